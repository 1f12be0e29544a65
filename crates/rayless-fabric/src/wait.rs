//! How long an operation waits, and what ends the waiting early.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// The longest that a transport sleeps before it looks again at the deadline and the caller's check. Bytes, room, a
/// cancellation and a peer's end are events, which end a sleep at once; this bounds what has none (a signal to
/// another thread).
pub(crate) const SLICE: Duration = Duration::from_millis(50);

/// The limits of one blocking call.
#[derive(Clone, Copy, Default)]
pub struct Wait<'a> {
    poll: bool,
    deadline: Option<Instant>,
    check: Option<&'a dyn Fn() -> bool>,
}

impl<'a> Wait<'a> {
    /// As long as it takes (or until the link is cancelled or lost).
    pub const fn forever() -> Self {
        Self { poll: false, deadline: None, check: None }
    }

    /// Not at all: what can be done at once, or nothing.
    pub const fn poll() -> Self {
        Self { poll: true, deadline: None, check: None }
    }

    /// Whether not even a spin is wanted.
    pub(crate) const fn is_poll(&self) -> bool {
        self.poll
    }

    /// Until an instant.
    pub const fn until(deadline: Instant) -> Self {
        Self { poll: false, deadline: Some(deadline), check: None }
    }

    /// At most this long from now.
    pub fn at_most(duration: Duration) -> Self {
        Self { poll: false, deadline: Instant::now().checked_add(duration), check: None }
    }

    /// Also ends, as cancelled, when `check` returns true. It is asked at least every 50 ms and after
    /// each signal: a Python binding looks for Ctrl-C here.
    pub const fn with_check(mut self, check: &'a dyn Fn() -> bool) -> Self {
        self.check = Some(check);
        self
    }

    /// How long to sleep next, or why not to.
    pub(crate) fn next_slice(&self, cancel: &Cancel) -> Result<Duration, Stop> {
        if cancel.is_set() {
            return Err(Stop::Cancelled);
        }
        self.slice()
    }

    /// The same where there is nothing to cancel but by the caller's check.
    pub(crate) fn slice(&self) -> Result<Duration, Stop> {
        if self.check.is_some_and(|check| check()) {
            return Err(Stop::Cancelled);
        }
        if self.poll {
            return Err(Stop::TimedOut);
        }
        match self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            None => Ok(SLICE),
            Some(Duration::ZERO) => Err(Stop::TimedOut),
            Some(left) => Ok(left.min(SLICE)),
        }
    }
}

impl fmt::Debug for Wait<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wait").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// Why a wait ended without what it waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The deadline passed.
    TimedOut,
    /// [`Cancel::cancel`] or the caller's check.
    Cancelled,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TimedOut => "timed out",
            Self::Cancelled => "was cancelled",
        })
    }
}

/// Ends a transport's sleep from another thread.
pub trait Wake: Send + Sync {
    /// The sleep in progress, or else the next one, ends early.
    fn wake(&self);
}

/// Cancels the blocking calls of one end of a link, from any thread: the one in progress and each later
/// one, until [`Cancel::reset`].
#[derive(Clone)]
pub struct Cancel(Arc<Inner>);

struct Inner {
    set: AtomicBool,
    wake: Arc<dyn Wake>,
}

impl Cancel {
    pub(crate) fn new(wake: Arc<dyn Wake>) -> Self {
        Self(Arc::new(Inner { set: AtomicBool::new(false), wake }))
    }

    /// Ends the call in progress, and each later one, as cancelled.
    pub fn cancel(&self) {
        self.0.set.store(true, Ordering::SeqCst);
        self.0.wake.wake();
    }

    /// Lets calls wait again.
    pub fn reset(&self) {
        self.0.set.store(false, Ordering::SeqCst);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.set.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cancel").field(&self.is_set()).finish()
    }
}
