//! The reply rings: each worker writes its own, the collector reads them all.

use super::{
    RECORD_HEAD, Ring, RingError, SLOT_HEAD, SLOT_REPLIER_WAITS, SLOT_TAIL,
    calls::{word32, word64},
    wait_word,
};
use rayless_proto::{ids::CallId, limits::MAX_FRAGMENT};
use rustix::thread::futex;
use std::{
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

const LAST: u32 = 1;
const ERROR: u32 = 2;
/// Bytes of payload in one record of a reply ring: a quarter of it, so that writer and collector can work at the same time.
const fn fragment(reply_bytes: usize) -> usize {
    let quarter = reply_bytes / 4 - RECORD_HEAD;
    if quarter < MAX_FRAGMENT { quarter } else { MAX_FRAGMENT }
}

/// A worker's own reply ring.
#[derive(Debug)]
pub(crate) struct ReplyWriter {
    ring: Arc<Ring>,
    reader: usize,
    head: u64,
}

impl ReplyWriter {
    pub(crate) const fn new(ring: Arc<Ring>, reader: usize) -> Self {
        Self { ring, reader, head: 0 }
    }

    /// Writes a whole reply, waiting for the collector where there is no room; `false` where the group ended meanwhile. The collector
    /// is woken by the last asked reply of the call, or by an error (which a rank that was not asked may send too).
    pub(crate) fn write(
        &mut self,
        call: CallId,
        asked: bool,
        error: bool,
        payload: &[u8],
        eventfd: BorrowedFd<'_>,
    ) -> bool {
        let mut rest = payload;
        loop {
            let (part, more) = rest.split_at(rest.len().min(fragment(self.ring.reply_bytes)));
            rest = more;
            let flags = if rest.is_empty() { LAST } else { 0 } | if error { ERROR } else { 0 };
            if !self.push(call, flags, part, eventfd) {
                return false;
            }
            if rest.is_empty() {
                break;
            }
        }
        if (asked && self.ring.count_down_latch(call)) || error {
            self.ring.wake_collector(eventfd);
        }
        true
    }

    fn push(&mut self, call: CallId, flags: u32, payload: &[u8], eventfd: BorrowedFd<'_>) -> bool {
        let need = (RECORD_HEAD + payload.len()).next_multiple_of(RECORD_HEAD) as u64;
        while self.room() < need {
            let waits = self.ring.map.word32(Ring::slot(self.reader, SLOT_REPLIER_WAITS));
            waits.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            self.ring.wake_collector(eventfd);
            if self.ring.is_closed() {
                return false;
            }
            if self.room() >= need {
                break;
            }
            // Bounded: a collector that goes away without closing the ring must not leave a thread here for good.
            wait_word(waits, 1, Some(Instant::now() + Duration::from_millis(500)));
        }
        let at = self.ring.at_replies + self.reader * self.ring.reply_bytes;
        let mask = self.ring.reply_bytes - 1;
        let mut head = [0; RECORD_HEAD];
        head[..8].copy_from_slice(&call.to_le_bytes());
        head[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        head[12..16].copy_from_slice(&flags.to_le_bytes());
        let offset = self.head as usize & mask;
        self.ring.map.write(at + offset, &head);
        let offset = (offset + RECORD_HEAD) & mask;
        let (first, rest) = payload.split_at(payload.len().min(self.ring.reply_bytes - offset));
        self.ring.map.write(at + offset, first);
        self.ring.map.write(at, rest);
        self.head += need;
        self.ring.map.word64(Ring::slot(self.reader, SLOT_HEAD)).store(self.head, Ordering::SeqCst);
        true
    }

    fn room(&self) -> u64 {
        let tail = self.ring.map.word64(Ring::slot(self.reader, SLOT_TAIL)).load(Ordering::SeqCst);
        (self.ring.reply_bytes as u64).saturating_sub(self.head.wrapping_sub(tail))
    }
}

/// A fragment of a reply, as read.
#[derive(Debug)]
pub(crate) struct ReplyFragment {
    pub(crate) call: CallId,
    pub(crate) last: bool,
    pub(crate) error: bool,
    pub(crate) payload: Vec<u8>,
}

/// The collector's place in one worker's reply ring.
#[derive(Debug)]
pub(crate) struct ReplyReader {
    ring: Arc<Ring>,
    reader: usize,
    tail: u64,
}

impl ReplyReader {
    pub(crate) const fn new(ring: Arc<Ring>, reader: usize) -> Self {
        Self { ring, reader, tail: 0 }
    }

    /// Whether something is there.
    pub(crate) fn has_more(&self) -> bool {
        self.ring.map.word64(Ring::slot(self.reader, SLOT_HEAD)).load(Ordering::SeqCst) != self.tail
    }

    /// The next fragment, checked: the worker at the other end may be broken.
    pub(crate) fn try_next(&mut self) -> Result<Option<ReplyFragment>, RingError> {
        let broken = |what| RingError { reader: self.reader as u32, what };
        let head = self.ring.map.word64(Ring::slot(self.reader, SLOT_HEAD)).load(Ordering::SeqCst);
        if head == self.tail {
            return Ok(None);
        }
        let available = head.wrapping_sub(self.tail);
        if available > self.ring.reply_bytes as u64 || available < RECORD_HEAD as u64 {
            return Err(broken("its reply position is impossible"));
        }
        let at = self.ring.at_replies + self.reader * self.ring.reply_bytes;
        let mask = self.ring.reply_bytes - 1;
        let offset = self.tail as usize & mask;
        if !offset.is_multiple_of(RECORD_HEAD) {
            return Err(broken("its reply position is misaligned"));
        }
        let mut record = [0; RECORD_HEAD];
        self.ring.map.read(at + offset, &mut record);
        let (call, length, flags) = (word64(&record, 0), word32(&record, 8) as usize, word32(&record, 12));
        let size = (RECORD_HEAD + length).next_multiple_of(RECORD_HEAD) as u64;
        if length > fragment(self.ring.reply_bytes) || size > available || flags & !(LAST | ERROR) != 0 {
            return Err(broken("a reply record makes no sense"));
        }
        let offset = (offset + RECORD_HEAD) & mask;
        let first = length.min(self.ring.reply_bytes - offset);
        let mut payload = Vec::with_capacity(length);
        self.ring.map.append(at + offset, first, &mut payload);
        self.ring.map.append(at, length - first, &mut payload);
        self.tail += size;
        self.ring.map.word64(Ring::slot(self.reader, SLOT_TAIL)).store(self.tail, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let waits = self.ring.map.word32(Ring::slot(self.reader, SLOT_REPLIER_WAITS));
        if waits.load(Ordering::SeqCst) != 0 && waits.swap(0, Ordering::SeqCst) != 0 {
            let _ = futex::wake(waits, futex::Flags::empty(), 1);
        }
        Ok(Some(ReplyFragment { call, last: flags & LAST != 0, error: flags & ERROR != 0, payload }))
    }
}
