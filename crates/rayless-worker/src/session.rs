//! One end of a step session: frames over a Unix socket or TLS, without blocking and without a runtime.
//!
//! Both ends of a session live on threads that do little else (the driver's pump or a waiting caller, the keeper's step thread),
//! so a reader and a writer are one object under one lock and nothing is handed from thread to thread on the way of a step.

use rayless_net::unix::{peer_credentials, recv_fds_now, send_fds_now};
use rayless_proto::{
    limits::{MAX_FRAGMENT, MAX_LOCAL_MESSAGE, MAX_WORLD_SIZE},
    v1::step::{FLAG_LAST, HEADER, Header, Kind},
};
use rustix::net::sockopt;
use rustls::Connection;
use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// Read at once.
const CHUNK: usize = 64 << 10;
/// Bytes that may wait to be sent before a sender of bulk holds back.
pub(crate) const OUTPUT_SOFT_LIMIT: usize = 256 << 10;
/// Descriptors a peer may leave with us untaken.
const MAX_UNTAKEN_FDS: usize = 8;
/// Past the moment at which a silent peer's time is up, so that a look at it finds it over.
pub(crate) const JUST_AFTER: Duration = Duration::from_millis(1);
/// Bytes of an event, a cause or a line.
const MAX_SMALL: usize = 1 << 20;

/// The session is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// In order, between two frames or within one.
    #[error("connection closed by the peer")]
    Closed,
    /// By the network or the peer's kernel.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer does not speak the protocol.
    #[error("protocol broken by the peer: {0}")]
    Protocol(String),
}

impl SessionError {
    /// What it means, where the kernel's word for it would not say.
    pub(crate) fn in_words(&self) -> String {
        match self {
            Self::Closed => "it ended without a word".to_owned(),
            Self::Io(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {
                "the connection was reset (it was killed, its host restarted, or it gave this side up)".to_owned()
            }
            Self::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                "what was sent to it was not acknowledged".to_owned()
            }
            other => other.to_string(),
        }
    }
}

/// A received frame.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tls { socket: TcpStream, tls: Box<Connection> },
}

/// One end of a session.
#[derive(Debug)]
pub(crate) struct Session {
    stream: Stream,
    input: Vec<u8>,
    /// Bytes of `input` already taken as frames.
    taken: usize,
    output: Vec<u8>,
    /// Bytes of `output` already sent.
    sent: usize,
    /// Descriptors to go with the next byte.
    out_fds: Vec<OwnedFd>,
    in_fds: VecDeque<OwnedFd>,
    closed: bool,
    /// When bytes last came in.
    pub(crate) heard: Instant,
    /// When a frame was last queued.
    pub(crate) spoke: Instant,
}

impl Session {
    /// Over a Unix socket, after the byte that says what it is for.
    pub(crate) fn local(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self::new(Stream::Unix(socket)))
    }

    /// Over TCP, after handshake and hello.
    pub(crate) fn remote(socket: TcpStream, tls: impl Into<Connection>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let mut tls = tls.into();
        // What is queued is bounded here, by `output`.
        tls.set_buffer_limit(None);
        // The handshake may have read ahead into the first frames.
        let state = tls.process_new_packets().map_err(io::Error::other)?;
        let mut early = vec![0; state.plaintext_bytes_to_read()];
        tls.reader().read_exact(&mut early)?;
        let mut session = Self::new(Stream::Tls { socket, tls: Box::new(tls) });
        session.input = early;
        Ok(session)
    }

    fn new(stream: Stream) -> Self {
        let now = Instant::now();
        Self {
            stream,
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
            sent: 0,
            out_fds: Vec::new(),
            in_fds: VecDeque::new(),
            closed: false,
            heard: now,
            spoke: now,
        }
    }

    /// For an epoll set.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(socket) => socket.as_fd(),
            Stream::Tls { socket, .. } => socket.as_fd(),
        }
    }

    /// The process at the other end, where it is one of this host.
    pub(crate) fn peer_pid(&self) -> Option<u32> {
        match &self.stream {
            Stream::Unix(socket) => peer_credentials(socket).ok().map(|peer| peer.pid),
            Stream::Tls { .. } => None,
        }
    }

    /// Queues a frame of `parts` behind each other; [`Self::flush`] sends it.
    pub(crate) fn queue(&mut self, mut header: Header, parts: &[&[u8]]) {
        header.length = parts.iter().map(|part| part.len() as u32).sum();
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
        } else if self.sent > OUTPUT_SOFT_LIMIT {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        self.output.extend_from_slice(&header.encode());
        parts.iter().for_each(|part| self.output.extend_from_slice(part));
        self.spoke = Instant::now();
    }

    /// Descriptors that go out with the next frame queued. Unix sockets only.
    pub(crate) fn attach(&mut self, fds: Vec<OwnedFd>) {
        self.out_fds.extend(fds);
    }

    /// The next descriptor that came in.
    pub(crate) fn take_fd(&mut self) -> Option<OwnedFd> {
        self.in_fds.pop_front()
    }

    /// Bytes queued and not yet taken by the kernel.
    pub(crate) fn queued(&self) -> usize {
        let behind = match &self.stream {
            Stream::Tls { tls, .. } => usize::from(tls.wants_write()),
            Stream::Unix(_) => 0,
        };
        self.output.len() - self.sent + behind
    }

    /// Sends what the kernel takes.
    pub(crate) fn flush(&mut self) -> Result<(), SessionError> {
        loop {
            match &mut self.stream {
                Stream::Unix(socket) => {
                    let rest = &self.output[self.sent..];
                    if rest.is_empty() {
                        return Ok(());
                    }
                    let fds: Vec<_> = self.out_fds.iter().map(AsFd::as_fd).collect();
                    match send_fds_now(&*socket, rest, &fds) {
                        Ok(count) => {
                            self.sent += count;
                            self.out_fds.clear();
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Stream::Tls { socket, tls } => {
                    while tls.wants_write() {
                        match tls.write_tls(socket) {
                            Ok(_) => {}
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                            Err(error) => return Err(error.into()),
                        }
                    }
                    let rest = &self.output[self.sent..];
                    if rest.is_empty() {
                        return Ok(());
                    }
                    // A bounded step: what the socket does not take stays here in clear, not twice.
                    self.sent += tls.writer().write(&rest[..rest.len().min(CHUNK)])?;
                }
            }
        }
    }

    /// Takes in what is there, about `CHUNK` bytes at most. An end of the session is told by [`Self::next_frame`], after the frames
    /// that came before it.
    pub(crate) fn read(&mut self) -> Result<(), SessionError> {
        if self.taken == self.input.len() {
            self.input.clear();
            self.taken = 0;
        } else if self.taken > CHUNK {
            self.input.drain(..self.taken);
            self.taken = 0;
        }
        let before = self.input.len();
        match &mut self.stream {
            Stream::Unix(socket) => {
                self.input.resize(before + CHUNK, 0);
                let got = loop {
                    match recv_fds_now(&*socket, &mut self.input[before..]) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        other => break other,
                    }
                };
                let count = match got {
                    Ok((0, _)) => {
                        self.closed = true;
                        0
                    }
                    Ok((count, fds)) => {
                        self.in_fds.extend(fds);
                        count
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(error) => {
                        self.input.truncate(before);
                        return Err(error.into());
                    }
                };
                self.input.truncate(before + count);
                if self.in_fds.len() > MAX_UNTAKEN_FDS {
                    return Err(SessionError::Protocol("too many descriptors".into()));
                }
            }
            Stream::Tls { socket, tls } => {
                while self.input.len() - before < CHUNK {
                    let count = match tls.read_tls(socket) {
                        Ok(0) => {
                            self.closed = true;
                            break;
                        }
                        Ok(count) => count,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                        Err(error) => return Err(error.into()),
                    };
                    let state = tls.process_new_packets().map_err(|error| SessionError::Protocol(error.to_string()))?;
                    let at = self.input.len();
                    self.input.resize(at + state.plaintext_bytes_to_read(), 0);
                    tls.reader().read_exact(&mut self.input[at..])?;
                    self.closed |= state.peer_has_closed();
                    // A short read emptied the socket; asking again would cost a system call for nothing.
                    if count < 4096 {
                        break;
                    }
                }
            }
        }
        if self.input.len() > before {
            self.heard = Instant::now();
        }
        Ok(())
    }

    /// The next whole frame that was read.
    ///
    /// # Errors
    /// Also [`SessionError::Closed`], once nothing whole is left.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame>, SessionError> {
        let none = |closed| if closed { Err(SessionError::Closed) } else { Ok(None) };
        let Some(head) = self.input[self.taken..].first_chunk::<HEADER>() else { return none(self.closed) };
        let header =
            Header::decode(head).ok_or_else(|| SessionError::Protocol("unknown kind or flags of a frame".into()))?;
        let limit = match header.kind {
            Kind::Call | Kind::Reply => MAX_FRAGMENT + 4 * MAX_WORLD_SIZE,
            Kind::Launch => MAX_LOCAL_MESSAGE,
            Kind::Event | Kind::Stop | Kind::Log => MAX_SMALL,
            Kind::Look => 64,
            Kind::Ping => 0,
        };
        let length = header.length as usize;
        if length > limit {
            return Err(SessionError::Protocol(format!("a frame of {length} bytes is over its limit of {limit}")));
        }
        let start = self.taken + HEADER;
        let Some(payload) = self.input.get(start..start + length) else { return none(self.closed) };
        let payload = payload.to_vec();
        self.taken = start + length;
        Ok(Some(Frame { header, payload }))
    }

    /// From here on its end is told to the peer by a reset. An orderly end waits its turn behind what the peer has not acknowledged:
    /// where only this side's packets arrive, the peer would never learn of it.
    pub(crate) fn end_by_reset(&self) {
        if let Stream::Tls { socket, .. } = &self.stream {
            let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
        }
    }

    /// Queues a ping.
    pub(crate) fn queue_ping(&mut self) {
        self.queue(plain_header(Kind::Ping), &[]);
    }
}

/// A header of `kind` with nothing else said.
pub(crate) const fn plain_header(kind: Kind) -> Header {
    Header { length: 0, kind, flags: FLAG_LAST, rank: 0, asked: 0, call: 0 }
}
