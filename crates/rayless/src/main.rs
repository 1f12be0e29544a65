//! The `rayless` command. What it says and how it ends follows `STYLE.md`.
#![forbid(unsafe_code)]

mod background;
mod bench;
mod cli;
mod logs;
mod message;
mod report;
mod start;
mod status;
mod token;

use cli::Action;
use message::Failure;
use rayless_node::run_dir::RunDir;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run() -> Result<(), Failure> {
    let asked = cli::parse()?;
    let run = RunDir::resolve(asked.run_dir);
    match asked.action {
        Action::Head { store, node } => start::run(&run, start::As::Head(store), node),
        Action::Join { address, wait, node } => start::run(&run, start::As::Node { address, wait }, node),
        Action::Status { json, environment } => status::status(&run, json, environment),
        Action::Stop(what) => status::stop(&run, &what),
        Action::Token(action) => token::run(&run, &action),
        Action::Report { output, scope } => report::run(&run, output, scope),
        Action::Logs(options) => logs::run(&run, &options),
        Action::BenchLink(options) => bench::link(&run, &options),
        Action::Keeper => rayless_worker::keeper::run().map_err(Failure::failed),
    }
}
