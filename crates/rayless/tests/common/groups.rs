//! Groups whose workers are processes of the test program itself.
#![allow(clippy::print_stdout, clippy::exit, clippy::unwrap_used, reason = "a worker prints, and ends with its group")]

use super::{Daemon, Host, PATIENCE};
use rayless_proto::{
    resources::{CPU, Quantity, Resources, Strategy},
    v1::step::Launch,
};
use rayless_worker::{
    driver::{Asked, Callbacks, GroupOptions, WorkerGroup},
    host::{Next, Worker},
};
use std::{env, process::Command, time::Duration};

/// Body of a worker whose calls are words; returns at once in a process that no keeper started.
pub fn serve_as_worker() {
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
            ("say", text) => {
                println!("{text}");
                String::new()
            }
            ("sleep", _) => {
                std::thread::sleep(Duration::from_secs(600));
                text.clone()
            }
            // A program in a session of its own, which nothing but the group it was started in leads to.
            ("leave", rank) if rank == worker.rank().to_string() => {
                Command::new("setsid").args(["sleep", "1000"]).spawn().unwrap().id().to_string()
            }
            ("rank", _) => worker.rank().to_string(),
            _ => text.clone(),
        };
        worker.reply(call.id, false, answer.as_bytes()).unwrap();
    }
}

pub fn launch() -> Launch {
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

pub fn options(host: &Host, bundles: Vec<Resources>, strategy: Strategy, wait: Duration) -> GroupOptions {
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

pub fn start_with(options: GroupOptions) -> WorkerGroup {
    let placed = WorkerGroup::place(options, &mut |_| true).unwrap();
    placed.launch(launch(), PATIENCE, Callbacks::default(), &mut |_| true).unwrap()
}

/// A group with a rank on each of `count` nodes.
pub fn spread(host: &Host, count: usize) -> WorkerGroup {
    let bundle = Resources::new().with(CPU, Quantity::ONE);
    start_with(options(host, vec![bundle; count], Strategy::StrictSpread, PATIENCE))
}

/// What every rank answers.
pub fn answers(group: &WorkerGroup, text: &str) -> Vec<String> {
    let replies = group.call(text.as_bytes(), &Asked::All, Some(PATIENCE)).unwrap().wait().unwrap();
    replies.iter().map(|reply| String::from_utf8(reply.payload.to_vec()).unwrap()).collect()
}

/// A head `a` and a node `b` that has joined it.
pub fn two_nodes(a: &Host, b: &Host, more: &[&str]) -> (Daemon, Daemon, String) {
    let (head, address) = a.head(&[&["--name", "a"], more].concat());
    let mut node_b = b.start(&[&["join", &address, "--name", "b"], more.get(2..).unwrap_or_default()].concat());
    node_b.says("has joined");
    (head, node_b, address)
}
