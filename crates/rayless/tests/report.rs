//! `rayless report`, unpacked as the one who gets it would.
#![allow(clippy::unwrap_used, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{
    Cluster, Host, PATIENCE,
    groups::{answers, serve_as_worker, spread, two_nodes},
    kill,
};
use rayless_worker::driver::Asked;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Not a test of its own: in a process that a keeper started, this is the worker.
#[test]
fn worker_process() {
    serve_as_worker();
}

/// Makes a report in `dir` and unpacks it: name without its folder to content, and what was said on stderr.
fn report(host: &Host, dir: &Path, name: &str) -> (BTreeMap<String, String>, String) {
    report_of(host, dir, name, &[])
}

fn report_of(host: &Host, dir: &Path, name: &str, more: &[&str]) -> (BTreeMap<String, String>, String) {
    let path = dir.join(name);
    let shown = host.run(&[&["report", "--output", path.to_str().unwrap()], more].concat());
    assert_eq!((shown.code, shown.stdout.trim()), (0, path.to_str().unwrap()), "{}", shown.stderr);
    assert!(fs::metadata(&path).unwrap().len() < 32 << 20);
    let into = dir.join(format!("{name}.d"));
    fs::create_dir(&into).unwrap();
    let unpacked = Command::new("tar").arg("-xzf").arg(&path).arg("-C").arg(&into).status().unwrap();
    assert!(unpacked.success());
    let mut files = BTreeMap::new();
    let mut left = vec![into.clone()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
                continue;
            }
            let name: PathBuf = path.strip_prefix(&into).unwrap().components().skip(1).collect();
            files.insert(name.to_string_lossy().into_owned(), fs::read_to_string(&path).unwrap());
        }
    }
    (files, shown.stderr)
}

#[test]
fn a_report_has_what_is_needed_and_no_secret() {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
    let (head, node_b, _) = two_nodes(&a, &b, &[]);
    let token = fs::read_to_string(&a.token).unwrap().trim().to_owned();
    let group = spread(&a, 2);
    // Programs that print the cluster's token and another's.
    assert_eq!(answers(&group, &format!("say {token} HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz"))[0], "");
    let _running = group.call(&b"sleep"[..], &Asked::All, Some(PATIENCE)).unwrap();
    let id = group.id().to_string();

    let (files, said) = report(&a, dir.path(), "whole.tar.gz");
    let stacks = &files[&format!("stacks-{id}.txt")];
    assert!(stacks.contains("=== rank 0 (pid ") && stacks.contains("kernel: thread "), "{stacks}");
    assert!(!stacks.contains("=== rank 1"), "rank 1 is elsewhere");
    assert_eq!(said, "", "nothing is missing");
    assert!(files["README.txt"].contains("nothing is missing"));
    let b_node = a.status()["nodes"].as_array().unwrap().iter().find(|node| node["name"] == "b").unwrap().clone();
    let of_b = format!("nodes/b-{}", &b_node["id"].as_str().unwrap()[..8]);
    let stacks = &files[&format!("{of_b}/stacks-{id}.txt")];
    assert!(stacks.contains("=== rank 1 (pid ") && stacks.contains("kernel: thread "), "{stacks}");
    assert!(files[&format!("{of_b}/processes.txt")].contains("rank 1 of "));
    assert!(files[&format!("{of_b}/host.txt")].contains("Linux version"));
    let log = &files[&format!("{of_b}/logs/{id}/rank-1.log")];
    assert!(log.contains("rl1_[removed]") && log.contains("hf_[removed]"), "{log}");
    assert!(!files.contains_key(&format!("{of_b}/status.json")), "there is one state of the cluster");
    assert!(files["status.txt"].contains("alive") && files["status.json"].contains("\"events\""));
    assert!(files["processes.txt"].contains("daemon (pid ") && files["processes.txt"].contains("rank 0 of "));
    assert!(files["versions.txt"].contains("rayless (this command): "));
    assert!(files["host.txt"].contains("--- kernel\nLinux version"));
    assert!(files["network.txt"].contains("lo: "), "{}", files["network.txt"]);
    assert!(files["rdma.txt"].contains("/dev/infiniband"));
    assert!(files["logs/daemon.log"].contains("member of the cluster"), "{}", files["logs/daemon.log"]);
    let log = &files[&format!("logs/{id}/rank-0.log")];
    assert!(log.contains("rl1_[removed]") && log.contains("hf_[removed]"), "{log}");
    let keys = [&a, &b].map(|host| fs::read(host.run_dir().join("node.key")).unwrap());
    for (name, content) in &files {
        assert!(!content.contains(&token), "the token is in {name}");
        assert!(!content.contains("abcdefghijklmnopqrstuvwxyz"), "a secret is in {name}");
        for key in &keys {
            assert!(!content.as_bytes().windows(key.len()).any(|part| part == key), "a key is in {name}");
        }
    }
    let (files, said) = report_of(&a, dir.path(), "local.tar.gz", &["--local"]);
    assert_eq!(said, "");
    assert!(files.contains_key("status.json") && files.keys().all(|name| !name.starts_with("nodes/")));

    // The other node's daemon is stopped, and taken for dead: it is named.
    node_b.signal(rustix::process::Signal::STOP);
    a.await_nodes(&[("b", "dead")]);
    let (files, said) = report(&a, dir.path(), "stopped.tar.gz");
    assert!(
        said.contains("missing: node b") && said.contains(": it is dead; `rayless report --local` there"),
        "{said}"
    );
    assert!(files["README.txt"].contains("missing: node b"));
    assert!(files.contains_key(&format!("stacks-{id}.txt")) && files.keys().all(|name| !name.starts_with("nodes/")));
    node_b.signal(rustix::process::Signal::CONT);

    // The head is gone: what this host knows is still there.
    head.crash();
    let (files, said) = report(&a, dir.path(), "without.tar.gz");
    assert!(said.contains("missing: status, events and the other nodes: no rayless daemon answers"), "{said}");
    assert!(files[&format!("stacks-{id}.txt")].contains("=== rank 0 (pid "));
    assert!(!files.contains_key("status.json"));
    // On the other host the daemon lives, but the head does not answer it.
    let (files, said) = report(&b, dir.path(), "far.tar.gz");
    assert!(said.contains("missing: status"), "{said}");
    assert!(files[&format!("stacks-{id}.txt")].contains("=== rank 1 (pid "));
}

#[test]
fn a_report_of_a_host_without_anything_says_so() {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let host = Host::new(&cluster);
    let (files, said) = report(&host, dir.path(), "empty.tar.gz");
    assert!(said.contains("missing: status, events and the other nodes: no rayless daemon answers"), "{said}");
    assert!(files["host.txt"].contains("Linux version"));
    let path = dir.path().join("empty.tar.gz");
    let again = host.run(&["report", "--output", path.to_str().unwrap()]);
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains("error: cannot make ") && again.stderr.contains("\nhint: "), "{}", again.stderr);
}

#[test]
fn a_stopped_daemon_costs_its_part_only() {
    let cluster = Cluster::new();
    let dir = tempfile::tempdir().unwrap();
    let host = Host::new(&cluster);
    let (head, _) = host.head(&[]);
    head.signal(rustix::process::Signal::STOP);
    let (_, said) = report(&host, dir.path(), "stopped.tar.gz");
    assert!(said.contains("does not answer"), "{said}");
    kill(head.pid());
}
