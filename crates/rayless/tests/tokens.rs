//! `rayless token rotate` on real daemons, under a real group.
#![allow(clippy::unwrap_used, clippy::exit, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{
    Cluster, Daemon, Host, PATIENCE,
    groups::{answers, serve_as_worker, spread, two_nodes},
    node,
};
use rayless_net::{
    identity::{ClusterIdentity, NodeKey},
    tcp::{self, TcpError},
};
use rayless_proto::{hello::Purpose, ids::GroupId};
use serde_json::Value;
use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt as _, time::Instant};

/// Not a test of its own: in a process that a keeper started, this is the worker.
#[test]
fn worker_process() {
    serve_as_worker();
}

/// Joins in the foreground, with the token that the file of its cluster holds.
fn join(host: &Host, address: &str, name: &str) -> Daemon {
    host.start(&["join", address, "--name", name])
}

/// Joins, and is refused.
fn refused(host: &Host, address: &str) {
    let token = host.token.to_str().unwrap();
    let told = host.run(&["join", address, "--token-file", token, "--port", "0", "--bind", "127.0.0.1"]);
    assert_eq!(told.code, 4, "{told:?}");
    assert!(told.stderr.starts_with(&format!("error: {address} has another cluster token\nhint: ")), "{told:?}");
    assert!(told.stderr.contains("it may have been rotated"), "{told:?}");
}

/// Whether the keeper of `group` on this node shakes hands with who knows only this token. (It then sends them away: they are not the driver.)
fn keeper_knows(status: &Value, name: &str, group: GroupId, token: &str) -> bool {
    let address: SocketAddr = node(status, name).unwrap()["address"].as_str().unwrap().parse().unwrap();
    let identity = ClusterIdentity::from_token(&token.trim().parse().unwrap(), &NodeKey::generate().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let name = tcp::keeper_name(group);
    let call = tcp::connect(address, &name, identity.tls(), Purpose::Step, None);
    match runtime.block_on(call) {
        Err(TcpError::WrongToken(_)) => false,
        Err(TcpError::Io { .. }) => true,
        other => panic!("{other:?}"),
    }
}

fn refused_so_far(status: &Value) -> u64 {
    status["cluster"]["refused_handshakes"].as_u64().unwrap()
}

fn spread_to(status: &Value, names: &[&str]) -> bool {
    status["cluster"]["token"]["rotating"] == true
        && names.iter().all(|name| node(status, name).is_some_and(|node| node["has_token"] == true))
}

#[test]
fn a_token_is_rotated_under_a_running_group_and_restarts() {
    let cluster = Cluster::new();
    let [a, b, c] = std::array::from_fn(|_| Host::new(&cluster));
    let (head, node_b, address) = two_nodes(&a, &b, &[]);
    let group = spread(&b, 2);
    let old = fs::read_to_string(&a.token).unwrap();

    let told = a.run(&["token", "rotate"]);
    assert_eq!(told.code, 0, "{told:?}");
    // stdout is no terminal: the path, never the token.
    let file = a.run_dir().join("token");
    assert_eq!(told.stdout, "[DIR]/run/token\n");
    assert_eq!(
        told.stderr,
        "2 of 2 nodes have taken the new token\nthe present one is accepted as well until `rayless token rotate --finish`\n"
    );
    let new = fs::read_to_string(&file).unwrap();
    assert_ne!(old, new);
    for host in [&a, &b] {
        for name in ["token", "tokens"] {
            let path = host.run_dir().join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
            assert!(fs::read_to_string(path).unwrap().contains(new.trim()));
        }
    }
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    let shown = a.run(&["status"]);
    assert!(shown.stdout.contains("token is being rotated"), "{shown:?}");
    let twice = a.run(&["token", "rotate"]);
    assert_eq!((twice.code, twice.stderr.lines().next()), (2, Some("error: a rotation of the token is under way")));
    let elsewhere = b.run(&["token", "rotate"]);
    assert_eq!(elsewhere.code, 2, "{elsewhere:?}");
    assert!(elsewhere.stderr.contains("is not the head of its cluster\nhint: run it on the host of the head"));

    // Who has only the old one may come in, and gets the new one.
    let mut node_c = join(&c, &address, "c");
    node_c.says("has joined");
    a.await_status("c with the new token", |status| spread_to(status, &["a", "b", "c"]));

    // Both are started again with the old one, as whoever wrote their start-up files knows it.
    let port = address.rsplit_once(':').unwrap().1.to_owned();
    head.crash();
    let token = a.token.to_str().unwrap();
    let mut again = a.command(&["head", "--name", "a", "--token-file", token, "--port", &port, "--bind", "127.0.0.1"]);
    let mut head = Daemon::of(&mut again);
    head.says("was rotated away; the present one, in ");
    node_b.crash();
    let mut node_b = join(&b, &address, "b");
    node_b.says("was rotated away");
    node_b.says("has joined");
    a.await_nodes(&[("a", "alive"), ("b", "alive"), ("c", "alive")]);
    a.await_status("all with the new token", |status| spread_to(status, &["a", "b", "c"]));
    assert_eq!(answers(&group, "rank"), ["0", "1"]);

    // Keepers take the new one too, and they outlive the daemons.
    let status = a.status();
    for known in [&old, &new] {
        assert!(keeper_knows(&status, "a", group.id(), known));
    }
    let told = a.run(&["token", "rotate", "--finish"]);
    assert_eq!(told.code, 0, "{told:?}");
    assert!(keeper_knows(&status, "a", group.id(), &new));
    // It hears of that from its daemon, a moment after the operator does.
    let end = Instant::now() + PATIENCE;
    while keeper_knows(&status, "a", group.id(), &old) {
        assert!(Instant::now() < end, "the keeper still shakes hands by the old token");
    }
    let before = refused_so_far(&a.status());
    let stranger = Host::new(&cluster);
    refused(&stranger, &address);
    a.await_status("a refusal", |status| refused_so_far(status) > before);
    assert_eq!(a.status()["cluster"]["token"]["rotating"], false);
    for host in [&a, &b, &c] {
        assert!(!fs::read_to_string(host.run_dir().join("tokens")).unwrap().contains(old.trim()));
    }

    // What ran goes on, what starts now starts; and again after a restart.
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    let second = spread(&a, 3);
    assert_eq!(answers(&second, "rank"), ["0", "1", "2"]);
    drop(second);
    drop(node_c);
    let mut node_c = join(&c, &address, "c");
    node_c.says("has joined");
    a.await_nodes(&[("a", "alive"), ("b", "alive"), ("c", "alive")]);
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
}

#[test]
fn an_overlap_of_a_stated_time_ends_by_itself_and_who_was_away_is_told() {
    let cluster = Cluster::new();
    let [a, b] = std::array::from_fn(|_| Host::new(&cluster));
    let (_head, node_b, address) = two_nodes(&a, &b, &[]);
    node_b.crash();
    let told = a.run(&["token", "rotate", "--overlap", "0.5"]);
    assert_eq!(told.code, 2, "{told:?}");
    let told = a.run(&["token", "rotate", "--overlap", "1"]);
    assert_eq!(told.code, 0, "{told:?}");
    a.await_status("the end of the overlap", |status| status["cluster"]["token"]["rotating"] == false);
    refused(&b, &address);
    let told = a.run(&["token", "rotate", "--finish"]);
    assert_eq!((told.code, told.stderr.lines().next()), (2, Some("error: no rotation of the token is under way")));
    // With the new one it is a member again, in the same run dir.
    let newer = a.run_dir().join("token");
    let mut command =
        b.command(&["join", &address, "--name", "b", "--port", "0", "--bind", "127.0.0.1", "--token-file"]);
    let mut node_b = Daemon::of(command.arg(newer));
    node_b.says("has joined");
}
