//! Links between two processes of one host: a ring of bytes in a memfd that both map.
//!
//! The sender makes the memory and passes it over a connected Unix socket with its greeting. That the peer is on
//! this host is not believed but proven: the receiver copies a nonce from the memory it was passed to another
//! place in it, and the sender finds it there. The socket stays open for the life of the link, for its end tells of
//! a peer that was killed.
//!
//! A payload that is longer than the ring is not copied twice: the sender writes where it lies (`record`), and the receiver copies it from
//! there by `process_vm_readv` (`borrow`, `copier`), as MPI libraries do. Until that is done the sender waits, as it would for room (`loan`).
//! Whether the system allows it is tried when the link is made; where it does not, and for a payload in memory that the kernel does not
//! read for others, the ring carries everything.

pub mod bell;
mod borrow;
mod copier;
mod inbound;
mod lender;
pub mod loan;
mod memory;
mod outbound;
mod record;
mod watch;

use crate::{
    config::LinkConfig,
    error::{EstablishError, TransportError},
    greeting::{Answer, Context, GREETING, Greeting, HandshakeIo, read_exact},
    name::{LinkName, Ticket},
    recv::RecvLink,
    send::SendLink,
    transport::Level,
    wait::Wake,
};
use bell::ring;
use borrow::Borrower;
use memory::{Memory, NONCE, Words};
use rustix::{
    fd::{AsFd, OwnedFd},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};
use std::{
    hash::{BuildHasher, RandomState},
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// [`crate::transport::Inbound::mode`] where long payloads take one copy.
const CMA: &str = "cma";
/// The same where they take two.
const RING_ONLY: &str = "ring";
const SENDER_ENDED: &str = "the sender's process ended";

/// Opens the sending end of a link over a connected Unix stream. Blocks for at most `config.handshake`.
pub fn connect(
    stream: UnixStream,
    name: LinkName,
    ticket: Ticket,
    config: &LinkConfig,
) -> Result<SendLink, EstablishError> {
    let context = Context::new(name, Level::Shm, config);
    let (memory, fd) = Memory::create().map_err(|e| context.failed("making shared memory", e))?;
    let nonce = nonce();
    memory.words().nonce.iter().zip(nonce).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
    let secret = config.one_copy.then(|| lender::announce(memory.words(), nonce, &stream));
    let greeting = Greeting::new(name, ticket, Level::Shm, 0, 1, config).encode();
    send_with_fd(&stream, &greeting, &fd).map_err(|e| context.failed("passing shared memory", e))?;
    let limits = context.read_answer(&stream)?.limits(&context)?;
    let proof = memory.words().proof.iter().map(|word| word.load(Ordering::Acquire));
    if !proof.eq(nonce) {
        return Err(context.refused("the peer did not prove that it maps the memory that was passed to it".to_owned()));
    }
    let secret = secret.filter(|_| memory.words().one_copy.load(Ordering::Relaxed) == 1);
    let outbound = outbound::ShmOutbound::new(Arc::new(memory), stream, secret);
    let outbound = outbound.map_err(|e| context.failed("watching the peer", e))?;
    Ok(SendLink::new(name, Box::new(outbound), limits, config))
}

/// The receiving end: maps the memory that came with a greeting whose ticket was right, proves that, answers.
pub(crate) fn accept(
    context: &Context,
    config: &LinkConfig,
    stream: UnixStream,
    memory: OwnedFd,
) -> Result<RecvLink, EstablishError> {
    let memory = match Memory::open(memory.as_fd()) {
        Ok(memory) => memory,
        Err(errno) => {
            let reason = format!("the passed memory cannot be mapped: {errno}");
            // The peer may be gone; the caller gets the reason either way.
            let _ = context.write_all(&stream, &Answer::Refused(reason.clone()).encode());
            return Err(context.refused(reason));
        }
    };
    let Words { nonce, proof, .. } = memory.words();
    nonce.iter().zip(proof).for_each(|(from, to)| to.store(from.load(Ordering::Relaxed), Ordering::Release));
    let borrower = if config.one_copy {
        Borrower::prove(memory.words())
    } else {
        Err("not asked for".to_owned())
    };
    memory.words().one_copy.store(u32::from(borrower.is_ok()), Ordering::Relaxed);
    context.write_all(&stream, &Answer::welcome(config).encode())?;
    let inbound = inbound::ShmInbound::new(Arc::new(memory), stream, borrower);
    let inbound = inbound.map_err(|e| context.failed("watching the peer", e))?;
    Ok(RecvLink::new(context.link, Box::new(inbound), config))
}

/// Reads a greeting and the descriptor that came with its first byte.
pub(crate) fn receive_greeting(
    stream: &UnixStream,
    deadline: Instant,
) -> Result<([u8; GREETING], Option<OwnedFd>), HandshakeIo> {
    let mut bytes = [0u8; GREETING];
    let mut peek = [0u8; 1];
    // Waits until the first byte is there, so that the descriptor's `recvmsg` below finds it.
    loop {
        match rustix::net::recv(stream, &mut peek, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(HandshakeIo::Eof),
            Ok(_) => break,
            Err(Errno::AGAIN | Errno::INTR) => crate::greeting::readable(stream.as_fd(), deadline)?,
            Err(errno) => return Err(HandshakeIo::Errno(errno)),
        }
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
        .map_err(HandshakeIo::Errno)?
        .bytes;
    let memory = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    read_exact(stream.as_fd(), &mut bytes[got..], deadline)?;
    Ok((bytes, memory))
}

fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: &OwnedFd) -> Result<(), Errno> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    // A fresh stream takes these few bytes at once and whole.
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::AGAIN) }
}

/// Four words that a peer cannot know without reading them: keys of the hasher come from the system's randomness.
fn nonce() -> [u64; NONCE] {
    std::array::from_fn(|i| RandomState::new().hash_one(i))
}

/// Whether the peer's process still holds its end of the socket. Asked only when a sleep brought nothing.
fn check_alive(socket: &UnixStream, who: &str) -> Result<(), TransportError> {
    let mut byte = [0u8; 1];
    match rustix::net::recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) | Err(Errno::CONNRESET) => Err(TransportError::gone(format!("the {who}'s process ended"))),
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(errno) => Err(TransportError::system("recv", errno)),
    }
}

/// Ends the sleep on one of the two bells from another thread of this process.
struct Poke {
    memory: Arc<Memory>,
    bell: fn(&Words) -> &memory::FutexBell,
    /// Part of what the sleeper looks at between saying that it sleeps and doing so, so no poke is lost.
    poked: AtomicBool,
}

impl Poke {
    const fn new(memory: Arc<Memory>, bell: fn(&Words) -> &memory::FutexBell) -> Self {
        Self { memory, bell, poked: AtomicBool::new(false) }
    }

    /// Sleeps until the bell rings, `ready` is true, or a poke comes.
    fn sleep_unless(&self, at_most: Duration, ready: impl Fn() -> bool) {
        let poked = || self.poked.load(Ordering::Acquire);
        bell::sleep_unless((self.bell)(self.memory.words()), at_most, || poked() || ready());
        self.poked.store(false, Ordering::Relaxed);
    }
}

impl Wake for Poke {
    fn wake(&self) {
        self.poked.store(true, Ordering::Release);
        ring((self.bell)(self.memory.words()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Inbound, Outbound};

    /// No event that could end a sleep is missing: this long is for ever.
    const FOR_EVER: Duration = Duration::from_secs(3600);

    #[test]
    fn the_end_of_a_peers_process_ends_the_longest_sleep() {
        let (memory, _fd) = Memory::create().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut inbound = inbound::ShmInbound::new(Arc::new(memory), ours, Err(String::new())).unwrap();
        let killed = std::thread::spawn(move || drop(theirs));
        assert_eq!(inbound.wait(FOR_EVER).unwrap_err().cause, "the sender's process ended");
        killed.join().unwrap();

        let (memory, _fd) = Memory::create().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut outbound = outbound::ShmOutbound::new(Arc::new(memory), ours, None).unwrap();
        let killed = std::thread::spawn(move || drop(theirs));
        assert_eq!(outbound.wait(FOR_EVER).unwrap_err().cause, "the receiver's process ended");
        killed.join().unwrap();
    }

    #[test]
    fn a_wake_ends_the_longest_sleep() {
        let (memory, _fd) = Memory::create().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut inbound = inbound::ShmInbound::new(Arc::new(memory), ours, Err(String::new())).unwrap();
        let waker = inbound.waker();
        let waking = std::thread::spawn(move || waker.wake());
        inbound.wait(FOR_EVER).unwrap();
        waking.join().unwrap();
    }
}
