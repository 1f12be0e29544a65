//! Sessions over QUIC: an endpoint, a handshake that tells why it failed, and framed messages with bounded memory.
//!
//! A connection is: mutual TLS 1.3 ([`crate::identity`]), one bidirectional stream opened by the connecting side, the frozen
//! [`Hello`] in both directions as the first frame, then frames of messages; beside it, datagrams. A `Session` exists only after
//! all of that: QUIC reports "connected" to a client before the server has looked at its certificate, so it is
//! the server's `Hello` that proves the welcome.
//!
//! What a stranger can make this hold: 128 handshakes of some 100 KiB each, for 5 s at most, the oldest making way
//! for the newest; from 16 on it must first prove that it receives at the address it sends from.

mod accept;
mod close;
mod session;
mod transport;

pub use accept::Acceptor;
pub use close::{CloseCause, CloseCode};
pub use session::{Link, Receiver, Sender, Session};
pub use transport::IDLE_TIMEOUT;

use crate::{
    counters::Counters,
    framing::{FrameReader, write_frame},
    identity::ClusterIdentity,
    interfaces::{self, PortError, Protocol},
    runtime::QuietRuntime,
    udp::CountedSocket,
};
use close::{cause_of, close, code_of};
use quinn::{
    ClientConfig, ConnectionError, EndpointConfig, ServerConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rayless_proto::{
    hello::{Hello, HelloError, Purpose},
    limits::{HANDSHAKE_TIMEOUT, MAX_HALF_OPEN, MAX_HELLO},
};
use session::peer;
use std::{
    fmt, io,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::time::timeout;
use transport::{RandomIds, transport};

/// A call that hears nothing at all for so long is begun anew: QUIC repeats its first packet after 0.3 s, 0.9, 2.1, 4.5, and
/// a head that comes up in between would not be found for seconds.
const CALL_AGAIN: Duration = Duration::from_secs(1);

/// A session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The peer belongs to another cluster.
    #[error(
        "{0} has another cluster token\nhint: use the token of that cluster: --token-file, or RAYLESS_TOKEN, from the head's token file; it may have been rotated since this one was copied"
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
    socket: Arc<CountedSocket>,
    identity: Arc<Mutex<ClusterIdentity>>,
    is_called: bool,
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
        let endpoint = Self::open(address, Some(server_config(identity)?), identity, counters)?;
        let acceptor = Acceptor::open(endpoint.inner.clone(), endpoint.counters.clone());
        Ok((endpoint, acceptor))
    }

    fn open(
        address: SocketAddr,
        config: Option<ServerConfig>,
        identity: &ClusterIdentity,
        counters: Arc<Counters>,
    ) -> Result<Self, EndpointError> {
        let is_called = config.is_some();
        let socket = std::net::UdpSocket::bind(address)
            .map_err(|error| interfaces::port_error(address, Protocol::Udp, &error))?;
        let socket = Arc::new(CountedSocket::new(socket, counters.clone()).map_err(set_up)?);
        let mut settings = EndpointConfig::new(identity.reset_key());
        settings.cid_generator(|| Box::new(RandomIds));
        // With the fixed bit always set, a stray datagram is known by its first byte.
        settings.grease_quic_bit(false);
        let inner = quinn::Endpoint::new_with_abstract_socket(settings, config, socket.clone(), Arc::new(QuietRuntime))
            .map_err(set_up)?;
        Ok(Self { inner, socket, identity: Arc::new(Mutex::new(identity.clone())), is_called, counters })
    }

    /// Shakes hands with `identity` from here on, as caller and as called: tokens have changed, the node has not. Open connections stay.
    ///
    /// # Errors
    /// [`EndpointError::SetUp`].
    pub fn set_identity(&self, identity: &ClusterIdentity) -> Result<(), EndpointError> {
        if self.is_called {
            self.inner.set_server_config(Some(server_config(identity)?));
        }
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity.clone();
        Ok(())
    }

    fn identity(&self) -> ClusterIdentity {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
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
        let mut call = pin!(self.call(address, purpose));
        loop {
            let heard = self.socket.received();
            let left = limit.saturating_sub(started.elapsed());
            match timeout(left.min(CALL_AGAIN), &mut call).await {
                Ok(outcome) => return outcome,
                Err(_) if left <= CALL_AGAIN => {
                    return Err(ConnectError::Unreachable { address, waited: started.elapsed() });
                }
                Err(_) if self.socket.received() == heard => call.set(self.call(address, purpose)),
                Err(_) => {}
            }
        }
    }

    async fn call(&self, address: SocketAddr, purpose: Purpose) -> Result<Session, ConnectError> {
        let local = |reason: String| ConnectError::Local { address, reason };
        let crypto =
            QuicClientConfig::try_from(self.identity().tls().client_config()).map_err(|e| local(e.to_string()))?;
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

fn server_config(identity: &ClusterIdentity) -> Result<ServerConfig, EndpointError> {
    let crypto = QuicServerConfig::try_from(identity.tls().server_config()).map_err(set_up)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport(None)))
        // A node's address does not change under a connection; who speaks from another one is somebody else.
        .migration(false)
        .max_incoming(2 * MAX_HALF_OPEN)
        .incoming_buffer_size(16 << 10)
        .incoming_buffer_size_total(1 << 20);
    Ok(config)
}

fn refused(address: SocketAddr, error: &ConnectionError) -> ConnectError {
    match cause_of(error) {
        CloseCause::WrongToken => ConnectError::WrongToken(address),
        cause => ConnectError::Refused { address, cause },
    }
}

fn set_up(error: impl fmt::Display) -> EndpointError {
    EndpointError::SetUp(error.to_string())
}
