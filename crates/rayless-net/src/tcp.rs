//! Sessions over TCP: the same identity and the same first frame as over QUIC, and a way to hand a session over.
//!
//! A caller names whom it wants (`<group>.keeper.rayless`, `<rank>.<group>.link.rayless`) in the TLS server name. The daemon behind the port looks
//! at that name without taking a byte off the socket ([`Front`]), and passes the socket on to the process of that
//! name, which shakes hands itself ([`accept`]).

use crate::{
    client_hello::{self, Parsed},
    congestion::NoSuchCongestion,
    counters::{Counters, Refused},
    framing::{FrameError, read_frame, write_frame},
    half_open::HalfOpen,
    identity::{Peer, TlsIdentity, peer_of},
    interfaces::{self, PortError, Protocol},
};
use rayless_proto::{
    hello::{Hello, HelloError, Purpose},
    ids::{GroupId, NodeId, Rank},
    limits::{HANDSHAKE_TIMEOUT, MAX_HALF_OPEN, MAX_HELLO},
};
use rustix::net::{RecvFlags, recv, sockopt};
use rustls::{AlertDescription, pki_types::ServerName};
use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// Sent data that is not acknowledged for so long ends a connection, if nothing else has noticed before.
const USER_TIMEOUT: Duration = Duration::from_secs(60);
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(15);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
const KEEP_ALIVE_COUNT: u32 = 6;
const KEEPER_SUFFIX: &str = ".keeper.rayless";
const LINK_SUFFIX: &str = ".link.rayless";

/// A session could not be opened, as caller or as called.
#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    /// The peer belongs to another cluster.
    #[error("{0} has another cluster token\nhint: use the same token on all hosts")]
    WrongToken(SocketAddr),
    /// No common version, or not rayless.
    #[error(transparent)]
    Version(#[from] HelloError),
    /// Another node than the one wanted is at that address.
    #[error("{address} is node {}, not node {}\nhint: do two hosts share that address?", found.short(), wanted.short())]
    WrongNode {
        /// Who was called.
        address: SocketAddr,
        /// Who should be there.
        wanted: NodeId,
        /// Who is.
        found: NodeId,
    },
    /// Nobody answered in time.
    #[error(
        "no answer from {address} within {} ms\nhint: does a firewall let {}/tcp through?",
        waited.as_millis(), address.port()
    )]
    Unreachable {
        /// The peer.
        address: SocketAddr,
        /// For how long.
        waited: Duration,
    },
    /// This host's settings do not let it be opened.
    #[error(transparent)]
    Congestion(#[from] NoSuchCongestion),
    /// The connection was refused or broke.
    #[error("{address}: {error}")]
    Io {
        /// The peer.
        address: SocketAddr,
        /// The system's, or the TLS library's, answer.
        error: io::Error,
    },
}

/// An open session: both sides are authenticated and speak a common version.
#[derive(Debug)]
pub struct TcpSession {
    /// The stream; frames go over it with [`crate::framing`].
    pub stream: TlsStream<TcpStream>,
    /// Who is at the other end.
    pub peer: Peer,
    /// What the session is for.
    pub purpose: Purpose,
    /// The protocol version agreed on.
    pub version: u16,
    /// The peer's build, for people.
    pub build: String,
}

/// Listens on `address`.
///
/// # Errors
/// See [`PortError`].
///
/// # Panics
/// Outside of a tokio runtime.
pub fn listen(address: SocketAddr) -> Result<TcpListener, PortError> {
    let listener = std::net::TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    });
    listener.map_err(|error| interfaces::port_error(address, Protocol::Tcp, &error))
}

/// The server name under which a group's keeper is called.
pub fn keeper_name(group: GroupId) -> String {
    format!("{group}{KEEPER_SUFFIX}")
}

/// The server name under which a worker is called by another that wants to send it tensors.
pub fn link_name(group: GroupId, rank: Rank) -> String {
    format!("{rank}.{group}{LINK_SUFFIX}")
}

/// The worker in such a name.
pub fn worker_of(name: &str) -> Option<(GroupId, Rank)> {
    let (rank, group) = name.strip_suffix(LINK_SUFFIX)?.split_once('.')?;
    // One worker, one name: no signs, no leading zeros.
    let plain = rank.bytes().all(|b| b.is_ascii_digit()) && (rank == "0" || !rank.starts_with('0'));
    Some((group.parse().ok()?, rank.parse().ok().filter(|_| plain)?))
}

/// The group in either kind of name: its keeper on this node gets the session.
pub fn group_of(name: &str) -> Option<GroupId> {
    match name.strip_suffix(KEEPER_SUFFIX) {
        Some(group) => group.parse().ok(),
        None => worker_of(name).map(|(group, _)| group),
    }
}

/// Calls `name` at `address` and shakes hands, within [`HANDSHAKE_TIMEOUT`] in all. With `wanted`, only that node (or a
/// keeper of it) will do.
///
/// # Errors
/// See [`TcpError`].
pub async fn connect(
    address: SocketAddr,
    name: &str,
    identity: &TlsIdentity,
    purpose: Purpose,
    wanted: Option<NodeId>,
) -> Result<TcpSession, TcpError> {
    let started = Instant::now();
    let io = |error: io::Error| classify(address, error);
    let call = async {
        let stream = TcpStream::connect(address).await.map_err(io)?;
        tune(&stream).map_err(io)?;
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| io(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let stream = TlsConnector::from(identity.client_config()).connect(name, stream).await.map_err(io)?;
        let mut stream = TlsStream::from(stream);
        write_frame(&mut stream, &Hello::of_this_build(purpose).encode(), MAX_HELLO)
            .await
            .map_err(|error| io(into_io(error)))?;
        let session = greet(stream, address).await?;
        match wanted {
            Some(wanted) if session.peer.node != wanted => {
                Err(TcpError::WrongNode { address, wanted, found: session.peer.node })
            }
            _ => Ok(TcpSession { purpose, ..session }),
        }
    };
    match timeout(HANDSHAKE_TIMEOUT, call).await {
        Ok(outcome) => outcome,
        Err(_) => Err(TcpError::Unreachable { address, waited: started.elapsed() }),
    }
}

/// Shakes hands with a caller, within [`HANDSHAKE_TIMEOUT`].
///
/// # Errors
/// See [`TcpError`].
pub async fn accept(stream: TcpStream, identity: &TlsIdentity) -> Result<TcpSession, TcpError> {
    let started = Instant::now();
    // A socket whose peer is gone has no address any more; it fails below.
    let address = stream.peer_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
    let io = |error: io::Error| classify(address, error);
    let answer = async {
        tune(&stream).map_err(io)?;
        let stream = TlsAcceptor::from(identity.server_config()).accept(stream).await.map_err(io)?;
        let mut stream = TlsStream::from(stream);
        // Ours does not depend on theirs: each side can name both.
        write_frame(&mut stream, &Hello::of_this_build(Purpose::Step).encode(), MAX_HELLO)
            .await
            .map_err(|error| io(into_io(error)))?;
        greet(stream, address).await
    };
    match timeout(HANDSHAKE_TIMEOUT, answer).await {
        Ok(outcome) => outcome,
        Err(_) => Err(TcpError::Unreachable { address, waited: started.elapsed() }),
    }
}

/// What such an error counts as.
pub fn refusal_of(error: &TcpError) -> Refused {
    match error {
        TcpError::WrongToken(_) => Refused::WrongToken,
        TcpError::Version(HelloError::NotHello) => Refused::NotRayless,
        TcpError::Version(HelloError::Version { .. }) => Refused::Version,
        TcpError::WrongNode { .. } => Refused::NotAllowed,
        TcpError::Unreachable { .. } | TcpError::Congestion(_) | TcpError::Io { .. } => Refused::Unfinished,
    }
}

/// Reads the peer's first frame.
async fn greet(mut stream: TlsStream<TcpStream>, address: SocketAddr) -> Result<TcpSession, TcpError> {
    let certificates = stream.get_ref().1.peer_certificates();
    let peer = certificates.and_then(|c| peer_of(c.first()?)).ok_or(TcpError::WrongToken(address))?;
    let frame = match read_frame(&mut stream, MAX_HELLO).await {
        Ok(frame) => frame,
        Err(FrameError::TooLong { .. }) => return Err(HelloError::NotHello.into()),
        Err(error) => return Err(classify(address, into_io(error))),
    };
    let hello = Hello::decode(&frame)?;
    match hello.agree() {
        Ok(version) => Ok(TcpSession { stream, peer, purpose: hello.purpose, version, build: hello.build }),
        Err(error) => {
            // An orderly end: a reset would destroy our own hello on its way to the peer.
            let _ = stream.shutdown().await;
            Err(error.into())
        }
    }
}

/// A step must not wait for more to send, and a peer that is gone must be found out even if nobody sends.
pub(crate) fn tune(stream: impl AsFd) -> io::Result<()> {
    let stream = stream.as_fd();
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE_AFTER)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_COUNT)?;
    sockopt::set_tcp_user_timeout(stream, USER_TIMEOUT.as_millis() as u32)?;
    Ok(())
}

fn into_io(error: FrameError) -> io::Error {
    match error {
        FrameError::Io(error) => error,
        FrameError::Closed => io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the peer during the handshake"),
        error @ FrameError::TooLong { .. } => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
    }
}

pub(crate) fn classify(address: SocketAddr, error: io::Error) -> TcpError {
    use AlertDescription::{
        AccessDenied, BadCertificate, CertificateRequired, CertificateUnknown, DecryptError, UnknownCA,
    };
    use rustls::{CertificateError, Error as Tls};
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) {
        Some(Tls::InvalidCertificate(CertificateError::Expired | CertificateError::NotValidYet))
        | Some(Tls::InvalidCertificate(
            CertificateError::ExpiredContext { .. } | CertificateError::NotValidYetContext { .. },
        )) => TcpError::Io { address, error },
        Some(
            Tls::InvalidCertificate(_)
            | Tls::NoCertificatesPresented
            | Tls::AlertReceived(
                AccessDenied | BadCertificate | CertificateRequired | CertificateUnknown | DecryptError | UnknownCA,
            ),
        ) => TcpError::WrongToken(address),
        Some(Tls::InvalidMessage(_) | Tls::InappropriateMessage { .. } | Tls::NoApplicationProtocol) => {
            HelloError::NotHello.into()
        }
        _ => TcpError::Io { address, error },
    }
}

/// A caller of which nothing is read yet but whom it wants.
#[derive(Debug)]
pub struct Arrival {
    /// The socket; all bytes are still in it.
    pub stream: TcpStream,
    /// Where it comes from.
    pub address: SocketAddr,
    /// The server name that it asks for, in lower case.
    pub name: String,
}

/// The listener behind the port, with those who have not yet said whom they want.
#[derive(Debug)]
pub struct Front {
    arrivals: mpsc::Receiver<Arrival>,
    task: tokio::task::JoinHandle<()>,
}

impl Front {
    /// Takes callers from `listener`.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(listener: TcpListener, counters: Arc<Counters>) -> Self {
        let (ready, arrivals) = mpsc::channel(MAX_HALF_OPEN);
        let task = tokio::spawn(take_callers(listener, counters, ready));
        Self { arrivals, task }
    }

    /// The next caller who said whom it wants. May be dropped while waiting. `None` does not happen while it lives.
    pub async fn next(&mut self) -> Option<Arrival> {
        self.arrivals.recv().await
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take_callers(listener: TcpListener, counters: Arc<Counters>, ready: mpsc::Sender<Arrival>) {
    let mut half_open = HalfOpen::new(MAX_HALF_OPEN, counters.clone());
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, mostly: those in use end some time, and spinning helps nobody.
                tracing::warn!("cannot accept a TCP connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (counters, ready) = (counters.clone(), ready.clone());
        let task = tokio::spawn(async move {
            match timeout(HANDSHAKE_TIMEOUT, peek_sni(&stream)).await {
                Ok(Ok(name)) => {
                    let _ = ready.send(Arrival { stream, address, name }).await;
                }
                Ok(Err(PeekError::NotRayless)) => {
                    counters.report(Refused::NotRayless, address, "not a rayless session");
                }
                Ok(Err(PeekError::Io(error))) => {
                    counters.report(Refused::Unfinished, address, &format!("caller gone: {error}"));
                }
                Err(_) => counters.report(Refused::Unfinished, address, "caller did not say whom it wants"),
            }
        });
        half_open.admit(task.abort_handle());
    }
}

/// A caller's wish could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PeekError {
    /// It does not start like a rayless session.
    #[error("not a rayless session")]
    NotRayless,
    /// It went away.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The server name in the `ClientHello` on `stream`, without taking a byte off it. Waits for as much as that needs: put a
/// time-out around it.
///
/// # Errors
/// See [`PeekError`].
pub async fn peek_sni(stream: &TcpStream) -> Result<String, PeekError> {
    let mut buffer = [0; client_hello::MAX];
    let mut peek = || {
        let (bytes, _) = recv(stream, &mut buffer[..], RecvFlags::PEEK)?;
        if bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match client_hello::parse(&buffer[..bytes]) {
            // Not there yet, and the kernel wakes us on what is new only: "would block" is what tokio
            // has to hear to wait for that instead of coming back at once.
            Parsed::Incomplete if bytes < client_hello::MAX => Err(io::ErrorKind::WouldBlock.into()),
            parsed => Ok(parsed),
        }
    };
    let parsed = loop {
        let ready = stream.ready(Interest::READABLE).await?;
        match stream.try_io(Interest::READABLE, &mut peek) {
            // Peeking never meets the end behind bytes that stay, and a socket with an end is ready for ever.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready.is_read_closed() => {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => break other?,
        }
    };
    match parsed {
        Parsed::Name(name) => Ok(name),
        Parsed::Incomplete | Parsed::Other => Err(PeekError::NotRayless),
    }
}
