//! An open session: framed messages both ways, datagrams, facts, the end.

use super::close::{CloseCause, CloseCode, cause_of, close};
use crate::{
    framing::{FrameError, FrameReader, write_frame},
    identity::{Peer, peer_of},
};
use bytes::Bytes;
use rayless_proto::{
    hello::{Hello, Purpose},
    limits::MAX_CONTROL_MESSAGE,
};
use rustls::pki_types::CertificateDer;
use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};
use tokio::time::timeout;

/// An open session: both sides are authenticated and speak a common version.
#[derive(Debug)]
pub struct Session {
    /// The connection, for datagrams, facts and the end.
    pub link: Link,
    /// For messages to the peer.
    pub sender: Sender,
    /// For messages from the peer.
    pub receiver: Receiver,
}

impl Session {
    pub(super) fn new(
        connection: quinn::Connection,
        send: quinn::SendStream,
        mut receive: FrameReader<quinn::RecvStream>,
        peer: Peer,
        hello: Hello,
        version: u16,
    ) -> Self {
        receive.set_limit(MAX_CONTROL_MESSAGE);
        let link = Link { connection, peer, purpose: hello.purpose, version, build: hello.build.into() };
        let sender = Sender { stream: send, link: link.clone() };
        let receiver = Receiver { frames: receive, link: link.clone() };
        Self { link, sender, receiver }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// Why the session is over.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), CloseCause> {
        self.sender.send(message).await
    }

    /// Receives one message. May be dropped while waiting.
    ///
    /// # Errors
    /// Why the session is over.
    pub async fn receive(&mut self) -> Result<Vec<u8>, CloseCause> {
        self.receiver.receive().await
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Sender {
    stream: quinn::SendStream,
    link: Link,
}

impl Sender {
    /// Says that nothing more comes, and waits (a second at most) until all that was sent has arrived.
    pub async fn finish(&mut self) {
        if self.stream.finish().is_ok() {
            let _ = timeout(Duration::from_secs(1), self.stream.stopped()).await;
        }
    }

    /// Sends one message; waits while the peer does not read. Not to be dropped half-way.
    ///
    /// # Errors
    /// Why the session is over; [`CloseCause::Violation`] for a message over the limit, which is not sent.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), CloseCause> {
        match write_frame(&mut self.stream, message, MAX_CONTROL_MESSAGE).await {
            Ok(()) => Ok(()),
            Err(error @ FrameError::TooLong { .. }) => Err(CloseCause::Violation(error.to_string())),
            Err(error) => Err(self.link.cause_or(error)),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    frames: FrameReader<quinn::RecvStream>,
    link: Link,
}

impl Receiver {
    /// Receives one message. May be dropped while waiting. A message over the limit ends the session.
    ///
    /// # Errors
    /// Why the session is over.
    pub async fn receive(&mut self) -> Result<Vec<u8>, CloseCause> {
        match self.frames.next().await {
            Ok(frame) => Ok(frame),
            Err(error @ FrameError::TooLong { .. }) => {
                self.link.close(CloseCode::Malformed, &error.to_string());
                Err(CloseCause::Violation(error.to_string()))
            }
            Err(error) => {
                // The end of the stream may be here before the reason for it.
                if self.link.close_cause().is_none() && matches!(error, FrameError::Closed) {
                    let _ = timeout(Duration::from_secs(1), self.link.closed()).await;
                }
                Err(self.link.cause_or(error))
            }
        }
    }
}

/// A session's connection. Cheap to clone; dropping the last part of a session ends it.
#[derive(Clone)]
pub struct Link {
    connection: quinn::Connection,
    peer: Peer,
    purpose: Purpose,
    version: u16,
    build: Arc<str>,
}

impl Link {
    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Whether this side opened it.
    pub fn is_ours(&self) -> bool {
        self.connection.side().is_client()
    }

    /// What the session is for.
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// The protocol version agreed on.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The peer's build, for people.
    pub fn build(&self) -> &str {
        &self.build
    }

    /// The peer's address as this side sees it: the echo by which a node learns how it is seen.
    pub fn peer_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// QUIC's running estimate of the round trip.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Counts frames from the peer that were authentic. Any change is a sign of life: heartbeats, messages,
    /// acknowledgements, and the probes by which QUIC makes up for loss.
    pub fn signs_of_life(&self) -> u64 {
        let frames = self.connection.stats().frame_rx;
        frames.acks
            + frames.datagram
            + frames.stream
            + frames.ping
            + frames.immediate_ack
            + frames.crypto
            + frames.max_data
            + frames.max_stream_data
    }

    /// Bytes and datagrams sent and received, for benches.
    pub fn traffic(&self) -> [(u64, u64); 2] {
        let stats = self.connection.stats();
        [(stats.udp_tx.datagrams, stats.udp_tx.bytes), (stats.udp_rx.datagrams, stats.udp_rx.bytes)]
    }

    /// Sends a datagram, or drops it (or an older one) where the path is full or gone.
    pub fn send_datagram(&self, bytes: &[u8]) {
        let _ = self.connection.send_datagram(Bytes::copy_from_slice(bytes));
    }

    /// Receives a datagram. May be dropped while waiting.
    ///
    /// # Errors
    /// Why the session is over.
    pub async fn receive_datagram(&self) -> Result<Bytes, CloseCause> {
        self.connection.read_datagram().await.map_err(|error| cause_of(&error))
    }

    /// Ends the session at once; messages on their way may be lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        close(&self.connection, code, reason);
    }

    /// Waits for the end.
    pub async fn closed(&self) -> CloseCause {
        cause_of(&self.connection.closed().await)
    }

    /// Why the session is over; `None` while it is not.
    pub fn close_cause(&self) -> Option<CloseCause> {
        self.connection.close_reason().map(|error| cause_of(&error))
    }

    fn cause_or(&self, error: FrameError) -> CloseCause {
        self.close_cause().unwrap_or_else(|| match error {
            FrameError::Closed => CloseCause::ByPeer { code: CloseCode::Done, reason: String::new() },
            error => CloseCause::Violation(error.to_string()),
        })
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("peer", &self.peer).field("address", &self.peer_address()).finish_non_exhaustive()
    }
}

/// Who holds the certificate that this connection was made with.
pub(super) fn peer(connection: &quinn::Connection) -> Option<Peer> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    peer_of(certificates.first()?)
}
