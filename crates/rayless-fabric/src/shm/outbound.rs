//! The sending end over shared memory.

use super::{
    Poke,
    bell::ring,
    check_alive,
    memory::{Memory, RING},
    watch::{Watched, watch},
};
use crate::{
    error::TransportError,
    scatter::Scatter,
    transport::{Counters, Cursor, Level, Outbound},
    wait::Wake,
};
use rustix::io::Errno;
use std::{
    os::unix::net::UnixStream,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// A large payload is published in pieces of this size, so that the receiver copies one while we copy the next.
const PIECE: u64 = 256 << 10;

pub(super) struct ShmOutbound {
    memory: Arc<Memory>,
    poke: Arc<Poke>,
    socket: Option<Watched>,
    /// Our own counter, as last published.
    tail: u64,
    /// The receiver's, as last seen.
    head: u64,
    sleeps: u64,
}

impl ShmOutbound {
    pub(super) fn new(memory: Arc<Memory>, socket: UnixStream) -> Result<Self, Errno> {
        let poke = Arc::new(Poke::new(Arc::clone(&memory), |words| &words.room.0));
        let socket = Some(watch(socket, &poke)?);
        Ok(Self { memory, poke, socket, tail: 0, head: 0, sleeps: 0 })
    }

    /// Bytes that may be written now; looks at the receiver's counter only when the last look does not suffice.
    fn room(&mut self, wanted: u64) -> Result<u64, TransportError> {
        let room = RING as u64 - (self.tail - self.head);
        if room >= wanted {
            return Ok(room);
        }
        let head = self.memory.words().head.0.load(Ordering::Acquire);
        if head < self.head || head > self.tail {
            return Err(TransportError::system("the ring", "the receiver's counter makes no sense"));
        }
        self.head = head;
        Ok(RING as u64 - (self.tail - head))
    }

    fn publish(&mut self, tail: u64) {
        let words = self.memory.words();
        self.tail = tail;
        words.tail.0.store(tail, Ordering::Release);
        ring(&words.data.0);
    }

    fn check_receiver(&self) -> Result<(), TransportError> {
        if self.memory.words().receiver_closed.0.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(TransportError::reported(&self.memory.reason()))
    }
}

impl Outbound for ShmOutbound {
    fn level(&self) -> Level {
        Level::Shm
    }

    fn write(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError> {
        self.check_receiver()?;
        loop {
            let left = (head.len() - cursor.head) as u64 + (body.len() - cursor.body);
            if left == 0 {
                return Ok(true);
            }
            // A message that fits is published whole, with one ring of the bell.
            let piece = if left <= PIECE { left } else { PIECE };
            let mut room = self.room(piece)?.min(piece);
            if room == 0 {
                return Ok(false);
            }
            let mut at = self.tail;
            let of_head = (head.len() - cursor.head).min(room as usize);
            self.memory.copy_in(at, &head[cursor.head..cursor.head + of_head]);
            cursor.head += of_head;
            at += of_head as u64;
            room -= of_head as u64;
            body.walk(cursor.body, room, |slice| {
                self.memory.copy_in(at, slice);
                cursor.body += slice.len() as u64;
                at += slice.len() as u64;
                true
            });
            self.publish(at);
        }
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        self.sleeps += 1;
        let words = self.memory.words();
        let seen = self.head;
        let moved =
            || words.head.0.load(Ordering::Acquire) != seen || words.receiver_closed.0.load(Ordering::Acquire) != 0;
        self.poke.sleep_unless(at_most, moved);
        match &self.socket {
            Some(socket) if !moved() => check_alive(socket.socket(), "receiver"),
            _ => self.check_receiver(),
        }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<Poke>::clone(&self.poke)
    }

    fn close(&mut self, _whole: bool) {
        let words = self.memory.words();
        words.sender_closed.0.store(1, Ordering::Release);
        ring(&words.data.0);
        self.socket = None;
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}
