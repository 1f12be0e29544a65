//! What the network thread tells: the main thread by events, the judge by calls.

use super::session::{ControlSession, SessionId};
use crate::{
    counters::Refusal,
    quic::{CloseCause, ConnectError, EndpointError},
};
use rayless_proto::ids::{Incarnation, NodeId};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sign {
    /// Of whom.
    pub peer: NodeId,
    /// Of which life of it; 0 for the head.
    pub incarnation: Incarnation,
    /// When; never later than it really was.
    pub at: Instant,
    /// The round trip, where it is known.
    pub rtt: Option<Duration>,
}

/// Who judges, on the network thread. Must not block.
pub trait Watch: Send {
    /// A sign of life, of any peer with a heartbeat connection, wanted or not.
    fn heard(&mut self, sign: Sign);

    /// Time to judge. Called at least every half second, and not much before the instant that it returned.
    fn tick(&mut self, now: Instant) -> Option<Instant>;
}

/// What the main thread is told.
#[derive(Debug)]
pub enum NetEvent {
    /// A control session is open: a node's, on the head; the one dialled, on a node.
    Opened(ControlSession),
    /// A message on it.
    Message {
        /// Which session.
        session: SessionId,
        /// The bytes of one message, not yet checked.
        message: Vec<u8>,
    },
    /// It is over; nothing more comes from it. Where a node opens a second session, the first one's end comes first.
    Closed {
        /// Which session.
        session: SessionId,
        /// Why.
        cause: CloseCause,
    },
    /// [`NetThread::dial`](super::NetThread::dial) came to nothing.
    DialFailed {
        /// Who was called.
        head: SocketAddr,
        /// Why.
        error: DialError,
    },
    /// A stranger was turned away. At most one a second per reason; all are counted.
    Refused(Refusal),
}

/// A head could not be dialled.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No session came about.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No socket could be opened on the address given.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}
