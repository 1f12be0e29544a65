//! The ring: shared memory between one writer, the workers of a host and the collector of their replies.
//!
//! One memfd per group and host holds, in this order:
//!
//! ```text
//! 0      header page: magic and sizes, then on cache lines of their own the writer's position, the wake word, the flags,
//!        and the latches (call id and number of replies still owed, for the last 128 calls)
//! 4096   per reader 384 bytes: its position in the call ring, whether it is gone, what it is doing;
//!        head (worker), tail (collector) and wake word of its reply ring; since when it does it, in a word of its own
//! …      the call ring: one writer (the driver on its own host, the keeper elsewhere), every worker reads everything
//! …      a reply ring per worker: one writer (the worker), one reader (the collector, the same process as the call ring's writer)
//! ```
//!
//! Positions count bytes since the start and never wrap (2^64 bytes); a record is a 64-byte head and its payload, padded to 64 bytes, so
//! heads never straddle the end. The writer publishes by storing its position, then bumps the wake word and, only
//! if someone sleeps on it, wakes all sleepers with one futex call (shared: other processes sleep on it). The reader with the
//! lowest position is what holds the writer up; a reader marked gone holds up nobody.
//!
//! The last of the asked ranks to reply finds the latch at zero and wakes the collector through an eventfd; so does whoever
//! raises, or finds its reply ring full. While the collector is awake (its flag is down) nobody pays for that system call.
//!
//! Workers run other people's code, so driver and keeper take nothing from here on trust: positions and lengths are checked against
//! their own copies before use, and what does not fit is [`RingError`], the end of that worker, never a crash.

mod calls;
#[cfg(fuzzing)]
pub mod fuzzed;
mod map;
mod replies;
#[cfg(test)]
mod tests;

pub(crate) use calls::{AskedSet, CallReader, CallWriter, Record};
pub(crate) use map::Map;
pub(crate) use replies::{ReplyReader, ReplyWriter};

use crate::event;
use rayless_proto::{
    ids::{CallId, Rank},
    limits::{MAX_DOING, MAX_WORKERS_PER_HOST, REPLY_RING_BYTES, RING_BYTES},
    v1::{control::WorkerState, step::LinkMoved},
};
use rustix::thread::futex;
use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering, fence},
    time::{Duration, Instant},
};

const MAGIC: u64 = u64::from_le_bytes(*b"RAYLRNG1");
/// Records start on multiples of this, and are this much longer than their payload, before padding.
pub(crate) const RECORD_HEAD: usize = 64;

const AT_MAGIC: usize = 0;
const AT_READERS: usize = 8;
const AT_RING_BYTES: usize = 16;
const AT_REPLY_BYTES: usize = 24;
/// Set once by the keeper when the group is over.
const AT_CLOSED: usize = 128;
const AT_WRITE: usize = 256;
/// The word readers sleep on: changes with each publication.
const AT_WAKE: usize = 384;
/// Readers asleep, or about to be.
const AT_SLEEPERS: usize = 512;
/// 1 while the writer waits for room.
const AT_WRITER_WAITS: usize = 640;
/// 1 while the collector sleeps, or is about to.
const AT_COLLECTOR_SLEEPS: usize = 768;
const AT_LATCHES: usize = 1024;
const LATCHES: usize = 128;
const AT_SLOTS: usize = 4096;
const SLOT: usize = 384;
/// Within a slot.
const SLOT_READ: usize = 0;
const SLOT_GONE: usize = 8;
const SLOT_STATE: usize = 16;
const SLOT_CALL: usize = 24;
const SLOT_HEAD: usize = 64;
const SLOT_TAIL: usize = 128;
const SLOT_REPLIER_WAITS: usize = 192;
/// `MAX_DOING` bytes of text, ended by a zero where it is shorter.
const SLOT_DOING: usize = 256;
/// Milliseconds of the monotonic clock at the last progress.
const SLOT_SINCE: usize = 320;
/// Of the link that last moved a message: number of the message plus one (0: none), rank at the other end, channel and direction.
const SLOT_LINK_SEQUENCE: usize = 328;
const SLOT_LINK_PEER: usize = 336;
const SLOT_LINK_CHANNEL: usize = 340;
/// Added to the channel where this end receives.
const RECEIVING: u32 = 1 << 16;

/// A worker wrote something impossible into shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("worker {reader} of this host broke the ring: {what}")]
pub struct RingError {
    /// Index of the worker among those of this host.
    pub reader: u32,
    /// What was found.
    pub what: &'static str,
}

/// The mapped ring of one group on one host, as each of the processes sees it.
#[derive(Debug)]
pub struct Ring {
    map: Map,
    readers: usize,
    ring_bytes: usize,
    reply_bytes: usize,
    at_ring: usize,
    at_replies: usize,
}

impl Ring {
    /// A new ring for `readers` workers, of the standard sizes, and the descriptor to hand on.
    ///
    /// # Errors
    /// Where the kernel gives no memory, or for no or more than 256 workers.
    pub fn create(readers: usize) -> io::Result<(OwnedFd, Self)> {
        Self::create_sized(readers, RING_BYTES, REPLY_RING_BYTES)
    }

    /// [`Self::create`] with sizes of its own (powers of two from 4096), for tests.
    pub(crate) fn create_sized(readers: usize, ring: usize, reply: usize) -> io::Result<(OwnedFd, Self)> {
        let length = Self::length(readers, ring, reply).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let (fd, map) = Map::create("rayless-ring", length)?;
        map.word32(AT_READERS).store(readers as u32, Ordering::Relaxed);
        map.word64(AT_RING_BYTES).store(ring as u64, Ordering::Relaxed);
        map.word64(AT_REPLY_BYTES).store(reply as u64, Ordering::Relaxed);
        map.word64(AT_MAGIC).store(MAGIC, Ordering::Release);
        Ok((fd, Self::with_sizes(map, readers, ring, reply)))
    }

    /// Maps a ring that the keeper made.
    ///
    /// # Errors
    /// For anything but a sealed memfd of exactly the size that its header names.
    pub fn open(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "not a ring");
        let map = Map::open(fd)?;
        if map.len() < AT_SLOTS || map.word64(AT_MAGIC).load(Ordering::Acquire) != MAGIC {
            return Err(bad());
        }
        // Read once: from here on only our copies count.
        let readers = map.word32(AT_READERS).load(Ordering::Relaxed) as usize;
        let size = |at| usize::try_from(map.word64(at).load(Ordering::Relaxed)).map_err(|_| bad());
        let (ring, reply) = (size(AT_RING_BYTES)?, size(AT_REPLY_BYTES)?);
        if Self::length(readers, ring, reply) != Some(map.len()) {
            return Err(bad());
        }
        Ok(Self::with_sizes(map, readers, ring, reply))
    }

    fn length(readers: usize, ring: usize, reply: usize) -> Option<usize> {
        let size = 4096..=1 << 30;
        let sizes_fit = [ring, reply].iter().all(|s| s.is_power_of_two() && size.contains(s));
        if readers == 0 || readers > MAX_WORKERS_PER_HOST || !sizes_fit {
            return None;
        }
        Some(AT_SLOTS + (readers * SLOT).next_multiple_of(4096) + ring + readers * reply)
    }

    const fn with_sizes(map: Map, readers: usize, ring_bytes: usize, reply_bytes: usize) -> Self {
        let at_ring = AT_SLOTS + (readers * SLOT).next_multiple_of(4096);
        Self { map, readers, ring_bytes, reply_bytes, at_ring, at_replies: at_ring + ring_bytes }
    }

    /// Workers that it is for.
    pub const fn readers(&self) -> usize {
        self.readers
    }

    const fn slot(reader: usize, word: usize) -> usize {
        AT_SLOTS + reader * SLOT + word
    }

    /// The group is over: every reader comes back with that, asleep or not, and stays so.
    pub fn close(&self) {
        self.map.word32(AT_CLOSED).store(1, Ordering::SeqCst);
        self.map.word32(AT_WAKE).fetch_add(1, Ordering::SeqCst);
        let _ = futex::wake(self.map.word32(AT_WAKE), futex::Flags::empty(), i32::MAX as u32);
        for reader in 0..self.readers {
            let word = self.map.word32(Self::slot(reader, SLOT_REPLIER_WAITS));
            word.store(0, Ordering::SeqCst);
            let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// Whether the group is over.
    pub fn is_closed(&self) -> bool {
        self.map.word32(AT_CLOSED).load(Ordering::SeqCst) != 0
    }

    /// This reader reads no more: it must not hold up the writer.
    pub(crate) fn mark_gone(&self, reader: usize) {
        self.map.word32(Self::slot(reader, SLOT_GONE)).store(1, Ordering::SeqCst);
    }

    /// A worker's own note of what it does. That it changes is progress.
    pub(crate) fn set_state(&self, reader: usize, state: WorkerState, call: CallId) {
        self.set_since(reader);
        self.map.word64(Self::slot(reader, SLOT_CALL)).store(call, Ordering::Relaxed);
        self.map.word32(Self::slot(reader, SLOT_STATE)).store(state as u32, Ordering::Release);
    }

    /// What a worker says it does, and in which call. Shown to people only: the worker may lie.
    pub(crate) fn state(&self, reader: usize) -> (WorkerState, CallId) {
        let state = match self.map.word32(Self::slot(reader, SLOT_STATE)).load(Ordering::Acquire) {
            1 => WorkerState::Ready,
            2 => WorkerState::Busy,
            3 => WorkerState::Dead,
            _ => WorkerState::Starting,
        };
        (state, self.map.word64(Self::slot(reader, SLOT_CALL)).load(Ordering::Relaxed))
    }

    fn set_since(&self, reader: usize) {
        self.map.word64(Self::slot(reader, SLOT_SINCE)).store(monotonic_ms(), Ordering::Relaxed);
    }

    /// A worker's own word for what it is in; longer text is cut.
    pub(crate) fn set_doing(&self, reader: usize, text: &str) {
        let mut bytes = [0; MAX_DOING];
        let length = (0..=text.len().min(MAX_DOING)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        self.map.write(Self::slot(reader, SLOT_DOING), &bytes);
        self.set_since(reader);
    }

    /// What a worker says it is in. For people only, like [`Self::state`]: it may be half of one text and half of the next.
    pub(crate) fn doing(&self, reader: usize) -> String {
        let mut bytes = [0; MAX_DOING];
        self.map.read(Self::slot(reader, SLOT_DOING), &mut bytes);
        let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(MAX_DOING);
        // No worker puts lines of its own making into what others print.
        String::from_utf8_lossy(&bytes[..length]).chars().filter(|c| !c.is_control()).collect()
    }

    /// A link of this worker has moved a whole message; its number is counted from 1.
    pub(crate) fn set_link_moved(&self, reader: usize, moved: LinkMoved) {
        let channel = u32::from(moved.channel) + if moved.receiving { RECEIVING } else { 0 };
        self.map.word32(Self::slot(reader, SLOT_LINK_PEER)).store(moved.peer, Ordering::Relaxed);
        self.map.word32(Self::slot(reader, SLOT_LINK_CHANNEL)).store(channel, Ordering::Relaxed);
        self.map.word64(Self::slot(reader, SLOT_LINK_SEQUENCE)).store(moved.sequence, Ordering::Relaxed);
        self.set_since(reader);
    }

    /// The link that last moved a message, by the worker's own word.
    pub(crate) fn link_moved(&self, reader: usize) -> Option<LinkMoved> {
        let sequence = self.map.word64(Self::slot(reader, SLOT_LINK_SEQUENCE)).load(Ordering::Relaxed);
        let channel = self.map.word32(Self::slot(reader, SLOT_LINK_CHANNEL)).load(Ordering::Relaxed);
        let peer: Rank = self.map.word32(Self::slot(reader, SLOT_LINK_PEER)).load(Ordering::Relaxed);
        (sequence > 0).then_some(LinkMoved {
            peer,
            channel: (channel & 0xffff) as u16,
            receiving: channel & RECEIVING != 0,
            sequence,
        })
    }

    /// Milliseconds since a worker last made progress, 0 where it never said.
    pub(crate) fn still_ms(&self, reader: usize) -> u64 {
        match self.map.word64(Self::slot(reader, SLOT_SINCE)).load(Ordering::Relaxed) {
            0 => 0,
            since => monotonic_ms().saturating_sub(since),
        }
    }

    /// The collector is about to sleep: replies from here on wake it. It must look for replies once more after this.
    pub(crate) fn collector_sleeps(&self) {
        self.map.word32(AT_COLLECTOR_SLEEPS).store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The collector looks for replies by itself.
    pub(crate) fn collector_wakes(&self) {
        self.map.word32(AT_COLLECTOR_SLEEPS).store(0, Ordering::SeqCst);
    }

    /// Wakes the collector where it sleeps.
    fn wake_collector(&self, eventfd: BorrowedFd<'_>) {
        fence(Ordering::SeqCst);
        let sleeps = self.map.word32(AT_COLLECTOR_SLEEPS);
        if sleeps.load(Ordering::SeqCst) != 0 && sleeps.swap(0, Ordering::SeqCst) != 0 {
            event::notify(eventfd);
        }
    }

    /// `owed` replies of `call` are to come.
    fn arm_latch(&self, call: CallId, owed: u32) {
        self.latch(call).store(call << 16 | u64::from(owed), Ordering::Release);
    }

    /// One reply of `call` is in its ring: whether the collector should look now. A latch taken over by a later call says yes: a wake
    /// too many is harmless.
    fn count_down_latch(&self, call: CallId) -> bool {
        let mut done = true;
        let _ = self.latch(call).fetch_update(Ordering::AcqRel, Ordering::Acquire, |latch| {
            let owed = latch & 0xffff;
            let mine = latch >> 16 == call & (u64::MAX >> 16);
            done = !mine || owed <= 1;
            (mine && owed > 0).then(|| latch - 1)
        });
        done
    }

    fn latch(&self, call: CallId) -> &std::sync::atomic::AtomicU64 {
        self.map.word64(AT_LATCHES + 8 * (call as usize % LATCHES))
    }
}

/// What a wait on a word of the ring ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// The word changed, or may have.
    Changed,
    /// The time is up.
    TimedOut,
    /// A signal arrived.
    Interrupted,
}

/// Sleeps while `word` is `value`, at most until `deadline`.
fn wait_word(word: &AtomicU32, value: u32, deadline: Option<Instant>) -> Waited {
    let timeout = match deadline {
        None => None,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Waited::TimedOut;
            }
            Some(timespec(left))
        }
    };
    match futex::wait(word, futex::Flags::empty(), value, timeout.as_ref()) {
        Err(rustix::io::Errno::TIMEDOUT) => Waited::TimedOut,
        Err(rustix::io::Errno::INTR) => Waited::Interrupted,
        Ok(()) | Err(_) => Waited::Changed,
    }
}

/// All processes of a host read the same clock.
fn monotonic_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

pub(crate) fn timespec(duration: Duration) -> rustix::time::Timespec {
    rustix::time::Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
