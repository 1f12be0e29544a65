//! `rayless bench link`: how fast links are, between two processes of this host or between two hosts.
//!
//! One side drives: it opens two links to the other, one each way, and measures over them, transport by transport, size by
//! size. The other side ([`serve`]) is a child of the first, or waits on another host (`--listen`) for whoever has the
//! cluster's token. What they say to each other is in [`control`], how links come up in [`open`], what is measured in
//! [`measure`], how it is shown in [`report`] and [`plot`].

mod args;
mod control;
mod measure;
mod open;
mod plot;
mod report;
mod serve;
mod sizes;

use crate::{
    message::{Failure, data, talk},
    token,
};
use control::Control;
use rayless_fabric::Level;
use rayless_node::run_dir::RunDir;
use std::{
    fs,
    io::{IsTerminal as _, stdin},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

pub(crate) use args::{command, link_options};
use sizes::{DEFAULT_SIZES, sizes};

/// The port of `--listen`, and of `--to`, where none is given.
const DEFAULT_PORT: u16 = 6390;

/// What was asked for.
#[derive(Debug)]
pub(crate) struct LinkOptions {
    pub(crate) side: Side,
    /// Empty: shm (on one host), rdma (where there is a device), tcp.
    pub(crate) transports: Vec<Level>,
    pub(crate) sizes: Vec<u64>,
    /// How long each size of each transport is measured, for latency and again for bandwidth.
    pub(crate) time: Duration,
    pub(crate) streams: usize,
    pub(crate) verify: bool,
    /// How long one message may take before the measurement is given up.
    pub(crate) stall: Duration,
    pub(crate) rdma_address: Option<IpAddr>,
    pub(crate) json: bool,
    pub(crate) plot: Option<PathBuf>,
    pub(crate) token_file: Option<PathBuf>,
}

/// Which side this is.
#[derive(Debug)]
pub(crate) enum Side {
    /// Drives, with a child as the other side.
    OneHost,
    /// Drives, with `--listen` on another host as the other side.
    To(String),
    /// The other side, on another host.
    Listen(SocketAddr),
    /// The other side, a child.
    Child,
}

/// `rayless bench link`
pub(crate) fn link(run: &RunDir, options: &LinkOptions) -> Result<(), Failure> {
    match &options.side {
        Side::Listen(address) => {
            let identity = control::identity(&token::required(run, options.token_file.as_deref())?.token)?;
            serve::listen(*address, &identity, options.rdma_address)
        }
        Side::Child if stdin().is_terminal() => Err(Failure::failed("--peer is for the command itself")),
        Side::Child => serve::child(options.rdma_address),
        Side::To(address) => {
            let identity = control::identity(&token::required(run, options.token_file.as_deref())?.token)?;
            let control = Control::call(address, &identity)?;
            drive(control, options)
        }
        Side::OneHost => {
            let (control, mut child) = start_child(options)?;
            let driven = drive(control, options);
            // The end of the control connection ends the child; it is reaped here.
            let _ = child.wait();
            driven
        }
    }
}

fn start_child(options: &LinkOptions) -> Result<(Control, Child), Failure> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(Failure::failed)?;
    let program = std::env::current_exe().map_err(Failure::failed)?;
    let mut command = Command::new(program);
    command.args(["bench", "link", "--peer"]).stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    if let Some(address) = options.rdma_address {
        command.arg("--rdma-address").arg(address.to_string());
    }
    let child = command.spawn().map_err(|error| Failure::failed(format!("cannot start the other side: {error}")))?;
    // The command holds the other end of the socket, which would hide the child's end from us.
    drop(command);
    Ok((Control::over_unix(ours)?, child))
}

fn drive(mut control: Control, options: &LinkOptions) -> Result<(), Failure> {
    let transports = open::transports(&control, options)?;
    let mut results = Vec::new();
    for level in transports {
        let mut links = match open::links(&mut control, level, options) {
            Ok(links) => links,
            // Found by itself, it is only left out; asked for by name, it is an error.
            Err(failure) if options.transports.is_empty() => {
                let theirs = open::give_up(&mut control)?;
                let reason = theirs.unwrap_or_else(|| failure.cause().to_owned());
                talk(format_args!("{level}: left out: {reason}"));
                results.push(report::Measured { level, device: None, mode: None, points: Err(reason) });
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let (device, mode) = (links.device(), links.mode());
        if !options.json {
            data(report::heading(level, device.as_deref(), mode.as_deref(), control.peer()));
        }
        let mut points = Vec::new();
        for &bytes in &options.sizes {
            let point = measure::point(&mut control, &mut links, bytes, options.time)?;
            if !options.json {
                data(report::row(&point));
            }
            points.push(point);
        }
        links.close(&mut control)?;
        results.push(report::Measured { level, device, mode, points: Ok(points) });
    }
    control.say("end")?;
    if options.json {
        data(report::json(&results, control.peer(), options));
    }
    if let Some(path) = &options.plot {
        let failed = |error| Failure::failed(format!("cannot write {}: {error}", path.display()));
        fs::write(path, plot::svg(&results)).map_err(failed)?;
        talk(format_args!("wrote {}", path.display()));
    }
    if results.iter().all(|measured| measured.points.is_err()) {
        return Err(Failure::failed(
            "no transport could be measured\nhint: name one with `--transport` to see all of its error",
        ));
    }
    Ok(())
}
