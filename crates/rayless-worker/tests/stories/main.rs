//! Groups from end to end, over real processes: keepers, workers, a driver on one host and sessions over TLS to another. No daemon: the
//! fixture (`world`) starts the keepers and hands the sessions over as a daemon does. No Python either: `worker` is a small program in Rust.
//!
//! `cargo test -p rayless-worker --test stories [-- NAME...]` runs them; `-- bench` measures calls.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::zombie_processes,
    reason = "a test, though one with a main of its own"
)]

mod bench;
mod calls;
mod deaths;
mod dying;
mod keepers;
mod links;
mod rdma;
mod stuck;
mod worker;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

type Story = (&'static str, fn());

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("keeper") => {
            return match rayless_worker::keeper::run() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{error}");
                    ExitCode::FAILURE
                }
            };
        }
        Some("worker") => return worker::main(),
        // In the guest of tests/rdma-vm: `stories rdma DEVICE DEVICE ADDRESS`.
        Some("rdma") => {
            rdma::main(&arguments[1..]);
            return ExitCode::SUCCESS;
        }
        Some("driver") => return deaths::driver_main(),
        Some("bench") => {
            bench::main(&arguments[1..]);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let named: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let stories =
        [calls::STORIES, deaths::STORIES, dying::STORIES, keepers::STORIES, links::STORIES, stuck::STORIES].concat();
    if arguments.iter().any(|argument| argument == "--list") {
        stories.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let mut failed = 0;
    for (name, story) in stories {
        if !named.is_empty() && !named.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(story));
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        println!("{word:6} {:5} ms  {name}", start.elapsed().as_millis());
        failed += u32::from(result.is_err());
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
