//! Sessions over QUIC: an endpoint, a handshake that tells why it failed, and framed messages with bounded memory.
//!
//! A connection is: mutual TLS 1.3 ([`crate::identity`]), one bidirectional stream opened by the connecting side, the frozen
//! [`Hello`] in both directions as the first frame, then frames of messages; beside it, datagrams. A `Session` exists only after
//! all of that: QUIC reports "connected" to a client before the server has looked at its certificate, so it is
//! the server's `Hello` that proves the welcome.
//!
//! What a stranger can make this hold: 128 handshakes of some 100 KiB each, for 5 s at most, the oldest making way
//! for the newest; from 16 on it must first prove that it receives at the address it sends from.

use crate::{
    counters::{Counters, Refused},
    framing::{FrameError, FrameReader, write_frame},
    half_open::HalfOpen,
    identity::{ClusterIdentity, Peer, peer_of},
    interfaces::{self, PortError, Protocol},
    runtime::QuietRuntime,
    udp::CountedSocket,
};
use bytes::Bytes;
use quinn::{
    AckFrequencyConfig, ClientConfig, ConnectionError, ConnectionId, EndpointConfig, IdleTimeout, ServerConfig,
    TransportConfig, VarInt, congestion,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rayless_proto::{
    hello::{Hello, HelloError, Purpose},
    limits::{HANDSHAKE_TIMEOUT, MAX_CONTROL_MESSAGE, MAX_HALF_OPEN, MAX_HELLO},
};
use rustls::pki_types::CertificateDer;
use std::{
    any::Any,
    fmt, io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, time::timeout};

/// From so many handshakes in progress on, a stranger must prove its address first.
const PROVE_ADDRESS_FROM: usize = 16;
/// Bytes of stream data that a peer may send ahead of the reader, and that we keep until it has them.
const WINDOW: u32 = 256 << 10;
/// Bytes of datagrams that wait to be read or sent; the oldest go first.
const DATAGRAM_BUFFER: usize = 4 << 10;
/// Without a word from the peer for so long a connection is given up. Much longer than `--dead-after`: who is dead is decided
/// by those who watch heartbeats, and an observer that was itself paused must still have its connections.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// A control connection at rest says a word this often, for the idle time-out and for tables in between.
const KEEP_ALIVE: Duration = Duration::from_secs(25);
/// Round trip assumed before the first is measured; lost first packets are sent again after three of them.
const FIRST_RTT: Duration = Duration::from_millis(100);

/// Codes by which a side ends a connection. Part of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseCode {
    /// In order.
    Done,
    /// No common protocol version.
    Version,
    /// The first frame was no `Hello`.
    NotRayless,
    /// This identity may not open this kind of connection.
    NotAllowed,
    /// The peer was told a reason (refused, fenced, …); the text has it.
    Refused,
    /// A message was malformed or too long.
    Malformed,
    /// A newer connection of the same node took over.
    Replaced,
    /// A later build's.
    Other(u32),
}

impl CloseCode {
    fn number(self) -> u32 {
        match self {
            Self::Done => 0,
            Self::Version => 1,
            Self::NotRayless => 2,
            Self::NotAllowed => 3,
            Self::Refused => 4,
            Self::Malformed => 5,
            Self::Replaced => 6,
            Self::Other(number) => number,
        }
    }

    fn of(number: VarInt) -> Self {
        match number.into_inner() {
            0 => Self::Done,
            1 => Self::Version,
            2 => Self::NotRayless,
            3 => Self::NotAllowed,
            4 => Self::Refused,
            5 => Self::Malformed,
            6 => Self::Replaced,
            other => Self::Other(u32::try_from(other).unwrap_or(u32::MAX)),
        }
    }
}

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseCause {
    /// The peer said so.
    #[error("closed by the peer{}", colon(reason))]
    ByPeer {
        /// Its code.
        code: CloseCode,
        /// Its words; may be empty.
        reason: String,
    },
    /// This side said so.
    #[error("closed by this side")]
    Local,
    /// Nothing was heard for [`IDLE_TIMEOUT`].
    #[error("silent for {} s", IDLE_TIMEOUT.as_secs())]
    Silent,
    /// The peer's process is another one now: it does not know this connection.
    #[error("the peer was restarted")]
    Restarted,
    /// The peer's certificate was not accepted, or ours was not.
    #[error("the cluster token differs")]
    WrongToken,
    /// The peer sent what the protocol does not allow.
    #[error("protocol violation: {0}")]
    Violation(String),
}

/// A session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The peer belongs to another cluster.
    #[error(
        "{0} has another cluster token\nhint: use the token of that cluster: --token-file, or RAYLESS_TOKEN, from the head's token file"
    )]
    WrongToken(SocketAddr),
    /// No common version, or not rayless.
    #[error(transparent)]
    Version(#[from] HelloError),
    /// Nothing came back.
    #[error(
        "no answer from {address} within {} ms\nhint: is `rayless head` running there, and does a firewall let {}/udp through?",
        waited.as_millis(), address.port()
    )]
    Unreachable {
        /// Who was called.
        address: SocketAddr,
        /// For how long.
        waited: Duration,
    },
    /// Somebody answered and ended it.
    #[error("{address} ended the connection: {cause}")]
    Refused {
        /// Who was called.
        address: SocketAddr,
        /// Why it ended.
        cause: CloseCause,
    },
    /// This host cannot send there.
    #[error("cannot send to {address}: {reason}")]
    Local {
        /// Who was to be called.
        address: SocketAddr,
        /// The cause.
        reason: String,
    },
}

/// An endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The port or the address cannot be had.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The system or the TLS library failed.
    #[error("cannot set up QUIC: {0}")]
    SetUp(String),
}

/// One UDP socket with its connections. Cheap to clone.
#[derive(Clone)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    identity: ClusterIdentity,
    counters: Arc<Counters>,
}

impl Endpoint {
    /// An endpoint that only calls, on `address` (port 0: any).
    ///
    /// # Errors
    /// See [`EndpointError`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn client(
        address: SocketAddr,
        identity: &ClusterIdentity,
        counters: Arc<Counters>,
    ) -> Result<Self, EndpointError> {
        Self::open(address, None, identity, counters)
    }

    /// An endpoint that is called, and may call. Sessions come out of the [`Acceptor`].
    ///
    /// # Errors
    /// See [`EndpointError`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn server(
        address: SocketAddr,
        identity: &ClusterIdentity,
        counters: Arc<Counters>,
    ) -> Result<(Self, Acceptor), EndpointError> {
        let crypto = QuicServerConfig::try_from(identity.tls().server_config()).map_err(set_up)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config
            .transport_config(Arc::new(transport(None)))
            // A node's address does not change under a connection; who speaks from another one is somebody else.
            .migration(false)
            .max_incoming(2 * MAX_HALF_OPEN)
            .incoming_buffer_size(16 << 10)
            .incoming_buffer_size_total(1 << 20);
        let endpoint = Self::open(address, Some(config), identity, counters)?;
        let (ready, sessions) = mpsc::channel(MAX_HALF_OPEN);
        let task = tokio::spawn(accept_all(endpoint.clone(), ready));
        Ok((endpoint, Acceptor { sessions, task }))
    }

    fn open(
        address: SocketAddr,
        config: Option<ServerConfig>,
        identity: &ClusterIdentity,
        counters: Arc<Counters>,
    ) -> Result<Self, EndpointError> {
        let socket = std::net::UdpSocket::bind(address)
            .map_err(|error| interfaces::port_error(address, Protocol::Udp, &error))?;
        let socket = CountedSocket::new(socket, counters.clone()).map_err(set_up)?;
        let mut settings = EndpointConfig::new(identity.reset_key());
        settings.cid_generator(|| Box::new(RandomIds));
        // With the fixed bit always set, a stray datagram is known by its first byte.
        settings.grease_quic_bit(false);
        let inner =
            quinn::Endpoint::new_with_abstract_socket(settings, config, Arc::new(socket), Arc::new(QuietRuntime))
                .map_err(set_up)?;
        Ok(Self { inner, identity: identity.clone(), counters })
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// The system's.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// What was refused here.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Opens a session, within [`HANDSHAKE_TIMEOUT`].
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, address: SocketAddr, purpose: Purpose) -> Result<Session, ConnectError> {
        self.connect_within(address, purpose, HANDSHAKE_TIMEOUT).await
    }

    /// Opens a session, within `limit`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect_within(
        &self,
        address: SocketAddr,
        purpose: Purpose,
        limit: Duration,
    ) -> Result<Session, ConnectError> {
        let started = Instant::now();
        match timeout(limit, self.call(address, purpose)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ConnectError::Unreachable { address, waited: started.elapsed() }),
        }
    }

    async fn call(&self, address: SocketAddr, purpose: Purpose) -> Result<Session, ConnectError> {
        let local = |reason: String| ConnectError::Local { address, reason };
        let crypto =
            QuicClientConfig::try_from(self.identity.tls().client_config()).map_err(|e| local(e.to_string()))?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport(Some(purpose))));
        // The name is not checked (see `identity`); it is there because TLS asks for one.
        let connecting = self.inner.connect_with(config, address, "head.rayless").map_err(|e| local(e.to_string()))?;
        let connection = connecting.await.map_err(|error| refused(address, &error))?;
        let ended = |connection: &quinn::Connection, error: &dyn fmt::Display| match connection.close_reason() {
            Some(cause) => refused(address, &cause),
            None => local(error.to_string()),
        };
        let (mut send, receive) = connection.open_bi().await.map_err(|error| refused(address, &error))?;
        let mut receive = FrameReader::new(receive, MAX_HELLO);
        if let Err(error) = write_frame(&mut send, &Hello::of_this_build(purpose).encode(), MAX_HELLO).await {
            return Err(ended(&connection, &error));
        }
        let frame = receive.next().await.map_err(|error| ended(&connection, &error))?;
        let told = Hello::decode(&frame).and_then(|hello| hello.agree().map(|version| (hello, version)));
        let (hello, version) = told.inspect_err(|error| close(&connection, code_of(error), &error.to_string()))?;
        let peer = peer(&connection).ok_or(ConnectError::WrongToken(address))?;
        Ok(Session::new(connection, send, receive, peer, Hello { purpose, ..hello }, version))
    }

    /// Ends every connection with `code` and waits (a second at most) until the peers can know.
    pub async fn close(&self, code: CloseCode, reason: &str) {
        self.inner.close(VarInt::from_u32(code.number()), reason.as_bytes());
        let _ = timeout(Duration::from_secs(1), self.inner.wait_idle()).await;
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("local_address", &self.inner.local_addr().ok()).finish_non_exhaustive()
    }
}

/// Where accepted sessions come out. Dropping it ends the acceptance.
#[derive(Debug)]
pub struct Acceptor {
    sessions: mpsc::Receiver<Session>,
    task: tokio::task::JoinHandle<()>,
}

impl Acceptor {
    /// The next session; `None` once the endpoint is closed. May be dropped while waiting.
    pub async fn next(&mut self) -> Option<Session> {
        self.sessions.recv().await
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept_all(endpoint: Endpoint, ready: mpsc::Sender<Session>) {
    let mut half_open = HalfOpen::new(MAX_HALF_OPEN, endpoint.counters.clone());
    let mut pace = Pace::new();
    while let Some(incoming) = endpoint.inner.accept().await {
        if !pace.allows(Instant::now()) {
            // Not a word back; a true peer asks again.
            incoming.ignore();
            endpoint.counters.refuse(Refused::TooMany);
            continue;
        }
        if half_open.len() >= PROVE_ADDRESS_FROM && !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        let counters = endpoint.counters.clone();
        let ready = ready.clone();
        let task = tokio::spawn(async move {
            let address = incoming.remote_address();
            match timeout(HANDSHAKE_TIMEOUT, welcome(incoming)).await {
                Ok(Ok(session)) => {
                    counters.accept();
                    let _ = ready.send(session).await;
                }
                Ok(Err((why, detail))) => counters.report(why, address, &detail),
                Err(_) => counters.report(Refused::Unfinished, address, "handshake not finished in time"),
            }
        });
        half_open.admit(task.abort_handle());
    }
}

/// How many handshakes are begun. Each costs half a millisecond of cryptography, here with real-time priority, and strangers
/// must not be able to buy all of it.
struct Pace {
    left: f64,
    counted: Instant,
}

impl Pace {
    const PER_SECOND: f64 = 500.0;
    const AT_ONCE: f64 = 250.0;

    fn new() -> Self {
        Self { left: Self::AT_ONCE, counted: Instant::now() }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.counted = now;
        self.left = (self.left + elapsed * Self::PER_SECOND).min(Self::AT_ONCE);
        let allowed = self.left >= 1.0;
        self.left -= f64::from(u8::from(allowed));
        allowed
    }
}

/// The accepting side of a handshake.
async fn welcome(incoming: quinn::Incoming) -> Result<Session, (Refused, String)> {
    let broken = |error: &ConnectionError| match cause_of(error) {
        CloseCause::WrongToken => (Refused::WrongToken, "the cluster token differs".to_owned()),
        CloseCause::ByPeer { code: CloseCode::Version, reason } => (Refused::Version, reason),
        cause => (Refused::Unfinished, cause.to_string()),
    };
    let connection = incoming.accept().map_err(|e| broken(&e))?.await.map_err(|e| broken(&e))?;
    let refuse = |why, code, text: String| {
        close(&connection, code, &text);
        (why, text)
    };
    let peer = peer(&connection).ok_or_else(|| (Refused::WrongToken, "no certificate".to_owned()))?;
    if peer.is_delegate {
        return Err(refuse(Refused::NotAllowed, CloseCode::NotAllowed, "only nodes may join".to_owned()));
    }
    let (mut send, receive) = connection.accept_bi().await.map_err(|e| broken(&e))?;
    let mut receive = FrameReader::new(receive, MAX_HELLO);
    let frame = match receive.next().await {
        Ok(frame) => frame,
        Err(error) => {
            return Err(match connection.close_reason() {
                Some(cause) => broken(&cause),
                None => refuse(Refused::NotRayless, CloseCode::NotRayless, error.to_string()),
            });
        }
    };
    let hello = match Hello::decode(&frame) {
        Ok(hello) => hello,
        Err(error) => return Err(refuse(Refused::NotRayless, CloseCode::NotRayless, error.to_string())),
    };
    // Ours goes out in any case: each side can then name both.
    let _ = write_frame(&mut send, &Hello::of_this_build(hello.purpose).encode(), MAX_HELLO).await;
    let version = match hello.agree() {
        Ok(version) => version,
        Err(error) => {
            // Closing drops what is on its way; the peer closes when it has read our hello.
            let _ = timeout(Duration::from_secs(1), connection.closed()).await;
            return Err(refuse(Refused::Version, CloseCode::Version, error.to_string()));
        }
    };
    if !matches!(hello.purpose, Purpose::Control | Purpose::Heartbeat) {
        let text = "this kind of session goes over TCP".to_owned();
        return Err(refuse(Refused::NotAllowed, CloseCode::NotAllowed, text));
    }
    Ok(Session::new(connection, send, receive, peer, hello, version))
}

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
    fn new(
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

/// Ids of connections. Quinn's own are signed with a key of the process, and packets with others are dropped: a daemon
/// started again could not tell the peers of its last life that it is no longer there.
struct RandomIds;

impl quinn::ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; 8];
        // Without random numbers TLS would not have got this far; an id that is not one costs a connection, no more.
        let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// One configuration for all: small windows, no second stream, no search for larger packets (a path that drops them
/// would cost heartbeats, and nothing here is large).
fn transport(calling_for: Option<Purpose>) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(u32::from(calling_for.is_none())))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER)
        .initial_rtt(FIRST_RTT)
        .mtu_discovery_config(None)
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok());
    if calling_for == Some(Purpose::Control) {
        config.keep_alive_interval(Some(KEEP_ALIVE));
    }
    if calling_for == Some(Purpose::Heartbeat) {
        // Every heartbeat is answered at once: the acknowledgement is the echo, and the head needs no timer for it.
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(0));
        config.ack_frequency_config(Some(acks)).congestion_controller_factory(Arc::new(FixedWindow));
    }
    config
}

/// Heartbeats are ten packets of 60 bytes a second at the worst. A window that shrinks with loss would silence
/// them just when they matter.
#[derive(Debug, Clone, Copy)]
struct FixedWindow;

impl congestion::ControllerFactory for FixedWindow {
    fn build(self: Arc<Self>, _now: Instant, _mtu: u16) -> Box<dyn congestion::Controller> {
        Box::new(Self)
    }
}

impl congestion::Controller for FixedWindow {
    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, _is_persistent: bool, _lost_bytes: u64) {}

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        self.initial_window()
    }

    fn clone_box(&self) -> Box<dyn congestion::Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        64 << 10
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

fn peer(connection: &quinn::Connection) -> Option<Peer> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    peer_of(certificates.first()?)
}

fn close(connection: &quinn::Connection, code: CloseCode, reason: &str) {
    let line = reason.lines().next().unwrap_or_default();
    connection.close(VarInt::from_u32(code.number()), line.as_bytes());
}

fn code_of(error: &HelloError) -> CloseCode {
    match error {
        HelloError::NotHello => CloseCode::NotRayless,
        HelloError::Version { .. } => CloseCode::Version,
    }
}

fn refused(address: SocketAddr, error: &ConnectionError) -> ConnectError {
    match cause_of(error) {
        CloseCause::WrongToken => ConnectError::WrongToken(address),
        cause => ConnectError::Refused { address, cause },
    }
}

fn cause_of(error: &ConnectionError) -> CloseCause {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            CloseCause::ByPeer { code: CloseCode::of(close.error_code), reason: printable(&close.reason) }
        }
        ConnectionError::LocallyClosed => CloseCause::Local,
        ConnectionError::TimedOut => CloseCause::Silent,
        ConnectionError::Reset => CloseCause::Restarted,
        ConnectionError::TransportError(error) if is_wrong_token(error.code) => CloseCause::WrongToken,
        ConnectionError::ConnectionClosed(close) if is_wrong_token(close.error_code) => CloseCause::WrongToken,
        ConnectionError::ConnectionClosed(close) => {
            CloseCause::Violation(format!("{} {}", close.error_code, printable(&close.reason)).trim().to_owned())
        }
        other => CloseCause::Violation(other.to_string()),
    }
}

/// TLS alerts (RFC 8446, section 6) that say: your certificate, or the lack of one, is not accepted.
fn is_wrong_token(code: quinn::TransportErrorCode) -> bool {
    const ALERTS: [u64; 6] = [
        42,  // bad_certificate
        46,  // certificate_unknown
        48,  // unknown_ca
        49,  // access_denied
        51,  // decrypt_error
        116, // certificate_required
    ];
    u64::from(code).checked_sub(0x100).is_some_and(|alert| ALERTS.contains(&alert))
}

/// A peer's words on one line, without what could play with a terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).take(256).collect()
}

fn colon(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn set_up(error: impl fmt::Display) -> EndpointError {
    EndpointError::SetUp(error.to_string())
}
