//! Why there is no link.

use rayless_fabric::LinkName;
use rayless_proto::v1::link::LinkTransport;
use std::time::Duration;

/// A link was not opened. It can be asked for again, but for [`LinkFault::Over`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{link}, from node {from_node} to node {to_node}: {fault}")]
pub struct LinkError {
    /// The link, and with it both ranks.
    pub link: LinkName,
    /// Name of the sender's node; `?` for a rank that there is not.
    pub from_node: String,
    /// Name of the receiver's node.
    pub to_node: String,
    /// What is wrong.
    pub fault: Box<LinkFault>,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    /// The caller's: no such rank, itself, a link that is open or asked for already.
    #[error("{0}")]
    Caller(String),
    /// The other end did not come, or did not get through, in time.
    #[error("{what} within {:.1} s{last}\nhint: {hint}", within.as_secs_f64())]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        within: Duration,
        /// What went wrong at the last try, in brackets; empty where nothing did.
        last: String,
        /// What to do.
        hint: String,
    },
    /// The caller's check said so.
    #[error("interrupted")]
    Interrupted,
    /// No transport is both allowed and works: all of them with their reasons, best first.
    #[error("no transport: {}\nhint: {hint}", reasons(rejected))]
    NoTransport {
        /// Transport and reason.
        rejected: Vec<(LinkTransport, String)>,
        /// What to do.
        hint: String,
    },
    /// The other end does not take this link, with its reason; or it is not of this cluster or version.
    #[error("{0}")]
    Refused(String),
    /// The group is over, or has no links.
    #[error("{0}")]
    Over(String),
}

/// `shm: …; rdma: …`
pub(super) fn reasons(rejected: &[(LinkTransport, String)]) -> String {
    rejected.iter().map(|(level, why)| format!("{}: {why}", level.name())).collect::<Vec<_>>().join("; ")
}
