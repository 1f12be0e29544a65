//! Real daemons on loopback: joining in any order, leaving, dying, coming back.
#![allow(clippy::unwrap_used, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{Cluster, Daemon, Host, PATIENCE, is_alive, kill, node, rayless};
use rayless_net::framing;
use rayless_proto::{
    codec,
    limits::{MAX_CLIENT_BACKLOG, MAX_LOCAL_CLIENTS, MAX_LOCAL_MESSAGE},
    resources::{CPU, Quantity, Resources, Strategy},
    v1::local::{ClientMessage, ClientReply, ClientRequest, DaemonMessage},
};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    fs,
    io::{Read as _, Write as _},
    net::UdpSocket,
    os::unix::{fs::MetadataExt as _, net::UnixStream},
    time::{Duration, Instant},
};

/// A port that is free now, for a head that is started later or again.
fn free_port() -> String {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// Starts a head at a given address.
fn head_at(host: &Host, port: &str, name: &str) -> Daemon {
    let token = host.token.to_str().unwrap();
    let args = ["head", "--name", name, "--bind", "127.0.0.1", "--port", port, "--token-file", token];
    let mut daemon = Daemon::of(&mut host.command(&args));
    daemon.join_address();
    daemon
}

#[test]
fn two_nodes_are_alive_and_every_field_of_the_status_is_there() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, address) = a.head(&["--name", "a", "--gpus", "2", "--resource", "nvme=1.5"]);
    let mut node_b = b.start(&["join", &address, "--name", "b", "--cpus", "3"]);
    node_b.says("b (127.0.0.1:");
    let status = b.await_nodes(&[("a", "alive"), ("b", "alive")]);
    let names = |value: &Value, wanted: &[&str]| {
        for name in wanted {
            assert!(value.get(name).is_some(), "no `{name}` in {value}");
        }
    };
    names(&status, &["cluster", "nodes", "groups", "placement_groups", "links", "events"]);
    names(&status["cluster"], &["id", "head", "protocol", "uptime_s"]);
    for found in status["nodes"].as_array().unwrap() {
        names(
            found,
            &[
                "id",
                "name",
                "address",
                "role",
                "state",
                "incarnation",
                "last_seen_ms",
                "rtt_us",
                "resources",
                "available",
                "gpus",
                "versions",
            ],
        );
        for gpu in found["gpus"].as_array().unwrap() {
            names(gpu, &["index", "uuid", "name", "memory_bytes", "state", "held_by"]);
        }
    }
    names(&status["events"][0], &["time", "kind", "cause"]);
    let [found_a, found_b] = ["a", "b"].map(|name| node(&status, name).unwrap());
    assert_eq!((&found_a["role"], &found_b["role"]), (&"head".into(), &"worker".into()));
    assert_eq!(status["cluster"]["head"], found_a["id"]);
    assert_eq!(found_a["resources"]["GPU"], 2);
    assert_eq!(found_a["resources"]["nvme"], 1.5);
    assert_eq!(found_a["gpus"].as_array().unwrap().len(), 2);
    assert_eq!(found_b["resources"]["CPU"], 3);
    assert_eq!(found_b["versions"]["rayless"], env!("CARGO_PKG_VERSION"));
    // Heartbeats measure the round trip once the second of them is there.
    b.await_status("a round trip", |status| node(status, "b").is_some_and(|b| b["rtt_us"].as_u64() > Some(0)));
}

#[test]
fn a_node_may_come_before_its_head() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let port = free_port();
    let mut node_b = b.start(&["join", &format!("127.0.0.1:{port}"), "--name", "b"]);
    let told = node_b.says("waiting for the head");
    assert!(told.contains(&format!("127.0.0.1:{port}")) && told.contains("600 s"), "{told}");
    // Local commands are answered meanwhile.
    let waiting = b.run(&["status"]);
    assert_eq!(waiting.code, 3, "{waiting:?}");
    assert!(waiting.stderr.contains(&port) && waiting.stderr.contains("\nhint: "), "{waiting:?}");
    let _head = head_at(&a, &port, "a");
    node_b.says("has joined the cluster");
    b.await_nodes(&[("a", "alive"), ("b", "alive")]);
}

#[test]
fn who_will_not_wait_is_told_at_once() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let head = format!("127.0.0.1:{}", free_port());
    let token = host.token.to_str().unwrap();
    for extra in [&["--wait", "0"][..], &["--wait", "0", "--daemon"], &["--wait", "0.5"]] {
        let mut args = vec!["join", &head, "--bind", "127.0.0.1", "--port", "0", "--token-file", token];
        args.extend(extra);
        let told = host.run(&args);
        assert_eq!((told.code, told.stdout.as_str()), (3, ""), "{told:?}");
        let error = &told.stderr[told.stderr.find("error: ").unwrap()..];
        assert!(error.starts_with(&format!("error: no head at {head}")) && error.contains("\nhint: "), "{told:?}");
    }
}

#[test]
fn a_wrong_token_is_refused_and_counted_and_the_head_serves_on() {
    let [cluster, other] = [Cluster::new(), Cluster::new()];
    let [a, b, stranger] = [Host::new(&cluster), Host::new(&cluster), Host::new(&other)];
    let (_head, address) = a.head(&["--name", "a"]);
    for mode in [&[][..], &["--daemon"]] {
        let token = stranger.token.to_str().unwrap();
        let mut args = vec!["join", &address, "--bind", "127.0.0.1", "--port", "0", "--token-file", token];
        args.extend(mode);
        let told = stranger.run(&args);
        assert_eq!((told.code, told.stdout.as_str()), (4, ""), "{told:?}");
        assert!(told.stderr.starts_with(&format!("error: {address} has another cluster token\nhint: ")), "{told:?}");
    }
    let status = a.await_status("both refusals", |status| status["cluster"]["refused_handshakes"] == 2);
    assert!(status["events"].as_array().unwrap().iter().any(|event| event["kind"] == "handshake-refused"), "{status}");
    let mut node_b = b.start(&["join", &address, "--name", "b"]);
    node_b.says("has joined");
}

#[test]
fn a_node_leaves_by_stop_and_by_signal() {
    let cluster = Cluster::new();
    let [a, b, c] = [Host::new(&cluster), Host::new(&cluster), Host::new(&cluster)];
    let (_head, address) = a.head(&["--name", "a"]);
    let mut node_b = b.start(&["join", &address, "--name", "b"]);
    let mut node_c = c.start(&["join", &address, "--name", "c"]);
    node_b.says("has joined");
    node_c.says("has joined");
    let stopped = b.run(&["stop"]);
    assert_eq!(stopped.code, 0, "{stopped:?}");
    assert_eq!(node_b.ends().0, 0);
    node_c.signal(Signal::TERM);
    assert_eq!(node_c.ends().0, 0);
    a.await_nodes(&[("b", "left"), ("c", "left")]);
    // The run dir is free again.
    let mut again = b.start(&["join", &address, "--name", "b"]);
    again.says("has joined");
    let status = a.await_nodes(&[("b", "alive")]);
    assert_eq!(node(&status, "b").unwrap()["incarnation"], 2);
}

#[test]
fn a_daemon_that_was_killed_comes_back_as_a_new_incarnation() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, address) = a.head(&["--name", "a", "--dead-after", "1"]);
    let mut first = b.start(&["join", &address, "--name", "b"]);
    first.says("has joined");
    let id = node(&a.await_nodes(&[("b", "alive")]), "b").unwrap()["id"].clone();
    first.crash();
    let status = a.await_nodes(&[("b", "dead")]);
    let told = status["events"].as_array().unwrap().iter().any(|e| e["kind"] == "node-dead");
    assert!(told, "{status}");
    let mut second = b.start(&["join", &address, "--name", "b"]);
    second.says("has joined");
    let status = a.await_nodes(&[("b", "alive")]);
    let found = node(&status, "b").unwrap();
    assert_eq!((&found["incarnation"], &found["id"]), (&2.into(), &id));
    assert_eq!(status["nodes"].as_array().unwrap().len(), 2, "{status}");
}

#[test]
fn nodes_rejoin_a_head_that_was_killed_with_its_state_and_without() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let port = free_port();
    let head = head_at(&a, &port, "a");
    let mut node_b = b.start(&["join", &format!("127.0.0.1:{port}"), "--name", "b"]);
    node_b.says("has joined");
    let cluster_id = a.await_nodes(&[("b", "alive")])["cluster"]["id"].clone();
    head.crash();
    node_b.says("lost the head");
    let refused = b.run(&["status"]);
    assert_eq!(refused.code, 3, "{refused:?}");

    let head = head_at(&a, &port, "a");
    node_b.says("back in the cluster");
    let status = b.await_nodes(&[("a", "alive"), ("b", "alive")]);
    assert_eq!(status["cluster"]["id"], cluster_id);
    assert_eq!(node(&status, "b").unwrap()["incarnation"], 1);
    head.crash();
    node_b.says("lost the head");

    // The state is a help, not needed.
    let _ = fs::remove_file(a.run_dir().join("head-state"));
    let _head = head_at(&a, &port, "a");
    node_b.says("back in the cluster");
    b.await_nodes(&[("a", "alive"), ("b", "alive")]);
}

#[test]
fn a_node_that_was_frozen_beyond_the_limit_is_dead_and_then_fenced() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (_head, address) = a.head(&["--name", "a", "--dead-after", "1"]);
    let mut node_b = b.start(&["join", &address, "--name", "b"]);
    node_b.says("has joined");
    node_b.signal(Signal::STOP);
    a.await_nodes(&[("b", "dead")]);
    node_b.signal(Signal::CONT);
    node_b.says("joining again as incarnation 2");
    let status = a.await_status("the second life", |status| {
        node(status, "b").is_some_and(|b| b["state"] == "alive" && b["incarnation"] == 2)
    });
    assert_eq!(status["nodes"].as_array().unwrap().len(), 2, "{status}");
}

#[test]
fn a_node_may_bear_the_silence_of_the_head_for_less_time_than_the_head_bears_its() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (head, address) = a.head(&["--name", "a", "--dead-after", "3600"]);
    let mut node_b = b.start(&["join", &address, "--name", "b", "--dead-after", "1"]);
    node_b.says("has joined");
    head.signal(Signal::STOP);
    // Were the head's hour in force here, this would never be said.
    node_b.says("lost the head");
    head.signal(Signal::CONT);
    a.await_nodes(&[("b", "alive")]);
}

#[test]
fn two_clusters_side_by_side_do_not_meet() {
    let clusters = [Cluster::new(), Cluster::new()];
    let hosts = clusters.each_ref().map(|cluster| [Host::new(cluster), Host::new(cluster)]);
    let heads = hosts.each_ref().map(|[a, _]| a.head(&["--name", "a"]));
    let mut nodes = [0, 1].map(|at| hosts[at][1].start(&["join", &heads[at].1, "--name", "b"]));
    for node in &mut nodes {
        node.says("has joined");
    }
    let ids = hosts.each_ref().map(|[_, b]| b.await_nodes(&[("a", "alive"), ("b", "alive")])["cluster"]["id"].clone());
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn daemons_return_once_ready_and_go_on() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let started = a.run(&["head", "--daemon", "--bind", "127.0.0.1", "--port", "0", "--name", "a"]);
    assert_eq!(started.code, 0, "{started:?}");
    assert_eq!(started.stderr.lines().count(), 1, "{started:?}");
    // The token was made there, for its owner only; stdout names its file.
    let words: Vec<&str> = started.stdout.split_whitespace().collect();
    let ["rayless", "join", address, "--token-file", "[DIR]/run/token"] = words[..] else { panic!("{started:?}") };
    let token = a.run_dir().join("token");
    assert_eq!(fs::metadata(&token).unwrap().mode() & 0o777, 0o600);
    let secret = fs::read_to_string(&token).unwrap();

    let joined = {
        let token = token.to_str().unwrap();
        let args = ["join", address, "--daemon", "--bind", "127.0.0.1", "--port", "0", "--name", "b"];
        b.run(&[&args[..], &["--token-file", token]].concat())
    };
    assert_eq!((joined.code, joined.stdout.as_str()), (0, ""), "{joined:?}");
    // No wait: it is alive when `join --daemon` returns.
    assert_eq!(node(&a.status(), "b").unwrap()["state"], "alive");

    for host in [&a, &b] {
        let pid = host.daemon_pid();
        for file in ["cmdline", "environ"] {
            let shown = fs::read(format!("/proc/{pid}/{file}")).unwrap();
            assert!(!String::from_utf8_lossy(&shown).contains(secret.trim()), "token in {file}");
        }
        // A session of its own, and nothing of the starter's pipes.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().to_owned();
        assert_eq!(session, pid.to_string());
        for fd in ["0", "1"] {
            assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap().to_str(), Some("/dev/null"));
        }
        assert_eq!(fs::metadata(host.run_dir().join("daemon.sock")).unwrap().mode() & 0o777, 0o600);
        let log = fs::read_to_string(host.run_dir().join("daemon.log")).unwrap();
        assert!(!log.contains(secret.trim()));
        assert_eq!(host.run(&["stop"]).code, 0);
        let end = Instant::now() + PATIENCE;
        while is_alive(pid) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn the_token_of_the_environment_does_not_stay_in_a_daemon() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let secret = fs::read_to_string(&host.token).unwrap();
    let mut command = host.command(&["head", "--daemon", "--bind", "127.0.0.1", "--port", "0"]);
    let started = command.env("RAYLESS_TOKEN", secret.trim()).output().unwrap();
    assert!(started.status.success());
    let (stdout, _) = common::text(&started);
    assert!(!stdout.contains(secret.trim()) && !stdout.contains("--token-file"), "{stdout}");
    let environment = fs::read(format!("/proc/{}/environ", host.daemon_pid())).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains(secret.trim()));
    assert!(!host.run_dir().join("token").exists());
    kill(host.daemon_pid());
}

#[test]
fn a_run_dir_with_a_very_long_path_works() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let long = host.run_dir().join("x".repeat(120));
    let long = long.to_str().unwrap();
    let token = host.token.to_str().unwrap();
    let args = ["head", "--bind", "127.0.0.1", "--port", "0", "--token-file", token, "--run-dir", long];
    let mut daemon = Daemon::of(&mut rayless(&args));
    daemon.join_address();
    let status = host.run(&["status", "--run-dir", long]);
    assert_eq!(status.code, 0, "{status:?}");
}

#[test]
fn workers_get_the_one_address_that_was_chosen() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let (_head, _) = host.head(&["--name", "a"]);
    let status = host.status();
    let address = status["nodes"][0]["address"].as_str().unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{status}");
    let env = status["nodes"][0]["env"].as_array().unwrap();
    let value = |name: &str| env.iter().find(|env| env["name"] == name).map(|env| env["value"].clone());
    assert_eq!(value("VLLM_HOST_IP"), Some("127.0.0.1".into()));
    assert_eq!(value("GLOO_SOCKET_IFNAME"), Some("lo".into()));
    assert_eq!(value("NCCL_SOCKET_IFNAME"), Some("=lo".into()));
    let shown = host.run(&["status", "--env"]);
    assert!(shown.stdout.contains("GLOO_SOCKET_IFNAME"), "{shown:?}");
    assert_eq!(host.run(&["status"]).code, 0);
}

#[test]
fn a_daemon_that_hangs_is_named() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let (head, _) = host.head(&["--name", "a"]);
    head.signal(Signal::STOP);
    let told = host.run(&["status"]);
    head.signal(Signal::CONT);
    assert_eq!((told.code, told.stdout.as_str()), (1, ""), "{told:?}");
    let wanted = format!("error: the daemon (pid {}) does not answer\nhint: ", head.pid());
    assert!(told.stderr.starts_with(&wanted), "{told:?}");
    assert_eq!(host.run(&["status"]).code, 0);
}

#[test]
fn a_full_disk_ends_no_daemon() {
    let cluster = Cluster::new();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let Some(disk) = common::SmallDisk::mount(&a.run_dir()) else {
        println!("skipped: this user may not mount");
        return;
    };
    let (mut head, address) = a.head(&["--name", "a"]);
    disk.fill();
    let mut node_b = b.start(&["join", &address, "--name", "b"]);
    node_b.says("has joined");
    a.await_nodes(&[("a", "alive"), ("b", "alive")]);
    assert_eq!(b.run(&["stop"]).code, 0);
    a.await_nodes(&[("b", "left")]);
    assert!(head.is_running());
    // Starting again needs room: it is refused with the cause, not half done.
    head.crash();
    let token = a.token.to_str().unwrap();
    let told = a.run(&["head", "--bind", "127.0.0.1", "--port", "0", "--token-file", token]);
    assert_eq!(told.code, 1, "{told:?}");
    assert!(told.stderr.contains("No space left on device") && told.stderr.contains("\nhint: "), "{told:?}");
}

#[test]
fn a_token_in_the_environment_of_a_foreground_daemon_is_not_left_there() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let token = fs::read_to_string(&host.token).unwrap();
    let mut command = host.command(&["head", "--name", "a", "--port", "0", "--bind", "127.0.0.1"]);
    let mut head = Daemon::of(command.env("RAYLESS_TOKEN", token.trim()));
    let address = head.join_address();
    assert_eq!(host.daemon_pid(), head.pid(), "it is the process that was started");
    for file in ["environ", "cmdline"] {
        let shown = fs::read(format!("/proc/{}/{file}", head.pid())).unwrap();
        assert!(!String::from_utf8_lossy(&shown).contains("rl1_"), "{file}");
    }
    let other = Host::new(&cluster);
    let mut node = other.start(&["join", &address, "--name", "b"]);
    node.says("has joined");
    assert!(head.is_running());
}

#[test]
fn a_copied_node_key_is_refused_on_the_second_host_and_the_first_goes_on() {
    let cluster = Cluster::new();
    let [a, b, copy] = std::array::from_fn(|_| Host::new(&cluster));
    let (_head, address) = a.head(&["--name", "a"]);
    let mut first = b.start(&["join", &address, "--name", "b"]);
    first.says("has joined");
    // Lives of the copy that look older, the same, and newer than that of the original.
    for lives in 0..3 {
        let _ = fs::remove_dir_all(copy.run_dir());
        fs::create_dir_all(copy.run_dir()).unwrap();
        fs::copy(b.run_dir().join("node.key"), copy.run_dir().join("node.key")).unwrap();
        fs::write(copy.run_dir().join("incarnation"), format!("{lives}\n")).unwrap();
        let token = copy.token.to_str().unwrap();
        let here = ["--token-file", token, "--port", "0", "--bind", "127.0.0.1", "--host-id", "another-host"];
        let told = copy.run(&[&["join", &address, "--name", "c"], &here[..]].concat());
        assert_eq!(told.code, 4, "{lives}: {told:?}");
        assert!(told.stderr.contains("error: node c has the key of node b, which lives on another host"), "{told:?}");
        assert!(told.stderr.contains("\nhint: a run dir, or the file node.key in it, was copied"), "{told:?}");
        let status = a.await_nodes(&[("a", "alive"), ("b", "alive")]);
        assert_eq!(status["nodes"].as_array().unwrap().len(), 2);
        assert_eq!(node(&status, "b").unwrap()["incarnation"], 1);
    }
    assert!(first.is_running());
}

#[test]
fn local_clients_beyond_the_limit_are_turned_away_and_there_is_room_again_when_they_leave() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let (head, _) = host.head(&["--name", "a"]);
    let socket = host.run_dir().join("daemon.sock");
    // They connect and say nothing.
    let mut held: Vec<_> = (0..MAX_LOCAL_CLIENTS).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let mut one_more = UnixStream::connect(&socket).unwrap();
    one_more.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(one_more.read(&mut [0]).unwrap(), 0, "it is turned away at once");
    let open = fs::read_dir(format!("/proc/{}/fd", head.pid())).unwrap().count();
    assert!(open < MAX_LOCAL_CLIENTS + 100, "{open} descriptors");
    held.clear();
    let until = Instant::now() + PATIENCE;
    while host.run(&["status"]).code != 0 {
        assert!(Instant::now() < until, "no room for a client although all have left");
    }
}

#[test]
fn one_client_has_so_many_requests_under_way_and_no_more() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let (_head, _) = host.head(&["--name", "a", "--cpus", "1"]);
    let mut client = UnixStream::connect(host.run_dir().join("daemon.sock")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    // All of them wait, for this cluster has no such node.
    let bundle = Resources::new().with(CPU, Quantity::whole(1000));
    for request in 0..=MAX_CLIENT_BACKLOG as u64 {
        let (name, strategy, wait_ms) = (format!("pg{request}"), Strategy::Pack, 60_000);
        let body = ClientRequest::CreatePlacementGroup { name, bundles: vec![bundle.clone()], strategy, wait_ms };
        let message = codec::encode(&ClientMessage { request, body });
        client.write_all(&framing::header_of(message.len(), MAX_LOCAL_MESSAGE).unwrap()).unwrap();
        client.write_all(&message).unwrap();
    }
    let refused = loop {
        let mut header = [0; framing::HEADER];
        client.read_exact(&mut header).unwrap();
        let mut frame = vec![0; framing::length_of(header, MAX_LOCAL_MESSAGE).unwrap()];
        client.read_exact(&mut frame).unwrap();
        let message = codec::decode::<DaemonMessage>(&frame).unwrap();
        if let DaemonMessage { request, body: ClientReply::Refused { refusal, .. } } = message {
            break (request, refusal.cause);
        }
    };
    assert_eq!(refused.0, MAX_CLIENT_BACKLOG as u64);
    assert!(refused.1.contains("requests of one client are under way"), "{refused:?}");
    drop(client);
    assert_eq!(host.run(&["status"]).code, 0);
}
