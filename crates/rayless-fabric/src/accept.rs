//! The accepting end of the handshake: greetings come in on streams, links come out.

use crate::{
    config::LinkConfig,
    error::EstablishError,
    greeting::{Answer, Context, GREETING, Greeting, HandshakeIo, read_exact, write_all},
    name::{LinkName, Ticket},
    rdma,
    recv::RecvLink,
    shm,
    tcp::{self, tls::Pipe},
    transport::Level,
};
use rayless_verbs::{Request, VerbsError};
use rustix::fd::{AsFd, OwnedFd};
use std::{
    collections::HashMap,
    net::TcpStream,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// A stream on which a greeting has been read.
#[derive(Debug)]
pub struct Greeted {
    greeting: Greeting,
    carrier: Carrier,
}

#[derive(Debug)]
enum Carrier {
    Tcp(TcpStream),
    Tls(Box<Pipe>),
    Unix(UnixStream, OwnedFd),
    Rdma(Request),
}

impl Greeted {
    /// The link that the peer asks for. The ticket has not been checked yet.
    pub const fn name(&self) -> LinkName {
        self.greeting.name
    }

    /// Refuses. The peer may be gone already; the caller gets the reason either way.
    fn refuse(self, reason: &str, within: Duration) {
        let (answer, deadline) = (Answer::Refused(reason.to_owned()).encode(), Instant::now() + within);
        match self.carrier {
            Carrier::Tcp(stream) => drop(write_all(stream.as_fd(), &answer, deadline)),
            Carrier::Unix(stream, _) => drop(write_all(stream.as_fd(), &answer, deadline)),
            Carrier::Tls(mut pipe) => pipe.refuse(&answer, deadline),
            Carrier::Rdma(request) => request.reject(reason),
        }
    }
}

/// Why a stream brought no greeting. The stream is closed.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// Nothing, or not all of it, came in time.
    #[error("no link greeting within {0:?}")]
    TimedOut(Duration),
    /// The peer closed the stream, or it broke.
    #[error("the stream ended before its greeting: {0}")]
    Broken(String),
    /// Other bytes, or another version's.
    #[error("these bytes are no link greeting of this version")]
    Malformed,
}

impl GreetError {
    fn from_io(error: HandshakeIo, within: Duration) -> Self {
        match error {
            HandshakeIo::TimedOut => Self::TimedOut(within),
            HandshakeIo::Eof => Self::Broken("closed by the peer".to_owned()),
            HandshakeIo::Errno(errno) => Self::Broken(errno.to_string()),
        }
    }
}

/// Reads the greeting of a link over TCP. Blocks for at most `within`, and touches no link: it may run on a thread
/// of its own per stream.
pub fn greet_tcp(stream: TcpStream, within: Duration) -> Result<Greeted, GreetError> {
    let mut bytes = [0u8; GREETING];
    read_exact(stream.as_fd(), &mut bytes, Instant::now() + within).map_err(|e| GreetError::from_io(e, within))?;
    let greeting = Greeting::decode(&bytes).filter(|g| g.level == Level::Tcp).ok_or(GreetError::Malformed)?;
    Ok(Greeted { greeting, carrier: Carrier::Tcp(stream) })
}

/// Reads the greeting of a link over TCP that stays within TLS.
pub fn greet_tls(stream: TcpStream, tls: rustls::Connection, within: Duration) -> Result<Greeted, GreetError> {
    let (bytes, pipe) =
        Pipe::greeting(stream, tls, Instant::now() + within).map_err(|e| GreetError::from_io(e, within))?;
    let greeting = Greeting::decode(&bytes).filter(|g| g.level == Level::Tcp && g.count == 1);
    let greeting = greeting.ok_or(GreetError::Malformed)?;
    Ok(Greeted { greeting, carrier: Carrier::Tls(Box::new(pipe)) })
}

/// Reads the greeting of a link over shared memory, and the memory that comes with it.
pub fn greet_unix(stream: UnixStream, within: Duration) -> Result<Greeted, GreetError> {
    let (bytes, memory) =
        shm::receive_greeting(&stream, Instant::now() + within).map_err(|e| GreetError::from_io(e, within))?;
    let greeting = Greeting::decode(&bytes).filter(|g| g.level == Level::Shm).ok_or(GreetError::Malformed)?;
    let memory = memory.ok_or(GreetError::Malformed)?;
    Ok(Greeted { greeting, carrier: Carrier::Unix(stream, memory) })
}

/// Waits for a peer that asks for a link over RDMA. One that says something else is refused here.
pub fn greet_rdma(listener: &mut rayless_verbs::Listener, within: Duration) -> Result<Greeted, GreetError> {
    match rdma::greet(listener, Instant::now() + within) {
        Ok(Some((greeting, request))) => Ok(Greeted { greeting, carrier: Carrier::Rdma(request) }),
        Ok(None) => Err(GreetError::Malformed),
        Err(VerbsError::TimedOut { .. }) => Err(GreetError::TimedOut(within)),
        Err(error) => Err(GreetError::Broken(error.to_string())),
    }
}

/// Knows the links that are expected and builds each when all of its streams are there.
#[derive(Debug, Default)]
pub struct Acceptor {
    expected: HashMap<LinkName, Expected>,
}

#[derive(Debug)]
struct Expected {
    ticket: Ticket,
    config: LinkConfig,
    streams: Vec<Option<TcpStream>>,
}

impl Acceptor {
    /// Expects a link: whoever brings its ticket becomes its sender.
    pub fn expect(&mut self, name: LinkName, ticket: Ticket, config: LinkConfig) {
        self.expected.insert(name, Expected { ticket, config, streams: Vec::new() });
    }

    /// Expects it no more; streams that have come for it are closed.
    pub fn forget(&mut self, name: LinkName) {
        self.expected.remove(&name);
    }

    /// Links still expected.
    pub fn pending(&self) -> usize {
        self.expected.len()
    }

    /// Takes a greeted stream. `None`: more streams of this link are to come. A greeting that does not fit
    /// is answered with the reason, its stream closed, and the link stays expected.
    pub fn admit(&mut self, greeted: Greeted) -> Result<Option<RecvLink>, EstablishError> {
        let Greeting { name, level, index, count, .. } = greeted.greeting;
        let defaults = LinkConfig::default();
        let config = self.expected.get(&name).map_or(&defaults, |expected| &expected.config);
        let context = Context::new(name, level, config);
        let misfit = match self.expected.get(&name) {
            None => Some("no such link is expected here".to_owned()),
            Some(expected) => greeted.greeting.misfit(&expected.ticket, &expected.config).or_else(|| {
                let taken = expected.streams.get(usize::from(index)).is_some_and(Option::is_some);
                let other_count = !expected.streams.is_empty() && expected.streams.len() != usize::from(count);
                (taken || other_count)
                    .then(|| format!("stream {index} of {count} does not fit the streams that came before"))
            }),
        };
        if let Some(reason) = misfit {
            greeted.refuse(&reason, config.handshake);
            return Err(context.refused(reason));
        }
        let stream = match greeted.carrier {
            Carrier::Unix(stream, memory) => {
                let link = shm::accept(&context, config, stream, memory)?;
                self.expected.remove(&name);
                return Ok(Some(link));
            }
            Carrier::Rdma(request) => {
                let link = rdma::accept(&context, config, request)?;
                self.expected.remove(&name);
                return Ok(Some(link));
            }
            Carrier::Tls(pipe) => {
                let link = tcp::tls::receiver(&context, config, *pipe)?;
                self.expected.remove(&name);
                return Ok(Some(link));
            }
            Carrier::Tcp(stream) => stream,
        };
        context.write_all(&stream, &Answer::welcome(config).encode())?;
        let Some(expected) = self.expected.get_mut(&name) else { return Ok(None) };
        expected.streams.resize_with(usize::from(count), || None);
        expected.streams[usize::from(index)] = Some(stream);
        if expected.streams.iter().any(Option::is_none) {
            return Ok(None);
        }
        let Some(expected) = self.expected.remove(&name) else { return Ok(None) };
        let streams = expected.streams.into_iter().flatten().collect();
        tcp::receiver(&context, &expected.config, streams).map(Some)
    }
}
