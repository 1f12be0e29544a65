//! All that can happen to a daemon, in one queue: its main loop takes one at a time.

use super::drain::Used;
use crate::inventory::gpu::Probe;
use rayless_proto::{
    ids::GroupId,
    v1::{
        control::{ReportPart, Requester},
        keeper::FromKeeper,
        local::{ClientMessage, DaemonMessage},
    },
};
use rayless_worker::keeper::KeeperHandle;
use std::os::fd::OwnedFd;
use tokio::sync::mpsc;

/// One local connection, numbered by the accept loop.
pub(crate) type ClientId = u64;

/// The way into the queue. Bounded: who fills it waits.
pub(crate) type Events = mpsc::Sender<Event>;

/// Events that wait at most.
pub(crate) const QUEUE: usize = 1024;

/// What happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// A local client connected; answers go into `outbox`.
    ClientOpened { client: ClientId, pid: u32, outbox: mpsc::Sender<DaemonMessage> },
    /// It said something.
    ClientSaid { client: ClientId, message: ClientMessage },
    /// It is gone.
    ClientGone { client: ClientId },
    /// A keeper takes sessions, or could not be started. `used`: GPU memory before it.
    KeeperStarted { group: GroupId, started: Result<Box<KeeperHandle>, String>, used: Used },
    /// A keeper said something.
    KeeperSaid { group: GroupId, message: FromKeeper },
    /// A keeper's process is gone.
    KeeperGone { group: GroupId },
    /// What the workers of a killed keeper had started is gone. `used`: GPU memory before the group.
    Swept { group: GroupId, used: Used },
    /// Memory of these GPUs is not back yet after the end of the group.
    Draining { group: GroupId, gpus: Vec<u32> },
    /// Memory of all its GPUs is back.
    Drained { group: GroupId },
    /// NVML has answered.
    GpusFound(Probe),
    /// A TCP connection whose first bytes name a keeper; none of them is consumed.
    StepSession { group: GroupId, from: String, stream: OwnedFd },
    /// This node's part of a report is made, or could not be.
    ReportMade { by: Requester, part: ReportPart },
    /// SIGTERM or SIGINT.
    Signal(&'static str),
}
