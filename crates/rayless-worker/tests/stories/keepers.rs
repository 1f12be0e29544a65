//! Keepers and their daemons, drivers at the door, logs.

use crate::{
    Story,
    world::{Shape, World, all, ask, texts, wait_gone},
};
use rayless_proto::v1::{control::WorkerState, keeper::FromKeeper};
use rayless_worker::{
    driver::{CallError, Callbacks, GroupFailure, StartError},
    keeper,
};
use std::{sync::mpsc::channel, time::Duration};

pub(crate) const STORIES: &[Story] = &[
    ("a second driver is refused and the first does not notice", second_driver),
    ("a daemon that comes back finds what the keeper holds", daemon_returns),
    ("a group stopped through its daemon is over for its driver too", stopped_by_daemon),
    ("a keeper that no driver comes to ends", nobody_comes),
    ("lines of output reach the log file and the driver", logs),
    ("a driver that prints slowly loses lines, not time", slow_printer),
];

fn second_driver() {
    let world = World::new(1, 1);
    let group = world.start();
    let error = world.start_with(world.launch(), Callbacks::default()).unwrap_err();
    assert!(matches!(error, StartError::Failed(GroupFailure::Ended { .. })), "{error:?}");
    assert!(error.to_string().contains("has a driver already"), "{error}");
    assert_eq!(texts(&all(&group, "echo still").unwrap()), ["still", "still"]);
}

fn daemon_returns() {
    let mut world = World::new(2, 1);
    let group = world.start();
    all(&group, "echo").unwrap();
    let socket = world.socket_of(0);
    // The old daemon goes, a new one comes: no call notices.
    world.handles.remove(0);
    all(&group, "echo").unwrap();
    let handle = world.runtime.block_on(keeper::adopt(&socket)).unwrap();
    let held = handle.held().clone();
    assert_eq!(held.group, group.id());
    assert_eq!(held.ranks.iter().map(|r| r.rank).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(held.pids, group.pids().iter().take(2).map(|(_, pid)| *pid).collect::<Vec<_>>());
    assert!(held.states.iter().all(|state| *state != WorkerState::Starting && *state != WorkerState::Dead));
    world.handles.insert(0, handle);
    // It sees what the workers do.
    let call = ask(&group, "sleep 1500", &[0]);
    let busy = world.runtime.block_on(async {
        loop {
            match world.handles[0].next().await {
                Some(FromKeeper::WorkerChanged { rank: 0, state: WorkerState::Busy, pid }) => return pid,
                Some(_) => {}
                None => panic!("the keeper ended"),
            }
        }
    });
    assert_eq!(busy, held.pids[0]);
    call.wait().unwrap();
    assert!(world.runtime.block_on(keeper::adopt(&world.dir.path().join("nothing.sock"))).is_err());
}

fn stopped_by_daemon() {
    for cause in ["", "the node was told to leave"] {
        let mut world = World::new(1, 1);
        let group = world.start();
        let pending = ask(&group, "sleep 10000", &[0, 1]);
        world.handles[1].stop(cause);
        let error = pending.wait().unwrap_err();
        let CallError::Failed(GroupFailure::Ended { cause: told }) = &error else { panic!("{error:?}") };
        assert!(told.contains(if cause.is_empty() { "was stopped" } else { cause }), "{told}");
        world.assert_nothing_left();
    }
}

fn nobody_comes() {
    let mut world = World::of(&Shape { driver_wait: Duration::from_millis(200), ..Shape::new(1, 0) });
    let pid = world.keeper_pid(0);
    let last = world.runtime.block_on(async {
        let mut last = None;
        while let Some(message) = world.handles[0].next().await {
            last = Some(message);
        }
        last
    });
    assert_eq!(last, Some(FromKeeper::Ended { cause: "no driver came to start it".into() }));
    assert!(wait_gone(pid, Duration::from_secs(6)));
    world.assert_nothing_left();
}

fn logs() {
    let world = World::new(1, 1);
    let (told, lines) = channel();
    let callbacks = Callbacks { on_log: Some(Box::new(move |line| drop(told.send(line)))), ..Callbacks::default() };
    let mut launch = world.launch();
    launch.directory = "/nowhere/at/all".into();
    let group = world.start_with(launch, callbacks).unwrap();
    all(&group, "say 3").unwrap();
    let mut seen = Vec::new();
    while seen.iter().filter(|line: &&String| line.contains("err of")).count() < 2 || seen.len() < 10 {
        let line = lines.recv_timeout(Duration::from_secs(5)).unwrap();
        seen.push(format!("{} {} {}", line.rank, line.stderr, line.text));
    }
    for rank in [0, 1] {
        let expected = [format!("{rank} false out 2 of {rank}"), format!("{rank} true err of {rank}")];
        assert!(expected.iter().all(|line| seen.contains(line)), "{seen:?}");
        assert!(seen.iter().any(|line| line.starts_with(&format!("{rank} true rayless: /nowhere/at/all is not here"))));
        let file = std::fs::read_to_string(world.log_of(rank as usize, rank)).unwrap();
        assert!(file.contains(&format!("out 0 of {rank}\n")) && file.contains(&format!("err of {rank}\n")));
    }
}

fn slow_printer() {
    let world = World::new(1, 1);
    let (go, gate) = channel::<()>();
    let (told, seen) = channel();
    let callbacks = Callbacks {
        on_log: Some(Box::new(move |line| {
            let _ = gate.recv();
            let _ = told.send(line.text);
        })),
        ..Callbacks::default()
    };
    let group = world.start_with(world.launch(), callbacks).unwrap();
    // Nobody prints a line before all of them are said, and every call goes through.
    for _ in 0..5 {
        all(&group, "say 20000").unwrap();
    }
    drop(go);
    let drain = || std::iter::from_fn(|| seen.recv_timeout(Duration::from_millis(500)).ok()).collect::<Vec<_>>();
    let lines = drain();
    assert!(!lines.is_empty() && lines.len() < 200_000, "{} lines", lines.len());
    // The next line that there is room for is preceded by the number of those lost.
    all(&group, "say 1").unwrap();
    assert!(lines.iter().chain(&drain()).any(|line| line.contains("lines not shown here")));
    let file = std::fs::read_to_string(world.log_of(0, 0)).unwrap();
    assert_eq!(file.lines().filter(|line| line.starts_with("out ")).count(), 100_001);
}
