//! A control session as the main thread holds it: messages go out through a bounded queue.

use crate::quic::{CloseCode, Link};
use rayless_proto::{ids::NodeId, limits::MAX_CONTROL_MESSAGE, v1::heartbeat::Heartbeat};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
};
use tokio::sync::mpsc;

/// Bytes that may wait for a peer that reads slowly: two of the largest messages.
const MAX_QUEUED: usize = 2 * MAX_CONTROL_MESSAGE;

/// Names a control session; never given twice by one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// An open control session, for the main thread: where messages to the peer go.
#[derive(Debug, Clone)]
pub struct ControlSession {
    id: SessionId,
    link: Link,
    queue: mpsc::UnboundedSender<Out>,
    queued: Arc<AtomicUsize>,
    ending: Arc<AtomicBool>,
}

/// What waits to go out.
#[derive(Debug)]
pub(super) enum Out {
    Message(Vec<u8>),
    Close(CloseCode, String),
}

/// A message could not be queued; the session is over or about to be, and a [`NetEvent::Closed`](super::NetEvent::Closed) follows or was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the session is closed, or its peer does not read")]
pub struct SessionOver;

impl ControlSession {
    /// The session on `link`, with the far ends of its queue: what waits, and how many bytes of messages that is.
    pub(super) fn new(id: SessionId, link: Link) -> (Self, mpsc::UnboundedReceiver<Out>, Arc<AtomicUsize>) {
        let (queue, outgoing) = mpsc::unbounded_channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let ending = Arc::new(AtomicBool::new(false));
        (Self { id, link, queue, queued: queued.clone(), ending }, outgoing, queued)
    }

    /// Its name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Whether this side opened it.
    pub fn is_ours(&self) -> bool {
        self.link.is_ours()
    }

    /// The node at the other end, as its key proves.
    pub fn peer(&self) -> NodeId {
        self.link.peer().node
    }

    /// The peer's address as this side sees it.
    pub fn peer_address(&self) -> SocketAddr {
        self.link.peer_address()
    }

    /// The protocol version agreed on.
    pub fn version(&self) -> u16 {
        self.link.version()
    }

    /// The peer's build, for people.
    pub fn build(&self) -> &str {
        self.link.build()
    }

    /// QUIC's running estimate of the round trip.
    pub fn rtt(&self) -> std::time::Duration {
        self.link.rtt()
    }

    /// Queues a message. A peer that lets more than 8 MiB wait is cut off.
    ///
    /// # Errors
    /// [`SessionOver`].
    pub fn send(&self, message: Vec<u8>) -> Result<(), SessionOver> {
        let length = message.len();
        if self.queued.fetch_add(length, Relaxed) + length > MAX_QUEUED {
            self.link.close(CloseCode::Refused, "messages are not read");
            return Err(SessionOver);
        }
        self.queue.send(Out::Message(message)).map_err(|_| SessionOver)
    }

    /// Ends the session once all that was queued has arrived (or after a second). A [`NetEvent::Closed`](super::NetEvent::Closed) follows.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.ending.store(true, Relaxed);
        let _ = self.queue.send(Out::Close(code, reason.to_owned()));
    }

    /// Where [`close`](Self::close) was called: waits until all that was queued has arrived, or the session is over otherwise.
    pub(super) async fn ended(&self) {
        if self.ending.load(Relaxed) {
            self.link.closed().await;
        }
    }

    /// Makes the peer show that it still knows this connection: one that was restarted answers with a reset.
    pub(super) fn probe(&self) {
        self.link.send_datagram(&[0; Heartbeat::LEN]);
    }

    /// Ends the session at once: the peer is dead, or not worth a word. A [`NetEvent::Closed`](super::NetEvent::Closed) follows.
    pub fn abort(&self, code: CloseCode, reason: &str) {
        self.link.close(code, reason);
    }
}
