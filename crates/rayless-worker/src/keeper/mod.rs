//! The keeper: owns the workers of one group on one host and outlives the daemon that started it.

use rayless_proto::{
    ids::{GroupId, NodeId},
    v1::{
        control::HeldGroup,
        keeper::{FromKeeper, KeeperConfig},
        status::NodeState,
    },
};
use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// Why a keeper did not start or ended early.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// What came on stdin is not a configuration.
    #[error("no keeper configuration on stdin: {0}\nhint: `rayless keeper` is started by the daemon, not by hand")]
    Config(String),
    /// Sockets, files or shared memory could not be made.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, for example `cannot bind /run/rayless/keepers/….sock`.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The keeper process did not come up; one line of what it said.
    #[error("the keeper did not start: {0}")]
    NotStarted(String),
}

/// Body of `rayless keeper`: reads its configuration from stdin and runs until the group is over. Must be called on the process's
/// main thread, before any other thread is started: its children die with the thread that made them.
///
/// # Errors
/// Where it cannot start. After the start everything that goes wrong ends the group with a cause told to daemon and driver.
pub fn run() -> Result<(), KeeperError> {
    unimplemented!()
}

/// Starts `exe keeper` in a session of its own, hands it `config`, and returns once its socket takes sessions. Needs a tokio
/// runtime with I/O. Dropping the handle leaves the keeper alone.
///
/// # Errors
/// [`KeeperError::NotStarted`] with its last line.
pub async fn spawn(_exe: &Path, _config: &KeeperConfig) -> Result<KeeperHandle, KeeperError> {
    unimplemented!()
}

/// Connects to the keeper behind `socket` (one found in `keepers/`).
///
/// # Errors
/// Where nobody listens there any more: the caller removes the file.
pub async fn adopt(_socket: &Path) -> Result<KeeperHandle, KeeperError> {
    unimplemented!()
}

/// A daemon's hold on one keeper.
#[derive(Debug)]
pub struct KeeperHandle {}

impl KeeperHandle {
    /// Its group.
    pub fn group(&self) -> GroupId {
        unimplemented!()
    }

    /// What it held when this handle was made.
    pub fn held(&self) -> &HeldGroup {
        unimplemented!()
    }

    /// Its socket.
    pub fn socket(&self) -> &PathBuf {
        unimplemented!()
    }

    /// The next message; `None` once the keeper is gone (after `Ended`, or without it where it was killed). Cancel safe.
    pub async fn next(&mut self) -> Option<FromKeeper> {
        unimplemented!()
    }

    /// Tells it to kill its workers and end (empty cause: in order). Queued, never blocks.
    pub fn stop(&self, _cause: &str) {
        unimplemented!()
    }

    /// Tells it what the head holds a node for. Queued, never blocks.
    pub fn verdict(&self, _node: NodeId, _state: NodeState) {
        unimplemented!()
    }

    /// A hand-over to the same keeper that can be kept in another task (the TCP accept loop).
    pub fn hand_over(&self) -> HandOver {
        unimplemented!()
    }
}

/// Passes TCP step sessions to a keeper.
#[derive(Debug, Clone)]
pub struct HandOver {}

impl HandOver {
    /// Passes `session`, of which nothing was consumed yet.
    ///
    /// # Errors
    /// Where the keeper is gone.
    pub async fn session(&self, _session: OwnedFd) -> io::Result<()> {
        unimplemented!()
    }
}
