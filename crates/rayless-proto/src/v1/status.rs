//! The state of a cluster: the fields of `rayless status --json` (names are a contract; fields may be added).

use super::control::{NodeEnv, WorkerState};
use crate::{
    ids::{ClusterId, GroupId, NodeId, PlacementGroupId, Rank, Term, TokenMark},
    resources::Resources,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Everything.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct StatusReport {
    /// `cluster.id`
    pub cluster: ClusterId,
    /// `cluster.head`
    pub head: NodeId,
    /// `cluster.term`; 0 without a store
    pub term: Term,
    /// `cluster.heads`: the active one first; empty without a store
    pub heads: Vec<HeadSeat>,
    /// `cluster.protocol`
    pub protocol: u16,
    /// `cluster.uptime_s`, here in milliseconds
    pub uptime_ms: u64,
    /// Handshakes refused since the head started (wrong token, malformed, too many at once).
    pub refused_handshakes: u64,
    /// `cluster.token`, and `has_token` of each node
    pub token: TokenStatus,
    /// `nodes`
    pub nodes: Vec<NodeStatus>,
    /// `groups`
    pub groups: Vec<GroupStatus>,
    /// `placement_groups`
    pub placement_groups: Vec<PlacementGroupStatus>,
    /// `links`
    pub links: Vec<LinkStatus>,
    /// `events`, oldest first
    pub events: Vec<Event>,
}

/// A daemon that is the head, or stands by to be.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct HeadSeat {
    /// Its node.
    pub node: NodeId,
    /// Its node's name.
    pub name: String,
    /// `IP:port` of its daemon.
    pub address: String,
    /// Whether it is the head now.
    pub active: bool,
}

/// The cluster's token as people see it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
pub struct TokenStatus {
    /// Mark of the current one.
    pub mark: Option<TokenMark>,
    /// Whether the one before it is still accepted.
    pub rotating: bool,
    /// Milliseconds until it no longer is, where an overlap was given.
    pub left_ms: Option<u64>,
    /// Living nodes that do not accept what the head accepts, each with its reason where it gave one.
    pub behind: Vec<(NodeId, String)>,
}

/// What the head holds a node for.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeState {
    /// Heard of in time.
    Alive,
    /// Silent for longer than half the limit.
    Suspect,
    /// Silent for longer than the limit, or its connection was lost for good.
    Dead,
    /// Left of its own will.
    Left,
}

impl NodeState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Left => "left",
        }
    }
}

impl WorkerState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Dead => "dead",
        }
    }
}

/// One node.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct NodeStatus {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// `IP:port` of its daemon.
    pub address: String,
    /// Whether it is the head.
    pub is_head: bool,
    /// What the head holds it for.
    pub state: NodeState,
    /// Which life of it.
    pub incarnation: u64,
    /// Milliseconds since it was last heard of; 0 for the head itself.
    pub last_seen_ms: u64,
    /// Last measured round trip in microseconds; 0 before the first and for the head itself.
    pub rtt_us: u64,
    /// All it has.
    pub resources: Resources,
    /// What is free.
    pub available: Resources,
    /// Its GPUs.
    pub gpus: Vec<GpuStatus>,
    /// Component to version.
    pub versions: Vec<(String, String)>,
    /// Interface in use.
    pub interface: String,
    /// Environment that its workers get, with sources.
    pub node_env: Vec<NodeEnv>,
}

/// State of a GPU.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum GpuState {
    /// Nothing of ours on it.
    Free,
    /// Some or all of it is held.
    Held,
    /// Given back, but its memory is not free yet.
    Draining,
}

impl GpuState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Held => "held",
            Self::Draining => "draining",
        }
    }
}

/// One GPU.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct GpuStatus {
    /// Index on its node.
    pub index: u32,
    /// UUID.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Total memory in bytes, 0 where unknown.
    pub memory_bytes: u64,
    /// Its state.
    pub state: GpuState,
    /// Groups with a share of it.
    pub held_by: Vec<GroupId>,
}

/// Life of a group.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum GroupState {
    /// Placed; its keepers or workers are starting.
    Starting,
    /// All workers took their first call.
    Running,
    /// Ended by a fault.
    Failed,
    /// Ended in order.
    Stopped,
}

impl GroupState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

/// One group.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct GroupStatus {
    /// Its id.
    pub id: GroupId,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: GroupState,
    /// Why it ended; empty otherwise.
    pub cause: String,
    /// Node of its driver.
    pub driver_node: NodeId,
    /// Process of its driver.
    pub driver_pid: u32,
    /// Its workers in ascending rank.
    pub workers: Vec<WorkerStatus>,
}

/// One worker.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct WorkerStatus {
    /// Its rank.
    pub rank: Rank,
    /// Its node.
    pub node: NodeId,
    /// Its process; 0 before its start.
    pub pid: u32,
    /// Its state.
    pub state: WorkerState,
    /// Indices of its GPUs.
    pub gpus: Vec<u32>,
}

/// One placement group.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct PlacementGroupStatus {
    /// Its id.
    pub id: PlacementGroupId,
    /// Its name.
    pub name: String,
    /// Its strategy, in Ray's spelling.
    pub strategy: String,
    /// Resources and node of each bundle.
    pub bundles: Vec<(Resources, NodeId)>,
}

/// One tensor link.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct LinkStatus {
    /// Its group.
    pub group: GroupId,
    /// Sending rank.
    pub from: Rank,
    /// Receiving rank.
    pub to: Rank,
    /// `shm`, `rdma` or `tcp`.
    pub transport: String,
    /// RDMA device, else empty.
    pub device: String,
    /// GID, else empty.
    pub gid: String,
    /// Path MTU in bytes, 0 where it has none.
    pub mtu: u32,
    /// Transport and reason of each that was not taken.
    pub rejected: Vec<(String, String)>,
}

/// Something that happened.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Microseconds since the Unix epoch on the head's clock.
    pub time_us: u64,
    /// For example `node-dead`, `group-failed`, `handshake-refused`.
    pub kind: String,
    /// One line.
    pub cause: String,
}
