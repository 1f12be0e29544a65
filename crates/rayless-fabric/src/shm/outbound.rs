//! The sending end over shared memory.

use super::{
    Poke,
    bell::ring,
    check_alive,
    loan::{self, Fate},
    memory::{Memory, NONCE, RING},
    record::{self, Record},
    watch::{Watched, watch},
};
use crate::{
    error::TransportError,
    scatter::Scatter,
    transport::{Counters, Cursor, End, Level, Outbound, SharedPage},
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
    /// Where the receiver finds that we are who made the link; `None`: it copies out of the ring only.
    secret: Option<Box<[u64; NONCE]>>,
    loan: Loan,
    /// Loans so far.
    loans: u64,
    record: Vec<u8>,
}

/// What is with the body in progress.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loan {
    /// None, or it is short: it goes through the ring.
    None,
    /// It is long, was announced, and goes through the ring all the same.
    Ring,
    /// It is lent: the receiver may be reading it.
    Out,
}

impl ShmOutbound {
    pub(super) fn new(
        memory: Arc<Memory>,
        socket: UnixStream,
        secret: Option<Box<[u64; NONCE]>>,
    ) -> Result<Self, Errno> {
        let poke = Arc::new(Poke::new(Arc::clone(&memory), |words| &words.room.0));
        let socket = Some(watch(socket, &poke)?);
        let (loan, record) = (Loan::None, Vec::with_capacity(record::FIXED));
        Ok(Self { memory, poke, socket, tail: 0, head: 0, sleeps: 0, secret, loan, loans: 0, record })
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

    fn fate(&self) -> Result<Fate, TransportError> {
        let fate = loan::fate(&self.memory.words().loan.0, self.loans);
        fate.filter(|fate| *fate != Fate::Revoked)
            .ok_or_else(|| TransportError::system("a loan", "the receiver's answer makes no sense"))
    }

    /// Writes the rest of the head and the record of the body in one piece. False: there is no room yet.
    fn lend(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError> {
        let (parts, tail) = body.parts();
        let mut record = std::mem::take(&mut self.record);
        Record::encode(self.loans + 1, parts, tail, &mut record);
        let head = &head[cursor.head..];
        let needed = (head.len() + record.len()) as u64;
        let room = self.room(needed).map(|room| room >= needed);
        if let Ok(true) = room {
            let lent = record.len() > record::FIXED;
            self.loan = if lent { Loan::Out } else { Loan::Ring };
            if lent {
                self.loans += 1;
                loan::offer(&self.memory.words().loan.0, self.loans);
                cursor.lent = true;
            }
            self.memory.copy_in(self.tail, head);
            self.memory.copy_in(self.tail + head.len() as u64, &record);
            cursor.head += head.len();
            self.publish(self.tail + needed);
        }
        self.record = record;
        room
    }

    /// What the receiver finds where the secret was is something else.
    #[cfg(test)]
    pub(super) fn spoil_secret(&mut self) {
        self.secret.as_mut().unwrap()[3] ^= 1;
    }

    fn check_receiver(&self) -> Result<(), TransportError> {
        if self.memory.words().receiver_closed.0.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(TransportError::reported(&self.memory.reason()))
    }
}

impl End for ShmOutbound {
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
        Some(if self.secret.is_some() { super::CMA } else { super::RING_ONLY })
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<Poke>::clone(&self.poke)
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}

impl Outbound for ShmOutbound {
    fn lends(&self, body: u64) -> bool {
        self.secret.is_some() && body > RING as u64
    }

    fn write(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError> {
        if self.loan == Loan::Out {
            match self.fate()? {
                Fate::Taken => {
                    self.loan = Loan::None;
                    cursor.body = body.len();
                    return Ok(true);
                }
                Fate::Declined => self.loan = Loan::Ring,
                Fate::Offered | Fate::Revoked => return self.check_receiver().map(|()| false),
            }
        }
        self.check_receiver()?;
        if self.loan == Loan::None
            && self.lends(body.len())
            && (!self.lend(head, body, cursor)? || self.loan == Loan::Out)
        {
            return Ok(false);
        }
        loop {
            let left = (head.len() - cursor.head) as u64 + (body.len() - cursor.body);
            if left == 0 {
                self.loan = Loan::None;
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
        let (seen, lent) = (self.head, (self.loan == Loan::Out).then_some(self.loans));
        let moved = || {
            let news = match lent {
                Some(number) => loan::fate(&words.loan.0, number) != Some(Fate::Offered),
                None => words.head.0.load(Ordering::Acquire) != seen,
            };
            news || words.receiver_closed.0.load(Ordering::Acquire) != 0
        };
        self.poke.sleep_unless(at_most, moved);
        match &self.socket {
            Some(socket) if !moved() => check_alive(socket.socket(), "receiver"),
            // It may have taken the loan before it went.
            _ if lent.is_some() => Ok(()),
            _ => self.check_receiver(),
        }
    }

    fn close(&mut self, _whole: bool) {
        let words = self.memory.words();
        if self.loan == Loan::Out {
            // From here on the caller may do with its tensors what it wants.
            loan::revoke(&words.loan.0, self.loans);
            self.loan = Loan::None;
        }
        words.sender_closed.0.store(1, Ordering::Release);
        ring(&words.data.0);
        self.socket = None;
    }
}
