//! Node and head: membership, placement and the life of groups.

use super::{
    link::{LinkPolicy, LinkReport, LinkSettings},
    rdma::RdmaInventory,
    status::{Event, StatusReport},
    token::TokenSet,
};
use crate::{
    ids::{ClusterId, GroupId, Incarnation, NodeId, PlacementGroupId, Rank, RequestId, Term, TokenMark},
    resources::{Allocation, Resources, Strategy},
};
use rkyv::{Archive, Deserialize, Serialize};

/// One GPU of a node, as found (NVML) or declared (`--gpus N`).
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct GpuInfo {
    /// Index on its node.
    pub index: u32,
    /// NVML's UUID; for declared GPUs `declared-<index>`.
    pub uuid: String,
    /// Product name; `declared` for declared GPUs.
    pub name: String,
    /// Total memory in bytes; 0 where unknown.
    pub memory_bytes: u64,
}

/// What a node says of itself when it joins.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Must be the hash of the leaf key it shook hands with.
    pub id: NodeId,
    /// Which life of it this is.
    pub incarnation: Incarnation,
    /// `--name`, else the host name.
    pub name: String,
    /// IP address at which peers reach it (its own view; the head compares it with what it sees).
    pub address: String,
    /// Port of its daemon, UDP and TCP.
    pub port: u16,
    /// Interface that carries `address`, empty where it could not be found out.
    pub interface: String,
    /// Equal boot id and network namespace mean the same host (`--host-id` overrides).
    pub host_id: String,
    /// All that it offers.
    pub resources: Resources,
    /// Its GPUs; as many as the GPU resource.
    pub gpus: Vec<GpuInfo>,
    /// `rayless`, `vllm`, `torch`, `cuda`, `python`, `kernel`, … to version; for people and launch checks.
    pub versions: Vec<(String, String)>,
    /// Environment of every worker of this node, with where each value came from.
    pub node_env: Vec<NodeEnv>,
    /// What its user set for links.
    pub links: LinkSettings,
    /// Its RDMA devices, and what is wrong with them.
    pub rdma: RdmaInventory,
}

/// One variable of promise 8: what it is on this node and who said so.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct NodeEnv {
    /// For example `GLOO_SOCKET_IFNAME`.
    pub name: String,
    /// For example `eth0`.
    pub value: String,
    /// For example `set by hand on this node` or `interface of the route to the head`.
    pub source: String,
}

/// A node's part of a running group, told at a rejoin so that any head can re-adopt it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct HeldGroup {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub name: String,
    /// Its number of ranks on all nodes.
    pub world_size: u32,
    /// Node of its driver.
    pub driver_node: NodeId,
    /// What its ranks on this node hold.
    pub ranks: Vec<RankAllocation>,
    /// Processes of those ranks, in the same order; 0 before their start.
    pub pids: Vec<u32>,
    /// State of those ranks, in the same order.
    pub states: Vec<WorkerState>,
    /// Ends of links that those ranks have.
    pub links: Vec<LinkReport>,
    /// The request that it was started for, until its driver has come: a head that did not start it can answer that request, or
    /// end what nobody waits for.
    pub launch: Option<Requester>,
}

/// Whom the answer to a request goes to. The incarnation keeps a restarted daemon from being taken for its predecessor.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Requester {
    /// The node whose client asked.
    pub node: NodeId,
    /// In which life of it.
    pub incarnation: Incarnation,
    /// Its own number for the request.
    pub request: RequestId,
}

/// A group that is over, as whoever comes later should know it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct EndedGroup {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub name: String,
    /// Its number of ranks on all nodes.
    pub world_size: u32,
    /// Node of its driver.
    pub driver_node: NodeId,
    /// Empty where it was stopped in order; otherwise the one line of cause.
    pub cause: String,
    /// When, in microseconds since the Unix epoch on the clock of whoever says so: for the order only.
    pub time_us: u64,
    /// Ranks by node, of the nodes that whoever says so knows of.
    pub ranks: Vec<(NodeId, Vec<Rank>)>,
}

/// What one rank holds on its node.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RankAllocation {
    /// The rank.
    pub rank: Rank,
    /// Its share of the node.
    pub allocation: Allocation,
    /// Placement group and bundle that it was carved from, if any.
    pub placement_group: Option<(PlacementGroupId, u32)>,
}

/// A placement group's part on one node, told at a rejoin.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct HeldPlacementGroup {
    /// The placement group.
    pub id: PlacementGroupId,
    /// Its name.
    pub name: String,
    /// Its strategy.
    pub strategy: Strategy,
    /// Number of its bundles on all nodes.
    pub bundle_count: u32,
    /// Bundle index and what it holds here.
    pub bundles: Vec<(u32, Allocation)>,
}

/// Life of a worker as `status` shows it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum WorkerState {
    /// Process started, not yet able to take calls.
    Starting,
    /// Waits for a call.
    Ready,
    /// Runs a call.
    Busy,
    /// Gone.
    Dead,
}

/// A request for a group of workers.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct GroupSpec {
    /// For people; need not be unique.
    pub name: String,
    /// One bundle per rank.
    pub bundles: Vec<Resources>,
    /// How they may lie.
    pub strategy: Strategy,
    /// Where the driver runs: rank 0 goes there if a bundle fits there at all.
    pub driver_node: NodeId,
    /// Process id of the driver on its node.
    pub driver_pid: u32,
    /// How long to wait for nodes and resources, in milliseconds; 0 refuses at once.
    pub wait_ms: u64,
    /// Carve the bundles out of this placement group instead of the nodes.
    pub placement_group: Option<PlacementGroupId>,
    /// Versions the driver runs with (`python`, `vllm`, …): every chosen node must match those that both name.
    pub driver_versions: Vec<(String, String)>,
}

/// Where one rank goes.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// The rank.
    pub rank: Rank,
    /// Its place among the ranks of its node, from 0.
    pub local_rank: u32,
    /// Its node.
    pub node: NodeId,
    /// What it holds there.
    pub allocation: Allocation,
    /// UUIDs of its GPUs, in the order of `allocation.gpus`.
    pub gpu_uuids: Vec<String>,
}

/// A node as a driver needs to know it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct PlacedNode {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// IP address of its daemon.
    pub address: String,
    /// Port of its daemon.
    pub port: u16,
    /// See [`NodeInfo::host_id`].
    pub host_id: String,
    /// See [`NodeInfo::node_env`].
    pub node_env: Vec<NodeEnv>,
    /// See [`NodeInfo::versions`].
    pub versions: Vec<(String, String)>,
    /// What its user set for links.
    pub link_policy: LinkPolicy,
    /// Whether it has an RDMA device, usable or not.
    pub has_rdma: bool,
}

/// One line of the need/have table of a launch that waits.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct NeedHaveRow {
    /// The node.
    pub node: String,
    /// Its state in a word (`alive`, `suspect`, …).
    pub state: String,
    /// All it has.
    pub total: Resources,
    /// What is free.
    pub available: Resources,
    /// Who holds what: GPU index (`None`: other resources) and group name or id.
    pub held: Vec<(Option<u32>, String)>,
}

/// Why a launch waits or was refused, with all that is needed to see it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct NeedHave {
    /// One line: what is short.
    pub cause: String,
    /// The sum of what the launch needs.
    pub need: Resources,
    /// Number of bundles.
    pub bundles: u32,
    /// A row per node.
    pub rows: Vec<NeedHaveRow>,
}

/// Why something was refused; the kind decides the exit code of the command.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// What kind of refusal.
    pub kind: RefusalKind,
    /// One line of cause.
    pub cause: String,
    /// What to do about it; may be empty.
    pub hint: String,
}

/// Kinds of refusal that a caller tells apart.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum RefusalKind {
    /// Policy: identity, version, NAT. Exit code 4.
    Policy,
    /// Not enough nodes or resources (within the wait asked for). Exit code 1.
    Resources,
    /// The request makes no sense (no such group, empty bundle, …). Exit code 2.
    Invalid,
    /// No head is known or reachable. Exit code 3.
    NoHead,
    /// It was tried and failed. Exit code 1.
    Failed,
}

/// Node to head.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum ToHead {
    /// First message of a session, also after a head's restart.
    Join {
        /// The node.
        info: NodeInfo,
        /// IP address of the head as this node dialled it.
        head_address: String,
        /// The highest term that this node was ever a member under. A head that finds a higher one than its own has been replaced.
        seen: Option<HeadTerm>,
        /// Groups that it still runs: keepers that are starting, up, or ending and not yet reaped.
        held: Vec<HeldGroup>,
        /// Groups whose part here has ended in this life of the daemon (the last 64 will do), with the cause that
        /// `GroupEnded` gave: that message may have been lost with its session, or the head may be another one.
        ended: Vec<EndedGroup>,
        /// Launches that clients of this life still wait for: the requests themselves come again after the welcome.
        asks: Vec<RequestId>,
        /// Launches of this life that were answered with a placement to a client that is still there (the last 64 of each).
        told: Vec<RequestId>,
        /// Placement groups that it still holds bundles of.
        held_placement_groups: Vec<HeldPlacementGroup>,
    },
    /// The node leaves of its own will; its groups are already stopped.
    Leave,
    /// A client of this node wants a group.
    CreateGroup {
        /// Echoed in each answer.
        request: RequestId,
        /// What it wants.
        spec: GroupSpec,
    },
    /// That client went away or gave up before its group was placed.
    CancelRequest {
        /// Which request.
        request: RequestId,
    },
    /// A client wants a placement group.
    CreatePlacementGroup {
        /// Echoed in each answer.
        request: RequestId,
        /// For people.
        name: String,
        /// Its bundles.
        bundles: Vec<Resources>,
        /// Its strategy.
        strategy: Strategy,
        /// How long to wait, in milliseconds.
        wait_ms: u64,
    },
    /// A client gives a placement group back; groups carved out of it are stopped.
    RemovePlacementGroup {
        /// Echoed in the answer.
        request: RequestId,
        /// Which one.
        id: PlacementGroupId,
    },
    /// A client wants a group ended (`rayless stop --group`; `None`: all).
    StopGroup {
        /// Echoed in the answer.
        request: RequestId,
        /// Which one.
        group: Option<GroupId>,
    },
    /// A client wants the state of the cluster.
    Status {
        /// Echoed in the answer.
        request: RequestId,
    },
    /// The keeper of a group is up on this node and takes sessions.
    KeeperReady {
        /// The group.
        group: GroupId,
    },
    /// A worker changed state (`Busy` and `Ready` are reported at most once a second).
    WorkerChanged {
        /// The group.
        group: GroupId,
        /// Its rank.
        rank: Rank,
        /// Its process.
        pid: u32,
        /// What it is now.
        state: WorkerState,
    },
    /// An end of a link of this node's ranks changed (counters alone are told at most once a second). One that is closed is
    /// forgotten.
    LinkChanged {
        /// The group.
        group: GroupId,
        /// How it is now.
        report: LinkReport,
    },
    /// This node's part of the group is over and its processes are reaped: what it held is free from here on (so
    /// `GpuDraining` comes before). Also the answer to a `StopKeeper` for a group that the node does not hold.
    GroupEnded {
        /// The group.
        group: GroupId,
        /// Empty where it was stopped in order; otherwise the one line of cause.
        cause: String,
    },
    /// Ranks of a group on this node make no progress while their driver waits for them: an event for `status`.
    RanksStuck {
        /// The group.
        group: GroupId,
        /// One line that names them and what they are in.
        line: String,
    },
    /// The process of a keeper is stopped (SIGSTOP, a debugger's pause), or runs again: the kernel says so, no silence is guessed at.
    KeeperStopped {
        /// The group.
        group: GroupId,
        /// Whether it is stopped now.
        stopped: bool,
    },
    /// Memory of these GPUs is not back yet (`true`) or is back (`false`).
    GpuDraining {
        /// GPU index and whether it drains.
        gpus: Vec<(u32, bool)>,
    },
    /// What was found out after the join (slow probes: GPUs' memory, versions).
    Update {
        /// The node with all it knows now. Resources may only grow by what was unknown at the join.
        info: NodeInfo,
    },
    /// The tokens that this node accepts: after each welcome, and as the answer to `Tokens`.
    TokensHeld {
        /// Their marks, the current one's first.
        marks: Vec<TokenMark>,
        /// Why the ones of the last `Tokens` could not be taken; empty otherwise.
        problem: String,
    },
    /// A client wants another node's part of a report. Answered with `ReportPart`, or refused where that node is not connected.
    AskReport {
        /// Echoed in the answer.
        request: RequestId,
        /// Whose.
        node: NodeId,
    },
    /// What this node was asked for by `MakeReport`.
    ReportMade {
        /// Who asked.
        by: Requester,
        /// What it has to say.
        part: ReportPart,
    },
}

/// A node's part of a report.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct ReportPart {
    /// A `.tar.gz` without secrets, at most [`MAX_REPORT_PART`](crate::limits::MAX_REPORT_PART) bytes; empty where it could not be made.
    pub archive: Vec<u8>,
    /// Why not, in one line; empty otherwise.
    pub cause: String,
}

/// In whose name a head speaks.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadTerm {
    /// Its cluster; terms of different clusters are not compared.
    pub cluster: ClusterId,
    /// Its term.
    pub term: Term,
}

/// All that travels from a head to a node: the message, and in whose name. A node that knows a higher term of the same cluster
/// does nothing of what it says.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct FromHead {
    /// The sender's; for [`ToNode::Elsewhere`] that of the head that the sender knows of.
    pub by: HeadTerm,
    /// What it says.
    pub message: ToNode,
}

/// Head to node.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum ToNode {
    /// The node is a member from here on.
    Welcome {
        /// The cluster.
        cluster: ClusterId,
        /// The head's node.
        head: NodeId,
        /// The node's IP address as the head sees it.
        your_address: String,
        /// The cluster's `--dead-after`, in milliseconds.
        dead_after_ms: u64,
        /// `IP:port` of this head and then of its standbys: where to dial when it is gone. Empty without a store.
        heads: Vec<String>,
    },
    /// Whoever says so is not the head now. Carries no authority: only a hint where to dial next.
    Elsewhere {
        /// `IP:port` of the head, where it is known.
        head: Option<String>,
        /// One line.
        cause: String,
    },
    /// The standbys have changed: `heads` of the welcome anew.
    Heads(Vec<String>),
    /// The node is not taken; the head closes after this.
    Refused(Refusal),
    /// This incarnation was declared dead: kill its workers at once, then join again as a new one.
    Fenced {
        /// Why it was declared dead.
        cause: String,
    },
    /// Start a keeper for these ranks.
    StartKeeper {
        /// The group.
        group: GroupId,
        /// Its name.
        name: String,
        /// Its number of ranks on all nodes.
        world_size: u32,
        /// Node of its driver.
        driver_node: NodeId,
        /// The ranks of this node.
        ranks: Vec<RankAllocation>,
        /// Whose request it is for: see [`HeldGroup::launch`].
        requester: Option<Requester>,
    },
    /// End this node's part of the group, now.
    StopKeeper {
        /// The group.
        group: GroupId,
        /// Empty for an orderly stop.
        cause: String,
    },
    /// Hold these bundles (told so that a later head can learn it from the node), or let go of them.
    HoldPlacementGroup(HeldPlacementGroup),
    /// Let go of the bundles of this placement group.
    DropPlacementGroup(PlacementGroupId),
    /// Not enough yet; comes within a second of the request and then every ten.
    Waiting {
        /// Which request.
        request: RequestId,
        /// What is short.
        table: NeedHave,
    },
    /// The group is placed and all its keepers take sessions.
    GroupPlaced {
        /// Which request.
        request: RequestId,
        /// The group.
        group: GroupId,
        /// A placement per rank, in ascending order.
        placements: Vec<Placement>,
        /// The nodes named in `placements`.
        nodes: Vec<PlacedNode>,
    },
    /// The placement group is placed.
    PlacementGroupPlaced {
        /// Which request.
        request: RequestId,
        /// Its id.
        id: PlacementGroupId,
        /// Node of each bundle.
        nodes: Vec<NodeId>,
    },
    /// The request is done, with nothing more to say.
    Done {
        /// Which request.
        request: RequestId,
    },
    /// The request is refused.
    RequestRefused {
        /// Which request.
        request: RequestId,
        /// Why.
        refusal: Refusal,
        /// The need/have table, where resources are what is short.
        table: Option<NeedHave>,
    },
    /// Answer to `Status`.
    Status {
        /// Which request.
        request: RequestId,
        /// The state of the cluster.
        report: StatusReport,
    },
    /// A node of a group whose driver or ranks are on the receiving node changed; goes on to the driver.
    NodeVerdict {
        /// The node.
        node: NodeId,
        /// Its name.
        name: String,
        /// What the head holds it for.
        state: super::status::NodeState,
        /// One line of cause.
        cause: String,
    },
    /// The keeper of a group whose driver is on the receiving node is stopped, or runs again; goes on to the driver.
    KeeperStopped {
        /// The group.
        group: GroupId,
        /// The keeper's node.
        node: NodeId,
        /// Whether it is stopped now.
        stopped: bool,
    },
    /// Accept these tokens and no others from here on; answered with `TokensHeld` once they are on disk.
    Tokens(TokenSet),
    /// Something that the node's own log should have too.
    Notice(Event),
    /// To a standby: what the head knows of the past, so that a later head can show it. At most one such part each
    /// [`crate::limits::STORY_PERIOD`], plus one for each 16 groups.
    Story {
        /// Whether this is the beginning: what was told before on another session is to be forgotten.
        whole: bool,
        /// Events, oldest first.
        events: Vec<Event>,
        /// Groups that are over, oldest first.
        ended: Vec<EndedGroup>,
    },
    /// Make this node's part of a report; answered with `ReportMade`. The head keeps nothing of it: who asked travels with the question and comes
    /// back with the answer.
    MakeReport(Requester),
    /// Answer to `AskReport`.
    ReportPart {
        /// Which request.
        request: RequestId,
        /// What that node has to say.
        part: ReportPart,
    },
}
