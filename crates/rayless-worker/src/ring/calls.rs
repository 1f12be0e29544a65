//! The call ring: one writer, every worker reads every record.

use super::{
    AT_SLEEPERS, AT_WAKE, AT_WRITE, AT_WRITER_WAITS, RECORD_HEAD, Ring, RingError, SLOT_GONE, SLOT_READ, Waited,
    wait_word,
};
use crate::{event, spin::Spin};
use rayless_proto::{
    ids::CallId,
    limits::{MAX_CALL, MAX_FRAGMENT, MAX_WORKERS_PER_HOST},
};
use rustix::thread::futex;
use std::{
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::Instant,
};

/// Last fragment of its call.
const LAST: u32 = 1;
const WORDS: usize = MAX_WORKERS_PER_HOST / 64;

/// Workers of this host whose reply a call waits for, a bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct AskedSet([u64; WORDS]);

impl AskedSet {
    pub(crate) const fn insert(&mut self, reader: usize) {
        self.0[reader / 64] |= 1 << (reader % 64);
    }

    const fn contains(&self, reader: usize) -> bool {
        self.0[reader / 64] >> (reader % 64) & 1 == 1
    }

    pub(crate) fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

/// A call, or a fragment of one, to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record<'a> {
    pub(crate) call: CallId,
    pub(crate) last: bool,
    pub(crate) asked: AskedSet,
    /// At most `MAX_FRAGMENT`.
    pub(crate) payload: &'a [u8],
}

fn encode_head(record: &Record<'_>) -> [u8; RECORD_HEAD] {
    let mut head = [0; RECORD_HEAD];
    head[..8].copy_from_slice(&record.call.to_le_bytes());
    head[8..12].copy_from_slice(&(record.payload.len() as u32).to_le_bytes());
    head[12..16].copy_from_slice(&u32::from(record.last).to_le_bytes());
    for (at, word) in record.asked.0.iter().enumerate() {
        head[16 + 8 * at..24 + 8 * at].copy_from_slice(&word.to_le_bytes());
    }
    head
}

pub(super) fn word32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

pub(super) fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from(word32(bytes, at)) | u64::from(word32(bytes, at + 4)) << 32
}

/// The only writer.
#[derive(Debug)]
pub(crate) struct CallWriter {
    ring: Arc<Ring>,
    position: u64,
    /// A position that every reader had reached when last looked at.
    floor: u64,
    written: bool,
}

impl CallWriter {
    pub(crate) const fn new(ring: Arc<Ring>) -> Self {
        Self { ring, position: 0, floor: 0, written: false }
    }

    /// Writes and publishes `record`; `false` where there is no room now: then the collector's eventfd tells when to try again.
    pub(crate) fn push(&mut self, record: &Record<'_>) -> Result<bool, RingError> {
        let need = (RECORD_HEAD + record.payload.len()).next_multiple_of(RECORD_HEAD) as u64;
        if !self.has_room(need)? {
            self.ring.map.word32(AT_WRITER_WAITS).store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            // A reader may have moved on just before it could see that flag.
            if !self.has_room(need)? {
                return Ok(false);
            }
            self.ring.map.word32(AT_WRITER_WAITS).store(0, Ordering::SeqCst);
        }
        if record.last {
            self.ring.arm_latch(record.call, record.asked.len());
        }
        let offset = self.position as usize & (self.ring.ring_bytes - 1);
        self.ring.map.write(self.ring.at_ring + offset, &encode_head(record));
        let offset = (offset + RECORD_HEAD) & (self.ring.ring_bytes - 1);
        let (first, rest) = record.payload.split_at(record.payload.len().min(self.ring.ring_bytes - offset));
        self.ring.map.write(self.ring.at_ring + offset, first);
        self.ring.map.write(self.ring.at_ring, rest);
        self.position += need;
        self.ring.map.word64(AT_WRITE).store(self.position, Ordering::SeqCst);
        self.written = true;
        Ok(true)
    }

    /// Wakes whoever sleeps, once for all that was pushed since the last time.
    pub(crate) fn wake(&mut self) {
        if !std::mem::take(&mut self.written) {
            return;
        }
        let word = self.ring.map.word32(AT_WAKE);
        word.fetch_add(1, Ordering::SeqCst);
        if self.ring.map.word32(AT_SLEEPERS).load(Ordering::SeqCst) != 0 {
            let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// Bytes written since the start.
    #[cfg(test)]
    pub(super) const fn position(&self) -> u64 {
        self.position
    }

    /// The reader furthest behind: whom the writer waits for when there is no room.
    pub(crate) fn slowest(&self) -> usize {
        let position = |reader: &usize| self.ring.map.word64(Ring::slot(*reader, SLOT_READ)).load(Ordering::Relaxed);
        (0..self.ring.readers).filter(|reader| !self.is_gone(*reader)).min_by_key(position).unwrap_or(0)
    }

    fn is_gone(&self, reader: usize) -> bool {
        self.ring.map.word32(Ring::slot(reader, SLOT_GONE)).load(Ordering::SeqCst) != 0
    }

    fn has_room(&mut self, need: u64) -> Result<bool, RingError> {
        let capacity = self.ring.ring_bytes as u64;
        if capacity - (self.position - self.floor) >= need {
            return Ok(true);
        }
        let mut floor = self.position;
        for reader in (0..self.ring.readers).filter(|reader| !self.is_gone(*reader)) {
            let read = self.ring.map.word64(Ring::slot(reader, SLOT_READ)).load(Ordering::SeqCst);
            if read > self.position || self.position - read > capacity {
                return Err(RingError { reader: reader as u32, what: "its position is outside of what was written" });
            }
            floor = floor.min(read);
        }
        self.floor = floor;
        Ok(capacity - (self.position - floor) >= need)
    }
}

/// A whole call, as its reader puts it together.
#[derive(Debug)]
pub(crate) struct ReadCall {
    pub(crate) call: CallId,
    pub(crate) asked: bool,
    pub(crate) payload: Vec<u8>,
}

/// One worker's place in the ring.
#[derive(Debug)]
pub(crate) struct CallReader {
    ring: Arc<Ring>,
    reader: usize,
    position: u64,
    /// Fragments so far of the call being read.
    partial: Option<(CallId, Vec<u8>)>,
}

impl CallReader {
    pub(crate) const fn new(ring: Arc<Ring>, reader: usize) -> Self {
        Self { ring, reader, position: 0, partial: None }
    }

    /// Whether something is there to be read.
    pub(crate) fn has_more(&self) -> bool {
        self.ring.map.word64(AT_WRITE).load(Ordering::SeqCst) != self.position
    }

    /// The next whole call that is there. Its bytes are copied out, so that the ring gets its room back before the call runs.
    pub(crate) fn try_next(&mut self, eventfd: BorrowedFd<'_>) -> Result<Option<ReadCall>, &'static str> {
        loop {
            let written = self.ring.map.word64(AT_WRITE).load(Ordering::SeqCst);
            if written == self.position {
                return Ok(None);
            }
            let available = written.wrapping_sub(self.position);
            if available > self.ring.ring_bytes as u64 || available < RECORD_HEAD as u64 {
                return Err("the writer's position is impossible");
            }
            let mut head = [0; RECORD_HEAD];
            let offset = self.position as usize & (self.ring.ring_bytes - 1);
            self.ring.map.read(self.ring.at_ring + offset, &mut head);
            let (call, length, flags) = (word64(&head, 0), word32(&head, 8) as usize, word32(&head, 12));
            let size = (RECORD_HEAD + length).next_multiple_of(RECORD_HEAD) as u64;
            if length > MAX_FRAGMENT || size > available {
                return Err("a record is longer than what was written");
            }
            let (of, mut payload) = self.partial.take().unwrap_or((call, Vec::new()));
            if of != call || payload.len() as u64 + length as u64 > MAX_CALL {
                return Err("the fragments of two calls are mixed up");
            }
            let offset = (offset + RECORD_HEAD) & (self.ring.ring_bytes - 1);
            let first = length.min(self.ring.ring_bytes - offset);
            self.ring.map.append(self.ring.at_ring + offset, first, &mut payload);
            self.ring.map.append(self.ring.at_ring, length - first, &mut payload);
            self.position += size;
            self.free_room(eventfd);
            if flags & LAST == 0 {
                self.partial = Some((call, payload));
                continue;
            }
            let mut asked = AskedSet::default();
            for (at, word) in asked.0.iter_mut().enumerate() {
                *word = word64(&head, 16 + 8 * at);
            }
            return Ok(Some(ReadCall { call, asked: asked.contains(self.reader), payload }));
        }
    }

    /// Lets the writer have what was read, and tells it where it waits for that.
    fn free_room(&self, eventfd: BorrowedFd<'_>) {
        self.ring.map.word64(Ring::slot(self.reader, SLOT_READ)).store(self.position, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let waits = self.ring.map.word32(AT_WRITER_WAITS);
        if waits.load(Ordering::SeqCst) != 0 && waits.swap(0, Ordering::SeqCst) != 0 {
            event::notify(eventfd);
        }
    }

    /// Looks again and again for a short while.
    pub(crate) fn spin(&self, spin: &mut Spin) {
        let mut spinning = spin.begin();
        while !self.has_more() && !self.ring.is_closed() && spin.again(&mut spinning) {}
    }

    /// Sleeps until there is something to read, the ring is closed, `deadline` passes or a signal arrives.
    pub(crate) fn sleep(&self, deadline: Option<Instant>) -> Waited {
        let (word, sleepers) = (self.ring.map.word32(AT_WAKE), self.ring.map.word32(AT_SLEEPERS));
        sleepers.fetch_add(1, Ordering::SeqCst);
        let value = word.load(Ordering::SeqCst);
        // The writer stores its position before it bumps the word: either it is seen here, or the word has changed under the wait.
        let waited =
            if self.has_more() || self.ring.is_closed() { Waited::Changed } else { wait_word(word, value, deadline) };
        sleepers.fetch_sub(1, Ordering::SeqCst);
        waited
    }
}
