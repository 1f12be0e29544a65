//! A daemon and a keeper, over the keeper's Unix socket (mode 0600).
//!
//! The daemon gives the keeper its [`KeeperConfig`] on a pipe at start (never in argv or the environment: it holds a
//! key). Later daemons of the same run dir connect to the socket; the first byte on every connection tells who calls:
//!
//! | first byte | caller | what follows |
//! |---|---|---|
//! | `D` | a daemon | frames of [`ToKeeper`] and [`FromKeeper`]; a TCP session is handed over as one `S` byte on a connection of its own |
//! | `S` | a daemon, handing over | the byte carries the session's descriptor (SCM_RIGHTS); then it closes |
//! | `L` | a driver on this host | a step session, see [`super::step`] |
//! | `T` | a worker of this host | a u32 (little endian): the rank that is to have this connection; then its own |

use super::{
    control::{HeldGroup, NodeEnv, RankAllocation, Requester, WorkerState},
    link::{LinkReport, LinkSettings},
    local::LeafBundle,
    step::{Look, RankLook},
};
use crate::ids::{GroupId, NodeId, Rank};
use rkyv::{Archive, Deserialize, Serialize};

/// All a keeper needs to know.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct KeeperConfig {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub name: String,
    /// Its number of ranks on all nodes.
    pub world_size: u32,
    /// Node of its driver.
    pub driver_node: NodeId,
    /// This node.
    pub node: NodeId,
    /// This node's name.
    pub node_name: String,
    /// This node's IP address.
    pub node_address: String,
    /// Run dir of the daemon: the socket is `keepers/<group>.sock`, the logs are in `logs/<group>/`.
    pub run_dir: String,
    /// Its ranks.
    pub ranks: Vec<RankAllocation>,
    /// UUIDs of the GPUs of each rank, in the order of `ranks`.
    pub gpu_uuids: Vec<Vec<String>>,
    /// Values that win over the driver's.
    pub node_env: Vec<NodeEnv>,
    /// Identity for step sessions.
    pub leaf: LeafBundle,
    /// Silence of a session after which its peer counts as dead, in milliseconds.
    pub dead_after_ms: u64,
    /// How long the keeper waits for the driver's first session, in milliseconds.
    pub driver_wait_ms: u64,
    /// What this node wants of links.
    pub links: LinkSettings,
    /// Whose request the group is started for: it holds that in mind until the driver has come.
    pub requester: Option<Requester>,
}

/// Daemon to keeper.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum ToKeeper {
    /// First message of each daemon: answered with `Held`, then changes follow.
    Watch,
    /// Kill the workers and end; empty cause for an orderly stop.
    Stop {
        /// One line.
        cause: String,
    },
    /// Shake hands with this identity from here on: the cluster's tokens have changed.
    Leaf(LeafBundle),
    /// The head's view of a peer of this group's sessions.
    NodeVerdict {
        /// The node.
        node: NodeId,
        /// What the head holds it for.
        state: super::status::NodeState,
    },
    /// What do the ranks do? Answered with `Looked`.
    Look(Look),
}

/// Keeper to daemon.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum FromKeeper {
    /// All that it holds.
    Held(HeldGroup),
    /// A worker changed.
    WorkerChanged {
        /// Its rank.
        rank: Rank,
        /// Its process.
        pid: u32,
        /// What it is now.
        state: WorkerState,
    },
    /// Answer to `Look`.
    Looked {
        /// All ranks of this keeper.
        ranks: Vec<RankLook>,
    },
    /// Ranks that make no progress while their driver waits for them.
    Stuck {
        /// One line that names them and what they are in.
        line: String,
    },
    /// A link of one of its ranks changed.
    Link(LinkReport),
    /// All processes are reaped; the keeper ends after this.
    Ended {
        /// Empty for an orderly end.
        cause: String,
    },
}
