//! Who comes to the keeper's socket: a daemon, a driver of this host, a worker of this host that has a link to one here, or a TCP session handed
//! over by a daemon: a driver's, or a link's.

use super::links::Arrival;
use crate::{retries, session::Session};
use rayless_net::{
    framing,
    identity::{TlsIdentity, peer_of},
    tcp, unix,
};
use rayless_proto::{
    codec,
    hello::{Hello, Purpose},
    ids::{GroupId, NodeId, Rank},
    limits::{HANDSHAKE_TIMEOUT, MAX_HELLO, MAX_LOCAL_MESSAGE},
    v1::keeper::{FromKeeper, ToKeeper},
};
use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

/// Handshakes at once; more wait their turn. A daemon hands over whatever asks for this group by name.
const HANDSHAKES: usize = 8;

/// Who came, or what a daemon said.
pub(super) enum Caller {
    /// A driver, ready to talk.
    Driver {
        session: Box<Session>,
        /// Its process, where it runs on this host.
        pid: Option<u32>,
    },
    /// Someone who wants a link to the worker of this rank.
    Link { rank: Rank, arrival: Arrival },
    /// A daemon, and where to send it messages.
    Daemon { id: u64, outbox: mpsc::UnboundedSender<FromKeeper> },
    /// A daemon's message.
    Said { id: u64, message: ToKeeper },
    /// That daemon is gone.
    Gone { id: u64 },
}

/// Lets callers in for as long as the runtime lives. Each shakes hands with the identity that is there when it comes.
pub(super) fn open(
    listener: UnixListener,
    identity: Arc<Mutex<TlsIdentity>>,
    group: GroupId,
    driver: NodeId,
    callers: mpsc::UnboundedSender<Caller>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let ids = Arc::new(AtomicU64::new(0));
    tokio::spawn(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: they come back.
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let identity = identity.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let callers = callers.clone();
            let (handshakes, ids) = (Arc::clone(&handshakes), Arc::clone(&ids));
            tokio::spawn(async move {
                if let Err(error) = serve(stream, &identity, (group, driver), callers, &handshakes, &ids).await {
                    tracing::info!(%error, "caller turned away");
                }
            });
        }
    });
}

async fn serve(
    stream: UnixStream,
    identity: &TlsIdentity,
    (group, driver): (GroupId, NodeId),
    callers: mpsc::UnboundedSender<Caller>,
    handshakes: &Semaphore,
    ids: &AtomicU64,
) -> io::Result<()> {
    let peer = unix::peer_credentials(&stream)?;
    if !peer.is_trusted() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (mut stream, mut first) = (stream, [0]);
    let (count, mut fds) = timeout(HANDSHAKE_TIMEOUT, unix::recv_fds(&stream, &mut first)).await??;
    match (count, first[0], fds.pop()) {
        (1, b'D', None) => {
            daemon(stream, ids.fetch_add(1, Ordering::Relaxed), &callers).await;
            Ok(())
        }
        (1, b'L', None) => {
            let session = Box::new(Session::local(stream.into_std()?)?);
            let _ = callers.send(Caller::Driver { session, pid: Some(peer.pid) });
            Ok(())
        }
        (1, b'S', Some(fd)) => {
            let socket = std::net::TcpStream::from(fd);
            socket.set_nonblocking(true)?;
            let socket = TcpStream::from_std(socket)?;
            // The daemon has read it too, so it is there.
            let name = timeout(HANDSHAKE_TIMEOUT, tcp::peek_sni(&socket)).await?.map_err(io::Error::other)?;
            if let Some((of, rank)) = tcp::worker_of(&name) {
                let arrival = Arrival::Tcp(socket.into_std()?.into());
                return if of == group && callers.send(Caller::Link { rank, arrival }).is_ok() {
                    Ok(())
                } else {
                    Err(io::Error::new(io::ErrorKind::NotFound, "a link of another group"))
                };
            }
            let _turn = handshakes.acquire().await.map_err(io::Error::other)?;
            let session = timeout(HANDSHAKE_TIMEOUT, shake_hands(socket, identity, driver)).await??;
            let _ = callers.send(Caller::Driver { session: Box::new(session), pid: None });
            Ok(())
        }
        (1, b'T', None) => {
            let mut rank = [0; 4];
            timeout(HANDSHAKE_TIMEOUT, stream.read_exact(&mut rank)).await??;
            let arrival = Arrival::Unix(stream.into_std()?.into());
            let _ = callers.send(Caller::Link { rank: u32::from_le_bytes(rank), arrival });
            Ok(())
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "unknown kind of caller")),
    }
}

/// TLS and hello with the driver on another host. Of all that the cluster trusts only its node may drive this group.
async fn shake_hands(socket: TcpStream, identity: &TlsIdentity, driver: NodeId) -> io::Result<Session> {
    socket.set_nodelay(true)?;
    retries::keep_short(&socket)?;
    let acceptor = TlsAcceptor::from(identity.server_config());
    let mut stream = acceptor.accept(socket).await?;
    let peer = stream.get_ref().1.peer_certificates().and_then(|certificates| peer_of(certificates.first()?));
    if peer.map(|peer| peer.node) != Some(driver) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "not from the node of this group's driver"));
    }
    let hello = Hello::of_this_build(Purpose::Step).encode();
    framing::write_frame(&mut stream, &hello, MAX_HELLO).await.map_err(io::Error::other)?;
    let theirs = framing::read_frame(&mut stream, MAX_HELLO).await.map_err(io::Error::other)?;
    let theirs = Hello::decode(&theirs).map_err(io::Error::other)?;
    theirs.agree().map_err(io::Error::other)?;
    if theirs.purpose != Purpose::Step {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a step session"));
    }
    stream.flush().await?;
    let (socket, tls) = stream.into_inner();
    Session::remote(socket.into_std()?, tls)
}

async fn daemon(stream: UnixStream, id: u64, callers: &mpsc::UnboundedSender<Caller>) {
    let (outbox, mut messages) = mpsc::unbounded_channel();
    if callers.send(Caller::Daemon { id, outbox }).is_err() {
        return;
    }
    let (read, mut write) = stream.into_split();
    let mut frames = framing::FrameReader::new(read, MAX_LOCAL_MESSAGE);
    loop {
        tokio::select! {
            message = messages.recv() => {
                let Some(message) = message else { return };
                let last = matches!(message, FromKeeper::Ended { .. });
                if framing::write_frame(&mut write, &codec::encode(&message), MAX_LOCAL_MESSAGE).await.is_err() {
                    break;
                }
                if last {
                    return;
                }
            }
            frame = frames.next() => {
                let Some(message) = frame.ok().and_then(|frame| codec::decode(&frame).ok()) else { break };
                if callers.send(Caller::Said { id, message }).is_err() {
                    return;
                }
            }
        }
    }
    let _ = callers.send(Caller::Gone { id });
}
