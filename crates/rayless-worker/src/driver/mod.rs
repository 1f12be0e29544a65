//! The driver's side: start a group, call it, learn of its end.

mod error;

pub use error::{CallError, GroupFailure, StartError};

use rayless_proto::{
    ids::{CallId, GroupId, NodeId, PlacementGroupId, Rank},
    resources::{Resources, Strategy},
    v1::{
        control::{NeedHave, NodeEnv, PlacedNode, Placement},
        local::LeafBundle,
        step::Launch,
    },
};
use std::{path::PathBuf, sync::Arc, time::Duration};

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

/// Calls that the start and the life of a group make on the driver. Each runs on a thread of its own, never on the caller's
/// and never on the one that keeps the sessions alive, so that it may block.
#[derive(Default)]
pub struct Callbacks {
    /// Lines of the workers' output. Dropped (and counted) while this is slow.
    pub on_log: Option<Box<dyn Fn(LogLine) + Send>>,
    /// The group failed: once.
    pub on_failure: Option<Box<dyn FnOnce(GroupFailure) + Send>>,
}

/// A group whose keepers wait for its driver.
#[derive(Debug)]
pub struct Placed {}

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

impl Placed {
    /// A group placed by other means than the local daemon.
    pub fn from_parts(_parts: PlacedParts) -> Self {
        unimplemented!()
    }

    /// Its id.
    pub fn group(&self) -> GroupId {
        unimplemented!()
    }

    /// Its ranks in ascending order.
    pub fn ranks(&self) -> &[RankInfo] {
        unimplemented!()
    }

    /// Opens the sessions, starts the workers, and returns when every rank is ready and their versions agree. `timeout` bounds
    /// it from here on (loading code, not weights). `on_progress` runs on the calling thread; where it returns `false` the start is
    /// given up (it is called at least each 200 ms, with `None` where there is no news, so that signals can be looked at).
    ///
    /// # Errors
    /// [`StartError`]; whatever was started is ended.
    pub fn launch(
        self,
        _launch: Launch,
        _timeout: Duration,
        _callbacks: Callbacks,
        _on_progress: &mut dyn FnMut(Option<Progress>) -> bool,
    ) -> Result<WorkerGroup, StartError> {
        unimplemented!()
    }
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
    pub payload: Vec<u8>,
}

/// A running group. Dropping the last handle stops it. Cheap to clone; usable from any thread.
#[derive(Debug, Clone)]
pub struct WorkerGroup {}

impl WorkerGroup {
    /// Asks the local daemon to place a group; comes back when its keepers wait for this driver. `on_progress` as in [`Placed::launch`].
    ///
    /// # Errors
    /// [`StartError::Client`].
    pub fn place(
        _options: GroupOptions,
        _on_progress: &mut dyn FnMut(Option<Progress>) -> bool,
    ) -> Result<Placed, StartError> {
        unimplemented!()
    }

    /// Its id.
    pub fn id(&self) -> GroupId {
        unimplemented!()
    }

    /// Its ranks in ascending order.
    pub fn ranks(&self) -> &[RankInfo] {
        unimplemented!()
    }

    /// Process of each rank.
    pub fn pids(&self) -> Vec<(Rank, u32)> {
        unimplemented!()
    }

    /// Sends `payload` to every rank, to be run in the order of these calls. Never blocks: what the ring or a session does not take at
    /// once is sent as it can. `timeout` counts from now.
    ///
    /// # Errors
    /// [`CallError::TooManyInFlight`], [`CallError::TooLarge`], [`CallError::NoSuchRank`], [`CallError::Failed`], [`CallError::Stopped`].
    pub fn call(
        &self,
        _payload: impl Into<Arc<[u8]>>,
        _asked: &Asked,
        _timeout: Option<Duration>,
    ) -> Result<Call, CallError> {
        unimplemented!()
    }

    /// Why the group is over, if it failed.
    pub fn failure(&self) -> Option<GroupFailure> {
        unimplemented!()
    }

    /// Waits until the group fails (`Some`) or is stopped or `timeout` passes (`None`).
    pub fn wait_failed(&self, _timeout: Option<Duration>) -> Option<GroupFailure> {
        unimplemented!()
    }

    /// Ends the group: workers leave their loop, are killed after 2 s, and are reaped when this returns (within 5 s). Idempotent.
    pub fn stop(&self) {
        unimplemented!()
    }
}

/// A call under way. Dropping it lets the call run on; its replies are dropped.
#[derive(Debug)]
pub struct Call {}

impl Call {
    /// Its id.
    pub fn id(&self) -> CallId {
        unimplemented!()
    }

    /// Waits for the asked ranks' replies, in ascending rank.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn wait(&self) -> Result<Vec<Reply>, CallError> {
        unimplemented!()
    }

    /// As [`Self::wait`], but gives up after `timeout` or when a signal arrives (`None`); the call goes on.
    pub fn wait_for(&self, _timeout: Duration) -> Option<Result<Vec<Reply>, CallError>> {
        unimplemented!()
    }

    /// Whether [`Self::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        unimplemented!()
    }

    /// Runs `callback` when the call is done (at once where it is), on the group's callback thread. At most one per call.
    pub fn on_done(&self, _callback: Box<dyn FnOnce() + Send>) {
        unimplemented!()
    }
}
