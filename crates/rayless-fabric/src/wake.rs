//! Ending a `poll` from another thread.

use crate::{error::TransportError, wait::Wake};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};
use std::time::Duration;

/// An eventfd among the polled descriptors.
pub(crate) struct EventWake(OwnedFd);

impl EventWake {
    pub(crate) fn new() -> Result<Self, Errno> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Self)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Forgets the wakes so far.
    pub(crate) fn drain(&self) {
        let mut count = [0u8; 8];
        // Nothing to forget is as good.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl Wake for EventWake {
    fn wake(&self) {
        // The only error is a full counter, and then the poll ends anyhow.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// `poll` for at most `at_most`; an interruption by a signal is a return like any other.
pub(crate) fn poll_for(fds: &mut [PollFd<'_>], at_most: Duration) -> Result<(), TransportError> {
    match poll(fds, Some(&timespec(at_most))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(TransportError::system("poll", errno)),
    }
}

/// Whether anything that was asked for, or a hang-up, was reported.
pub(crate) fn is_ready(fd: &PollFd<'_>) -> bool {
    fd.revents() != PollFlags::empty()
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
