//! What thousands of launches leave in the daemons: RAYLESS_TEST_LAUNCHES of them (30; `tests/run leaks` asks for 2,000).
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test ends with the first thing that is not as it should be"
)]

mod common;

use common::{
    Cluster, Host, PATIENCE,
    groups::{answers, serve_as_worker, spread, two_nodes},
};
use std::{env, fs, thread, time::Duration, time::Instant};

/// Not a test of its own: in a process that a keeper started, this is the worker.
#[test]
fn worker_process() {
    serve_as_worker();
}

/// How large a process is.
#[derive(Debug, Clone, Copy)]
struct Size {
    /// Memory that it has allocated, in KiB.
    memory: u64,
    descriptors: usize,
    threads: u64,
    children: usize,
}

fn size(pid: i32) -> Size {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.split_whitespace().next().unwrap().parse().unwrap()
    };
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    Size {
        memory: of("RssAnon:"),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        threads: of("Threads:"),
        children: children.split_whitespace().count(),
    }
}

/// Of a daemon with nothing to do: clients and keepers gone, no thread of the blocking pool left.
fn at_rest(host: &Host, wanted: Option<Size>) -> Size {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = size(host.daemon_pid());
        let settled =
            wanted.is_none_or(|wanted| now.descriptors <= wanted.descriptors && now.threads <= wanted.threads);
        if (now.children == 0 && settled) || Instant::now() > end {
            return now;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn launches_leave_nothing_in_the_daemons() {
    let count: usize = env::var("RAYLESS_TEST_LAUNCHES").map_or(30, |text| text.parse().unwrap());
    let cluster = Cluster::new();
    let hosts = [Host::new(&cluster), Host::new(&cluster)];
    let [a, b] = &hosts;
    let (_head, _node, _) = two_nodes(a, b, &[]);
    let fresh = hosts.each_ref().map(|host| at_rest(host, None));
    let launch = |at: usize| {
        let group = spread(&hosts[at % 2], 2);
        assert_eq!(answers(&group, "rank"), ["0", "1"]);
        group.stop();
    };
    // What is kept of ended groups, a bounded number, is there after so many.
    let warm = (count / 4).max(10);
    (0..warm).for_each(launch);
    let before = hosts.each_ref().map(|host| at_rest(host, None));
    let begin = Instant::now();
    (0..count).for_each(launch);
    let took = begin.elapsed().as_secs_f64();
    for (at, host) in hosts.iter().enumerate() {
        let after = at_rest(host, Some(fresh[at]));
        eprintln!(
            "{at}: fresh {:?}\n   after {warm} {:?}\n   after {count} more {after:?}, {took:.1} s",
            fresh[at], before[at]
        );
        assert_eq!(after.children, 0);
        assert!(after.descriptors <= fresh[at].descriptors, "descriptors");
        assert!(after.threads <= fresh[at].threads, "threads");
        // Until 64 groups are over each is worth some memory; from then on none is.
        let kept = if warm > 64 { 0 } else { 16 * count as u64 };
        assert!(after.memory <= before[at].memory + 512 + kept, "memory");
        let logs = fs::read_dir(host.run_dir().join("logs")).unwrap().count();
        assert!(logs <= 65, "{logs} folders of logs");
        assert_eq!(fs::read_dir(host.run_dir().join("keepers")).unwrap().count(), 0);
    }
}
