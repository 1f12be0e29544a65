//! What goes into a [`Head`](super::Head) and what comes out.

use crate::{SessionId, liveness::Transition};
use rayless_proto::{
    ids::{ClusterId, Incarnation, NodeId, Term},
    v1::{
        control::{ToHead, ToNode},
        status::{Event, HeadSeat},
        token::TokenSet,
    },
};
use std::time::Duration;

/// What a head needs to know.
#[derive(Debug, Clone)]
pub struct HeadConfig {
    /// The node that the head runs on. It joins like any other (over a session of its own, in-process), but is not watched.
    pub node: NodeId,
    /// Its term; 0 without a store.
    pub term: Term,
    /// This head and its standbys; empty without a store.
    pub heads: Vec<HeadSeat>,
    /// Id of the cluster, fresh from the system's randomness. One restored from a state file wins.
    pub cluster: ClusterId,
    /// Fresh from the system's randomness: group ids come from it.
    pub seed: u64,
    /// `--dead-after`, told to every node.
    pub dead_after: Duration,
    /// Wall clock at the `now` of [`Head::new`](super::Head::new), in microseconds since the Unix epoch. Read once: events keep
    /// their order and distance even if somebody sets the clock.
    pub unix_us: u64,
}

/// What happened.
#[allow(clippy::large_enum_variant, reason = "each is moved once, into the head")]
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// An authenticated node opened a control session.
    SessionOpened {
        /// Its number.
        session: SessionId,
        /// Whose key it shook hands with.
        node: NodeId,
        /// IP address that the session comes from (without port), compared with the one that the node names. Empty: not compared.
        address: String,
    },
    /// A message came on a session that was opened before.
    Message {
        /// Which.
        session: SessionId,
        /// What it says.
        message: ToHead,
    },
    /// A session ended, from either side.
    SessionClosed {
        /// Which.
        session: SessionId,
    },
    /// The detector of the heartbeats changed its mind.
    Liveness {
        /// About this node,
        node: NodeId,
        /// in this life of it.
        incarnation: Incarnation,
        /// How.
        transition: Transition,
    },
    /// A heartbeat came. For `status` only: enough to hand in the last one of each node before [`Head::status`](super::Head::status) or
    /// a `ToHead::Status`.
    Heard {
        /// From this node,
        node: NodeId,
        /// in this life of it,
        incarnation: Incarnation,
        /// so long ago,
        ago: Duration,
        /// with this round trip in microseconds (0: not measured).
        rtt_us: u64,
    },
    /// The standbys have changed: this head and all of them.
    Heads(Vec<HeadSeat>),
    /// Somebody did not get in: wrong token, malformed, too many at once.
    HandshakeRefused {
        /// `IP:port` it came from.
        from: String,
        /// One line.
        cause: String,
    },
    /// The cluster's tokens from here on, which the daemon has on disk and accepts: at its start, and at every change.
    Tokens {
        /// The tokens.
        set: TokenSet,
        /// Where there are two: after what time [`Effect::EndOverlap`] is wanted; `None`: an operator will say.
        overlap: Option<Duration>,
    },
    /// [`Head::next_timeout`](super::Head::next_timeout) has come.
    Timer,
}

/// What is to be done, in this order.
#[allow(clippy::large_enum_variant, reason = "each is moved once, out of the head")]
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send on this session. It may be gone already: then the message is lost, and the node's next join repairs it.
    Send {
        /// Which session.
        session: SessionId,
        /// Whose it is.
        to: NodeId,
        /// What.
        message: ToNode,
    },
    /// Close this session once what was sent on it has left.
    Close {
        /// Which.
        session: SessionId,
    },
    /// Watch the heartbeats of this life of a node, as alive from now on.
    Watch {
        /// The node.
        node: NodeId,
        /// Which life.
        incarnation: Incarnation,
    },
    /// No longer.
    Unwatch {
        /// The node.
        node: NodeId,
        /// Which life.
        incarnation: Incarnation,
    },
    /// A node has been a member under this term, which is higher: this head has been replaced, and must do nothing any more.
    Superseded(Term),
    /// The time of the previous token is up: put the current one on disk alone, then hand that in as [`Input::Tokens`].
    EndOverlap,
    /// For the log and for people; `status` has it, too.
    Notify(Event),
    /// Replace the state file by these bytes (write aside, sync, rename). At most one each [`SAVE_PERIOD`](super::SAVE_PERIOD).
    SaveState(Vec<u8>),
}
