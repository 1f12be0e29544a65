//! The wake protocol of the ring, apart from any memory, so that loom can try every interleaving of it.
//!
//! Each direction has a counter of bytes (written by one side) and a bell (a futex word). Whoever moves the counter
//! swaps the bell to `AWAKE` afterwards and makes the system call only if it was `ASLEEP`. Whoever waits swaps it to
//! `ASLEEP`, looks at the counter once more, and only then sleeps on the bell. Both swaps are read-modify-writes of one word,
//! so one comes first: if the mover's, the waiter's swap reads it and with it sees the counter; if the waiter's,
//! the mover sees `ASLEEP` and wakes it. No wake-up is lost, and none is made while nobody sleeps.

use std::time::Duration;

/// Nobody sleeps on the bell, or its sleeper has been told.
pub const AWAKE: u32 = 0;
/// Somebody sleeps on the bell, or is about to.
pub const ASLEEP: u32 = 1;

/// A futex word.
pub trait Bell {
    /// Swaps the word, acquiring and releasing.
    fn swap(&self, to: u32) -> u32;
    /// Sleeps while the word is `ASLEEP`, at most for a time; may end early.
    fn sleep(&self, at_most: Duration);
    /// Wakes the sleeper.
    fn wake(&self);
}

/// Call after moving a counter (with release ordering): wakes whoever waits for that.
pub fn ring(bell: &impl Bell) {
    if bell.swap(AWAKE) == ASLEEP {
        bell.wake();
    }
}

/// Sleeps on a bell until it rings, unless `ready` (which reads the counter with acquire ordering) is true by then.
pub fn sleep_unless(bell: &impl Bell, at_most: Duration, ready: impl Fn() -> bool) {
    bell.swap(ASLEEP);
    if !ready() {
        bell.sleep(at_most);
    }
    bell.swap(AWAKE);
}
