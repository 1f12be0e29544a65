//! Two heads that take turns by a lease in a real etcd, and what restarts cost. Each test has an etcd of its own.
//!
//! Times are printed, not judged: `RAYLESS_REPEATS=10 cargo test -p rayless --test heads -- --nocapture`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test ends with the first thing that is not as it should be"
)]

mod common;

use common::{
    Cluster, Daemon, Host, PATIENCE, Shown,
    etcd::Etcd,
    groups::{answers, options, serve_as_worker, spread, start_with},
    node,
};
use rayless_proto::resources::{CPU, Quantity, Resources, Strategy};
use rayless_worker::driver::{Asked, WorkerGroup};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustix::process::Signal;
use serde_json::Value;
use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

/// Not a test of its own: in a process that a keeper started, this is the worker.
#[test]
fn worker_process() {
    serve_as_worker();
}

fn repeats() -> usize {
    env::var("RAYLESS_REPEATS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (median, most) = (times[times.len() / 2].as_millis(), times[times.len() - 1].as_millis());
    println!("{what}: n={} median {median} ms, max {most} ms", times.len());
}

/// Calls the group all the time while `what` happens: each call must be answered by each rank.
fn without_a_failed_call<T>(group: &WorkerGroup, what: impl FnOnce() -> T) -> T {
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let calls = scope.spawn(|| {
            let mut calls = 0;
            while !over.load(Relaxed) {
                assert_eq!(answers(group, "rank"), ["0", "1"]);
                calls += 1;
                thread::sleep(Duration::from_millis(1));
            }
            calls
        });
        let end = Over(&over);
        let result = what();
        drop(end);
        assert!(calls.join().unwrap() > 0);
        result
    })
}

/// The group is running, with all its ranks, in the eyes of this host's head.
fn runs(status: &Value, group: &WorkerGroup) -> bool {
    let id = group.id().to_string();
    let found = status["groups"].as_array().and_then(|all| all.iter().find(|group| group["id"] == id));
    found.is_some_and(|group| group["state"] == "running" && group["workers"].as_array().is_some_and(|w| w.len() == 2))
}

fn is_head(status: &Value, name: &str, term: u64) -> bool {
    let active = |head: &Value| head["name"] == name && head["state"] == "active";
    status["cluster"]["term"] == term && status["cluster"]["heads"].as_array().is_some_and(|all| all.iter().any(active))
}

fn stands_by(status: &Value, name: &str) -> bool {
    let standby = |head: &Value| head["name"] == name && head["state"] == "standby";
    status["cluster"]["heads"].as_array().is_some_and(|all| all.iter().any(standby))
}

/// Heads `a` (active) and `b`, a node `c` that was told of both.
struct Three {
    /// Its token is read by whoever starts later.
    cluster: Cluster,
    etcd: Etcd,
    /// Address of the first head.
    first: String,
    a: Host,
    b: Host,
    c: Host,
    head_a: Daemon,
    head_b: Daemon,
    node_c: Daemon,
}

fn head<'a>(host: &Host, store: &'a str, name: &'a str, more: &[&'a str]) -> (Daemon, String) {
    host.head(&[&["--store", store, "--name", name, "--cpus", "2"], more].concat())
}

fn three(etcd: Etcd, more: &[&str]) -> Three {
    let cluster = Cluster::new();
    let [a, b, c] = [(); 3].map(|()| Host::new(&cluster));
    let store = etcd.address();
    let (head_a, first) = head(&a, &store, "a", more);
    let (mut head_b, both) = head(&b, &store, "b", more);
    head_b.says("stands by at");
    assert!(both.starts_with(&format!("{first},")), "{both}");
    let mut node_c = c.start(&["join", &both, "--name", "c", "--cpus", "2"]);
    node_c.says("has joined");
    c.await_nodes(&[("a", "alive"), ("b", "alive"), ("c", "alive")]);
    Three { cluster, etcd, first, a, b, c, head_a, head_b, node_c }
}

/// A group with a rank on each of two nodes; `a` has none where it is full.
fn two_ranks(host: &Host) -> WorkerGroup {
    let bundle = Resources::new().with(CPU, Quantity::whole(2));
    start_with(options(host, vec![bundle; 2], Strategy::StrictSpread, PATIENCE))
}

#[test]
fn the_standby_takes_over_and_a_running_group_answers_every_call() {
    let mut times = Vec::new();
    for _ in 0..repeats() {
        let mut t = three(Etcd::start(), &[]);
        assert!(is_head(&t.c.status(), "a", 1) && stands_by(&t.c.status(), "b"));
        // On b and c: the driver's node first, then by name, and a is taken.
        let filler =
            start_with(options(&t.a, vec![Resources::new().with(CPU, Quantity::whole(2))], Strategy::Pack, PATIENCE));
        let group = two_ranks(&t.c);
        let status = without_a_failed_call(&group, || {
            t.head_a.crash();
            let begin = Instant::now();
            t.c.await_status("b as the head", |status| {
                is_head(status, "b", 2) && node(status, "c").is_some_and(|c| c["state"] == "alive")
            });
            times.push(begin.elapsed());
            t.c.await_status("the group under b", |status| runs(status, &group))
        });
        assert!(node(&status, "a").is_none(), "a host that never came to b: {status}");
        t.head_b.says("this daemon is the head now (term 2)");
        t.node_c.says("back in the cluster");
        // The keeper of the filler lives on without its daemon; a comes back as a standby, with it and under a new address.
        let (mut head_a, _) = head(&t.a, &t.etcd.address(), "a", &[]);
        head_a.says("stands by at");
        t.c.await_status("a with its group", |status| {
            stands_by(status, "a") && status["groups"].as_array().is_some_and(|all| all.len() == 2)
        });
        assert_eq!(answers(&group, "rank"), ["0", "1"]);
        group.stop();
        filler.stop();
        t.c.await_status("all free", |status| {
            status["nodes"].as_array().unwrap().iter().all(|node| node["available"] == node["resources"])
        });
    }
    show("killed head until its standby leads and a node is with it", times);
}

#[test]
fn a_head_that_was_stopped_for_a_while_finds_itself_replaced_and_does_nothing() {
    let mut t = three(Etcd::start(), &[]);
    let group = spread(&t.c, 2);
    without_a_failed_call(&group, || {
        t.head_a.signal(Signal::STOP);
        t.c.await_status("b as the head", |status| is_head(status, "b", 2));
        // What was asked of the old head while it could not hear is not done by it when it can.
        let mut late = t.a.command(&["stop", "--all"]).spawn().unwrap();
        thread::sleep(Duration::from_millis(100));
        t.head_a.signal(Signal::CONT);
        t.head_a.says("no longer the head (term 1)");
        assert_eq!(late.wait().unwrap().code(), Some(3), "it knew no head at that moment");
        t.head_a.says("back in the cluster");
        for host in [&t.a, &t.b, &t.c] {
            host.await_status("a as a standby of b", |status| is_head(status, "b", 2) && stands_by(status, "a"));
        }
        let status = t.a.await_status("the group", |status| runs(status, &group));
        assert_eq!(node(&status, "a").unwrap()["incarnation"], 1, "it lost nothing: {status}");
    });
    group.stop();
    assert!(t.head_b.is_running() && t.node_c.is_running());
}

#[test]
fn without_the_store_nobody_decides_and_what_runs_goes_on() {
    let mut t = three(Etcd::start(), &[]);
    let group = spread(&t.c, 2);
    let late = Host::new(&t.cluster);
    without_a_failed_call(&group, || {
        t.etcd.crash();
        t.head_a.says("no longer the head (term 1): its lease in the store could not be renewed");
        let shown = await_nobody(&t.c);
        assert!(shown.stderr.contains(&t.etcd.address()) && shown.stderr.contains("hint:"), "{shown:?}");
        let shown = t.a.run(&["status"]);
        assert!(shown.code == 3 && shown.stderr.contains("see that etcd runs at"), "{shown:?}");
        // Who joins meanwhile is told why it waits.
        let mut node_d = late.start(&["join", &t.first, "--name", "d"]);
        node_d.says("so nobody may decide");
        t.etcd.resume();
        t.c.await_status("a head", |status| {
            ["a", "b"].iter().any(|name| is_head(status, name, 2)) && runs(status, &group)
        });
        node_d.says("has joined");
    });
    group.stop();
}

#[test]
fn a_head_that_leaves_or_restarts_need_not_be_waited_for() {
    let t = three(Etcd::start(), &["--store-lease", "60"]);
    assert_eq!(t.a.run(&["stop"]).code, 0);
    t.c.await_status("b at once", |status| is_head(status, "b", 2));
    assert_eq!(t.head_a.ends().0, 0);
    t.head_b.crash();
    let (head_b, _) = head(&t.b, &t.etcd.address(), "b", &["--store-lease", "60"]);
    t.b.await_status("b again", |status| is_head(status, "b", 3));
    assert_eq!(fs::read_to_string(t.b.run_dir().join("term")).unwrap().split(' ').nth(1), Some("3\n"));
    drop(head_b);
}

#[test]
fn another_cluster_in_the_same_store_is_not_mistaken_for_this_one() {
    let etcd = Etcd::start();
    let [here, there] = [Cluster::new(), Cluster::new()];
    let (a, b) = (Host::new(&here), Host::new(&there));
    let (_head, _) = head(&a, &etcd.address(), "a", &[]);
    let (code, said) = b.start(&["head", "--store", &etcd.address(), "--name", "b"]).ends();
    assert_eq!(code, 4);
    assert!(said.iter().any(|line| line.contains("a cluster with another token: a (127.0.0.1:")), "{said:?}");
    // Under a name of its own it is.
    let (_other, _) = head(&b, &format!("{}/other", etcd.address()), "b", &[]);
    b.await_status("its own head", |status| is_head(status, "b", 1));
}

#[test]
fn what_is_wrong_with_the_store_is_said_before_anything_is_started() {
    let host = Host::new(&Cluster::new());
    for (args, cause) in [
        (vec!["--store", "http://x"], "does not begin with `etcd://`"),
        (vec!["--store", "etcd://10.0.0.9", "--store-cert", "/nowhere"], "is of no use without TLS"),
        (vec!["--store", "etcd://10.0.0.9", "--store-ca", "/nowhere"], "/nowhere: "),
        (vec!["--store", "etcd://10.0.0.9", "--store-user", "u"], "goes with a password"),
        (vec!["--store", "etcd://10.0.0.9", "--store-lease", "1"], "2 to 600 whole seconds"),
    ] {
        let shown = host.run(&[&["head", "--bind", "127.0.0.1", "--port", "0"][..], &args[..]].concat());
        assert_eq!(shown.code, 2, "{shown:?}");
        assert!(shown.stderr.contains(cause), "{shown:?}");
    }
}

/// A resource that only the nodes of a launch have, so that it goes nowhere else.
fn slots(count: u64) -> Resources {
    Resources::new().with("slot", Quantity::whole(count))
}

/// Heads `a` and `b`, and two nodes with two slots each.
struct Four {
    /// Its token is read by whoever starts later.
    _cluster: Cluster,
    etcd: Etcd,
    /// Address of the first head.
    first: String,
    a: Host,
    b: Host,
    c: Host,
    d: Host,
    head_a: Daemon,
    head_b: Daemon,
    node_c: Daemon,
    node_d: Daemon,
}

fn four() -> Four {
    let cluster = Cluster::new();
    let [a, b, c, d] = [(); 4].map(|()| Host::new(&cluster));
    let etcd = Etcd::start();
    let store = etcd.address();
    let (head_a, first) = head(&a, &store, "a", &[]);
    let (mut head_b, both) = head(&b, &store, "b", &[]);
    head_b.says("stands by at");
    let [node_c, node_d] = [(&c, "c"), (&d, "d")].map(|(host, name)| {
        let mut node = host.start(&["join", &both, "--name", name, "--resource", "slot=2"]);
        node.says("has joined");
        node
    });
    c.await_nodes(&[("a", "alive"), ("b", "alive"), ("c", "alive"), ("d", "alive")]);
    Four { _cluster: cluster, etcd, first, a, b, c, d, head_a, head_b, node_c, node_d }
}

fn groups(status: &Value) -> &[Value] {
    status["groups"].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn all_free(status: &Value) -> bool {
    status["nodes"].as_array().unwrap().iter().all(|node| node["available"] == node["resources"])
}

/// Under whatever term: a slow store may cost one.
fn leads(status: &Value, name: &str) -> bool {
    status["cluster"]["term"].as_u64().is_some_and(|term| is_head(status, name, term))
}

/// Waits until a host says that nobody may be the head, and why.
fn await_nobody(host: &Host) -> Shown {
    let end = Instant::now() + PATIENCE;
    loop {
        let shown = host.run(&["status"]);
        if shown.code == 3 && shown.stderr.contains("so nobody may decide") {
            return shown;
        }
        assert!(Instant::now() < end, "{shown:?}");
    }
}

fn has_event(status: &Value, kind: &str, part: &str) -> bool {
    let is = |event: &Value| event["kind"] == kind && event["cause"].as_str().is_some_and(|cause| cause.contains(part));
    status["events"].as_array().is_some_and(|events| events.iter().any(is))
}

#[test]
fn a_launch_that_the_head_did_not_live_to_finish_is_finished_by_the_next() {
    let mut t = four();
    // What happened under the first head is to be known under the second.
    let early = start_with(options(&t.c, vec![slots(1)], Strategy::Pack, PATIENCE));
    assert!(early.call(*b"die 0", &Asked::All, Some(PATIENCE)).unwrap().wait().is_err());
    drop(early);
    let status = t.c.await_status("the first end", |status| groups(status).len() == 1 && all_free(status));
    let cause = groups(&status)[0]["cause"].clone();
    assert_eq!(groups(&status)[0]["state"], "failed", "{status}");
    // It is told to the standby four times a second.
    thread::sleep(Duration::from_millis(600));

    // d cannot start its part: the head that told it to dies meanwhile.
    t.node_d.signal(Signal::STOP);
    thread::scope(|scope| {
        let launch = || start_with(options(&t.c, vec![slots(2); 2], Strategy::StrictSpread, PATIENCE));
        let driver = scope.spawn(launch);
        t.a.await_status("the launch under way", |status| groups(status).len() == 2);
        t.head_a.crash();
        t.node_d.signal(Signal::CONT);
        let group = driver.join().unwrap();
        let status = t.c.await_status("the group under b", |status| leads(status, "b") && runs(status, &group));
        assert_eq!(groups(&status).len(), 2, "nothing was started twice: {status}");
        assert!(has_event(&status, "group-resumed", "was being started"), "{status}");
        let ended = groups(&status).iter().find(|group| group["state"] == "failed").unwrap();
        assert_eq!(ended["cause"], cause, "{status}");
        assert!(has_event(&status, "node-joined", "node d joined") && has_event(&status, "head-changed", "b is"));
        assert_eq!(answers(&group, "rank"), ["0", "1"]);
        group.stop();
    });
    t.c.await_status("all free", all_free);
    assert!(t.head_b.is_running() && t.node_c.is_running() && t.node_d.is_running());
}

#[test]
fn a_launch_that_nobody_waits_for_any_more_is_ended_by_the_next_head() {
    let mut t = four();
    t.node_d.signal(Signal::STOP);
    let given_up = AtomicBool::new(false);
    thread::scope(|scope| {
        let options = options(&t.c, vec![slots(2); 2], Strategy::StrictSpread, PATIENCE);
        let driver = scope.spawn(|| WorkerGroup::place(options, &mut |_| !given_up.load(Relaxed)).map(drop));
        t.a.await_status("the launch under way", |status| groups(status).len() == 1);
        t.head_a.crash();
        given_up.store(true, Relaxed);
        assert!(driver.join().unwrap().is_err());
        t.node_d.signal(Signal::CONT);
    });
    let status = t.c.await_status("all free under b", |status| {
        leads(status, "b") && groups(status).len() == 1 && node(status, "d").is_some() && all_free(status)
    });
    let cause = groups(&status)[0]["cause"].as_str().unwrap().to_owned();
    assert!(cause.contains("nobody waited for it any more"), "{status}");
    // Both nodes can be used at once.
    let group = start_with(options(&t.d, vec![slots(2); 2], Strategy::StrictSpread, PATIENCE));
    assert_eq!(answers(&group, "rank"), ["0", "1"]);
    group.stop();
    assert!(t.head_b.is_running() && t.node_c.is_running() && t.node_d.is_running());
}

#[test]
fn a_standby_that_missed_a_rotation_of_the_token_does_not_take_over() {
    let mut t = four();
    t.head_b.signal(Signal::STOP);
    t.a.await_nodes(&[("b", "dead")]);
    assert_eq!(t.a.run(&["token", "rotate"]).code, 0);
    assert_eq!(t.a.run(&["token", "rotate", "--finish"]).code, 0);
    t.head_b.signal(Signal::CONT);
    t.head_b.says("cannot be the head: the cluster's token was rotated while it was away");
    t.a.await_status("no seat of b", |status| !stands_by(status, "b"));
    t.head_a.crash();
    let end = Instant::now() + PATIENCE;
    // `/rayless/default/head`
    while t.etcd.operate("kv/range", r#"{"key":"L3JheWxlc3MvZGVmYXVsdC9oZWFk"}"#).contains("mod_revision") {
        assert!(Instant::now() < end, "the lease of a does not end");
        thread::sleep(Duration::from_millis(20));
    }
    let shown = t.b.run(&["status"]);
    assert!(shown.code == 3 && shown.stderr.contains("the cluster's token was rotated"), "{shown:?}");
    assert!(shown.stderr.contains("hint: start this daemon with the present token"), "{shown:?}");
    // Under its old address: b, whom no node lets in, cannot tell them a new one.
    let (port, store) = (t.first.rsplit_once(':').unwrap().1, t.etcd.address());
    let args = ["head", "--store", &store, "--name", "a", "--bind", "127.0.0.1", "--port", port, "--token-file"];
    let mut head_a = Daemon::of(&mut t.a.command(&[&args[..], &[t.a.token.to_str().unwrap()]].concat()));
    head_a.says("is ready at");
    t.a.await_status("a again, and nobody in between", |status| leads(status, "a"));

    t.a.await_nodes(&[("c", "alive"), ("d", "alive")]);

    // With the present token it is one of them again.
    t.head_b.crash();
    let new = t.a.run_dir().join("token");
    let args = ["head", "--store", &store, "--name", "b", "--bind", "127.0.0.1", "--port", "0", "--token-file"];
    let mut head_b = Daemon::of(&mut t.b.command(&[&args[..], &[new.to_str().unwrap()]].concat()));
    head_b.says("stands by at");
    t.a.await_status("b as a standby", |status| stands_by(status, "b"));
    assert_eq!(t.a.run(&["stop"]).code, 0);
    t.c.await_status("b as the head", |status| leads(status, "b"));
    assert!(t.node_c.is_running() && t.node_d.is_running());
}

#[test]
fn the_store_may_lose_a_member_and_without_most_of_them_nobody_decides() {
    let mut members = Etcd::members(3);
    let hosts: Vec<String> = members.iter().map(|etcd| etcd.address().replace("etcd://", "")).collect();
    let store = format!("etcd://{}", hosts.join(","));
    let cluster = Cluster::new();
    let [a, b, c] = [(); 3].map(|()| Host::new(&cluster));
    let (mut head_a, first) = head(&a, &store, "a", &[]);
    let mut node_c = c.start(&["join", &first, "--name", "c", "--cpus", "2"]);
    node_c.says("has joined");
    let group = spread(&c, 2);
    without_a_failed_call(&group, || {
        // The one that is in use. What comes after it is seen by way of another.
        members[0].crash();
        let (mut head_b, _) = head(&b, &store, "b", &[]);
        head_b.says("stands by at");
        // The members that are left may need longer to agree on a leader than a lease lasts: then there is a next term.
        let status = a.await_status("the standby", |status| stands_by(status, "a") || stands_by(status, "b"));
        let leader = if leads(&status, "a") { &mut head_a } else { &mut head_b };
        // Most of them.
        members[1].crash();
        let term = &status["cluster"]["term"];
        leader.says(&format!("no longer the head (term {term}): its lease in the store could not be renewed"));
        await_nobody(&a);
        // One of the lost is enough; the other comes later.
        members[1].resume();
        let led = |status: &Value| ["a", "b"].iter().any(|name| leads(status, name));
        c.await_status("a head again", |status| led(status) && runs(status, &group));
        members[0].resume();
        members[2].crash();
        let late = Host::new(&cluster);
        let (mut head_d, _) = head(&late, &store, "d", &[]);
        head_d.says("stands by at");
        c.await_status("the same head, by way of the first and second", |status| led(status) && stands_by(status, "d"));
        assert!(head_b.is_running());
    });
    group.stop();
    assert!(node_c.is_running());
}

fn closed_file(path: &Path, text: &str) -> String {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_store_is_entered_with_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, kind: &str, der: &[u8]| closed_file(&dir.path().join(name), &pem(kind, der));
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = file("ca.pem", "CERTIFICATE", authority.self_signed(&authority_key).unwrap().der());
    let issuer = Issuer::new(authority, authority_key);
    let issue = |name: &str, purposes: &[ExtendedKeyUsagePurpose]| {
        let key = KeyPair::generate().unwrap();
        let mut leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        leaf.extended_key_usages = purposes.to_vec();
        let cert = leaf.signed_by(&key, &issuer).unwrap();
        let cert = file(&format!("{name}.pem"), "CERTIFICATE", cert.der());
        [cert, file(&format!("{name}.key"), "PRIVATE KEY", &key.serialize_der())]
    };
    // etcd's gateway shows the server's certificate to etcd itself.
    let server = issue("server", &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]);
    let client = issue("client", &[ExtendedKeyUsagePurpose::ClientAuth]);
    let etcd = Etcd::start_with(
        &["--cert-file", &server[0], "--key-file", &server[1], "--client-cert-auth", "--trusted-ca-file", &ca],
        "https",
    );
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let store = etcd.address();
    let args = ["head", "--store", &store, "--name", "a", "--store-ca", &ca];
    let mut stranger = host.start(&args);
    stranger.says("does not answer");
    stranger.crash();
    let mut head = host.start(&[&args[..], &["--store-cert", &client[0], "--store-key", &client[1]]].concat());
    head.says("is ready at");
    host.await_status("the head", |status| is_head(status, "a", 1));
}

#[test]
fn the_store_is_entered_with_a_password() {
    let etcd = Etcd::start();
    etcd.operate("auth/user/add", r#"{"name":"root","password":"secret"}"#);
    etcd.operate("auth/user/grant", r#"{"user":"root","role":"root"}"#);
    etcd.operate("auth/enable", "{}");
    let dir = tempfile::tempdir().unwrap();
    let password = closed_file(&dir.path().join("password"), "secret\n");
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let store = etcd.address();
    let args = ["head", "--store", &store, "--name", "a"];
    let mut stranger = host.start(&args);
    stranger.says("does not answer: access is denied");
    stranger.crash();
    let mut head = host.start(&[&args[..], &["--store-user", "root", "--store-password-file", &password]].concat());
    head.says("is ready at");
    let status = host.await_status("the head", |status| is_head(status, "a", 1));
    assert!(!status.to_string().contains("secret"));
}

/// DER as PEM.
fn pem(kind: &str, der: &[u8]) -> String {
    let digit =
        |at: u32| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"[at as usize & 63]);
    let mut text = String::new();
    for three in der.chunks(3) {
        let word = three.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        let four = (0..4).map(|at| if at <= three.len() { digit(word >> (18 - 6 * at)) } else { '=' });
        text.extend(four);
        if text.len() % 65 == 64 {
            text.push('\n');
        }
    }
    format!("-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n")
}

#[test]
fn restarts_in_numbers() {
    let (mut with, mut without, mut daemon) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeats() {
        let cluster = Cluster::new();
        let [a, b] = [Host::new(&cluster), Host::new(&cluster)];
        let (mut head, address) = a.head(&["--name", "a"]);
        let mut node_b = b.start(&["join", &address, "--name", "b"]);
        node_b.says("has joined");
        let group = spread(&b, 2);
        let port = address.rsplit_once(':').unwrap().1;
        for keep in [true, false] {
            a.await_status("the group", |status| runs(status, &group));
            // Its file is written at most four times a second.
            thread::sleep(Duration::from_millis(300));
            head.crash();
            if !keep {
                fs::remove_file(a.run_dir().join("head-state")).unwrap();
            }
            let token = a.token.to_str().unwrap();
            let args = ["head", "--name", "a", "--bind", "127.0.0.1", "--port", port, "--token-file", token];
            let begin = Instant::now();
            head = Daemon::of(&mut a.command(&args));
            a.await_status("all adopted", |status| {
                runs(status, &group) && node(status, "b").is_some_and(|b| b["state"] == "alive")
            });
            if keep { &mut with } else { &mut without }.push(begin.elapsed());
            assert_eq!(answers(&group, "rank"), ["0", "1"]);
        }
        node_b.crash();
        let begin = Instant::now();
        node_b = b.start(&["join", &address, "--name", "b"]);
        a.await_status("b adopted its keeper", |status| {
            runs(status, &group) && node(status, "b").is_some_and(|b| b["incarnation"] == 2 && b["state"] == "alive")
        });
        daemon.push(begin.elapsed());
        assert_eq!(answers(&group, "rank"), ["0", "1"]);
        group.stop();
        drop(node_b);
    }
    show("restarted head with its state until nodes and group are adopted", with);
    show("restarted head without any state", without);
    show("restarted daemon until its keeper is adopted and the head knows", daemon);
}
