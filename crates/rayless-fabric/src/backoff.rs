//! Looking at something that nobody announces (a word that a GPU writes), without burning a core for long.

use std::time::{Duration, Instant};

/// How long to look without a sleep: a decode step's kernels are done within this.
const EAGER: Duration = Duration::from_millis(3);
/// Sleeps after that: short beside the payloads that take longer, and cheap (a few per cent of a core).
const SLEEP: Duration = Duration::from_micros(50);

/// One wait's patience.
#[derive(Debug)]
pub(crate) struct Backoff {
    eager_until: Instant,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { eager_until: Instant::now() + EAGER }
    }
}

impl Backoff {
    /// Gives the core away, for an instant at first and then for longer.
    pub(crate) fn pause(&self) {
        if Instant::now() < self.eager_until {
            std::thread::yield_now();
        } else {
            std::thread::sleep(SLEEP);
        }
    }
}
