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
pub(crate) use watch::forget_watcher;

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
    let borrower = if config.one_copy { Borrower::prove(memory.words()) } else { Err("not asked for".to_owned()) };
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
    use crate::{
        error::LostKind,
        scatter::{Scatter, ScatterMut},
        transport::{Cursor, End, Inbound, Outbound},
    };

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

    /// Both ends, with one copy, without the links around them. The sender's memory is this process's.
    fn lending() -> (Arc<Memory>, outbound::ShmOutbound, inbound::ShmInbound) {
        let (memory, _fd) = Memory::create().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let nonce = nonce();
        memory.words().nonce.iter().zip(nonce).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        let secret = lender::announce(memory.words(), nonce, &ours);
        let memory = Arc::new(memory);
        let borrower = Borrower::prove(memory.words());
        assert!(borrower.is_ok());
        let outbound = outbound::ShmOutbound::new(Arc::clone(&memory), ours, Some(secret)).unwrap();
        let inbound = inbound::ShmInbound::new(Arc::clone(&memory), theirs, borrower).unwrap();
        assert_eq!((outbound.mode(), inbound.mode()), (Some(CMA), Some(CMA)));
        (memory, outbound, inbound)
    }

    const LONG: usize = memory::RING + 12_345;

    fn payload() -> Vec<u8> {
        (0..=250).cycle().take(LONG).collect()
    }

    /// Runs both ends in turns until both are done.
    fn cross(outbound: &mut outbound::ShmOutbound, inbound: &mut inbound::ShmInbound, parts: &[&[u8]]) -> Vec<u8> {
        let (body, mut cursor, mut filled) = (Scatter::with_tail(parts, b"tail"), Cursor::default(), 0);
        let mut room = vec![0; body.len() as usize];
        let (mut sent, mut received) = (false, false);
        while !(sent && received) {
            sent = sent || outbound.write(b"", &body, &mut cursor).unwrap();
            let mut rooms = [room.as_mut_slice()];
            received = received || inbound.read_body(&mut ScatterMut::new(&mut rooms), &mut filled).unwrap();
        }
        room
    }

    #[test]
    fn a_long_payload_is_lent_and_its_sender_waits_until_it_is_taken() {
        let (memory, mut outbound, mut inbound) = lending();
        let payload = payload();
        let (one, two) = payload.split_at(777);
        let parts = [one, &[], two];
        let (body, mut cursor) = (Scatter::with_tail(&parts, b"tail"), Cursor::default());
        assert!(!outbound.write(b"head", &body, &mut cursor).unwrap());
        assert!(!outbound.write(b"head", &body, &mut cursor).unwrap());
        assert!(cursor.lent && !cursor.is_at_start());
        let written = memory.words().tail.0.load(Ordering::Relaxed);
        assert_eq!(written, 4 + (record::FIXED + 2 * 16) as u64, "no byte of the payload is in the ring");
        let (mut head, mut filled) = ([0; 4], 0);
        assert!(inbound.read_head(&mut head, &mut filled).unwrap());
        let (mut to, mut filled) = (vec![0; LONG + 4], 0);
        assert!(inbound.read_body(&mut ScatterMut::new(&mut [&mut to]), &mut filled).unwrap());
        assert!(outbound.write(b"head", &body, &mut cursor).unwrap());
        assert!(to[..LONG] == payload && &to[LONG..] == b"tail");
        // And again: numbers go on.
        assert!(cross(&mut outbound, &mut inbound, &[&payload])[..LONG] == payload);
        // A short one does as ever.
        assert_eq!(cross(&mut outbound, &mut inbound, &[b"short"]), b"shorttail");
    }

    #[test]
    fn memory_that_the_kernel_does_not_read_for_others_comes_through_the_ring() {
        let (memory, mut outbound, mut inbound) = lending();
        let payload = payload();
        let parts = [payload.as_slice()];
        let (body, mut cursor) = (Scatter::new(&parts), Cursor::default());
        let expected = body.len();
        std::thread::scope(|scope| {
            let body = &body;
            scope.spawn(move || {
                while !outbound.write(b"", body, &mut cursor).unwrap() {
                    outbound.wait(FOR_EVER).unwrap();
                }
            });
            // What the receiver would have found at its first look at such memory.
            while memory.words().tail.0.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            let (mut to, mut filled) = (vec![0; LONG], 0);
            inbound.forget_where(&mut ScatterMut::new(&mut [&mut to]));
            while !inbound.read_body(&mut ScatterMut::new(&mut [&mut to]), &mut filled).unwrap() {
                inbound.wait(FOR_EVER).unwrap();
            }
            assert_eq!((filled, loan::fate(&memory.words().loan.0, 1)), (expected, Some(loan::Fate::Declined)));
            assert!(to == payload);
        });
    }

    #[test]
    fn what_the_sender_took_back_is_never_a_payload() {
        let (memory, mut outbound, mut inbound) = lending();
        let payload = payload();
        let parts = [payload.as_slice()];
        let (body, mut cursor) = (Scatter::new(&parts), Cursor::default());
        assert!(!outbound.write(b"", &body, &mut cursor).unwrap());
        outbound.close(false);
        assert_eq!(loan::fate(&memory.words().loan.0, 1), Some(loan::Fate::Revoked));
        let (mut to, mut filled) = (vec![0; LONG], 0);
        let lost = inbound.read_body(&mut ScatterMut::new(&mut [&mut to]), &mut filled).unwrap_err();
        assert_eq!(lost.cause, "the sender gave up in the middle of a payload");
    }

    #[test]
    fn a_process_that_has_not_the_secret_is_not_the_sender() {
        let (memory, mut outbound, mut inbound) = lending();
        let payload = payload();
        let parts = [payload.as_slice()];
        let (body, mut cursor) = (Scatter::new(&parts), Cursor::default());
        assert!(!outbound.write(b"", &body, &mut cursor).unwrap());
        // As after the sender's end, when its number, or its memory, is another program's.
        outbound.spoil_secret();
        let (mut to, mut filled) = (vec![0; LONG], 0);
        let lost = inbound.read_body(&mut ScatterMut::new(&mut [&mut to]), &mut filled).unwrap_err();
        assert_eq!((lost.kind, lost.cause.as_str()), (LostKind::PeerGone, SENDER_ENDED));
        assert_eq!(loan::fate(&memory.words().loan.0, 1), Some(loan::Fate::Offered), "not taken");
        assert!(Borrower::prove(memory.words()).is_err_and(|why| why.contains("another process")));
    }

    #[test]
    fn why_memory_is_not_lent_is_told() {
        let (memory, _fd) = Memory::create().unwrap();
        let words = memory.words();
        let why = || Borrower::prove(words).err().unwrap();
        assert_eq!(why(), "the sender does not lend its memory");
        words.secret_at.store(16, Ordering::Relaxed);
        assert_eq!(why(), "the two processes are in different PID namespaces");
        words.pid_namespace.store(lender::pid_namespace(), Ordering::Relaxed);
        assert_eq!(why(), "the sender's process id makes no sense");
        words.sender_pid.store(std::process::id(), Ordering::Relaxed);
        assert_eq!(why(), format!("process_vm_readv: {}", Errno::FAULT));
        // Process ids are at most 2^22.
        words.sender_pid.store((1 << 22) + 1, Ordering::Relaxed);
        assert_eq!(why(), format!("process_vm_readv: {}", Errno::SRCH));
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
