//! Links belong to the process that made them: what a fork of it must not do, and must not hold.
//!
//! A forked child (a data loader's, say) has copies of all links and none of their threads. It must not write where the parent writes: so each end
//! knows the process that it belongs to, and in any other it does nothing, not even when it is dropped. It must not
//! hold the parent's connections open either, or a peer would not see the parent's death while the child lives: so they are closed in
//! the child as it begins. (A queue pair's descriptors are libibverbs' and stay open there.)

use crate::{
    error::{Lost, LostKind, TransportError},
    name::LinkName,
};
use rustix::fd::RawFd;
use std::{
    cell::UnsafeCell,
    mem::ManuallyDrop,
    ops::{Deref, DerefMut},
    sync::{
        Once,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// What a link says in a process that is not its own.
const NOT_HERE: &str = "the link belongs to the process that this one was forked from";

/// The same as a transport's error.
pub(crate) fn not_here() -> TransportError {
    TransportError { kind: LostKind::Abandoned, cause: NOT_HERE.to_owned() }
}

/// Forks between the first process and this one. Changes in a child only, before anything else runs there.
static FORKS: AtomicU64 = AtomicU64::new(0);
static HELD: Held = Held { locked: AtomicBool::new(false), descriptors: UnsafeCell::new(Vec::new()) };

/// The process in which something was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Origin(u64);

impl Origin {
    /// This process.
    pub(crate) fn here() -> Self {
        install();
        Self(FORKS.load(Ordering::Relaxed))
    }

    pub(crate) fn is_here(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }

    /// For what has a lock: in a forked process it may be held for ever, by a thread that is not there.
    pub(crate) fn check(self, link: LinkName) -> Result<(), Lost> {
        if self.is_here() {
            return Ok(());
        }
        let TransportError { kind, cause } = not_here();
        Err(Lost { link, sequence: 0, kind, cause })
    }
}

/// One end's transport. In a process forked from its own it is neither closed nor dropped: that would take down what is the
/// parent's.
#[derive(Debug)]
pub(crate) struct OfOneProcess<T> {
    transport: ManuallyDrop<T>,
    origin: Origin,
    held: NotInChildren,
}

impl<T> OfOneProcess<T> {
    /// `descriptors`: of the transport, to be closed in forked children.
    pub(crate) fn new(descriptors: Vec<RawFd>, transport: T) -> Self {
        let (origin, held) = (Origin::here(), NotInChildren::new(descriptors));
        Self { transport: ManuallyDrop::new(transport), origin, held }
    }

    pub(crate) fn is_here(&self) -> bool {
        self.origin.is_here()
    }

    /// Runs the transport's last call, which closes its descriptors.
    pub(crate) fn shut(&mut self, close: impl FnOnce(&mut T)) {
        if self.is_here() {
            self.held = NotInChildren::default();
            close(&mut self.transport);
        }
    }
}

impl<T> Deref for OfOneProcess<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.transport
    }
}

impl<T> DerefMut for OfOneProcess<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.transport
    }
}

impl<T> Drop for OfOneProcess<T> {
    fn drop(&mut self) {
        if self.is_here() {
            self.held = NotInChildren::default();
            // SAFETY: never used again.
            unsafe { ManuallyDrop::drop(&mut self.transport) };
        }
    }
}

/// Descriptors that a child closes. A lock of its own, for a child has to find it in order whatever other threads were doing.
struct Held {
    locked: AtomicBool,
    descriptors: UnsafeCell<Vec<RawFd>>,
}

// SAFETY: `descriptors` is touched only between `lock` and `unlock`.
unsafe impl Sync for Held {}

impl Held {
    fn lock(&self) {
        // Held for a push or a removal, or for the time of a fork.
        while self.locked.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    fn unlock(&self) {
        self.locked.store(false, Ordering::Release);
    }

    fn with<R>(&self, run: impl FnOnce(&mut Vec<RawFd>) -> R) -> R {
        self.lock();
        // SAFETY: the lock is held, and `run` (in this file) neither panics nor comes back here.
        let out = run(unsafe { &mut *self.descriptors.get() });
        self.unlock();
        out
    }
}

/// Descriptors that a forked child closes as it begins, until this is dropped. Drop it before they are closed.
#[derive(Debug, Default)]
pub(crate) struct NotInChildren(Vec<RawFd>);

impl NotInChildren {
    pub(crate) fn new(descriptors: Vec<RawFd>) -> Self {
        install();
        HELD.with(|held| held.extend_from_slice(&descriptors));
        Self(descriptors)
    }
}

impl Drop for NotInChildren {
    fn drop(&mut self) {
        HELD.with(|held| held.retain(|descriptor| !self.0.contains(descriptor)));
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the three functions live for ever, and do nothing that a child of a process with threads may not do. The only
        // error is that there is no memory; a child then takes the links for its own, as without all this.
        let _ = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

extern "C" fn before() {
    HELD.lock();
}

extern "C" fn in_parent() {
    HELD.unlock();
}

extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    crate::shm::forget_watcher();
    // SAFETY: the lock was taken in `before` by this very thread, the only one there is now.
    let held = unsafe { &mut *HELD.descriptors.get() };
    for descriptor in held.drain(..) {
        // SAFETY: a descriptor of a link of the parent's. What owns it in this process's copy of memory is never used here, not even to close it.
        unsafe { libc::close(descriptor) };
    }
    HELD.unlock();
}
