//! Eventfds: how one thread or process tells another to look.

use rustix::event::EventfdFlags;
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

/// A new one, never blocking, closed at exec.
pub(crate) fn create() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes it readable. Fails only where it is so 2^64 times already.
pub(crate) fn notify(event: impl AsFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes it not readable.
pub(crate) fn clear(event: impl AsFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}
