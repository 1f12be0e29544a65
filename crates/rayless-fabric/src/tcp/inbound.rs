//! The receiving end over TCP.

use super::{Plan, is_gone};
use crate::{
    error::TransportError,
    greeting::MAX_STREAMS,
    scatter::ScatterMut,
    transport::{Counters, End, Inbound, Level},
    wait::Wake,
    wake::{EventWake, is_ready, poll_for},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvFlags, SendFlags,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use std::{
    io::IoSliceMut,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::Duration,
};

/// Bytes read ahead on the first stream: a small message comes in with one call, header and all.
const STAGE: usize = 64 << 10;
/// A rest of a payload of at least this many bytes is read straight into its tensors. (A second system call costs
/// more than copying less.)
const DIRECT: u64 = 32 << 10;
/// The first sleep of a wait is the read itself, for so long (in the clock's ticks): one system call less than
/// polling and reading, where the next message comes soon. Only a wake from another thread is noticed late by it.
const READ_SLEEP: Duration = Duration::from_millis(2);
/// Slices filled by one system call.
const SLICES: usize = 16;

pub(super) struct TcpInbound {
    streams: Vec<OwnedFd>,
    stage: Box<[u8]>,
    /// The bytes of `stage` that nobody has taken yet.
    staged: std::ops::Range<usize>,
    /// Payload bytes of the message in progress that each stream has brought.
    moved: [u64; MAX_STREAMS],
    /// Streams that had nothing at the last look, and from which more is due.
    dry: [bool; MAX_STREAMS],
    /// Bytes have come since the last sleep.
    may_sleep_in_read: bool,
    wake: Arc<EventWake>,
    sleeps: u64,
}

impl TcpInbound {
    pub(super) fn new(streams: Vec<OwnedFd>) -> Result<Self, Errno> {
        set_socket_timeout(&streams[0], Timeout::Recv, Some(READ_SLEEP))?;
        Ok(Self {
            streams,
            stage: vec![0; STAGE].into_boxed_slice(),
            staged: 0..0,
            may_sleep_in_read: true,
            moved: [0; MAX_STREAMS],
            dry: [false; MAX_STREAMS],
            wake: Arc::new(EventWake::new()?),
            sleeps: 0,
        })
    }

    /// Fills the stage anew. False: nothing has come.
    fn fill_stage(&mut self) -> Result<bool, TransportError> {
        let Some(n) = receive(self.streams[0].as_fd(), &mut [IoSliceMut::new(&mut self.stage)])? else {
            self.dry[0] = true;
            return Ok(false);
        };
        self.staged = 0..n;
        self.may_sleep_in_read = true;
        Ok(true)
    }

    /// Sleeps in the read that the next call would make anyhow.
    fn sleep_in_read(&mut self) {
        self.may_sleep_in_read = false;
        // The end, and an error, are found again by the next read.
        if let Ok((n, _)) = rustix::net::recv(&self.streams[0], &mut *self.stage, RecvFlags::empty()) {
            self.staged = 0..n;
            self.may_sleep_in_read = true;
        }
    }

    /// Takes staged bytes.
    fn take(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.staged.len());
        out[..n].copy_from_slice(&self.stage[self.staged.start..self.staged.start + n]);
        self.staged.start += n;
        n
    }

    /// One step for one stream. False: it is done, or dry.
    fn read_lane(&mut self, lane: usize, plan: &Plan, body: &mut ScatterMut<'_, '_>) -> Result<bool, TransportError> {
        let (offset, len) = plan.next(lane, self.moved[lane]);
        if len == 0 {
            return Ok(false);
        }
        if lane == 0 && self.staged.is_empty() && len < DIRECT && !self.fill_stage()? {
            return Ok(false);
        }
        let before = self.moved[lane];
        if lane == 0 && !self.staged.is_empty() {
            body.walk(offset, len, |slice| {
                let took = self.take(slice);
                self.moved[0] += took as u64;
                took == slice.len()
            });
        } else {
            let mut slices: [IoSliceMut<'_>; SLICES] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
            let used = body.list(offset, len, &mut slices);
            match receive(self.streams[lane].as_fd(), &mut slices[..used])? {
                Some(n) => self.moved[lane] += n as u64,
                None => self.dry[lane] = true,
            }
        }
        Ok(self.moved[lane] > before)
    }
}

/// Reads what has come. `None`: nothing.
fn receive(stream: BorrowedFd<'_>, out: &mut [IoSliceMut<'_>]) -> Result<Option<usize>, TransportError> {
    loop {
        let got = rustix::net::recvmsg(stream, out, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT);
        match got.map(|message| message.bytes) {
            Ok(0) => return Err(TransportError::gone("the sender's connection ended without a goodbye")),
            Ok(n) => return Ok(Some(n)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(errno) if is_gone(errno) => {
                return Err(TransportError::gone(format!("the sender's connection is gone: {errno}")));
            }
            Err(errno) => return Err(TransportError::system("recv", errno)),
        }
    }
}

impl End for TcpInbound {
    fn level(&self) -> Level {
        Level::Tcp
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.streams.iter().map(AsRawFd::as_raw_fd).collect()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<EventWake>::clone(&self.wake)
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}

impl Inbound for TcpInbound {
    fn read_head(&mut self, head: &mut [u8], filled: &mut usize) -> Result<bool, TransportError> {
        // Only the first stream brings heads, so only it is waited for.
        self.dry = [false; MAX_STREAMS];
        while *filled < head.len() {
            if self.staged.is_empty() && !self.fill_stage()? {
                return Ok(false);
            }
            *filled += self.take(&mut head[*filled..]);
        }
        Ok(true)
    }

    fn read_body(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError> {
        if *filled == 0 {
            self.moved = [0; MAX_STREAMS];
        }
        let plan = Plan::new(body.len(), self.streams.len());
        let lanes = plan.lanes as usize;
        self.dry = [false; MAX_STREAMS];
        loop {
            let mut any = false;
            for lane in 0..lanes {
                if !self.dry[lane] {
                    any |= self.read_lane(lane, &plan, body)?;
                }
            }
            *filled = self.moved[..lanes].iter().sum();
            if *filled == body.len() {
                return Ok(true);
            }
            if !any {
                return Ok(false);
            }
        }
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        self.sleeps += 1;
        let only_first = self.dry[0] && !self.dry[1..].contains(&true);
        if self.may_sleep_in_read && only_first && self.staged.is_empty() && at_most > READ_SLEEP {
            self.sleep_in_read();
            return Ok(());
        }
        let wake = PollFd::from_borrowed_fd(self.wake.fd(), PollFlags::IN);
        let mut fds: [PollFd<'_>; MAX_STREAMS + 1] = std::array::from_fn(|_| wake.clone());
        let mut used = 1;
        for (stream, _) in self.streams.iter().zip(self.dry).filter(|(_, dry)| *dry) {
            fds[used] = PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN);
            used += 1;
        }
        poll_for(&mut fds[..used], at_most)?;
        if is_ready(&fds[0]) {
            self.wake.drain();
        }
        // The end of a stream, or its error, is found by the next read.
        Ok(())
    }

    fn close(&mut self, reason: &str) {
        if let (Some(stream), false) = (self.streams.first(), reason.is_empty()) {
            let reason = &reason.as_bytes()[..reason.len().min(512)];
            // The sender may be gone already.
            let _ = rustix::net::send(stream, reason, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        self.streams.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_wake_ends_the_longest_sleep() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut inbound = TcpInbound::new(vec![listener.accept().unwrap().0.into()]).unwrap();
        assert!(!inbound.read_head(&mut [0; 64], &mut 0).unwrap());
        let waker = inbound.waker();
        let waking = std::thread::spawn(move || waker.wake());
        // The first sleep is in the read and ends by itself; the second has the waker among what it waits for.
        inbound.wait(Duration::from_secs(3600)).unwrap();
        inbound.wait(Duration::from_secs(3600)).unwrap();
        waking.join().unwrap();
        assert_eq!(inbound.counters().sleeps, 2);
    }
}
