//! The worker's side: what runs inside a worker process.

use rayless_proto::ids::{CallId, Rank};
use std::time::Duration;

/// Why a worker cannot go on. Whatever the variant, the process should end with a line of it on stderr.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// This process was not started by a keeper.
    #[error(
        "not started by a rayless keeper: {0}\nhint: workers are started by `rayless.WorkerGroup.start`, not by hand"
    )]
    NotAWorker(String),
    /// The keeper is gone.
    #[error("the keeper is gone")]
    KeeperGone,
    /// What is in the ring breaks its rules (a gap in the call ids, impossible lengths).
    #[error("the ring is broken: {0}")]
    Broken(String),
    /// An answer larger than the limit.
    #[error("a reply of {0} bytes is over the limit of 1 GiB")]
    TooLarge(u64),
}

/// A call as a worker gets it.
#[derive(Debug)]
pub struct IncomingCall {
    /// Its id.
    pub id: CallId,
    /// Whether this rank's answer is waited for.
    pub asked: bool,
    /// The bytes the driver gave to `WorkerGroup::call`.
    pub payload: Vec<u8>,
}

/// What [`Worker::next_call`] came back with.
#[derive(Debug)]
pub enum Next {
    /// The next call.
    Call(IncomingCall),
    /// The group is over: leave.
    Closed,
    /// Nothing yet: the timeout passed or a signal arrived (a chance to run signal handlers).
    Nothing,
}

/// This process as a worker of a group. All methods take `&self` and may be called from any thread.
#[derive(Debug)]
pub struct Worker {}

impl Worker {
    /// Takes over what the keeper left in the environment (`RAYLESS_WORKER_FDS`, `RAYLESS_RANK`, …) and waits for the boot bytes.
    /// The descriptors are made close-on-exec and the variable that names them is to be ignored from then on. At most once per process.
    ///
    /// # Errors
    /// [`HostError::NotAWorker`] where something is missing.
    pub fn from_env() -> Result<Self, HostError> {
        unimplemented!()
    }

    /// Its rank.
    pub fn rank(&self) -> Rank {
        unimplemented!()
    }

    /// Its place among the ranks of its node.
    pub fn local_rank(&self) -> u32 {
        unimplemented!()
    }

    /// Ranks of the group.
    pub fn world_size(&self) -> u32 {
        unimplemented!()
    }

    /// `Launch::boot` as the driver gave it.
    pub fn boot(&self) -> &[u8] {
        unimplemented!()
    }

    /// Tells keeper and driver that this rank takes calls, with its `python`, `rayless`, `vllm`, … versions. Once, before the first call.
    ///
    /// # Errors
    /// [`HostError::KeeperGone`].
    pub fn ready(&self, _versions: &[(String, String)]) -> Result<(), HostError> {
        unimplemented!()
    }

    /// The next call, in the order the driver made them: first a short spin (only when the previous call was just finished), then a
    /// sleep until one comes, `timeout` passes or a signal arrives. One thread at a time.
    ///
    /// # Errors
    /// [`HostError::Broken`] for a gap or a repeat in the call ids: the process must end.
    pub fn next_call(&self, _timeout: Option<Duration>) -> Result<Next, HostError> {
        unimplemented!()
    }

    /// Answers `call`. `raised` tells that `payload` is an exception. Answers go out in the order of these calls, from whatever
    /// thread; a full reply ring makes it wait for the collector. The answer of a rank that was not asked is dropped.
    ///
    /// # Errors
    /// [`HostError::KeeperGone`] where the group ended meanwhile, [`HostError::TooLarge`].
    pub fn reply(&self, _call: CallId, _raised: bool, _payload: &[u8]) -> Result<(), HostError> {
        unimplemented!()
    }
}
