//! Groups of real workers (this test program plays them), on clusters of real daemons and keepers.
#![allow(clippy::unwrap_used, clippy::exit, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{Cluster, Daemon, Host, PATIENCE, is_alive, kill, node};
use rayless_proto::{
    resources::{CPU, GPU, Quantity, Resources, Strategy},
    v1::step::Launch,
};
use rayless_worker::{
    driver::{Asked, Callbacks, GroupFailure, GroupOptions, Progress, StartError, WorkerGroup},
    host::{Next, Worker},
};
use serde_json::Value;
use std::{
    env, fs,
    time::{Duration, Instant},
};

/// Not a test of its own: in a process that a keeper started, this is the worker. Its calls are words.
#[test]
fn worker_process() {
    if env::var_os("RAYLESS_WORKER_FDS").is_none() {
        return;
    }
    let worker = Worker::from_env().unwrap();
    println!("rank {} is here", worker.rank());
    worker.ready(&[("rayless".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]).unwrap();
    loop {
        let call = match worker.next_call(None).unwrap() {
            Next::Call(call) => call,
            Next::Nothing => continue,
            Next::Closed => std::process::exit(0),
        };
        let text = String::from_utf8(call.payload).unwrap();
        let answer = match text.split_once(' ').unwrap_or((&text, "")) {
            ("env", name) => env::var(name).unwrap_or_default(),
            ("die", rank) if rank == worker.rank().to_string() => std::process::exit(3),
            ("rank", _) => worker.rank().to_string(),
            _ => text.clone(),
        };
        worker.reply(call.id, false, answer.as_bytes()).unwrap();
    }
}

fn launch() -> Launch {
    let program = env::current_exe().unwrap().to_str().unwrap().to_owned();
    Launch {
        program,
        arguments: ["worker_process", "--exact", "--nocapture", "--test-threads=1"].map(str::to_owned).to_vec(),
        directory: "/".to_owned(),
        env: vec![("PATH".to_owned(), env::var("PATH").unwrap_or_default())],
        rank_env: Vec::new(),
        boot: Vec::new(),
        links: None,
    }
}

fn options(host: &Host, bundles: Vec<Resources>, strategy: Strategy, wait: Duration) -> GroupOptions {
    GroupOptions {
        run_dir: host.run_dir(),
        name: "story".to_owned(),
        bundles,
        strategy,
        placement_group: None,
        wait,
        versions: vec![("rayless".to_owned(), env!("CARGO_PKG_VERSION").to_owned())],
    }
}

fn start_with(options: GroupOptions) -> WorkerGroup {
    let placed = WorkerGroup::place(options, &mut |_| true).unwrap();
    placed.launch(launch(), PATIENCE, Callbacks::default(), &mut |_| true).unwrap()
}

/// A group with a rank on each of `count` nodes.
fn spread(host: &Host, count: usize) -> WorkerGroup {
    let bundle = Resources::new().with(CPU, Quantity::ONE);
    start_with(options(host, vec![bundle; count], Strategy::StrictSpread, PATIENCE))
}

/// What every rank answers.
fn answers(group: &WorkerGroup, text: &str) -> Vec<String> {
    let replies = group.call(text.as_bytes(), &Asked::All, Some(PATIENCE)).unwrap().wait().unwrap();
    replies.iter().map(|reply| String::from_utf8(reply.payload.to_vec()).unwrap()).collect()
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

/// A head `a` and a node `b` that has joined it.
fn two_nodes(a: &Host, b: &Host, more: &[&str]) -> (Daemon, Daemon, String) {
    let (head, address) = a.head(&[&["--name", "a"], more].concat());
    let mut node_b = b.start(&[&["join", &address, "--name", "b"], more.get(2..).unwrap_or_default()].concat());
    node_b.says("has joined");
    (head, node_b, address)
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
    kill(keeper_pid(&b));
    assert!(group.wait_failed(Some(PATIENCE)).is_some());
    gone(group.pids().into_iter().map(|(_, pid)| pid));
    let status = await_group(&a, &group, "failed");
    assert_eq!(node(&status, "b").unwrap()["state"], "alive");
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
