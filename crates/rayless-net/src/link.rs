//! The handshake of links between workers: blocking, without a runtime, and exact.
//!
//! A worker has no runtime, and a link's own bytes may follow on the same socket in clear: so TLS is read record by record, never a byte
//! further than the frame that was asked for, and [`Channel::into_clear`] gives the socket back with nothing of what follows consumed.
//! (The server sends no session tickets, and neither side says goodbye in TLS, so nothing comes between.)

use crate::{
    congestion::{Congestion, ConnectError},
    framing::{HEADER, header_of, length_of},
    identity::{Peer, TlsIdentity, peer_of},
    tcp::{TcpError, classify, tune},
};
use rayless_proto::{
    hello::{Hello, HelloError, Purpose},
    limits::MAX_HELLO,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
    time::Timespec,
};
use rustls::{ClientConnection, Connection, ServerConnection, pki_types::ServerName};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

/// How long is slept at most before [`Patience::is_over`] is asked again.
const SLICE: Duration = Duration::from_millis(50);
/// Of one attempt to connect: the kernel's first packet and one repeat.
const CONNECT: Duration = Duration::from_secs(2);
/// Bytes of a TLS record's header, and of the longest record behind it (RFC 8446, section 5.2).
const RECORD_HEADER: usize = 5;
const MAX_RECORD: usize = (1 << 14) + 256;

/// How long to wait for a peer.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    deadline: Instant,
    is_over: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for Patience<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Patience").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl<'a> Patience<'a> {
    /// Until `deadline`, or until `is_over` says so, which is asked every 50 ms.
    pub const fn new(deadline: Instant, is_over: &'a dyn Fn() -> bool) -> Self {
        Self { deadline, is_over }
    }

    /// The same with an earlier end, where `deadline` is one.
    pub fn at_most(self, deadline: Instant) -> Self {
        Self { deadline: self.deadline.min(deadline), ..self }
    }

    /// Until when.
    pub const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What is left of it; `None`: nothing.
    pub fn left(&self) -> Option<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        (!left.is_zero() && !(self.is_over)()).then_some(left)
    }

    fn wait(&self, fd: BorrowedFd<'_>, flags: PollFlags) -> Result<(), ChannelError> {
        let slice = self.left().ok_or(ChannelError::Stopped)?.min(SLICE);
        let slice = Timespec { tv_sec: 0, tv_nsec: i64::from(slice.subsec_nanos()) };
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&slice)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(ChannelError::Broken(errno.to_string())),
        }
    }
}

/// A channel could not be opened or used. It is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The patience is over.
    #[error("not in time")]
    Stopped,
    /// The peer closed it, or the network broke it: another try may help.
    #[error("{0}")]
    Broken(String),
    /// The peer is not of this cluster, or of another version: another try does not help.
    #[error(transparent)]
    Refused(TcpError),
}

impl ChannelError {
    fn from_io(address: SocketAddr, error: io::Error) -> Self {
        match classify(address, error) {
            TcpError::Io { error, .. } => Self::Broken(format!("{address}: {error}")),
            refused => Self::Refused(refused),
        }
    }
}

/// An authenticated connection between two workers, in frames.
#[derive(Debug)]
pub struct Channel {
    socket: TcpStream,
    tls: Connection,
    address: SocketAddr,
    peer: Peer,
}

impl Channel {
    /// Calls the worker behind `name` (see [`crate::tcp::link_name`]) at `address`. One try: who is not there yet is called again by the caller.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn call(
        address: SocketAddr,
        name: &str,
        identity: &TlsIdentity,
        patience: &Patience<'_>,
    ) -> Result<Self, ChannelError> {
        let left = patience.left().ok_or(ChannelError::Stopped)?;
        let socket = Congestion::from_env().connect(address, left.min(CONNECT)).map_err(|error| match error {
            ConnectError::Congestion(error) => ChannelError::Refused(error.into()),
            ConnectError::Io(error) => ChannelError::from_io(address, error),
        })?;
        let name = ServerName::try_from(name.to_owned()).map_err(|error| ChannelError::Broken(error.to_string()))?;
        let tls = ClientConnection::new(identity.client_config(), name)
            .map_err(|error| ChannelError::Broken(error.to_string()))?;
        Self::open(socket, tls.into(), address, patience)
    }

    /// Answers a caller of which nothing was read yet.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn answer(socket: TcpStream, identity: &TlsIdentity, patience: &Patience<'_>) -> Result<Self, ChannelError> {
        // A socket whose peer is gone has no address any more; it fails below.
        let address = socket.peer_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        let tls =
            ServerConnection::new(identity.server_config()).map_err(|error| ChannelError::Broken(error.to_string()))?;
        Self::open(socket, tls.into(), address, patience)
    }

    fn open(
        socket: TcpStream,
        mut tls: Connection,
        address: SocketAddr,
        patience: &Patience<'_>,
    ) -> Result<Self, ChannelError> {
        let io = |error| ChannelError::from_io(address, error);
        socket.set_nonblocking(true).and_then(|()| tune(&socket)).map_err(io)?;
        while tls.is_handshaking() {
            write_all(&socket, &mut tls, address, patience)?;
            if tls.is_handshaking() {
                read_record(&socket, &mut tls, address, patience)?;
            }
        }
        let peer = tls.peer_certificates().and_then(|certificates| peer_of(certificates.first()?));
        let peer = peer.ok_or(ChannelError::Refused(TcpError::WrongToken(address)))?;
        let mut channel = Self { socket, tls, address, peer };
        channel.send(&Hello::of_this_build(Purpose::Link).encode(), patience)?;
        let refused = |error: HelloError| ChannelError::Refused(error.into());
        let hello = Hello::decode(&channel.receive(MAX_HELLO, patience)?).map_err(refused)?;
        hello.agree().map_err(refused)?;
        if hello.purpose != Purpose::Link {
            return Err(ChannelError::Broken(format!("{address}: not a link")));
        }
        Ok(channel)
    }

    /// Who is at the other end.
    pub const fn peer(&self) -> Peer {
        self.peer
    }

    /// Where it is.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn send(&mut self, frame: &[u8], patience: &Patience<'_>) -> Result<(), ChannelError> {
        let io = |error| ChannelError::from_io(self.address, error);
        let header = header_of(frame.len(), u32::MAX as usize).map_err(|error| io(io::Error::other(error)))?;
        let whole = [&header, frame].concat();
        let mut rest = &whole[..];
        while !rest.is_empty() {
            // TLS takes what it has room for.
            rest = &rest[self.tls.writer().write(rest).map_err(io)?..];
            write_all(&self.socket, &mut self.tls, self.address, patience)?;
        }
        Ok(())
    }

    /// Receives a frame of up to `limit` bytes, and not a byte more.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn receive(&mut self, limit: usize, patience: &Patience<'_>) -> Result<Vec<u8>, ChannelError> {
        let mut header = [0; HEADER];
        self.read_exact(&mut header, patience)?;
        let length = length_of(header, limit).map_err(|error| ChannelError::Broken(error.to_string()))?;
        let mut frame = vec![0; length];
        self.read_exact(&mut frame, patience)?;
        Ok(frame)
    }

    /// Whether the peer has said something, or is gone.
    pub fn has_news(&self) -> bool {
        let looked = recv(&self.socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        !matches!(looked, Err(Errno::AGAIN | Errno::INTR))
    }

    /// Whether the peer has hung up.
    pub fn is_gone(&self) -> bool {
        let looked = recv(&self.socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(looked, Ok((0, _))) || looked.is_err_and(|errno| errno != Errno::AGAIN && errno != Errno::INTR)
    }

    /// The socket, blocking, with what follows in clear; TLS is over without a word.
    ///
    /// # Errors
    /// Where part of what was received in TLS was not taken: the peer does not keep to the protocol.
    pub fn into_clear(mut self) -> Result<TcpStream, ChannelError> {
        let state = self.tls.process_new_packets().map_err(|error| ChannelError::Broken(error.to_string()))?;
        if state.plaintext_bytes_to_read() > 0 {
            return Err(ChannelError::Broken(format!("{}: more was sent than belongs here", self.address)));
        }
        self.socket.set_nonblocking(false).map_err(|error| ChannelError::from_io(self.address, error))?;
        Ok(self.socket)
    }

    /// The socket, not blocking, with TLS to go on.
    pub fn into_tls(self) -> (TcpStream, Connection) {
        (self.socket, self.tls)
    }

    fn read_exact(&mut self, mut out: &mut [u8], patience: &Patience<'_>) -> Result<(), ChannelError> {
        while !out.is_empty() {
            match self.tls.reader().read(out) {
                Ok(0) => return Err(closed(self.address)),
                Ok(count) => out = &mut out[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    read_record(&self.socket, &mut self.tls, self.address, patience)?;
                }
                Err(error) => return Err(ChannelError::from_io(self.address, error)),
            }
        }
        Ok(())
    }
}

fn closed(address: SocketAddr) -> ChannelError {
    ChannelError::Broken(format!("{address}: closed by the peer during the handshake"))
}

/// Takes one whole record off the socket.
fn read_record(
    socket: &TcpStream,
    tls: &mut Connection,
    address: SocketAddr,
    patience: &Patience<'_>,
) -> Result<(), ChannelError> {
    let mut record = [0; RECORD_HEADER + MAX_RECORD];
    let fill = |from: usize, to: usize, record: &mut [u8]| {
        let mut at = from;
        while at < to {
            match recv(socket, &mut record[at..to], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(closed(address)),
                Ok((count, _)) => at += count,
                Err(Errno::AGAIN) => patience.wait(socket.as_fd(), PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::from_io(address, errno.into())),
            }
        }
        Ok(())
    };
    fill(0, RECORD_HEADER, &mut record)?;
    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
    // What cannot be a record is not waited for.
    if !(20..=23).contains(&record[0]) || record[1] != 3 || length > MAX_RECORD {
        return Err(ChannelError::Refused(HelloError::NotHello.into()));
    }
    fill(RECORD_HEADER, RECORD_HEADER + length, &mut record)?;
    let mut rest = &record[..RECORD_HEADER + length];
    while !rest.is_empty() {
        tls.read_tls(&mut rest).map_err(|error| ChannelError::from_io(address, error))?;
        if let Err(error) = tls.process_new_packets() {
            // The alert that says why; the peer may be gone already.
            let _ = write_all(socket, tls, address, patience);
            return Err(ChannelError::from_io(address, io::Error::new(io::ErrorKind::InvalidData, error)));
        }
    }
    Ok(())
}

/// Sends what TLS has to send.
fn write_all(
    socket: &TcpStream,
    tls: &mut Connection,
    address: SocketAddr,
    patience: &Patience<'_>,
) -> Result<(), ChannelError> {
    let mut bytes = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut bytes).map_err(|error| ChannelError::from_io(address, error))?;
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        match send(socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::AGAIN) => patience.wait(socket.as_fd(), PollFlags::OUT)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(ChannelError::from_io(address, errno.into())),
        }
    }
    Ok(())
}
