//! The receiving end over TCP.

use super::{Plan, is_gone};
use crate::{
    error::TransportError,
    greeting::MAX_STREAMS,
    scatter::ScatterMut,
    transport::{Counters, Inbound, Level},
    wait::{SLICE, Wake},
    wake::{EventWake, is_ready, poll_for},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
    net::{
        RecvFlags, SendFlags,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use std::{sync::Arc, time::Duration};

/// Bytes read ahead on the first stream: a small message comes in with one call, header and all.
const STAGE: usize = 64 << 10;
/// A rest of a payload of at least this many bytes is read straight into its tensor.
const DIRECT: usize = 32 << 10;

pub(super) struct TcpInbound {
    streams: Vec<OwnedFd>,
    stage: Box<[u8]>,
    /// The bytes of `stage` that nobody has taken yet.
    staged: std::ops::Range<usize>,
    /// Payload bytes of the message in progress that each stream has brought.
    moved: [u64; MAX_STREAMS],
    /// Streams that had nothing at the last look, and from which more is due.
    dry: [bool; MAX_STREAMS],
    wake: Arc<EventWake>,
    sleeps: u64,
}

impl TcpInbound {
    pub(super) fn new(streams: Vec<OwnedFd>) -> Result<Self, Errno> {
        set_socket_timeout(&streams[0], Timeout::Recv, Some(SLICE))?;
        Ok(Self {
            streams,
            stage: vec![0; STAGE].into_boxed_slice(),
            staged: 0..0,
            moved: [0; MAX_STREAMS],
            dry: [false; MAX_STREAMS],
            wake: Arc::new(EventWake::new()?),
            sleeps: 0,
        })
    }

    /// Fills the stage anew. False: nothing has come.
    fn fill_stage(&mut self) -> Result<bool, TransportError> {
        let Some(n) = receive(self.streams[0].as_fd(), &mut self.stage)? else {
            self.dry[0] = true;
            return Ok(false);
        };
        self.staged = 0..n;
        Ok(true)
    }

    /// Sleeps in the read that the next call would make anyhow; the socket's timeout is the slice.
    fn sleep_in_read(&mut self) -> Result<(), TransportError> {
        // The end, and an error, are found again by the next read.
        if let Ok((n, _)) = rustix::net::recv(&self.streams[0], &mut *self.stage, RecvFlags::empty()) {
            self.staged = 0..n;
        }
        Ok(())
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
        let before = self.moved[lane];
        if lane == 0 && self.staged.is_empty() && len < DIRECT as u64 && !self.fill_stage()? {
            return Ok(false);
        }
        let mut error = None;
        if lane == 0 && !self.staged.is_empty() {
            body.walk(offset, len, |slice| {
                let took = self.take(slice);
                self.moved[0] += took as u64;
                took == slice.len()
            });
        } else {
            body.walk(offset, len, |slice| match receive(self.streams[lane].as_fd(), slice) {
                Ok(Some(n)) => {
                    self.moved[lane] += n as u64;
                    n == slice.len()
                }
                Ok(None) => {
                    self.dry[lane] = true;
                    false
                }
                Err(e) => {
                    error = Some(e);
                    false
                }
            });
        }
        match error {
            Some(error) => Err(error),
            None => Ok(self.moved[lane] > before),
        }
    }
}

/// Reads what has come. `None`: nothing.
fn receive(stream: BorrowedFd<'_>, out: &mut [u8]) -> Result<Option<usize>, TransportError> {
    loop {
        match rustix::net::recv(stream, &mut *out, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(TransportError::gone("the sender's connection ended without a goodbye")),
            Ok((n, _)) => return Ok(Some(n)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(errno) if is_gone(errno) => {
                return Err(TransportError::gone(format!("the sender's connection is gone: {errno}")));
            }
            Err(errno) => return Err(TransportError::system("recv", errno)),
        }
    }
}

impl Inbound for TcpInbound {
    fn level(&self) -> Level {
        Level::Tcp
    }

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
        if at_most == SLICE && self.staged.is_empty() && self.dry[0] && !self.dry[1..].contains(&true) {
            // The common case, a small message: the sleep is the read. A wake from another thread is then
            // noticed at the end of the slice, which is all that cancelling needs.
            return self.sleep_in_read();
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

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<EventWake>::clone(&self.wake)
    }

    fn close(&mut self, reason: &str) {
        if let (Some(stream), false) = (self.streams.first(), reason.is_empty()) {
            let reason = &reason.as_bytes()[..reason.len().min(512)];
            // The sender may be gone already.
            let _ = rustix::net::send(stream, reason, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        self.streams.clear();
    }

    fn counters(&self) -> Counters {
        Counters { sleeps: self.sleeps, ..Counters::default() }
    }
}
