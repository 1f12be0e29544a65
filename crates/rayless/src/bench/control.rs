//! What the two sides say to each other: lines of text, over a socket that only they have.
//!
//! On one host that is a socket pair, given to the child as its stdin. Between two hosts it is a TLS session with the
//! cluster's identity at both ends, as everything between rayless' hosts is; without the token nobody comes in.

use crate::message::{Exit, Failure};
use rayless_net::{
    identity::{ClusterIdentity, NodeKey, TlsIdentity},
    token::Token,
};
use rustix::{
    fd::{AsFd, OwnedFd},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use rustls::{ClientConnection, ServerConnection, StreamOwned, pki_types::ServerName};
use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::{SocketAddr, TcpStream, ToSocketAddrs as _},
    os::unix::net::UnixStream,
    time::Duration,
};

/// Both sides start with this and their build.
const GREETING: &str = "rayless bench link 1";
/// The longest line; a peer cannot make us hold more.
const MAX_LINE: usize = 4096;
const HANDSHAKE: Duration = Duration::from_secs(5);

/// One side's end of the conversation.
pub(super) struct Control {
    stream: Stream,
    peer: String,
}

enum Stream {
    Unix(UnixStream),
    Client(Box<StreamOwned<ClientConnection, TcpStream>>),
    Server(Box<StreamOwned<ServerConnection, TcpStream>>),
}

/// The cluster's identity, with a key of this run's own.
pub(super) fn identity(token: &Token) -> Result<TlsIdentity, Failure> {
    let key = NodeKey::generate().map_err(Failure::failed)?;
    Ok(ClusterIdentity::from_token(token, &key).map_err(Failure::failed)?.tls().clone())
}

impl Control {
    /// Over a socket pair.
    pub(super) fn over_unix(stream: UnixStream) -> Result<Self, Failure> {
        Self { stream: Stream::Unix(stream), peer: "another process of this host".to_owned() }.greeted()
    }

    /// Calls a `--listen`.
    pub(super) fn call(address: &str, identity: &TlsIdentity) -> Result<Self, Failure> {
        let with_port = if address.rsplit_once(':').is_some_and(|(host, _)| !host.contains(':') || host.ends_with(']'))
        {
            address.to_owned()
        } else {
            format!("{address}:{}", super::DEFAULT_PORT)
        };
        let mut addresses = with_port.to_socket_addrs().map_err(|error| {
            Failure::failed(format!("`{address}` is no address: {error}\nhint: HOST[:PORT], as `--listen` says it"))
        })?;
        let Some(to) = addresses.next() else { return Err(Failure::failed(format!("`{address}` has no address"))) };
        let stream = TcpStream::connect_timeout(&to, HANDSHAKE).map_err(|error| {
            Failure::new(
                Exit::NoCluster,
                format!("cannot reach {to}: {error}\nhint: on that host: `rayless bench link --listen`"),
            )
        })?;
        patient(&stream, Some(HANDSHAKE))?;
        let name = ServerName::try_from("link.bench.rayless").map_err(Failure::failed)?;
        let session = ClientConnection::new(identity.client_config(), name).map_err(Failure::failed)?;
        let stream = Stream::Client(Box::new(StreamOwned::new(session, stream)));
        Self { stream, peer: to.to_string() }.greeted()
    }

    /// Takes a caller.
    pub(super) fn answer(stream: TcpStream, from: SocketAddr, identity: &TlsIdentity) -> Result<Self, Failure> {
        patient(&stream, Some(HANDSHAKE))?;
        let session = ServerConnection::new(identity.server_config()).map_err(Failure::failed)?;
        let stream = Stream::Server(Box::new(StreamOwned::new(session, stream)));
        Self { stream, peer: from.to_string() }.greeted()
    }

    /// The same greeting and build at both ends, or both are named.
    fn greeted(mut self) -> Result<Self, Failure> {
        self.say(&format!("{GREETING} {}", rayless_proto::BUILD))?;
        let theirs = self.hear()?;
        if theirs.strip_prefix(GREETING).is_none() {
            return Err(Failure::new(
                Exit::Refused,
                format!(
                    "{} speaks `{}`, this side `{GREETING} {}`\nhint: use the same rayless on both hosts",
                    self.peer,
                    theirs.chars().filter(|c| !c.is_control()).take(80).collect::<String>(),
                    rayless_proto::BUILD
                ),
            ));
        }
        match &self.stream {
            Stream::Unix(_) => {}
            Stream::Client(stream) => patient(&stream.sock, None)?,
            Stream::Server(stream) => patient(&stream.sock, None)?,
        }
        Ok(self)
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// The peer's address, where it is on another host, and ours.
    pub(super) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let socket = match &self.stream {
            Stream::Unix(_) => return None,
            Stream::Client(stream) => &stream.sock,
            Stream::Server(stream) => &stream.sock,
        };
        Some((socket.peer_addr().ok()?, socket.local_addr().ok()?))
    }

    /// Says a line.
    pub(super) fn say(&mut self, line: &str) -> Result<(), Failure> {
        let line = format!("{line}\n");
        let said = match &mut self.stream {
            Stream::Unix(stream) => stream.write_all(line.as_bytes()),
            Stream::Client(stream) => stream.write_all(line.as_bytes()).and_then(|()| stream.flush()),
            Stream::Server(stream) => stream.write_all(line.as_bytes()).and_then(|()| stream.flush()),
        };
        said.map_err(|error| self.broken(&error))
    }

    /// Waits for a line.
    pub(super) fn hear(&mut self) -> Result<String, Failure> {
        let mut line = Vec::new();
        loop {
            // Byte by byte: lines are few, and what comes behind one (a descriptor) must stay where it is.
            let mut byte = [0];
            let got = match &mut self.stream {
                Stream::Unix(stream) => stream.read_exact(&mut byte),
                Stream::Client(stream) => stream.read_exact(&mut byte),
                Stream::Server(stream) => stream.read_exact(&mut byte),
            };
            got.map_err(|error| self.broken(&error))?;
            match byte[0] {
                b'\n' => return String::from_utf8(line).map_err(|_| self.nonsense()),
                _ if line.len() == MAX_LINE => return Err(self.nonsense()),
                byte => line.push(byte),
            }
        }
    }

    /// Waits for a line that is `ok …`; `failed …` is an error of the peer's.
    pub(super) fn expect_ok(&mut self) -> Result<String, Failure> {
        let line = self.hear()?;
        match (line.strip_prefix("ok"), line.strip_prefix("failed ")) {
            (Some(rest), _) => Ok(rest.trim().to_owned()),
            (_, Some(cause)) => Err(Failure::failed(format!("the other side: {cause}"))),
            _ => Err(self.nonsense()),
        }
    }

    /// Gives sockets to the peer, which is on this host.
    pub(super) fn give(&self, sockets: &[UnixStream; 2]) -> Result<(), Failure> {
        let Stream::Unix(stream) = &self.stream else { return Err(elsewhere()) };
        let fds = sockets.each_ref().map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(stream, &[IoSlice::new(b"s")], &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|errno| Failure::failed(format!("passing sockets: {errno}")))
    }

    /// Takes the sockets that the peer gives.
    pub(super) fn take(&self) -> Result<[UnixStream; 2], Failure> {
        let Stream::Unix(stream) = &self.stream else { return Err(elsewhere()) };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(|errno| Failure::failed(format!("taking sockets: {errno}")))?;
        let taken: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        let taken: [OwnedFd; 2] = taken.try_into().map_err(|_| self.nonsense())?;
        Ok(taken.map(UnixStream::from))
    }

    fn broken(&self, error: &io::Error) -> Failure {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if tls.is_some_and(is_strange) {
            let text = format!("{} has another cluster token\nhint: use the same token on both hosts", self.peer);
            return Failure::new(Exit::Refused, text);
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Failure::failed(format!(
                    "{} ended the conversation\nhint: is its process still there, or busy with another run?",
                    self.peer
                ))
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::failed(format!(
                "no answer from {} within {} s\nhint: does `rayless bench link --listen` run there, and nothing else?",
                self.peer,
                HANDSHAKE.as_secs()
            )),
            _ => Failure::failed(format!("{}: {error}", self.peer)),
        }
    }

    /// The peer says what it cannot have meant.
    pub(super) fn nonsense(&self) -> Failure {
        Failure::failed(format!(
            "{} does not speak as this side does\nhint: use the same rayless on both hosts",
            self.peer
        ))
    }
}

fn is_strange(error: &rustls::Error) -> bool {
    use rustls::{AlertDescription as Alert, Error};
    matches!(
        error,
        Error::InvalidCertificate(_)
            | Error::AlertReceived(
                Alert::UnknownCA
                    | Alert::BadCertificate
                    | Alert::CertificateUnknown
                    | Alert::DecryptError
                    | Alert::AccessDenied
            )
    )
}

fn elsewhere() -> Failure {
    Failure::failed("shm: the other side is on another host\nhint: measure tcp or rdma between hosts")
}

fn patient(stream: &TcpStream, limit: Option<Duration>) -> Result<(), Failure> {
    let set = stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit));
    set.and_then(|()| stream.set_nodelay(true)).map_err(Failure::failed)
}
