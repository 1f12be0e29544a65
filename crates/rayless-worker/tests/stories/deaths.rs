//! Who dies, who is told, what is left: nothing.

use crate::{
    Story,
    world::{Shape, World, all, ask, node_of, signal, texts, wait_gone},
};
use rayless_worker::driver::{CallError, Callbacks, GroupFailure, StartError};
use rustix::process::Signal;
use std::{
    io::{BufRead, BufReader},
    process::{Command, ExitCode, Stdio},
    sync::mpsc::channel,
    time::{Duration, Instant},
};

pub(crate) const STORIES: &[Story] = &[
    ("a worker killed on either host fails every call with one cause", worker_killed),
    ("a worker that exits is told with its code and its last line", worker_exits),
    ("a worker that exits at boot fails the start", boot_fails),
    ("a program that is not there fails the start", no_program),
    ("another version fails the start and names both sides", other_version),
    ("a start that is given up leaves nothing", given_up),
    ("a driver killed leaves nothing", driver_killed),
    ("a driver killed whose child holds its sockets leaves nothing", driver_killed_with_child),
    ("a keeper killed takes its workers along", keeper_killed),
    ("a host that falls silent is dead", silent_host),
    ("what workers started and left is killed", leftovers),
    ("a group dropped is a group stopped", dropped),
];

const SOON: Duration = Duration::from_secs(6);

fn worker_killed() {
    for rank in [1, 2] {
        let mut world = World::new(2, 2);
        let (told, failures) = channel();
        let callbacks = Callbacks {
            on_failure: Some(Box::new(move |failure| told.send(failure).unwrap())),
            ..Callbacks::default()
        };
        let group = world.start_with(world.launch(), callbacks).unwrap();
        let pids = group.pids();
        let pending = ask(&group, "sleep 10000", &[0, 3]);
        let start = Instant::now();
        signal(pids[rank].1, Signal::KILL);
        let error = pending.wait().unwrap_err();
        println!("         worker {rank} killed: told after {:?}", start.elapsed());
        let node = if rank == 1 { "a" } else { "b" };
        let cause = format!("rank {rank} on node {node} (pid {}) was killed by SIGKILL", pids[rank].1);
        let CallError::Failed(failure @ GroupFailure::WorkerDied { .. }) = &error else { panic!("{error:?}") };
        assert_eq!(failure.to_string(), cause);
        assert_eq!(failures.recv_timeout(SOON).as_ref(), Ok(failure));
        assert_eq!(group.failure().as_ref(), Some(failure));
        assert_eq!(group.wait_failed(None).as_ref(), Some(failure));
        assert_eq!(all(&group, "echo").unwrap_err(), error);
        for (_, pid) in pids {
            assert!(wait_gone(pid, SOON));
        }
        world.assert_nothing_left();
        group.stop();
        println!("         and all reaped after {:?}", start.elapsed());
    }
}

fn worker_exits() {
    for (rank, code) in [(0, 3), (3, 0)] {
        let mut world = World::new(2, 2);
        let group = world.start();
        let error = all(&group, &format!("on {rank} exit {code}")).unwrap_err();
        let CallError::Failed(GroupFailure::WorkerDied { rank: told, node, cause, tail }) = error else { panic!() };
        assert_eq!((told, node.as_str()), (rank, if rank < 2 { "a" } else { "b" }));
        let expected =
            if code == 0 { "exited with code 0" } else { "exited with code 3: ValueError: something is wrong" };
        assert!(cause.ends_with(expected), "{cause}");
        assert!(tail.contains("ValueError"), "{tail}");
        world.assert_nothing_left();
    }
}

fn boot_fails() {
    let mut world = World::new(1, 1);
    let mut launch = world.launch();
    launch.rank_env = vec![(1, vec![("TEST_FAIL_BOOT".into(), "1".into())])];
    let error = world.start_with(launch, Callbacks::default()).unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, StartError::Failed(GroupFailure::WorkerDied { rank: 1, .. })), "{error:?}");
    assert!(told.ends_with("exited with code 1: ImportError: no module named vllm"), "{told}");
    world.assert_nothing_left();
}

fn no_program() {
    let mut world = World::new(1, 1);
    let mut launch = world.launch();
    launch.program = "/nowhere/python3".into();
    let told = world.start_with(launch, Callbacks::default()).unwrap_err().to_string();
    assert!(told.contains("cannot start /nowhere/python3") && told.contains("hint:"), "{told}");
    world.assert_nothing_left();
}

fn other_version() {
    let mut world = World::new(1, 1);
    let mut launch = world.launch();
    launch.rank_env = vec![(1, vec![("TEST_VERSION".into(), "2.0".into())])];
    let told = world.start_with(launch, Callbacks::default()).unwrap_err().to_string();
    assert!(told.starts_with("vllm differs: the driver has 1.0, rank 1 on node b has 2.0"), "{told}");
    world.assert_nothing_left();
}

fn given_up() {
    let mut world = World::new(1, 1);
    let error = world.placed().launch(world.launch(), SOON, Callbacks::default(), &mut |_| false).unwrap_err();
    assert!(matches!(error, StartError::GivenUp));
    world.assert_nothing_left();
}

/// A driver in a process of its own: starts a group, says the pids, and waits to be killed.
pub(crate) fn driver_main() -> ExitCode {
    let world = World::new(2, 2);
    let group = world.start();
    let mut pids: Vec<String> = group.pids().iter().map(|(_, pid)| pid.to_string()).collect();
    pids.extend((0..2).map(|index| world.keeper_pid(index).to_string()));
    if std::env::args().any(|argument| argument == "fork") {
        // Stands for a forked child: it has every socket of the driver.
        for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
            let fd: i32 = entry.file_name().to_string_lossy().parse().unwrap();
            let link = std::fs::read_link(entry.path());
            if fd > 2 && link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:")) {
                rustix::io::fcntl_setfd(borrow(fd), rustix::io::FdFlags::empty()).unwrap();
            }
        }
        let child = Command::new("sleep").arg("30").spawn().unwrap();
        pids.push(format!("child:{}", child.id()));
    }
    println!("{} {}", world.dir.path().display(), pids.join(" "));
    let _pending = ask(&group, "sleep 100000", &[0, 1, 2, 3]);
    std::thread::sleep(Duration::from_secs(60));
    ExitCode::FAILURE
}

fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: found open in /proc a moment ago, by the only thread that closes any.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

fn kill_a_driver(arguments: &[&str]) {
    let exe = std::env::current_exe().unwrap();
    let mut driver = Command::new(exe).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(driver.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut words = line.split_whitespace();
    let dir = words.next().unwrap().to_owned();
    let start = Instant::now();
    driver.kill().unwrap();
    driver.wait().unwrap();
    let mut children = Vec::new();
    for word in words {
        match word.strip_prefix("child:") {
            Some(child) => children.push(child.parse().unwrap()),
            None => assert!(wait_gone(word.parse().unwrap(), SOON), "process {word} is left"),
        }
    }
    println!("         driver killed: all gone after {:?}", start.elapsed());
    for child in children {
        assert!(!wait_gone(child, Duration::ZERO));
        signal(child, Signal::KILL);
    }
    std::fs::remove_dir_all(dir).unwrap();
}

fn driver_killed() {
    kill_a_driver(&["driver"]);
}

fn driver_killed_with_child() {
    kill_a_driver(&["driver", "fork"]);
}

fn keeper_killed() {
    for index in [0, 1] {
        let world = World::new(2, 2);
        let group = world.start();
        let pids = group.pids();
        let pending = ask(&group, "sleep 10000", &[0, 3]);
        let other = world.keeper_pid(1 - index);
        signal(world.keeper_pid(index), Signal::KILL);
        let error = pending.wait().unwrap_err();
        let CallError::Failed(GroupFailure::NodeDied { node, name, cause }) = &error else { panic!("{error:?}") };
        assert_eq!((*node, name.as_str()), (node_of(&world, index), ["a", "b"][index]));
        assert!(cause.contains("keeper"), "{cause}");
        for (_, pid) in pids {
            assert!(wait_gone(pid, SOON));
        }
        group.stop();
        assert!(wait_gone(other, SOON));
    }
}

fn silent_host() {
    let shape = Shape { dead_after: Duration::from_millis(800), ..Shape::new(1, 1) };
    let world = World::of(&shape);
    let group = world.start();
    let pending = ask(&group, "sleep 10000", &[0]);
    let keeper = world.keeper_pid(1);
    let start = Instant::now();
    signal(keeper, Signal::STOP);
    let error = pending.wait().unwrap_err();
    println!("         silence of {:?} told after {:?}", shape.dead_after, start.elapsed());
    assert!(matches!(&error, CallError::Failed(GroupFailure::NodeDied { name, .. }) if name == "b"), "{error:?}");
    assert!(error.to_string().contains("silent for"), "{error}");
    // It wakes, and finds that its driver has gone.
    signal(keeper, Signal::CONT);
    group.stop();
    assert!(wait_gone(keeper, SOON));
    assert!(group.pids().iter().all(|(_, pid)| wait_gone(*pid, SOON)));
}

fn leftovers() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let mut pids = texts(&all(&group, "start").unwrap());
    pids.extend(texts(&all(&group, "daemon").unwrap()));
    let pids: Vec<u32> = pids.iter().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 4);
    assert!(pids.iter().all(|pid| !wait_gone(*pid, Duration::ZERO)));
    group.stop();
    assert!(pids.iter().all(|pid| wait_gone(*pid, Duration::ZERO)), "reaped when stop returns");
    world.assert_nothing_left();
}

fn dropped() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let pids = group.pids();
    // Stuck in a call, they do not see the end of the ring: they get a moment, then SIGKILL.
    let call = ask(&group, "sleep 100000", &[0, 1]);
    assert_eq!(call.wait_for(Duration::from_millis(100)), None);
    drop(group);
    assert_eq!(call.wait(), Err(CallError::Stopped));
    assert!(pids.iter().all(|(_, pid)| wait_gone(*pid, Duration::ZERO)));
    // In order on both hosts: no worker was taken for a dead one.
    assert_eq!(world.assert_nothing_left(), ["", ""]);
}
