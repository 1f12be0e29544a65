//! Groups of real workers (this test program plays them), on clusters of real daemons and keepers.
#![allow(clippy::unwrap_used, clippy::exit, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{
    Cluster, Daemon, Host, PATIENCE,
    groups::{answers, launch, options, serve_as_worker, spread, start_with, two_nodes},
    is_alive, kill, node,
};
use rayless_proto::resources::{CPU, GPU, Quantity, Resources, Strategy};
use rayless_worker::driver::{Asked, Callbacks, GroupFailure, Progress, StartError, WorkerGroup};
use serde_json::Value;
use std::{
    fs,
    time::{Duration, Instant},
};

/// Not a test of its own: in a process that a keeper started, this is the worker.
#[test]
fn worker_process() {
    serve_as_worker();
}

fn group_of<'a>(status: &'a Value, group: &WorkerGroup) -> &'a Value {
    let id = group.id().to_string();
    status["groups"].as_array().unwrap().iter().find(|group| group["id"] == id).unwrap()
}

fn await_group(host: &Host, group: &WorkerGroup, state: &str) -> Value {
    let id = group.id().to_string();
    host.await_status(&format!("group {state}"), |status| {
        status["groups"].as_array().is_some_and(|all| all.iter().any(|g| g["id"] == id && g["state"] == state))
    })
}

fn gone(pids: impl IntoIterator<Item = u32>) {
    let end = Instant::now() + PATIENCE;
    for pid in pids {
        while is_alive(i32::try_from(pid).unwrap()) {
            assert!(Instant::now() < end, "process {pid} is left");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn keeper_pid(host: &Host) -> i32 {
    let entries = fs::read_dir(host.run_dir().join("keepers")).unwrap().flatten();
    let pids: Vec<_> = entries.map(|e| e.path()).filter(|path| path.extension().is_some_and(|e| e == "pid")).collect();
    assert_eq!(pids.len(), 1, "{pids:?}");
    fs::read_to_string(&pids[0]).unwrap().trim().parse().unwrap()
}

#[test]
fn a_group_on_two_nodes_answers_and_leaves_nothing() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, _node, _) = two_nodes(&a, &b, &[]);
    let group = spread(&b, 2);
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    // Rank 0 is on the driver's node, and each rank has its node's address.
    assert_eq!(group.ranks()[0].node_name, "b");
    assert_eq!(answers(&group, "env RAYLESS_NODE_NAME"), ["b", "a"]);
    assert_eq!(answers(&group, "env VLLM_HOST_IP"), ["127.0.0.1", "127.0.0.1"]);
    assert_eq!(answers(&group, "env GLOO_SOCKET_IFNAME"), ["lo", "lo"]);
    assert_eq!(answers(&group, "env RAYLESS_TOKEN"), ["", ""]);
    let status = await_group(&a, &group, "running");
    let workers = group_of(&status, &group)["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    for (worker, (rank, pid)) in workers.iter().zip(group.pids()) {
        assert_eq!((worker["rank"].as_u64(), worker["pid"].as_u64()), (Some(rank.into()), Some(pid.into())));
    }
    let log = b.run(&["logs", "--rank", "0"]);
    assert!(log.stdout.lines().all(|line| line.starts_with("rank 0 | ")), "{log:?}");
    assert!(log.stdout.contains("rank 0 is here"), "{log:?}");
    let keepers = [keeper_pid(&a), keeper_pid(&b)].map(|pid| u32::try_from(pid).unwrap());
    group.stop();
    gone(group.pids().into_iter().map(|(_, pid)| pid).chain(keepers));
    let status = await_group(&a, &group, "stopped");
    for name in ["a", "b"] {
        let found = node(&status, name).unwrap();
        assert_eq!(found["resources"], found["available"], "{status}");
    }
    for host in [&a, &b] {
        assert_eq!(fs::read_dir(host.run_dir().join("keepers")).unwrap().count(), 0);
    }
}

#[test]
fn a_group_survives_its_daemon_and_is_adopted_by_the_next_one() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, node_b, address) = two_nodes(&a, &b, &["--dead-after", "1"]);
    let group = spread(&a, 2);
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    let keeper = keeper_pid(&b);
    node_b.crash();
    a.await_nodes(&[("b", "dead")]);
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    let mut node_b = b.start(&["join", &address, "--name", "b"]);
    node_b.says("has joined");
    let status = a.await_status("the second life", |status| {
        node(status, "b").is_some_and(|b| b["incarnation"] == 2 && b["state"] == "alive")
    });
    assert_eq!(group_of(&status, &group)["state"], "running", "{status}");
    assert_eq!(node(&status, "b").unwrap()["available"]["CPU"], node_cpus(&status, "b") - 1);
    assert_eq!((keeper_pid(&b), is_alive(keeper)), (keeper, true));
    assert_eq!(answers(&group, "still here"), ["still here", "still here"]);
    // Adopted means under control: a stop from anywhere ends it.
    assert_eq!(a.run(&["stop", "--group", "story"]).code, 0);
    assert!(matches!(group.wait_failed(Some(PATIENCE)), Some(GroupFailure::Ended { .. })));
    gone(group.pids().into_iter().map(|(_, pid)| pid).chain([u32::try_from(keeper).unwrap()]));
}

fn node_cpus(status: &Value, name: &str) -> u64 {
    node(status, name).unwrap()["resources"]["CPU"].as_u64().unwrap()
}

#[test]
fn a_group_survives_its_head_and_is_adopted_by_the_next_one() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (head, mut node_b, address) = two_nodes(&a, &b, &[]);
    let group = spread(&b, 2);
    head.crash();
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    let _ = fs::remove_file(a.run_dir().join("head-state"));
    let port = address.rsplit_once(':').unwrap().1;
    let token = a.token.to_str().unwrap();
    let args = ["head", "--name", "a", "--bind", "127.0.0.1", "--port", port, "--token-file", token];
    let mut head = Daemon::of(&mut a.command(&args));
    head.join_address();
    node_b.says("back in the cluster");
    let status = await_group(&a, &group, "running");
    assert_eq!(group_of(&status, &group)["workers"].as_array().unwrap().len(), 2);
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    group.stop();
    await_group(&a, &group, "stopped");
}

#[test]
fn a_dead_worker_is_news_with_its_rank_and_the_group_is_over_everywhere() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, _node, _) = two_nodes(&a, &b, &[]);
    let group = spread(&a, 2);
    let call = group.call("die 1".as_bytes(), &Asked::All, Some(PATIENCE)).unwrap();
    assert!(call.wait().is_err());
    match group.wait_failed(Some(PATIENCE)) {
        Some(GroupFailure::WorkerDied { rank: 1, node, cause, .. }) => {
            assert_eq!(node, "b");
            assert!(cause.contains("rank 1"), "{cause}");
        }
        other => panic!("{other:?}"),
    }
    gone(group.pids().into_iter().map(|(_, pid)| pid));
    let status = await_group(&a, &group, "failed");
    let cause = group_of(&status, &group)["cause"].as_str().unwrap().to_owned();
    assert!(cause.contains("rank 1"), "{status}");
}

#[test]
fn a_node_that_is_stopped_ends_its_groups_with_a_cause() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, node_b, _) = two_nodes(&a, &b, &[]);
    let group = spread(&a, 2);
    assert_eq!(b.run(&["stop"]).code, 0);
    assert_eq!(node_b.ends().0, 0);
    let failure = group.wait_failed(Some(PATIENCE)).unwrap();
    assert!(failure.to_string().contains('b'), "{failure}");
    gone(group.pids().into_iter().map(|(_, pid)| pid));
    await_group(&a, &group, "failed");
}

#[test]
fn a_keeper_that_was_killed_takes_its_workers_with_it() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, _node, _) = two_nodes(&a, &b, &[]);
    let group = spread(&a, 2);
    let left: u32 = answers(&group, "leave 1")[1].parse().unwrap();
    kill(keeper_pid(&b));
    assert!(group.wait_failed(Some(PATIENCE)).is_some());
    gone(group.pids().into_iter().map(|(_, pid)| pid).chain([left]));
    let status = await_group(&a, &group, "failed");
    assert_eq!(node(&status, "b").unwrap()["state"], "alive");
}

#[test]
fn what_a_keeper_left_that_was_killed_without_a_daemon_is_ended_by_the_next_one() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, node_b, address) = two_nodes(&a, &b, &[]);
    let group = spread(&a, 2);
    let left: u32 = answers(&group, "leave 1")[1].parse().unwrap();
    node_b.crash();
    kill(keeper_pid(&b));
    assert!(group.wait_failed(Some(PATIENCE)).is_some());
    assert!(is_alive(i32::try_from(left).unwrap()));
    let mut node_b = b.start(&["join", &address, "--name", "b"]);
    node_b.says("has joined");
    gone([left]);
}

#[test]
fn a_stopped_keeper_is_told_from_a_late_one() {
    let cluster = Cluster::new();
    for far in [false, true] {
        let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
        let (_head, _node, _) = two_nodes(&a, &b, &["--dead-after", "1"]);
        let group = spread(&a, 2);
        let keeper = keeper_pid(if far { &b } else { &a });
        let process = rustix::process::Pid::from_raw(keeper).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
        let failure = group.wait_failed(Some(PATIENCE)).unwrap();
        assert!(matches!(failure, GroupFailure::NodeDied { .. }), "{failure:?}");
        assert!(failure.to_string().contains(", its keeper is stopped (SIGSTOP)"), "{failure}");
        if far {
            let status = a.status();
            let seen = |event: &Value| event["kind"] == "keeper-stopped";
            assert!(status["events"].as_array().unwrap().iter().any(seen), "{status}");
        }
        rustix::process::kill_process(process, rustix::process::Signal::CONT).unwrap();
        gone(group.pids().into_iter().map(|(_, pid)| pid));
    }
}

#[test]
fn who_holds_the_gpus_is_shown_to_who_lacks_them() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let (_head, _) = host.head(&["--name", "a", "--gpus", "2"]);
    let bundle = Resources::new().with(GPU, Quantity::ONE);
    let group = start_with(options(&host, vec![bundle.clone(); 2], Strategy::Pack, PATIENCE));
    assert_eq!(answers(&group, "env RAYLESS_GPU_IDS"), ["0", "1"]);
    let held = host.status();
    let gpus = node(&held, "a").unwrap()["gpus"].clone();
    assert!(
        gpus.as_array()
            .unwrap()
            .iter()
            .all(|gpu| gpu["state"] == "held" && gpu["held_by"][0] == group.id().to_string())
    );
    assert!(host.run(&["status"]).stdout.contains("story"));
    // At once, with the table.
    let refused =
        WorkerGroup::place(options(&host, vec![bundle.clone()], Strategy::Pack, Duration::ZERO), &mut |_| true);
    match refused.map(drop).unwrap_err() {
        StartError::Client(error) => {
            let told = format!("{error:?}");
            assert!(told.contains("story") && told.contains("Resources"), "{told}");
        }
        other => panic!("{other:?}"),
    }
    // Or later, when they are given back.
    let mut tables = 0;
    let mut waiting = Some(group);
    let placed = WorkerGroup::place(options(&host, vec![bundle], Strategy::Pack, PATIENCE), &mut |news| {
        if let Some(Progress::Waiting(table)) = news {
            tables += 1;
            assert!(table.to_string().contains("GPU 0: story"), "{table}");
            if let Some(group) = waiting.take() {
                group.stop();
            }
        }
        true
    });
    assert!(placed.is_ok(), "{placed:?}");
    assert!(tables >= 1);
}

#[test]
fn a_launch_waits_for_a_head() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut node_b = b.start(&["join", &format!("127.0.0.1:{port}"), "--name", "b"]);
    node_b.says("waiting for the head");
    let bundle = Resources::new().with(CPU, Quantity::ONE);
    let mut head = None;
    let placed = WorkerGroup::place(options(&b, vec![bundle], Strategy::Pack, PATIENCE), &mut |news| {
        if let Some(Progress::WaitingForHead(line)) = news
            && head.is_none()
        {
            assert!(line.contains(&port), "{line}");
            let token = a.token.to_str().unwrap();
            let args = ["head", "--name", "a", "--bind", "127.0.0.1", "--port", &port, "--token-file", token];
            let mut daemon = Daemon::of(&mut a.command(&args));
            daemon.join_address();
            head = Some(daemon);
        }
        true
    })
    .unwrap();
    let group = placed.launch(launch(), PATIENCE, Callbacks::default(), &mut |_| true).unwrap();
    assert_eq!(answers(&group, "rank"), ["0"]);
    assert_eq!(group.ranks()[0].node_name, "b");
}
