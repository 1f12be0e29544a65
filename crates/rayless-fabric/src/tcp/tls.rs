//! Links over TCP whose bytes stay within TLS (`--encrypt-tensors`): one stream, for it is the cipher that limits it, not the flow.
//!
//! The stream comes with its TLS session from the caller, who has shaken hands on it. Bytes are copied once more than in clear, into the
//! records and out of them.

use super::is_gone;
use crate::{
    config::LinkConfig,
    error::{EstablishError, TransportError},
    greeting::{ANSWER, Answer, Context, GREETING, Greeting, HandshakeIo, readable, writable},
    name::{LinkName, Ticket},
    recv::RecvLink,
    scatter::{Scatter, ScatterMut},
    send::SendLink,
    transport::{Counters, Cursor, End, Inbound, Level, Outbound},
    wait::Wake,
    wake::{EventWake, is_ready, poll_for},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd},
    io::Errno,
    net::{RecvFlags, SendFlags},
};
use rustls::Connection;
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

/// Bytes of records that wait for the socket; a payload goes through in pieces of about this size.
const QUEUED: usize = 256 << 10;
/// Bytes of records taken off the socket with one call.
const STAGE: usize = 256 << 10;

/// A TLS session and its socket.
pub(crate) struct Pipe {
    socket: TcpStream,
    tls: Connection,
    /// Records that TLS has not looked at yet.
    stage: Box<[u8]>,
    staged: std::ops::Range<usize>,
}

impl std::fmt::Debug for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipe").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Why bytes do not move.
enum Stuck {
    /// Closed by the peer.
    Ended,
    /// By the system or the network.
    Errno(Errno),
    /// What came is not what was sent: TLS says so.
    Tls(String),
}

impl From<Stuck> for HandshakeIo {
    fn from(stuck: Stuck) -> Self {
        match stuck {
            Stuck::Ended => Self::Eof,
            Stuck::Errno(errno) => Self::Errno(errno),
            Stuck::Tls(_) => Self::Errno(Errno::PROTO),
        }
    }
}

impl Pipe {
    fn new(socket: TcpStream, mut tls: Connection) -> Result<Self, Errno> {
        socket.set_nonblocking(true).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
        tls.set_buffer_limit(Some(QUEUED));
        Ok(Self { socket, tls, stage: vec![0; STAGE].into_boxed_slice(), staged: 0..0 })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes over some of `bytes`.
    fn put(&mut self, bytes: &[u8]) -> Result<usize, Stuck> {
        self.tls.writer().write(bytes).map_err(|error| stuck(&error))
    }

    /// Sends records. True: none is left.
    fn flush(&mut self) -> Result<bool, Stuck> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Socket(&self.socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(stuck(&error)),
            }
        }
        Ok(true)
    }

    /// Bytes that have come; 0: none.
    fn take(&mut self, out: &mut [u8]) -> Result<usize, Stuck> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            match self.tls.reader().read(out) {
                Ok(0) => return Err(Stuck::Ended),
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(stuck(&error)),
            }
            if self.staged.is_empty() {
                match rustix::net::recv(&self.socket, &mut *self.stage, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => return Err(Stuck::Ended),
                    Ok((count, _)) => self.staged = 0..count,
                    Err(Errno::AGAIN) => return Ok(0),
                    Err(Errno::INTR) => continue,
                    Err(errno) => return Err(Stuck::Errno(errno)),
                }
            }
            let mut rest = &self.stage[self.staged.clone()];
            self.tls.read_tls(&mut rest).map_err(|error| stuck(&error))?;
            self.staged.start = self.staged.end - rest.len();
            self.tls.process_new_packets().map_err(|error| Stuck::Tls(error.to_string()))?;
        }
    }

    fn write_all(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<(), HandshakeIo> {
        loop {
            bytes = &bytes[self.put(bytes)?..];
            if self.flush()? && bytes.is_empty() {
                return Ok(());
            }
            if self.tls.wants_write() {
                writable(self.fd(), deadline)?;
            }
        }
    }

    fn read_exact(&mut self, bytes: &mut [u8], deadline: Instant) -> Result<(), HandshakeIo> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.take(&mut bytes[filled..])? {
                0 => readable(self.fd(), deadline)?,
                count => filled += count,
            }
        }
        Ok(())
    }

    /// Reads a greeting of the accepting end.
    pub(crate) fn greeting(
        socket: TcpStream,
        tls: Connection,
        deadline: Instant,
    ) -> Result<([u8; GREETING], Self), HandshakeIo> {
        let mut pipe = Self::new(socket, tls).map_err(HandshakeIo::Errno)?;
        let mut bytes = [0; GREETING];
        pipe.read_exact(&mut bytes, deadline)?;
        Ok((bytes, pipe))
    }

    /// Refuses. The peer may be gone already.
    pub(crate) fn refuse(&mut self, answer: &[u8; ANSWER], deadline: Instant) {
        let _ = self.write_all(answer, deadline);
    }
}

/// Never blocks, never raises SIGPIPE.
struct Socket<'a>(&'a TcpStream);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::net::send(self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn stuck(error: &io::Error) -> Stuck {
    Errno::from_io_error(error).map_or_else(|| Stuck::Tls(error.to_string()), Stuck::Errno)
}

/// Opens the sending end over a stream on which TLS stands. Blocks for at most `config.handshake`.
pub fn connect_tls(
    socket: TcpStream,
    tls: Connection,
    name: LinkName,
    ticket: Ticket,
    config: &LinkConfig,
) -> Result<SendLink, EstablishError> {
    let context = Context::new(name, Level::Tcp, config);
    let mut pipe = Pipe::new(socket, tls).map_err(|e| context.failed("preparing a stream", e))?;
    let greeting = Greeting::new(name, ticket, Level::Tcp, 0, 1, config).encode();
    pipe.write_all(&greeting, context.deadline()).map_err(|e| context.io_failed("writing the handshake", e))?;
    let mut answer = [0; ANSWER];
    pipe.read_exact(&mut answer, context.deadline()).map_err(|e| context.io_failed("reading the answer", e))?;
    let answer = Answer::decode(&answer);
    let answer = answer.ok_or_else(|| context.failed("reading the answer", "these bytes are no answer"))?;
    let limits = answer.limits(&context)?;
    let wake = EventWake::new().map_err(|e| context.failed("eventfd", e))?;
    let outbound = TlsOutbound { pipe: Some(pipe), wake: Arc::new(wake), sleeps: 0 };
    Ok(SendLink::new(name, Box::new(outbound), limits, config))
}

/// The receiving end, for a greeting that fitted.
pub(crate) fn receiver(context: &Context, config: &LinkConfig, mut pipe: Pipe) -> Result<RecvLink, EstablishError> {
    let answer = Answer::welcome(config).encode();
    pipe.write_all(&answer, context.deadline()).map_err(|e| context.io_failed("writing the handshake", e))?;
    let wake = EventWake::new().map_err(|e| context.failed("eventfd", e))?;
    let inbound = TlsInbound { pipe: Some(pipe), wake: Arc::new(wake), sleeps: 0 };
    Ok(RecvLink::new(context.link, Box::new(inbound), config))
}

struct TlsOutbound {
    /// `None` once closed.
    pipe: Option<Pipe>,
    wake: Arc<EventWake>,
    sleeps: u64,
}

impl TlsOutbound {
    fn pipe(&mut self) -> Result<&mut Pipe, TransportError> {
        self.pipe.as_mut().ok_or_else(|| TransportError::gone("this end is closed"))
    }

    /// What the receiver wrote before it went, or how it went.
    fn lost(&mut self, stuck: Stuck) -> TransportError {
        match stuck {
            Stuck::Errno(errno) if !is_gone(errno) => TransportError::system("send", errno),
            Stuck::Tls(cause) => TransportError::system("TLS", cause),
            Stuck::Errno(_) | Stuck::Ended => self.parting_words(),
        }
    }

    fn parting_words(&mut self) -> TransportError {
        let mut reason = [0; 512];
        match self.pipe.as_mut().map(|pipe| pipe.take(&mut reason)) {
            Some(Ok(count)) if count > 0 => TransportError::reported(&reason[..count]),
            _ => TransportError::gone("the receiver's end of the connection was closed"),
        }
    }
}

impl End for TlsOutbound {
    fn level(&self) -> Level {
        Level::Tcp
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.pipe.iter().map(|pipe| pipe.socket.as_raw_fd()).collect()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<EventWake>::clone(&self.wake)
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}

impl Outbound for TlsOutbound {
    fn write(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError> {
        let pipe = self.pipe()?;
        let mut step = || -> Result<bool, Stuck> {
            loop {
                while cursor.head < head.len() {
                    let took = pipe.put(&head[cursor.head..])?;
                    cursor.head += took;
                    if took == 0 {
                        break;
                    }
                }
                let mut failed = None;
                if cursor.head == head.len() {
                    let from = cursor.body;
                    body.walk(from, body.len() - from, |slice| match pipe.put(slice) {
                        Ok(took) => {
                            cursor.body += took as u64;
                            took == slice.len()
                        }
                        Err(stuck) => {
                            failed = Some(stuck);
                            false
                        }
                    });
                }
                if let Some(stuck) = failed {
                    return Err(stuck);
                }
                if !pipe.flush()? {
                    return Ok(false);
                }
                if cursor.head == head.len() && cursor.body == body.len() {
                    return Ok(true);
                }
            }
        };
        step().map_err(|stuck| self.lost(stuck))
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        self.sleeps += 1;
        let wake = Arc::clone(&self.wake);
        let pipe = self.pipe()?;
        let room = if pipe.tls.wants_write() { PollFlags::OUT } else { PollFlags::empty() };
        let mut fds = [
            PollFd::from_borrowed_fd(wake.fd(), PollFlags::IN),
            // The receiver writes nothing before its last words.
            PollFd::from_borrowed_fd(pipe.fd(), room | PollFlags::IN | PollFlags::RDHUP),
        ];
        poll_for(&mut fds, at_most)?;
        if is_ready(&fds[0]) {
            wake.drain();
        }
        let ended = PollFlags::IN | PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        if fds[1].revents().intersects(ended) {
            return Err(self.parting_words());
        }
        Ok(())
    }

    fn close(&mut self, _whole: bool) {
        // What was written is still delivered; then the receiver reads the end of the stream.
        self.pipe = None;
    }
}

struct TlsInbound {
    /// `None` once closed.
    pipe: Option<Pipe>,
    wake: Arc<EventWake>,
    sleeps: u64,
}

impl TlsInbound {
    fn take(&mut self, out: &mut [u8]) -> Result<usize, TransportError> {
        let pipe = self.pipe.as_mut().ok_or_else(|| TransportError::gone("this end is closed"))?;
        pipe.take(out).map_err(|stuck| match stuck {
            Stuck::Ended => TransportError::gone("the sender's connection ended without a goodbye"),
            Stuck::Errno(errno) if is_gone(errno) => {
                TransportError::gone(format!("the sender's connection is gone: {errno}"))
            }
            Stuck::Errno(errno) => TransportError::system("recv", errno),
            Stuck::Tls(cause) => TransportError { kind: crate::LostKind::Corrupt, cause: format!("TLS: {cause}") },
        })
    }
}

impl End for TlsInbound {
    fn level(&self) -> Level {
        Level::Tcp
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.pipe.iter().map(|pipe| pipe.socket.as_raw_fd()).collect()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<EventWake>::clone(&self.wake)
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}

impl Inbound for TlsInbound {
    fn read_head(&mut self, head: &mut [u8], filled: &mut usize) -> Result<bool, TransportError> {
        while *filled < head.len() {
            match self.take(&mut head[*filled..])? {
                0 => return Ok(false),
                count => *filled += count,
            }
        }
        Ok(true)
    }

    fn read_body(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError> {
        let mut failed = None;
        while *filled < body.len() && failed.is_none() {
            let (from, len) = (*filled, body.len());
            let mut dry = false;
            body.walk(from, len - from, |slice| match self.take(slice) {
                Ok(count) => {
                    *filled += count as u64;
                    dry = count == 0;
                    count == slice.len()
                }
                Err(error) => {
                    failed = Some(error);
                    false
                }
            });
            if dry {
                return Ok(false);
            }
        }
        failed.map_or(Ok(true), Err)
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        self.sleeps += 1;
        let Some(pipe) = &self.pipe else { return Err(TransportError::gone("this end is closed")) };
        let mut fds = [
            PollFd::from_borrowed_fd(self.wake.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(pipe.fd(), PollFlags::IN),
        ];
        poll_for(&mut fds, at_most)?;
        if is_ready(&fds[0]) {
            self.wake.drain();
        }
        // The end of the stream, or its error, is found by the next read.
        Ok(())
    }

    fn close(&mut self, reason: &str) {
        if let (Some(pipe), false) = (&mut self.pipe, reason.is_empty()) {
            // The sender may be gone already.
            let _ = pipe.put(&reason.as_bytes()[..reason.len().min(512)]).and_then(|_| pipe.flush());
        }
        self.pipe = None;
    }
}
