//! What a link needs of the thing that moves its bytes.
//!
//! A transport is a one-way stream of bytes between two processes: a *head* (header and description) and a
//! *body* (payload) in turn. Both ends know each body's length before its first byte moves, so a transport may
//! stripe it. Nothing here blocks but `wait`; partial progress is kept in the caller's cursor.

use crate::{
    error::TransportError,
    scatter::{Scatter, ScatterMut},
    wait::Wake,
};
use std::{fmt, os::fd::RawFd, sync::Arc, time::Duration};

/// Transports in the order of preference: a greater one is taken when it can be had.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Level {
    /// TCP streams.
    Tcp,
    /// RDMA writes.
    Rdma,
    /// Shared memory of one host.
    Shm,
}

impl Level {
    /// As in `--transport` and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Shm => "shm",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a message has come. Start each message with a default one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cursor {
    /// Bytes of the head that have moved.
    pub head: usize,
    /// Bytes of the body that have moved.
    pub body: u64,
    /// The body is lent (see [`Outbound::lends`]), so that any of its bytes may have moved.
    pub lent: bool,
}

impl Cursor {
    /// Whether not one byte has moved.
    pub const fn is_at_start(&self) -> bool {
        self.head == 0 && self.body == 0 && !self.lent
    }
}

/// What a transport has counted since it was opened; zero where it has no such thing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Work requests posted (RDMA).
    pub work_requests: u64,
    /// Posting calls (RDMA): each rings the device's doorbell once.
    pub doorbells: u64,
    /// Completions taken (RDMA).
    pub completions: u64,
    /// Times that `wait` slept.
    pub sleeps: u64,
}

/// A page that both processes map besides the transport's own memory, for the two GPUs' use (see `cuda`).
#[derive(Clone)]
pub struct SharedPage {
    pub(crate) host: std::ptr::NonNull<u8>,
    /// Holds the mapping.
    pub(crate) keep: Arc<dyn Send + Sync>,
}

// SAFETY: memory is bound to no thread. This gives out an address only, and what is read and written there is atomic.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

/// What both ends of a transport say of themselves.
pub trait End: Send {
    /// Its level.
    fn level(&self) -> Level;

    /// The device that it uses, where it uses one of its own.
    fn device(&self) -> Option<&str> {
        None
    }

    /// Descriptors of what joins the two processes: a forked child closes its copies, see `fork`.
    fn descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// How it works where it has several ways (`cma`, or `ring` and perhaps why: see `shm`).
    fn mode(&self) -> Option<&str> {
        None
    }

    /// The page for the GPUs, where both ends are on one host.
    fn shared_page(&self) -> Option<SharedPage> {
        None
    }

    /// Ends a sleep in `wait` from another thread.
    fn waker(&self) -> Arc<dyn Wake>;

    /// What was counted.
    fn counters(&self) -> Counters;
}

/// The sending end of a transport.
pub trait Outbound: End {
    /// Whether a body of this length is not copied by `write` but lent: from the first `write` with it on, its slices must stay
    /// valid and unchanged until `write` returns true or `close` has returned.
    fn lends(&self, _body: u64) -> bool {
        false
    }

    /// Moves as much of `head`, and then of `body`, as can be moved without waiting. True: all has been taken
    /// over and the caller may reuse its buffers.
    fn write(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError>;

    /// Sleeps until `write` may have something to do, the waker is called, a signal comes, or `at_most` has passed.
    /// An error: the receiver is gone.
    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError>;

    /// The last call: nothing more will be written. `whole`: the stream ends between two messages.
    fn close(&mut self, whole: bool);
}

/// The receiving end of a transport.
pub trait Inbound: End {
    /// Fills `head` from `filled` on, as far as bytes have come. True: it is full.
    fn read_head(&mut self, head: &mut [u8], filled: &mut usize) -> Result<bool, TransportError>;

    /// Fills `body` from `filled` on, as far as bytes have come; its length is that of the sender's body.
    /// True: it is full.
    fn read_body(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError>;

    /// Sleeps until there may be something to read, the waker is called, a signal comes, or `at_most` has passed.
    /// An error: the sender is gone and all that it wrote has been read.
    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError>;

    /// The last call; the sender learns `reason` if it is still there.
    fn close(&mut self, reason: &str);
}
