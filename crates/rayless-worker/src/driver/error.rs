//! What can go wrong with a group, as its driver sees it.

use crate::{client::ClientError, links::BadWish};
use rayless_proto::ids::{CallId, NodeId, Rank};
use std::time::Duration;

/// Why a group is over. Every pending and every later call fails with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupFailure {
    /// A worker died.
    #[error("{cause}")]
    WorkerDied {
        /// Its rank.
        rank: Rank,
        /// Name of its node.
        node: String,
        /// One line that names rank, node, pid and how it ended.
        cause: String,
        /// Last lines of its output.
        tail: String,
    },
    /// A node, or the keeper on it, is gone.
    #[error("{cause}")]
    NodeDied {
        /// The node.
        node: NodeId,
        /// Its name.
        name: String,
        /// One line.
        cause: String,
    },
    /// A step took longer than its deadline, though every process was alive.
    #[error("{cause}")]
    Stuck {
        /// The ranks that made no progress; where all did, those that had not replied.
        ranks: Vec<Rank>,
        /// One line that names them and what they were in.
        cause: String,
        /// Where they were, a line per frame with its rank in front; may be empty.
        stacks: String,
    },
    /// The group was stopped by someone else (`rayless stop --group`), or its keeper gave it up.
    #[error("{cause}")]
    Ended {
        /// One line.
        cause: String,
    },
}

/// Why a call has no replies.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The method raised on `rank` (the lowest of those that did).
    #[error("call {call} raised on rank {rank}")]
    Raised {
        /// The call.
        call: CallId,
        /// The rank.
        rank: Rank,
        /// The pickled exception.
        payload: Vec<u8>,
    },
    /// Not all asked ranks answered in time. The late replies are dropped, the group stays usable.
    #[error("call {call} timed out after {after:?}: no reply from rank {}", list(missing))]
    TimedOut {
        /// The call.
        call: CallId,
        /// The limit.
        after: Duration,
        /// Who has not answered.
        missing: Vec<Rank>,
    },
    /// 64 calls are under way already.
    #[error(
        "{in_flight} calls are under way already; the slowest is rank {rank} on node {node}, which has not answered call {call}\nhint: wait for earlier calls before making more"
    )]
    TooManyInFlight {
        /// How many.
        in_flight: usize,
        /// Who holds them up.
        rank: Rank,
        /// Name of its node.
        node: String,
        /// The oldest call it owes.
        call: CallId,
    },
    /// The payload is larger than 1 GiB.
    #[error("a call of {0} bytes is over the limit of 1 GiB")]
    TooLarge(u64),
    /// A rank was asked that the group does not have.
    #[error("rank {rank} was asked, but the group has ranks 0 to {}", world_size - 1)]
    NoSuchRank {
        /// Which one.
        rank: Rank,
        /// Ranks there are.
        world_size: u32,
    },
    /// The group is over by a fault.
    #[error(transparent)]
    Failed(#[from] GroupFailure),
    /// The group was stopped by this driver.
    #[error("the group was stopped")]
    Stopped,
}

/// Why a group did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The daemon is not there, or refused (see [`ClientError::Refused`] for the table).
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A node's keeper could not be reached.
    #[error("cannot open a step session to node {name} at {address}: {cause}")]
    Unreachable {
        /// Name of the node.
        name: String,
        /// Its `IP:port` or socket.
        address: String,
        /// One line.
        cause: String,
    },
    /// Two processes of the group differ in a version that must be the same.
    #[error(
        "{component} differs: {left} has {left_version}, {right} has {right_version}\nhint: install the same {component} on both"
    )]
    Versions {
        /// `python`, `vllm`, …
        component: String,
        /// Who, for example `the driver`.
        left: String,
        /// Its version.
        left_version: String,
        /// Who else, for example `rank 3 on node b`.
        right: String,
        /// Its version.
        right_version: String,
    },
    /// The driver's environment wants something of links that is none.
    #[error(transparent)]
    Wish(#[from] BadWish),
    /// A worker did not come up, or a node was lost meanwhile.
    #[error(transparent)]
    Failed(#[from] GroupFailure),
    /// Not all ranks were ready in time.
    #[error("rank {} not ready after {after:?}", list(missing))]
    TimedOut {
        /// The limit.
        after: Duration,
        /// Who is not ready.
        missing: Vec<Rank>,
    },
    /// The caller's progress function said to give up.
    #[error("the start was given up")]
    GivenUp,
    /// This host's threads, descriptors or shared memory could not be set up.
    #[error("cannot set up the group on this host: {0}")]
    Io(#[from] std::io::Error),
}

/// `3`, or `3, 4 and 7`.
pub(crate) fn list(ranks: &[Rank]) -> String {
    let mut text = String::new();
    for (at, rank) in ranks.iter().enumerate() {
        if at > 0 {
            text.push_str(if at + 1 == ranks.len() { " and " } else { ", " });
        }
        text.push_str(&rank.to_string());
    }
    text
}
