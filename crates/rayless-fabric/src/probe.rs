//! What others may see of a link while it works: for `status`, and for the line per rank when nothing moves.

use crate::{name::LinkName, transport::Level};
use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering, fence},
    },
};

/// What an end of a link is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Nothing: between two messages.
    Idle,
    /// The sender has put out a header; the payload is not ready.
    HeaderSent,
    /// The sender waits for room, or for the rest to leave.
    Sending,
    /// The receiver waits for a header.
    AwaitingHeader,
    /// The receiver has a header; nobody has asked for the payload.
    HeaderReceived,
    /// The receiver waits for a payload.
    AwaitingPayload,
    /// Closed in order.
    Closed,
    /// Lost.
    Lost,
}

const PHASES: [(Phase, &str); 8] = [
    (Phase::Idle, "idle"),
    (Phase::HeaderSent, "header sent"),
    (Phase::Sending, "sending"),
    (Phase::AwaitingHeader, "awaiting header"),
    (Phase::HeaderReceived, "header received"),
    (Phase::AwaitingPayload, "awaiting payload"),
    (Phase::Closed, "closed"),
    (Phase::Lost, "lost"),
];

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PHASES[*self as usize].1)
    }
}

/// Told of each whole message, by the thread that moved it: the number of messages so far.
type Follower = Box<dyn Fn(u64) + Send + Sync>;

/// Told once that the link is lost.
type Mourner = Box<dyn Fn() + Send + Sync>;

/// A view on one end of a link that any thread may read at any time.
pub struct Probe {
    name: LinkName,
    level: Level,
    messages: AtomicU64,
    bytes: AtomicU64,
    phase: AtomicU8,
    follower: OnceLock<Follower>,
    loss: OnceLock<String>,
    mourner: OnceLock<Mourner>,
}

impl Probe {
    pub(crate) const fn new(name: LinkName, level: Level) -> Self {
        Self {
            name,
            level,
            messages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            phase: AtomicU8::new(0),
            follower: OnceLock::new(),
            loss: OnceLock::new(),
            mourner: OnceLock::new(),
        }
    }

    /// The link's name.
    pub const fn name(&self) -> LinkName {
        self.name
    }

    /// Its transport.
    pub const fn level(&self) -> Level {
        self.level
    }

    /// Whole messages moved: the sequence number of the next one.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// Bytes of payload in them.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// What this end is doing.
    pub fn phase(&self) -> Phase {
        PHASES[usize::from(self.phase.load(Ordering::Acquire)) % PHASES.len()].0
    }

    /// Has `follower` called after each whole message from here on, with the number of messages so far. It runs within the
    /// hop: it must be quick and must not wait. A second follower is ignored.
    pub fn follow(&self, follower: impl Fn(u64) + Send + Sync + 'static) {
        let _ = self.follower.set(Box::new(follower));
    }

    /// Why the link is lost, in one line; `None` while it is not.
    pub fn loss(&self) -> Option<&str> {
        self.loss.get().map(String::as_str)
    }

    /// Has `mourner` called when the link is lost, by the thread that finds out; at once where it is lost already. A second
    /// one is ignored.
    pub fn on_loss(&self, mourner: impl Fn() + Send + Sync + 'static) {
        let _ = self.mourner.set(Box::new(mourner));
        // Each side writes its own and then reads the other's: one of them sees both.
        fence(Ordering::SeqCst);
        if let (Some(_), Some(mourner)) = (self.loss.get(), self.mourner.get()) {
            mourner();
        }
    }

    pub(crate) fn lose(&self, cause: &str) {
        // Before the phase: who reads that it is lost may ask why.
        let _ = self.loss.set(cause.to_owned());
        self.phase.store(Phase::Lost as u8, Ordering::Release);
        fence(Ordering::SeqCst);
        if let Some(mourner) = self.mourner.get() {
            mourner();
        }
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(crate) fn moved(&self, bytes: u64) {
        // One thread writes these; others only read.
        self.bytes.store(self.bytes.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
        let messages = self.messages.load(Ordering::Relaxed) + 1;
        self.messages.store(messages, Ordering::Relaxed);
        if let Some(follower) = self.follower.get() {
            follower(messages);
        }
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Probe")
            .field("name", &self.name)
            .field("level", &self.level)
            .field("messages", &self.messages())
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}
