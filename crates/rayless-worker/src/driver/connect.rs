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
    sync::Arc,
    thread,
    time::Duration,
};

/// Of one attempt to connect: the kernel's first packet and one repeat.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_ATTEMPTS: u32 = 6;
/// For each answer of the other side. It gives the whole handshake so long.
const ANSWER_TIMEOUT: Duration = HANDSHAKE_TIMEOUT;

/// A session to the keeper on each of `nodes`, opened at the same time.
pub(super) fn open_all(parts: &PlacedParts, nodes: &[&PlacedNode]) -> Result<Vec<Session>, StartError> {
    let identity = TlsIdentity::from_bundle(&parts.leaf);
    thread::scope(|scope| {
        let opening: Vec<_> = nodes
            .iter()
            .map(|node| {
                let identity = &identity;
                scope.spawn(move || {
                    let local = parts.local_keeper.as_ref().filter(|_| node.id == parts.local_node);
                    let address = local.map_or_else(
                        || format!("{}:{}", node.address, node.port),
                        |socket| socket.display().to_string(),
                    );
                    let session = match (local, identity) {
                        (Some(socket), _) => open_local(socket),
                        (None, Ok(identity)) => open_remote(node, parts.group, identity),
                        (None, Err(error)) => Err(io::Error::other(error.to_string())),
                    };
                    session.map_err(|error| StartError::Unreachable {
                        name: node.name.clone(),
                        address,
                        cause: error.to_string(),
                    })
                })
            })
            .collect();
        let joined = opening.into_iter().map(|thread| thread.join());
        joined.map(|session| session.unwrap_or_else(|_| Err(io::Error::other("a thread panicked").into()))).collect()
    })
}

fn open_local(socket: &std::path::Path) -> io::Result<Session> {
    let mut stream = unix::connect_std(socket).map_err(io::Error::other)?;
    stream.write_all(b"L")?;
    Session::local(stream)
}

fn open_remote(node: &PlacedNode, group: GroupId, identity: &TlsIdentity) -> io::Result<Session> {
    let address: IpAddr = node.address.parse().map_err(io::Error::other)?;
    let mut socket = connect(SocketAddr::new(address, node.port))?;
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
fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    for _ in 1..CONNECT_ATTEMPTS {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
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
