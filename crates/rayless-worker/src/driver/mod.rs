//! The driver's side: start a group, call it, learn of its end.
//!
//! Threads of a group: the caller's own, which while it waits for a call does all of the receiving; the *pump*, which does it while nobody
//! waits and keeps the sessions alive (`shared`); and one that runs the driver's callbacks (`callbacks`). What they share is `core`.

mod callbacks;
mod calls;
mod connect;
mod core;
mod error;
mod peer;
mod placed;
mod shared;
mod stuck;
mod versions;

pub use callbacks::Callbacks;
pub use error::{CallError, GroupFailure, StartError};
pub use placed::Placed;
pub use stuck::StuckReport;

use self::core::{Core, End};
use calls::Slot;

use rayless_proto::{
    ids::{CallId, GroupId, NodeId, PlacementGroupId, Rank},
    limits::REAP_TIMEOUT,
    resources::{Resources, Strategy},
    v1::{
        control::{NeedHave, NodeEnv, PlacedNode, Placement},
        local::LeafBundle,
        status::LinkStatus,
    },
};
use shared::Shared;
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// What to place.
#[derive(Debug, Clone)]
pub struct GroupOptions {
    /// Run dir of the local daemon.
    pub run_dir: PathBuf,
    /// For people.
    pub name: String,
    /// One bundle per rank.
    pub bundles: Vec<Resources>,
    /// How they may lie.
    pub strategy: Strategy,
    /// Carve the bundles out of this placement group.
    pub placement_group: Option<PlacementGroupId>,
    /// How long to wait for nodes and resources.
    pub wait: Duration,
    /// `python`, `rayless`, `vllm`, `torch`, `cuda` of the driver: checked against those of every rank.
    pub versions: Vec<(String, String)>,
}

/// News of a start.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Not enough yet: the table. At once, then every 10 s.
    Waiting(NeedHave),
    /// No head yet; one line.
    WaitingForHead(String),
    /// The workers of a node are started.
    Launched {
        /// Name of the node.
        node: String,
        /// Rank and process.
        pids: Vec<(Rank, u32)>,
    },
    /// A rank takes calls.
    Ready {
        /// The rank.
        rank: Rank,
        /// How many are ready now.
        ready: usize,
        /// Of how many.
        of: usize,
    },
}

/// A line of a worker's output.
#[derive(Debug, Clone)]
pub struct LogLine {
    /// Whose.
    pub rank: Rank,
    /// Whether it came from stderr.
    pub stderr: bool,
    /// Without its newline.
    pub text: String,
}

/// One rank of a placed group.
#[derive(Debug, Clone)]
pub struct RankInfo {
    /// The rank.
    pub rank: Rank,
    /// Its place among the ranks of its node.
    pub local_rank: u32,
    /// Its node.
    pub node: NodeId,
    /// Name of its node.
    pub node_name: String,
    /// IP address of its node.
    pub address: String,
    /// Indices of its GPUs on its node.
    pub gpus: Vec<u32>,
    /// UUIDs of its GPUs.
    pub gpu_uuids: Vec<String>,
    /// Values of its node that win over the driver's environment.
    pub node_env: Vec<NodeEnv>,
}

/// The parts of a placement, for a driver without a daemon (tests).
#[derive(Debug, Clone)]
pub struct PlacedParts {
    /// The group.
    pub group: GroupId,
    /// A placement per rank, in ascending order.
    pub placements: Vec<Placement>,
    /// The nodes.
    pub nodes: Vec<PlacedNode>,
    /// This node.
    pub local_node: NodeId,
    /// Socket of the keeper on this host, where ranks are placed here.
    pub local_keeper: Option<PathBuf>,
    /// The driver's identity.
    pub leaf: LeafBundle,
    /// Silence of a session after which its peer counts as dead.
    pub dead_after: Duration,
    /// See [`GroupOptions::versions`].
    pub versions: Vec<(String, String)>,
}

/// Which ranks' replies a call waits for. Every rank runs it in any case.
#[derive(Debug, Clone)]
pub enum Asked {
    /// All.
    All,
    /// These; none means that nobody replies and the call is done once it is sent.
    Ranks(Vec<Rank>),
}

/// One rank's reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The rank.
    pub rank: Rank,
    /// What it gave to `Worker::reply`.
    pub payload: Arc<Vec<u8>>,
}

/// A running group. Dropping the last handle stops it (in the process that started it: a forked child's copy does nothing). Cheap to
/// clone; usable from any thread.
#[derive(Clone)]
pub struct WorkerGroup {
    inner: Arc<Inner>,
}

struct Inner {
    id: GroupId,
    ranks: Arc<[RankInfo]>,
    pids: OnceLock<Vec<(Rank, u32)>>,
    shared: Arc<Shared>,
    pump: Mutex<Option<JoinHandle<()>>>,
    /// The process that started it.
    owner: u32,
}

impl fmt::Debug for WorkerGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerGroup").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

impl WorkerGroup {
    fn new(id: GroupId, ranks: Arc<[RankInfo]>, shared: Arc<Shared>, pump: JoinHandle<()>) -> Self {
        let pump = Mutex::new(Some(pump));
        let owner = std::process::id();
        Self { inner: Arc::new(Inner { id, ranks, pids: OnceLock::new(), shared, pump, owner }) }
    }

    fn set_pids(&self, pids: Vec<(Rank, u32)>) {
        let _ = self.inner.pids.set(pids);
    }

    /// Asks the local daemon to place a group; comes back when its keepers wait for this driver. `on_progress` as in [`Placed::launch`].
    ///
    /// # Errors
    /// [`StartError::Client`], and [`StartError::GivenUp`] where `on_progress` said so.
    pub fn place(
        options: GroupOptions,
        on_progress: &mut dyn FnMut(Option<Progress>) -> bool,
    ) -> Result<Placed, StartError> {
        placed::place(options, on_progress)
    }

    /// Its id.
    pub fn id(&self) -> GroupId {
        self.inner.id
    }

    /// Its ranks in ascending order.
    pub fn ranks(&self) -> &[RankInfo] {
        &self.inner.ranks
    }

    /// Process of each rank, in ascending rank.
    pub fn pids(&self) -> Vec<(Rank, u32)> {
        self.inner.pids.get().cloned().unwrap_or_default()
    }

    /// Sends `payload` to every rank, to be run in the order of these calls. Never blocks: what the ring or a session does not take at
    /// once is sent as it can. `timeout` counts from now.
    ///
    /// # Errors
    /// [`CallError::TooManyInFlight`], [`CallError::TooLarge`], [`CallError::NoSuchRank`], [`CallError::Failed`], [`CallError::Stopped`].
    pub fn call(
        &self,
        payload: impl Into<Arc<[u8]>>,
        asked: &Asked,
        timeout: Option<Duration>,
    ) -> Result<Call, CallError> {
        self.send(payload.into(), asked, timeout, None)
    }

    /// As [`Self::call`], for a call that is known to be short: where it takes longer than `deadline`, the group is ended with
    /// [`GroupFailure::Stuck`]. The time counts from when no earlier call is under way any more.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn step(
        &self,
        payload: impl Into<Arc<[u8]>>,
        asked: &Asked,
        timeout: Option<Duration>,
        deadline: Duration,
    ) -> Result<Call, CallError> {
        self.send(payload.into(), asked, timeout, Some(deadline))
    }

    fn send(
        &self,
        payload: Arc<[u8]>,
        asked: &Asked,
        timeout: Option<Duration>,
        step_deadline: Option<Duration>,
    ) -> Result<Call, CallError> {
        let world_size = self.inner.ranks.len() as u32;
        let asked = match asked {
            Asked::All => (0..world_size).collect(),
            Asked::Ranks(ranks) => {
                if let Some(rank) = ranks.iter().find(|rank| **rank >= world_size) {
                    return Err(CallError::NoSuchRank { rank: *rank, world_size });
                }
                let mut ranks = ranks.clone();
                ranks.sort_unstable();
                ranks.dedup();
                ranks
            }
        };
        let (id, slot) = self.inner.shared.with(|core| core.call(payload, asked, timeout, step_deadline))?;
        Ok(Call { id, slot, shared: Arc::clone(&self.inner.shared) })
    }

    /// Its tensor links as their ends last reported them, in the order of ranks and channels; those of a group that failed as they were
    /// then, of one that was stopped none.
    pub fn links(&self) -> Vec<LinkStatus> {
        self.inner.shared.with(|core| LinkStatus::of_group(self.inner.id, &core.links))
    }

    /// Why the group is over, if it failed.
    pub fn failure(&self) -> Option<GroupFailure> {
        self.inner.shared.with(|core| match &core.end {
            Some(End::Failed(failure)) => Some(failure.clone()),
            _ => None,
        })
    }

    /// Waits until the group fails (`Some`) or is stopped or `timeout` passes (`None`).
    pub fn wait_failed(&self, timeout: Option<Duration>) -> Option<GroupFailure> {
        self.inner.shared.wait_failed(timeout)
    }

    /// Ends the group: workers leave their loop, are killed after 2 s, and are reaped when this returns (within 8 s; a failed group
    /// within 5 s). Idempotent.
    pub fn stop(&self) {
        self.inner.stop();
    }
}

impl Inner {
    fn stop(&self) {
        self.shared.with(Core::stop);
        let pump = self.pump.lock().unwrap_or_else(PoisonError::into_inner).take();
        match pump {
            Some(pump) => {
                let _ = pump.join();
            }
            // Another thread is in here already.
            None => self.shared.wait_change(Instant::now() + 2 * REAP_TIMEOUT, |core| core.over),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A forked child has a copy of everything but the threads; the sessions are its parent's.
        if self.owner == std::process::id() {
            self.stop();
        }
    }
}

/// A call under way. Dropping it lets the call run on; its replies are dropped.
pub struct Call {
    id: CallId,
    slot: Slot,
    shared: Arc<Shared>,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("id", &self.id).field("done", &self.is_done()).finish()
    }
}

impl Call {
    /// Its id.
    pub const fn id(&self) -> CallId {
        self.id
    }

    /// Waits for the asked ranks' replies, in ascending rank. The waiting thread receives by itself, which is the quickest way to them.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn wait(&self) -> Result<Vec<Reply>, CallError> {
        self.shared.wait(&self.slot)
    }

    /// As [`Self::wait`], but gives up after `timeout` or when a signal arrives (`None`); the call goes on.
    pub fn wait_for(&self, timeout: Duration) -> Option<Result<Vec<Reply>, CallError>> {
        self.shared.wait_for(&self.slot, timeout)
    }

    /// Whether [`Self::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.slot.get().is_some()
    }

    /// Asked ranks that have not answered yet.
    pub fn missing(&self) -> Vec<Rank> {
        if self.is_done() { Vec::new() } else { self.shared.with(|core| core.missing(self.id)) }
    }

    /// Runs `callback` when the call is done (at once where it is), on the group's callback thread. At most one per call.
    pub fn on_done(&self, callback: Box<dyn FnOnce() + Send>) {
        self.shared.with(|core| core.on_done(self.id, callback));
    }
}
