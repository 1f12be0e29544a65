//! The receiving end over shared memory.

use super::{
    Poke,
    bell::ring,
    check_alive,
    memory::{Memory, RING},
    watch::{Watched, watch},
};
use crate::{
    error::TransportError,
    scatter::ScatterMut,
    transport::{Counters, Inbound, Level, SharedPage},
    wait::Wake,
};
use rustix::io::Errno;
use std::{
    os::unix::net::UnixStream,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Room is given back in pieces of this size while a large payload is copied out.
const PIECE: u64 = 256 << 10;

pub(super) struct ShmInbound {
    memory: Arc<Memory>,
    poke: Arc<Poke>,
    socket: Option<Watched>,
    /// Our own counter.
    head: u64,
    /// The same, as last published. It lags behind by headers: a message then costs one publication and not two.
    published: u64,
    /// The sender's, as last seen.
    tail: u64,
    sleeps: u64,
}

impl ShmInbound {
    pub(super) fn new(memory: Arc<Memory>, socket: UnixStream) -> Result<Self, Errno> {
        let poke = Arc::new(Poke::new(Arc::clone(&memory), |words| &words.data.0));
        let socket = Some(watch(socket, &poke)?);
        Ok(Self { memory, poke, socket, head: 0, published: 0, tail: 0, sleeps: 0 })
    }

    /// Bytes that have come; looks at the sender's counter only when the last look does not suffice.
    fn available(&mut self, wanted: u64) -> Result<u64, TransportError> {
        if self.tail - self.head < wanted {
            let tail = self.memory.words().tail.0.load(Ordering::Acquire);
            if tail < self.tail || tail - self.head > RING as u64 {
                return Err(TransportError::system("the ring", "the sender's counter makes no sense"));
            }
            self.tail = tail;
        }
        Ok((self.tail - self.head).min(wanted))
    }

    /// Gives the room back that has been read.
    fn publish(&mut self) {
        let words = self.memory.words();
        self.published = self.head;
        words.head.0.store(self.head, Ordering::Release);
        ring(&words.room.0);
    }
}

impl Inbound for ShmInbound {
    fn level(&self) -> Level {
        Level::Shm
    }

    fn shared_page(&self) -> Option<SharedPage> {
        Some(self.memory.gpu_page())
    }

    fn read_head(&mut self, head: &mut [u8], filled: &mut usize) -> Result<bool, TransportError> {
        let available = self.available((head.len() - *filled) as u64)?;
        if available > 0 {
            let end = *filled + available as usize;
            self.memory.copy_out(self.head, &mut head[*filled..end]);
            *filled = end;
            self.head += available;
            if self.head - self.published >= PIECE {
                self.publish();
            }
        }
        Ok(*filled == head.len())
    }

    fn read_body(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError> {
        loop {
            let left = body.len() - *filled;
            let available = self.available(left.min(PIECE))?;
            if available == 0 {
                return Ok(left == 0);
            }
            let mut at = self.head;
            body.walk(*filled, available, |slice| {
                self.memory.copy_out(at, slice);
                at += slice.len() as u64;
                true
            });
            *filled += available;
            self.head = at;
            self.publish();
        }
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        self.sleeps += 1;
        if self.published != self.head {
            self.publish();
        }
        let words = self.memory.words();
        let seen = self.tail;
        let moved = || words.tail.0.load(Ordering::Acquire) != seen;
        let closed = || words.sender_closed.0.load(Ordering::Acquire) != 0;
        self.poke.sleep_unless(at_most, || moved() || closed());
        if moved() {
            return Ok(());
        }
        // The order matters: once the sender is seen to be gone, its last bytes are there to be seen too.
        let gone = match &self.socket {
            _ if closed() => Err(TransportError::gone("the sender closed its end without a goodbye")),
            Some(socket) => check_alive(socket.socket(), "sender"),
            None => Ok(()),
        };
        if moved() { Ok(()) } else { gone }
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<Poke>::clone(&self.poke)
    }

    fn close(&mut self, reason: &str) {
        self.memory.set_reason(reason.as_bytes());
        ring(&self.memory.words().room.0);
        self.socket = None;
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}
