//! The sending end over TCP.

use super::{Plan, is_gone};
use crate::{
    error::TransportError,
    greeting::MAX_STREAMS,
    scatter::Scatter,
    transport::{Counters, Cursor, End, Level, Outbound},
    wait::Wake,
    wake::{EventWake, is_ready, poll_for},
};
use rustix::{
    event::{PollFd, PollFlags},
    fd::{AsFd, OwnedFd},
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendFlags},
};
use std::{
    io::IoSlice,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::Duration,
};

/// Slices handed to one system call.
const SLICES: usize = 16;

pub(super) struct TcpOutbound {
    streams: Vec<OwnedFd>,
    /// Payload bytes of the message in progress that each stream has taken.
    moved: [u64; MAX_STREAMS],
    /// Streams whose buffers were full at the last look.
    full: [bool; MAX_STREAMS],
    wake: Arc<EventWake>,
    sleeps: u64,
}

impl TcpOutbound {
    pub(super) fn new(streams: Vec<OwnedFd>) -> Result<Self, Errno> {
        Ok(Self {
            streams,
            moved: [0; MAX_STREAMS],
            full: [false; MAX_STREAMS],
            wake: Arc::new(EventWake::new()?),
            sleeps: 0,
        })
    }

    /// One system call for one stream. False: it has nothing left to send, or is full.
    fn write_lane(
        &mut self,
        lane: usize,
        plan: &Plan,
        head: &[u8],
        body: &Scatter<'_>,
        cursor: &mut Cursor,
    ) -> Result<bool, TransportError> {
        let head = if lane == 0 { &head[cursor.head..] } else { &[] };
        let (offset, len) = plan.next(lane, self.moved[lane]);
        if head.is_empty() && len == 0 {
            return Ok(false);
        }
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        if !head.is_empty() {
            slices[0] = IoSlice::new(head);
            used = 1;
        }
        body.walk(offset, len, |slice| {
            slices[used] = IoSlice::new(slice);
            used += 1;
            used < SLICES
        });
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = loop {
            match rustix::net::sendmsg(&self.streams[lane], &slices[..used], &mut SendAncillaryBuffer::default(), flags)
            {
                Ok(sent) => break sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.full[lane] = true;
                    return Ok(false);
                }
                Err(errno) if is_gone(errno) => return Err(self.parting_words(Some(errno))),
                Err(errno) => return Err(TransportError::system("sendmsg", errno)),
            }
        };
        let of_head = sent.min(head.len());
        cursor.head += of_head;
        self.moved[lane] += (sent - of_head) as u64;
        cursor.body += (sent - of_head) as u64;
        Ok(true)
    }

    /// What the receiver wrote before it went, or how it went.
    fn parting_words(&self, errno: Option<Errno>) -> TransportError {
        let mut reason = [0u8; 512];
        match rustix::net::recv(&self.streams[0], &mut reason, RecvFlags::DONTWAIT) {
            Ok((n, _)) if n > 0 => TransportError::reported(&reason[..n]),
            _ => TransportError::gone(match errno {
                Some(errno) => format!("the receiver's connection is gone: {errno}"),
                None => "the receiver's end of the connection was closed".to_owned(),
            }),
        }
    }
}

impl End for TcpOutbound {
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

impl Outbound for TcpOutbound {
    fn write(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError> {
        if cursor.body == 0 {
            self.moved = [0; MAX_STREAMS];
        }
        let plan = Plan::new(body.len(), self.streams.len());
        let lanes = plan.lanes as usize;
        self.full = [false; MAX_STREAMS];
        loop {
            let mut any = false;
            for lane in 0..lanes {
                if !self.full[lane] {
                    any |= self.write_lane(lane, &plan, head, body, cursor)?;
                }
            }
            if cursor.head == head.len() && cursor.body == body.len() {
                return Ok(true);
            }
            if !any {
                return Ok(false);
            }
        }
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        self.sleeps += 1;
        let wake = PollFd::from_borrowed_fd(self.wake.fd(), PollFlags::IN);
        let mut fds: [PollFd<'_>; MAX_STREAMS + 1] = std::array::from_fn(|_| wake.clone());
        for (at, stream) in self.streams.iter().enumerate() {
            let room = if self.full[at] { PollFlags::OUT } else { PollFlags::empty() };
            // The receiver writes nothing before its last words.
            fds[at + 1] = PollFd::from_borrowed_fd(stream.as_fd(), room | PollFlags::IN | PollFlags::RDHUP);
        }
        let fds = &mut fds[..=self.streams.len()];
        poll_for(fds, at_most)?;
        if is_ready(&fds[0]) {
            self.wake.drain();
        }
        let ended = PollFlags::IN | PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        if fds[1..].iter().any(|fd| fd.revents().intersects(ended)) {
            return Err(self.parting_words(None));
        }
        Ok(())
    }

    fn close(&mut self, _whole: bool) {
        // What was written is still delivered; then the receiver reads the end of the stream.
        self.streams.clear();
    }
}
