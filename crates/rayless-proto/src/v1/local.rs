//! A client on this host (a command or a driver) and its node's daemon, over `daemon.sock` (mode 0600).
//!
//! The daemon checks with SO_PEERCRED that the client runs as the same user or as root. A client may have several
//! requests under way on one connection. Closing it cancels those not yet answered; a placed group lives on
//! until its driver's step sessions end.

use super::{
    control::{GroupSpec, NeedHave, PlacedNode, Placement, Refusal, ReportPart},
    status::{NodeState, StatusReport},
};
use crate::{
    ids::{GroupId, NodeId, PlacementGroupId, RequestId},
    resources::{Resources, Strategy},
};
use rkyv::{Archive, Deserialize, Serialize};

/// Client to daemon.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum ClientRequest {
    /// Who are you? Answered with `Identity`, also while there is no head.
    Identify,
    /// The state of the cluster.
    Status,
    /// Start a group. Answered by any number of `Waiting`, then `GroupPlaced` or `Refused`; after that, `NodeVerdict`s follow.
    CreateGroup(GroupSpec),
    /// End a group (`None`: all of the cluster).
    StopGroup(Option<GroupId>),
    /// A placement group.
    CreatePlacementGroup {
        /// For people.
        name: String,
        /// Its bundles.
        bundles: Vec<Resources>,
        /// Its strategy.
        strategy: Strategy,
        /// How long to wait, in milliseconds.
        wait_ms: u64,
    },
    /// Give it back.
    RemovePlacementGroup(PlacementGroupId),
    /// End this daemon and its groups.
    Stop,
    /// Make a new cluster token and have every node accept it beside the present one. For the daemon of the head. Answered with `Done`
    /// once it is on disk there; `Status` tells which nodes have it.
    RotateToken {
        /// After this many milliseconds the present one is no longer accepted; `None`: by `FinishRotation` only.
        overlap_ms: Option<u64>,
    },
    /// Accept the new token alone from here on. Refused while a living node has not taken it.
    FinishRotation,
    /// Another node's part of a report: logs, stacks, what its host is like.
    Report(NodeId),
}

/// A request with its number.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct ClientMessage {
    /// Counted up by the client.
    pub request: RequestId,
    /// What it wants.
    pub body: ClientRequest,
}

/// A leaf certificate with its key, as handed to a driver or a keeper: whoever has it is trusted as that node.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq)]
pub struct LeafBundle {
    /// The cluster CAs that are accepted (two while a token is being rotated), DER.
    pub ca_certificates: Vec<Vec<u8>>,
    /// The leaf as issued under each of those CAs, in the same order and for the same key, DER.
    pub certificates: Vec<Vec<u8>>,
    /// Its key, PKCS#8 DER.
    pub key: Vec<u8>,
}

impl core::fmt::Debug for LeafBundle {
    /// Never shows the key.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LeafBundle").finish_non_exhaustive()
    }
}

/// What a daemon is.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct Identity {
    /// Its node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Its `IP:port`.
    pub address: String,
    /// Its process.
    pub pid: u32,
    /// Its build.
    pub build: String,
    /// Whether it is the head.
    pub is_head: bool,
    /// `IP:port` of the head, empty for the head itself.
    pub head_address: String,
    /// Whether the head has accepted it (always for the head).
    pub joined: bool,
    /// What it waits for, or why it was refused; empty when joined.
    pub waiting_for: String,
    /// `--dead-after` in milliseconds.
    pub dead_after_ms: u64,
    /// `--step-deadline` in milliseconds; 0 for none.
    pub step_deadline_ms: u64,
    /// See [`super::control::NodeInfo::host_id`].
    pub host_id: String,
}

/// Daemon to client.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum ClientReply {
    /// Answer to `Identify`.
    Identity(Identity),
    /// Answer to `Status`.
    Status(StatusReport),
    /// The launch waits.
    Waiting(NeedHave),
    /// The launch waits for a head; one line.
    WaitingForHead(String),
    /// The group is placed: open a step session to each node's keeper and send `Launch`.
    GroupPlaced {
        /// The group.
        group: GroupId,
        /// A placement per rank, in ascending order.
        placements: Vec<Placement>,
        /// The nodes.
        nodes: Vec<PlacedNode>,
        /// Socket of the keeper on this host, where ranks are placed here.
        local_keeper: Option<String>,
        /// The driver's short-lived identity for sessions to other hosts.
        leaf: LeafBundle,
    },
    /// The placement group is placed.
    PlacementGroupPlaced {
        /// Its id.
        id: PlacementGroupId,
        /// Node of each bundle.
        nodes: Vec<NodeId>,
    },
    /// A node of one of this client's groups changed.
    NodeVerdict {
        /// The node.
        node: NodeId,
        /// Its name.
        name: String,
        /// What the head holds it for.
        state: NodeState,
        /// One line.
        cause: String,
    },
    /// The keeper of one of this client's groups is stopped, or runs again: nobody vouches for it while it is.
    KeeperStopped {
        /// The group.
        group: GroupId,
        /// The keeper's node.
        node: NodeId,
        /// Whether it is stopped now.
        stopped: bool,
    },
    /// Done, nothing more to say.
    Done,
    /// Refused.
    Refused {
        /// Why.
        refusal: Refusal,
        /// The table, where resources are short.
        table: Option<NeedHave>,
    },
    /// Answer to `Report`.
    Report(ReportPart),
}

/// A reply with the number of its request.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct DaemonMessage {
    /// Number of the request; 0 for a `NodeVerdict` or `KeeperStopped`.
    pub request: RequestId,
    /// What it says.
    pub body: ClientReply,
}
