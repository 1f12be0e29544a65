//! Opening the step sessions of a placed group.

use super::{PlacedParts, StartError};
use crate::{retries, session::Session};
use rayless_net::{
    framing,
    identity::{TlsIdentity, peer_of},
    unix,
};
use rayless_proto::{
    hello::{Hello, Purpose},
    ids::GroupId,
    limits::{HANDSHAKE_TIMEOUT, MAX_HELLO},
    v1::control::PlacedNode,
};
use rustls::{ClientConnection, pki_types::ServerName};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

/// Of one attempt to connect: the kernel's first packet and one repeat.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_ATTEMPTS: u32 = 6;
/// For each answer of the other side. It gives the whole handshake so long.
const ANSWER_TIMEOUT: Duration = HANDSHAKE_TIMEOUT;

/// Between two looks at whether it is still worth it.
const TICK: Duration = Duration::from_millis(100);

/// A session to the keeper on each of `nodes`, opened at the same time. `worth_it` is asked again and again with the nodes that have not answered
/// yet, and ends it all with its error: what is under way then is left to end by itself, within one attempt.
pub(super) fn open_all(
    parts: &PlacedParts,
    nodes: &[&PlacedNode],
    worth_it: &mut dyn FnMut(&[&PlacedNode]) -> Result<(), StartError>,
) -> Result<Vec<Session>, StartError> {
    let identity = Arc::new(TlsIdentity::from_bundle(&parts.leaf).map_err(|error| error.to_string()));
    let given_up = Arc::new(AtomicBool::new(false));
    let (done, opened) = mpsc::channel();
    for (index, node) in nodes.iter().copied().enumerate() {
        let local = parts.local_keeper.clone().filter(|_| node.id == parts.local_node);
        let (node, group, done) = (node.clone(), parts.group, done.clone());
        let (identity, given_up) = (Arc::clone(&identity), Arc::clone(&given_up));
        std::thread::Builder::new().name("rayless-open".into()).spawn(move || {
            let address = local
                .as_ref()
                .map_or_else(|| format!("{}:{}", node.address, node.port), |socket| socket.display().to_string());
            let session = match (&local, &*identity) {
                (Some(socket), _) => open_local(socket),
                (None, Ok(identity)) => open_remote(&node, group, identity, &given_up),
                (None, Err(error)) => Err(io::Error::other(error.clone())),
            };
            let session = session.map_err(|error| StartError::Unreachable {
                name: node.name.clone(),
                address,
                cause: error.to_string(),
            });
            let _ = done.send((index, session));
        })?;
    }
    drop(done);
    let mut sessions: Vec<Option<Session>> = nodes.iter().map(|_| None).collect();
    let outcome = loop {
        match opened.recv_timeout(TICK) {
            Ok((index, Ok(session))) => sessions[index] = Some(session),
            Ok((_, Err(error))) => break Err(error),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => break Err(io::Error::other("a thread ended early").into()),
        }
        let open = sessions.iter().zip(nodes).filter(|(session, _)| session.is_none());
        let open: Vec<&PlacedNode> = open.map(|(_, node)| *node).collect();
        if open.is_empty() {
            break Ok(());
        }
        if let Err(error) = worth_it(&open) {
            break Err(error);
        }
    };
    given_up.store(true, Ordering::Relaxed);
    outcome.map(|()| sessions.into_iter().flatten().collect())
}

fn open_local(socket: &std::path::Path) -> io::Result<Session> {
    let mut stream = unix::connect_std(socket).map_err(io::Error::other)?;
    stream.write_all(b"L")?;
    Session::local(stream)
}

fn open_remote(
    node: &PlacedNode,
    group: GroupId,
    identity: &TlsIdentity,
    given_up: &AtomicBool,
) -> io::Result<Session> {
    let address: IpAddr = node.address.parse().map_err(io::Error::other)?;
    let mut socket = connect(SocketAddr::new(address, node.port), given_up)?;
    socket.set_nodelay(true)?;
    retries::keep_short(&socket)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    // The daemon there hands the connection to the keeper of that name.
    let name = ServerName::try_from(format!("{group}.keeper.rayless")).map_err(io::Error::other)?;
    let mut tls = ClientConnection::new(Arc::clone(&identity.client_config()), name).map_err(io::Error::other)?;
    greet(&mut rustls::Stream::new(&mut tls, &mut socket)).map_err(|error| told(error, group))?;
    let peer = tls.peer_certificates().and_then(|certificates| peer_of(certificates.first()?));
    if peer.map(|peer| peer.node) != Some(node.id) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "another node answers at that address"));
    }
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    Session::remote(socket, tls)
}

/// The kernel repeats a lost first packet after 1, 3 and 7 seconds: on a lossy network many short attempts are better than one long.
fn connect(address: SocketAddr, given_up: &AtomicBool) -> io::Result<TcpStream> {
    for _ in 1..CONNECT_ATTEMPTS {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !given_up.load(Ordering::Relaxed) => {}
            done => return done,
        }
    }
    TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
}

/// Both hellos. The TLS handshake happens on the way.
fn greet(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let hello = Hello::of_this_build(Purpose::Step).encode();
    let header = framing::header_of(hello.len(), MAX_HELLO).map_err(io::Error::other)?;
    stream.write_all(&[&header[..], &hello].concat())?;
    stream.flush()?;
    let mut header = [0; framing::HEADER];
    stream.read_exact(&mut header)?;
    let mut theirs = vec![0; framing::length_of(header, MAX_HELLO).map_err(io::Error::other)?];
    stream.read_exact(&mut theirs)?;
    Hello::decode(&theirs).and_then(|hello| hello.agree()).map_err(io::Error::other)?;
    Ok(())
}

/// A daemon that has no such keeper, or that does not trust this side, closes the connection.
fn told(error: io::Error, group: GroupId) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            io::Error::new(error.kind(), format!("closed by the node: it does not run group {group}"))
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {ANSWER_TIMEOUT:?}"))
        }
        _ => error,
    }
}
