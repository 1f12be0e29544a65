//! `rayless bench link`: on one host, between two, and for whoever may not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends with the first thing that is not as it should be")]

mod common;

use common::{Cluster, Host};
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

/// A `--listen` with a port of its own, ended with the test.
struct Listening {
    child: Child,
    address: String,
}

impl Listening {
    fn on(host: &Host) -> Self {
        let token = host.token.to_str().unwrap();
        let mut command: Command = host.command(&["bench", "link", "--listen", "127.0.0.1:0", "--token-file", token]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { child, address: address.trim().to_owned() }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const QUICK: [&str; 5] = ["bench", "link", "--seconds=0.005", "--sizes=1,28KiB,2MiB", "--json"];

/// Every transport named has a point of each size, and nothing in it is nothing.
fn check(document: &str, transports: &[&str]) {
    let read: Value = serde_json::from_str(document).unwrap_or_else(|error| panic!("{error}: {document}"));
    let shown = read["transports"].as_array().unwrap();
    assert_eq!(shown.iter().map(|t| t["transport"].as_str().unwrap()).collect::<Vec<_>>(), transports, "{document}");
    for transport in shown {
        let points = transport["points"].as_array().unwrap();
        assert_eq!(points.iter().map(|p| p["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 28 << 10, 2 << 20]);
        for point in points {
            let latency = |name: &str| point["latency_us"][name].as_f64().unwrap();
            assert!(0.0 < latency("min") && latency("min") <= latency("p50"), "{point}");
            assert!(latency("p50") <= latency("p99") && latency("p99") <= latency("p99.9"), "{point}");
            assert!(point["hops"].as_u64().unwrap() >= 5 && point["messages"].as_u64().unwrap() >= 4, "{point}");
            assert!(point["gigabytes_per_s"].as_f64().unwrap() > 0.0, "{point}");
        }
    }
}

#[test]
fn on_one_host_it_measures_what_there_is_and_draws_it() {
    let host = Host::new(&Cluster::new());
    let picture = host.run_dir().with_file_name("links.svg");
    let asked = [&QUICK[..], &["--transport=shm,tcp", "--verify", "--plot", picture.to_str().unwrap()]].concat();
    let shown = host.run(&asked);
    assert_eq!(shown.code, 0, "{shown:?}");
    check(&shown.stdout, &["shm", "tcp"]);
    assert!(std::fs::read_to_string(picture).unwrap().ends_with("</svg>\n"));

    let table = host.run(&["bench", "link", "--seconds=0.005", "--sizes=64", "--transport=shm"]);
    let heading = "      size     p50 (us)     p99 (us)   p99.9 (us)       hops       GB/s  messages";
    // How the memory is shared depends on what this host allows: `cma`, or `ring` and why.
    let first = table.stdout.lines().next().unwrap_or_default();
    assert!(first.starts_with("shm (") && first.ends_with("), with another process of this host"), "{table:?}");
    assert_eq!((table.stdout.lines().nth(1), table.stdout.lines().count()), (Some(heading), 3), "{table:?}");
}

#[test]
fn two_hosts_measure_with_the_clusters_token_one_after_the_other() {
    let cluster = Cluster::new();
    let (here, there) = (Host::new(&cluster), Host::new(&cluster));
    let listening = Listening::on(&there);
    let token = here.token.to_str().unwrap().to_owned();
    let to = |more: &[&str]| {
        let all = [&QUICK[..], &["--to", &listening.address, "--token-file", &token], more].concat();
        here.run(&all)
    };
    for streams in ["--streams=1", "--streams=3"] {
        let shown = to(&["--transport=tcp", streams]);
        assert_eq!(shown.code, 0, "{shown:?}");
        check(&shown.stdout, &["tcp"]);
    }
    let shown = to(&["--transport=shm"]);
    let cause = format!("error: shm: the other side is {}, on another host\n", listening.address);
    assert!(shown.code == 1 && shown.stderr.starts_with(&cause) && shown.stderr.contains("hint: "), "{shown:?}");
}

#[test]
fn who_has_another_token_or_none_is_refused_and_the_other_side_goes_on() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let (here, there, stranger) = (Host::new(&cluster), Host::new(&cluster), Host::new(&other));
    let listening = Listening::on(&there);
    let call = |host: &Host, more: &[&str]| host.run(&[&QUICK[..], &["--to", &listening.address], more].concat());

    let refused = call(&stranger, &["--token-file", stranger.token.to_str().unwrap()]);
    let told =
        format!("error: {} has another cluster token\nhint: use the same token on both hosts\n", listening.address);
    assert_eq!((refused.code, refused.stderr, refused.stdout), (4, told, String::new()));
    let refused = call(&stranger, &[]);
    assert_eq!((refused.code, refused.stdout.as_str()), (2, ""));
    assert!(refused.stderr.starts_with("error: no cluster token\nhint: "), "{refused:?}");

    let shown = call(&here, &["--transport=tcp", "--token-file", here.token.to_str().unwrap()]);
    assert_eq!(shown.code, 0, "{shown:?}");
}

#[test]
fn nobody_there_and_no_device_say_what_to_do() {
    let cluster = Cluster::new();
    let host = Host::new(&cluster);
    let token = host.token.to_str().unwrap();
    // A port that nobody has: bound once, and free again.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let shown = host.run(&["bench", "link", "--to", &free, "--token-file", token]);
    let cause = format!("error: cannot reach {free}: ");
    assert!(shown.code == 3 && shown.stderr.starts_with(&cause), "{shown:?}");
    assert!(shown.stderr.ends_with("hint: on that host: `rayless bench link --listen`\n"), "{shown:?}");
    let shown = host.run(&["bench", "link", "--sizes=3TiB"]);
    assert!(shown.code == 2 && shown.stderr.contains("not a size"), "{shown:?}");
    if !std::path::Path::new("/sys/class/infiniband").exists() {
        let shown = host.run(&["bench", "link", "--transport=rdma"]);
        let told = "error: rdma: no RDMA device in /sys/class/infiniband\n\
                    hint: name the address of the device with `--rdma-address`\n";
        assert_eq!((shown.code, shown.stderr.as_str()), (1, told));
    }
}
