//! The receiving end over shared memory.

use super::{
    Poke,
    bell::ring,
    borrow::Borrower,
    check_alive,
    loan::{self, Fate},
    memory::{Memory, RING},
    record::{FIXED, Record},
    watch::{Watched, watch},
};
use crate::{
    error::{LostKind, TransportError},
    scatter::ScatterMut,
    transport::{Counters, End, Inbound, Level, SharedPage},
    wait::Wake,
};
use rustix::io::Errno;
use std::{
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
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
    /// Reads the sender's memory; or why not.
    borrower: Result<Borrower, String>,
    coming: Coming,
    /// Loans so far.
    loans: u64,
    /// The variable part of a record.
    rest: Vec<u8>,
}

/// How the body in progress comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coming {
    /// Not known yet, or it is short and comes through the ring.
    Unknown,
    /// It is long and comes through the ring.
    Ring,
    /// It is lent.
    Lent,
}

impl ShmInbound {
    pub(super) fn new(
        memory: Arc<Memory>,
        socket: UnixStream,
        borrower: Result<Borrower, String>,
    ) -> Result<Self, Errno> {
        let poke = Arc::new(Poke::new(Arc::clone(&memory), |words| &words.data.0));
        let socket = Some(watch(socket, &poke)?);
        let borrower = borrower.map_err(|why| format!("{}: {why}", super::RING_ONLY));
        let (coming, rest) = (Coming::Unknown, Vec::new());
        Ok(Self { memory, poke, socket, head: 0, published: 0, tail: 0, sleeps: 0, borrower, coming, loans: 0, rest })
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

    /// Reads the record in front of a long body of `len` bytes. False: it has not come.
    fn read_record(&mut self, len: u64) -> Result<bool, TransportError> {
        let nonsense =
            || TransportError { kind: LostKind::Corrupt, cause: "a loan's record makes no sense".to_owned() };
        let mut fixed = [0; FIXED];
        if self.available(FIXED as u64)? < FIXED as u64 {
            return Ok(false);
        }
        self.memory.copy_out(self.head, &mut fixed);
        let rest = Record::rest(&fixed).ok_or_else(nonsense)?;
        // It was published in one piece.
        let whole = (FIXED + rest) as u64;
        if self.available(whole)? < whole {
            return Err(nonsense());
        }
        self.rest.resize(rest, 0);
        self.memory.copy_out(self.head + FIXED as u64, &mut self.rest);
        let Ok(borrower) = &mut self.borrower else { return Err(nonsense()) };
        Record::decode(&fixed, &self.rest, len, &mut borrower.record).ok_or_else(nonsense)?;
        self.head += whole;
        if borrower.record.parts.is_empty() {
            self.coming = Coming::Ring;
        } else if borrower.record.number == self.loans + 1 {
            self.loans += 1;
            borrower.begin();
            self.coming = Coming::Lent;
        } else {
            return Err(nonsense());
        }
        Ok(true)
    }

    /// Reads the next record and makes its addresses ones that cannot be read.
    #[cfg(test)]
    pub(super) fn forget_where(&mut self, body: &mut ScatterMut<'_, '_>) {
        assert!(self.read_record(body.len()).unwrap());
        self.borrower.as_mut().unwrap().record.parts.iter_mut().for_each(|part| part.address = 4096);
    }

    /// Copies a lent body on. True: it is whole, and it counts.
    fn borrow(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError> {
        let revoked = || TransportError::gone("the sender gave up in the middle of a payload");
        let Ok(borrower) = &mut self.borrower else { return Ok(false) };
        let words = self.memory.words();
        if loan::fate(&words.loan.0, self.loans) != Some(Fate::Offered) {
            return Err(revoked());
        }
        if let Err(errno) = borrower.copy(body, filled) {
            if errno == Errno::SRCH {
                return Err(TransportError::gone(super::SENDER_ENDED));
            }
            if let Some(socket) = &self.socket {
                check_alive(socket.socket(), "sender")?;
            }
            // Memory that the kernel does not read for others (a device's), or a permission that has gone.
            if !loan::decline(&words.loan.0, self.loans) {
                return Err(revoked());
            }
            ring(&words.room.0);
            *filled = 0;
            self.coming = Coming::Ring;
            return Ok(false);
        }
        if !borrower.finish(body, filled) {
            return Ok(false);
        }
        if borrower.is_the_sender() != Ok(true) {
            return Err(TransportError::gone(super::SENDER_ENDED));
        }
        if !loan::take(&words.loan.0, self.loans) {
            return Err(revoked());
        }
        ring(&words.room.0);
        self.coming = Coming::Unknown;
        Ok(true)
    }

    /// Gives the room back that has been read.
    fn publish(&mut self) {
        let words = self.memory.words();
        self.published = self.head;
        words.head.0.store(self.head, Ordering::Release);
        ring(&words.room.0);
    }
}

impl End for ShmInbound {
    fn level(&self) -> Level {
        Level::Shm
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.socket.iter().map(|watched| watched.socket().as_raw_fd()).collect()
    }

    fn shared_page(&self) -> Option<SharedPage> {
        Some(self.memory.gpu_page())
    }

    fn mode(&self) -> Option<&str> {
        Some(self.borrower.as_ref().map_or_else(String::as_str, |_| super::CMA))
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<Poke>::clone(&self.poke)
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}

impl Inbound for ShmInbound {
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
        if self.borrower.is_ok() && body.len() > RING as u64 {
            if self.coming == Coming::Unknown && !self.read_record(body.len())? {
                return Ok(false);
            }
            if self.coming == Coming::Lent {
                return self.borrow(body, filled);
            }
        }
        loop {
            let left = body.len() - *filled;
            let available = self.available(left.min(PIECE))?;
            if available == 0 {
                if left == 0 {
                    self.coming = Coming::Unknown;
                }
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
        if self.coming == Coming::Lent {
            // There is something to copy, or what is wrong shows by that.
            return Ok(());
        }
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

    fn close(&mut self, reason: &str) {
        self.memory.set_reason(reason.as_bytes());
        ring(&self.memory.words().room.0);
        self.socket = None;
    }
}
