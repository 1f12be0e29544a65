//! The handshake of a link: who it joins, its ticket, and what both ends can take.
//!
//! The connecting end (the sender) writes a greeting on each stream, the accepting end answers each. Both
//! are of fixed size, so nothing can be over-read, and an answer that refuses carries one line of reason.

use crate::{
    config::LinkConfig,
    dtype::DTypeSet,
    error::EstablishError,
    name::{LinkName, Ticket},
    tensor::PeerLimits,
    transport::Level,
};
use rayless_proto::ids::GroupId;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, BorrowedFd},
    io::Errno,
    net::{RecvFlags, SendFlags},
};
use std::time::{Duration, Instant};

/// Version of this handshake and of the bytes behind it.
const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"rlk1";
pub(crate) const GREETING: usize = 96;
pub(crate) const ANSWER: usize = 256;
const REASON: usize = ANSWER - 24;
/// Streams of one link.
pub const MAX_STREAMS: usize = 16;

/// What the connecting end says on each stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Greeting {
    pub(crate) name: LinkName,
    pub(crate) ticket: [u8; 32],
    pub(crate) level: Level,
    /// This stream's place among `count`.
    pub(crate) index: u8,
    pub(crate) count: u8,
    pub(crate) verify: bool,
    pub(crate) max_message: u64,
}

impl Greeting {
    pub(crate) fn new(name: LinkName, ticket: Ticket, level: Level, index: u8, count: u8, config: &LinkConfig) -> Self {
        Self { name, ticket: ticket.0, level, index, count, verify: config.verify, max_message: config.max_message }
    }

    pub(crate) fn encode(&self) -> [u8; GREETING] {
        let mut out = [0u8; GREETING];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6] = self.index;
        out[7] = self.count;
        out[8..16].copy_from_slice(&self.name.group.0);
        out[16..20].copy_from_slice(&self.name.from.to_le_bytes());
        out[20..24].copy_from_slice(&self.name.to.to_le_bytes());
        out[24..26].copy_from_slice(&self.name.channel.to_le_bytes());
        out[26] = u8::from(self.verify);
        out[27] = self.level as u8;
        out[32..40].copy_from_slice(&self.max_message.to_le_bytes());
        out[40..72].copy_from_slice(&self.ticket);
        out
    }

    /// `None`: this is no greeting of this version.
    pub(crate) fn decode(bytes: &[u8; GREETING]) -> Option<Self> {
        let part = |at: usize, len: usize| bytes.get(at..at + len);
        if part(0, 4)? != MAGIC || part(4, 2)? != VERSION.to_le_bytes() {
            return None;
        }
        let level = [Level::Tcp, Level::Rdma, Level::Shm].into_iter().find(|l| *l as u8 == bytes[27])?;
        let (index, count) = (bytes[6], bytes[7]);
        if index >= count || usize::from(count) > MAX_STREAMS {
            return None;
        }
        Some(Self {
            name: LinkName {
                group: GroupId(part(8, 8)?.try_into().ok()?),
                from: u32::from_le_bytes(part(16, 4)?.try_into().ok()?),
                to: u32::from_le_bytes(part(20, 4)?.try_into().ok()?),
                channel: u16::from_le_bytes(part(24, 2)?.try_into().ok()?),
            },
            ticket: part(40, 32)?.try_into().ok()?,
            level,
            index,
            count,
            verify: bytes[26] != 0,
            max_message: u64::from_le_bytes(part(32, 8)?.try_into().ok()?),
        })
    }

    /// What of this greeting does not fit what the accepting end expects.
    pub(crate) fn misfit(&self, ticket: &Ticket, config: &LinkConfig) -> Option<String> {
        if !ticket.matches(&self.ticket) {
            return Some("the ticket is not this link's".to_owned());
        }
        if self.verify != config.verify {
            let word = |verify| if verify { "verifies" } else { "does not verify" };
            return Some(format!("the sender {} checksums, the receiver {}", word(self.verify), word(config.verify)));
        }
        None
    }
}

/// What the accepting end answers on each stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    Welcome { dtypes: DTypeSet, max_message: u64 },
    Refused(String),
}

impl Answer {
    pub(crate) const fn welcome(config: &LinkConfig) -> Self {
        Self::Welcome { dtypes: config.dtypes, max_message: config.max_message }
    }

    pub(crate) fn encode(&self) -> [u8; ANSWER] {
        let mut out = [0u8; ANSWER];
        out[0..4].copy_from_slice(&MAGIC);
        match self {
            Self::Welcome { dtypes, max_message } => {
                out[4] = 1;
                out[8..16].copy_from_slice(&dtypes.bits().to_le_bytes());
                out[16..24].copy_from_slice(&max_message.to_le_bytes());
            }
            Self::Refused(reason) => {
                let reason = &reason.as_bytes()[..reason.len().min(REASON)];
                out[5] = reason.len() as u8;
                out[24..24 + reason.len()].copy_from_slice(reason);
            }
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8; ANSWER]) -> Option<Self> {
        if bytes[0..4] != MAGIC {
            return None;
        }
        if bytes[4] == 1 {
            return Some(Self::Welcome {
                dtypes: DTypeSet::from_bits(u64::from_le_bytes(bytes[8..16].try_into().ok()?)),
                max_message: u64::from_le_bytes(bytes[16..24].try_into().ok()?),
            });
        }
        let reason = bytes.get(24..24 + usize::from(bytes[5]))?;
        Some(Self::Refused(String::from_utf8_lossy(reason).into_owned()))
    }

    /// The limits that a welcome sets, or the refusal as an error.
    pub(crate) fn limits(self, context: &Context) -> Result<PeerLimits, EstablishError> {
        match self {
            Self::Welcome { dtypes, max_message } => {
                Ok(PeerLimits { dtypes, max_message: max_message.min(context.max_message) })
            }
            Self::Refused(reason) => Err(context.refused(reason)),
        }
    }
}

/// What the errors of one handshake name, and when it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) link: LinkName,
    pub(crate) level: Level,
    pub(crate) max_message: u64,
    within: Duration,
    deadline: Instant,
}

impl Context {
    pub(crate) fn new(link: LinkName, level: Level, config: &LinkConfig) -> Self {
        let within = config.handshake;
        Self { link, level, max_message: config.max_message, within, deadline: Instant::now() + within }
    }

    pub(crate) const fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(crate) const fn timed_out(&self) -> EstablishError {
        EstablishError::TimedOut { link: self.link, transport: self.level.name(), within: self.within }
    }

    pub(crate) fn refused(&self, reason: String) -> EstablishError {
        EstablishError::Refused { link: self.link, transport: self.level.name(), reason }
    }

    pub(crate) fn failed(&self, call: &str, cause: impl std::fmt::Display) -> EstablishError {
        EstablishError::Failed { link: self.link, transport: self.level.name(), cause: format!("{call}: {cause}") }
    }

    pub(crate) fn io_failed(&self, call: &str, error: HandshakeIo) -> EstablishError {
        match error {
            HandshakeIo::TimedOut => self.timed_out(),
            HandshakeIo::Eof => self.failed(call, "the peer closed the connection"),
            HandshakeIo::Errno(errno) => self.failed(call, errno),
        }
    }

    pub(crate) fn write_all(&self, fd: impl AsFd, bytes: &[u8]) -> Result<(), EstablishError> {
        write_all(fd.as_fd(), bytes, self.deadline).map_err(|e| self.io_failed("writing the handshake", e))
    }

    pub(crate) fn read_answer(&self, fd: impl AsFd) -> Result<Answer, EstablishError> {
        let mut bytes = [0u8; ANSWER];
        read_exact(fd.as_fd(), &mut bytes, self.deadline).map_err(|e| self.io_failed("reading the answer", e))?;
        Answer::decode(&bytes).ok_or_else(|| self.failed("reading the answer", "these bytes are no answer"))
    }
}

/// Why handshake bytes did not move.
#[derive(Debug)]
pub(crate) enum HandshakeIo {
    TimedOut,
    Eof,
    Errno(Errno),
}

fn ready(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> Result<(), HandshakeIo> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(HandshakeIo::TimedOut);
    }
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&crate::wake::timespec(left))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(HandshakeIo::Errno(errno)),
    }
}

/// Waits until there is something to read (or a signal came).
pub(crate) fn readable(fd: BorrowedFd<'_>, deadline: Instant) -> Result<(), HandshakeIo> {
    ready(fd, PollFlags::IN, deadline)
}

/// The same for something to be written.
pub(crate) fn writable(fd: BorrowedFd<'_>, deadline: Instant) -> Result<(), HandshakeIo> {
    ready(fd, PollFlags::OUT, deadline)
}

pub(crate) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8], deadline: Instant) -> Result<(), HandshakeIo> {
    while !bytes.is_empty() {
        match rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::AGAIN) => ready(fd, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(HandshakeIo::Errno(errno)),
        }
    }
    Ok(())
}

pub(crate) fn read_exact(fd: BorrowedFd<'_>, bytes: &mut [u8], deadline: Instant) -> Result<(), HandshakeIo> {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::net::recv(fd, &mut bytes[filled..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(HandshakeIo::Eof),
            Ok((n, _)) => filled += n,
            Err(Errno::AGAIN) => ready(fd, PollFlags::IN, deadline)?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(HandshakeIo::Errno(errno)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_and_answer_read_back() {
        let name = LinkName { group: GroupId([3; 8]), from: 1, to: 2, channel: 7 };
        let config = LinkConfig { verify: true, ..LinkConfig::default() };
        let greeting = Greeting::new(name, Ticket([9; 32]), Level::Shm, 2, 4, &config);
        let back = Greeting::decode(&greeting.encode()).unwrap();
        assert_eq!((back.name, back.level, back.index, back.count), (name, Level::Shm, 2, 4));
        assert_eq!(back.misfit(&Ticket([9; 32]), &config), None);
        assert!(back.misfit(&Ticket([8; 32]), &config).unwrap().contains("ticket"));
        assert!(back.misfit(&Ticket([9; 32]), &LinkConfig::default()).unwrap().contains("checksums"));

        for answer in [Answer::welcome(&config), Answer::Refused("no".repeat(70)), Answer::Refused(String::new())] {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
        assert!(Greeting::decode(&[0; GREETING]).is_none());
        assert_eq!(Answer::decode(&[0; ANSWER]), None);
    }
}
