//! Control sessions as the main thread sees them: messages out through a bounded queue, messages in as events.

use super::NetEvent;
use crate::{
    counters::{Counters, Refused},
    quic::{CloseCause, CloseCode, Link, Receiver, Sender, Session},
};
use rayless_proto::{ids::NodeId, limits::MAX_CONTROL_MESSAGE, v1::heartbeat::Heartbeat};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};
use tokio::{sync::mpsc, task::JoinHandle};

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
}

#[derive(Debug)]
enum Out {
    Message(Vec<u8>),
    Close(CloseCode, String),
}

/// A message could not be queued; the session is over or about to be, and a [`NetEvent::Closed`] follows or was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the session is closed, or its peer does not read")]
pub struct SessionOver;

impl ControlSession {
    /// Its name.
    pub fn id(&self) -> SessionId {
        self.id
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

    /// Ends the session once all that was queued has arrived (or after a second). A [`NetEvent::Closed`] follows.
    pub fn close(&self, code: CloseCode, reason: &str) {
        let _ = self.queue.send(Out::Close(code, reason.to_owned()));
    }

    /// Makes the peer show that it still knows this connection: one that was restarted answers with a reset.
    pub(super) fn probe(&self) {
        self.link.send_datagram(&[0; Heartbeat::LEN]);
    }

    /// Ends the session at once: the peer is dead, or not worth a word. A [`NetEvent::Closed`] follows.
    pub fn abort(&self, code: CloseCode, reason: &str) {
        self.link.close(code, reason);
    }
}

/// Starts the traffic of `session`: an `Opened` event, `Message`s, and a `Closed` in the end. The task ends after that. With
/// `older` nothing is said before that task has ended.
pub(super) fn run(
    id: SessionId,
    session: Session,
    older: Option<JoinHandle<()>>,
    events: mpsc::Sender<NetEvent>,
    counters: Arc<Counters>,
) -> (ControlSession, JoinHandle<()>) {
    let (queue, outgoing) = mpsc::unbounded_channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let Session { link, sender, receiver } = session;
    let control = ControlSession { id, link: link.clone(), queue, queued: queued.clone() };
    let opened = NetEvent::Opened(control.clone());
    let task = tokio::spawn(async move {
        if let Some(older) = older {
            let _ = older.await;
        }
        if events.send(opened).await.is_err() {
            return; // the main thread is gone, and with it the process
        }
        let writer = tokio::spawn(write(link.clone(), sender, outgoing, queued));
        let cause = read(id, receiver, &events).await;
        if let CloseCause::Violation(what) = &cause {
            counters.report(Refused::Malformed, link.peer_address(), what);
        }
        writer.abort();
        link.close(CloseCode::Done, "");
        let _ = events.send(NetEvent::Closed { session: id, cause }).await;
    });
    (control, task)
}

async fn read(id: SessionId, mut receiver: Receiver, events: &mpsc::Sender<NetEvent>) -> CloseCause {
    loop {
        match receiver.receive().await {
            // While the main thread does not take it, the peer is not read further: QUIC's window holds it back.
            Ok(message) => {
                if events.send(NetEvent::Message { session: id, message }).await.is_err() {
                    return CloseCause::Local;
                }
            }
            Err(cause) => return cause,
        }
    }
}

async fn write(link: Link, mut sender: Sender, mut outgoing: mpsc::UnboundedReceiver<Out>, queued: Arc<AtomicUsize>) {
    while let Some(out) = outgoing.recv().await {
        match out {
            Out::Message(message) => {
                let sent = sender.send(&message).await;
                queued.fetch_sub(message.len(), Relaxed);
                if let Err(cause) = sent {
                    // Over already, or a message of our own that no peer would take: the reader tells.
                    link.close(CloseCode::Malformed, &cause.to_string());
                    return;
                }
            }
            Out::Close(code, reason) => {
                sender.finish().await;
                link.close(code, &reason);
                return;
            }
        }
    }
}
