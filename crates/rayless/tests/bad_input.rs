//! What bad input gets: one line of cause, a hint, an exit code (see STYLE.md).
#![allow(clippy::unwrap_used, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{Cluster, Host, Shown, rayless, shown};
use std::{fs, net::UdpSocket, path::Path};

/// Exit code and stderr of a command that must say nothing on stdout.
fn error_of(host: &Host, args: &[&str]) -> (i32, String) {
    let Shown { code, stdout, stderr } = host.run(args);
    assert_eq!(stdout, "", "{args:?}");
    (code, stderr)
}

fn check(host: &Host, args: &[&str], code: i32, text: &str) {
    assert_eq!(error_of(host, args), (code, text.to_owned()), "{args:?}");
}

#[test]
fn a_malformed_token_is_refused_with_its_source_and_without_its_text() {
    let host = Host::new(&Cluster::new());
    let mut command = host.command(&["join", "127.0.0.1:1"]);
    let Shown { code, stderr, .. } = shown(command.env("RAYLESS_TOKEN", "rl1_secretsecret"), Path::new("/nowhere"));
    assert_eq!(code, 4);
    assert_eq!(
        stderr,
        "error: RAYLESS_TOKEN: malformed cluster token: it has not the right length\n\
         hint: copy all of it, `rl1_` and 32 characters, from the file that `rayless head` names, or make one with `rayless token new`\n"
    );
}

#[test]
fn without_a_token_one_is_asked_for() {
    let host = Host::new(&Cluster::new());
    check(
        &host,
        &["join", "127.0.0.1:1"],
        2,
        "error: no cluster token\nhint: set RAYLESS_TOKEN or `--token-file`; on the head, `rayless token show` shows it\n",
    );
    let (code, text) = error_of(&host, &["join", "127.0.0.1:1", "--token-file", "/no/such/file"]);
    assert_eq!(code, 2);
    assert!(text.starts_with("error: no token file /no/such/file\nhint: "), "{text}");
}

#[test]
fn without_a_daemon_status_and_stop_say_how_to_start_one() {
    let host = Host::new(&Cluster::new());
    let told = "error: no rayless daemon answers at [DIR]/run/daemon.sock\n\
                hint: start one with `rayless head` or `rayless join ADDRESS`, or name its directory with --run-dir\n";
    for args in [&["status"][..], &["status", "--json"], &["stop"], &["stop", "--all"]] {
        check(&host, args, 3, told);
    }
}

#[test]
fn an_unknown_interface_is_named_with_those_that_there_are() {
    let host = Host::new(&Cluster::new());
    let (code, text) = error_of(&host, &["head", "--bind", "nosuch0", "--port", "0"]);
    assert_eq!(code, 2);
    assert!(
        text.starts_with("error: `nosuch0` is neither an address nor an interface of this host\nhint: this host has ")
    );
    assert!(text.contains("lo 127.0.0.1"), "{text}");
}

#[test]
fn a_port_in_use_is_named() {
    let host = Host::new(&Cluster::new());
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for mode in [&[][..], &["--daemon"]] {
        let mut args = vec!["head", "--bind", "127.0.0.1", "--port"];
        let number = port.to_string();
        args.push(&number);
        args.extend(mode);
        let (code, text) = error_of(&host, &args);
        assert_eq!(code, 1, "{text}");
        assert!(text.starts_with(&format!("error: port {port}/udp on 127.0.0.1 is in use")), "{text}");
        assert!(text.contains("\nhint: "), "{text}");
    }
}

#[test]
fn more_gpus_than_a_number_and_a_small_shared_memory_are_refused() {
    let host = Host::new(&Cluster::new());
    let (code, text) = error_of(&host, &["head", "--bind", "127.0.0.1", "--port", "0", "--shm-min", "1000000000"]);
    assert_eq!(code, 2);
    assert!(text.starts_with("error: /dev/shm has ") && text.contains("\nhint: free it, or start"), "{text}");
    let (code, text) = error_of(&host, &["head", "--gpus", "2000"]);
    assert_eq!(code, 2);
    assert!(text.contains("invalid value '2000' for '--gpus <N>'"), "{text}");
}

#[test]
fn bad_values_are_usage_errors() {
    let host = Host::new(&Cluster::new());
    for args in [
        &["head", "--name", "two words"][..],
        &["head", "--resource", "nvme"],
        &["head", "--resource", "GPU=1", "--bind", "127.0.0.1", "--port", "0"],
        &["head", "--cpus", "-1"],
        &["head", "--dead-after", "0.1"],
        &["head", "--port", "70000"],
        &["head", "--transport", "ib"],
        &["head", "--rdma-ports", "6463-6400"],
        &["join", "10.0.0.1", "--rdma-ports", "0-5"],
        &["head", "--verify-links=maybe"],
        &["join"],
        &["join", "http://host"],
        &["join", "10.0.0.1", "--wait", "soon"],
        &["stop", "--group", "x", "--all"],
        &["frobnicate"],
    ] {
        let mut command = host.command(args);
        let told = shown(command.env("RAYLESS_TOKEN", token()), Path::new("/nowhere"));
        assert_eq!((told.code, told.stdout.as_str()), (2, ""), "{args:?}: {told:?}");
        assert!(told.stderr.starts_with("error: ") && told.stderr.contains("\nhint: "), "{args:?}: {told:?}");
    }
}

#[test]
fn what_links_cannot_be_is_a_usage_error_with_what_they_can() {
    let host = Host::new(&Cluster::new());
    check(
        &host,
        &["head", "--transport", "ib"],
        2,
        "error: invalid value 'ib' for '--transport <auto|rdma|shm|tcp>': not one of auto, rdma, shm, tcp\n\
         hint: `--help` behind the command shows what can be given\n",
    );
    check(
        &host,
        &["head", "--bind", "127.0.0.1", "--port", "0", "--transport", "rdma", "--encrypt-tensors"],
        2,
        "error: --transport rdma and --encrypt-tensors contradict each other: RDMA carries tensors in clear\n\
         hint: leave one of them out\n",
    );
    let (code, text) = error_of(&host, &["head", "--bind", "127.0.0.1", "--port", "0", "--rdma-device", "nosuch_0"]);
    assert_eq!(code, 2);
    assert!(text.starts_with("error: --rdma-device nosuch_0: this host has "), "{text}");
    assert!(text.contains("\nhint: `ls /sys/class/infiniband` shows the devices"), "{text}");
    let mut command = host.command(&["head", "--bind", "127.0.0.1", "--port", "0", "--transport", "tcp"]);
    let told = shown(command.env("RAYLESS_ALLOW_TCP", "0"), Path::new("/nowhere"));
    assert_eq!(told.code, 2);
    assert!(
        told.stderr.starts_with("error: --transport tcp and RAYLESS_ALLOW_TCP=0 contradict each other: "),
        "{told:?}"
    );
}

#[test]
fn a_second_daemon_in_one_run_dir_is_told_who_is_there() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let (daemon, _) = host.head(&["--name", "first"]);
    let (code, text) = error_of(&host, &["head", "--bind", "127.0.0.1", "--port", "0"]);
    assert_eq!(code, 1);
    assert_eq!(
        text,
        format!(
            "error: a daemon (pid {}) already runs in [DIR]/run\n\
             hint: `rayless stop` ends it; `--run-dir` gives a second one its own directory\n",
            daemon.pid()
        )
    );
}

#[test]
fn a_run_dir_that_cannot_be_made_is_named() {
    let host = Host::new(&Cluster::new());
    let (code, text) = error_of(&host, &["head", "--run-dir", "/proc/no/run"]);
    assert_eq!(code, 1);
    assert!(text.starts_with("error: cannot create /proc/no/run: ") && text.contains("\nhint: "), "{text}");
}

#[test]
fn the_token_is_shown_to_terminals_only() {
    let host = Host::new(&Cluster::new());
    check(
        &host,
        &["token", "show"],
        2,
        "error: no cluster token\nhint: set RAYLESS_TOKEN or `--token-file`; on the head, `rayless token show` shows it\n",
    );
    let made = host.run(&["token", "new"]);
    assert_eq!((made.code, made.stderr.as_str()), (0, ""));
    assert!(made.stdout.starts_with("rl1_") && made.stdout.trim().len() == 36, "{made:?}");
    fs::create_dir_all(host.run_dir()).unwrap();
    fs::write(host.run_dir().join("token"), &made.stdout).unwrap();
    let told = host.run(&["token", "show"]);
    assert_eq!((told.code, told.stdout.as_str()), (0, "[DIR]/run/token\n"));
}

#[test]
fn logs_of_nothing_say_where_they_would_be() {
    let host = Host::new(&Cluster::new());
    let (code, text) = error_of(&host, &["logs", "--rank", "3"]);
    assert_eq!(code, 1);
    assert!(text.starts_with("error: no log of rank 3 in [DIR]/run/logs\nhint: "), "{text}");
}

#[test]
fn logs_have_their_rank_in_front() {
    let host = Host::new(&Cluster::new());
    let dir = host.run_dir().join("logs/00010203fcfdfeff");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("rank-0.log"), "loading\nready\n").unwrap();
    fs::write(dir.join("rank-10.log"), "half a line").unwrap();
    fs::write(dir.join("rank-2.log"), "two\n").unwrap();
    let all = host.run(&["logs"]);
    assert_eq!(all.stdout, "rank 0 | loading\nrank 0 | ready\nrank 2 | two\nrank 10 | half a line\n");
    assert_eq!(host.run(&["logs", "--rank", "2", "--group", "0001"]).stdout, "rank 2 | two\n");
    assert!(host.run(&["logs", "--all"]).stdout.contains("00010203 rank 2 | two\n"));
}

#[test]
fn version_and_help_need_nothing() {
    let version = rayless(&["--version"]).output().unwrap();
    assert_eq!(common::text(&version).0, format!("rayless {}\n", env!("CARGO_PKG_VERSION")));
    let help = rayless(&["head", "--help"]).output().unwrap();
    let (help, _) = common::text(&help);
    for name in ["--port", "--bind", "--dead-after", "--daemon", "RAYLESS_PORT"] {
        assert!(help.contains(name), "{name} in {help}");
    }
    assert!(!help.contains("daemon-child"), "{help}");
}

fn token() -> String {
    let made = rayless(&["token", "new"]).output().unwrap();
    common::text(&made).0.trim().to_owned()
}
