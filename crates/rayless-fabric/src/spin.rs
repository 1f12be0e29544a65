//! Looking again before sleeping, where that pays: for links and for the steps that drive them.
//!
//! Between two hops or calls that follow each other closely, looking beats a sleep by far; the core is given away
//! (`sched_yield`) between looks. But where others want the core, a yield hands it to somebody who keeps it for
//! milliseconds. So a yield that came back late ends the spinning, for this wait and for a while.

use std::time::{Duration, Instant};

/// A yield among a group's own workers comes back within this; a longer one went to somebody else.
const LATE: Duration = Duration::from_micros(60);
/// How long not to spin after a late yield.
const PAUSE: Duration = Duration::from_secs(1);

/// One thread's, or one end's, spinning.
#[derive(Debug)]
pub struct Spin {
    limit: Duration,
    not_before: Option<Instant>,
}

impl Spin {
    /// Looks for `limit` at most; zero: sleeps at once.
    pub const fn new(limit: Duration) -> Self {
        Self { limit, not_before: None }
    }

    /// Until when a wait that begins now may look; `None`: it sleeps at once.
    pub fn begin(&mut self) -> Option<Instant> {
        if self.limit.is_zero() {
            return None;
        }
        let now = Instant::now();
        if self.not_before.is_some_and(|at| now < at) {
            return None;
        }
        self.not_before = None;
        Some(now + self.limit)
    }

    /// Gives the core away once; false when it is time to sleep.
    pub fn again(&mut self, until: &mut Option<Instant>) -> bool {
        let before = Instant::now();
        if until.is_none_or(|until| before >= until) {
            return false;
        }
        std::thread::yield_now();
        let now = Instant::now();
        if now.duration_since(before) > LATE {
            self.not_before = Some(now + PAUSE);
            *until = None;
        }
        // Even then one more look: what was waited for may have come meanwhile.
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_means_no_look() {
        let mut spin = Spin::new(Duration::ZERO);
        let mut until = spin.begin();
        assert!(until.is_none() && !spin.again(&mut until));
    }

    #[test]
    fn after_a_late_yield_the_next_wait_sleeps_at_once() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        assert!(spin.begin().is_some());
        spin.not_before = Some(Instant::now() + PAUSE);
        assert!(spin.begin().is_none());
        spin.not_before = Some(Instant::now());
        assert!(spin.begin().is_some());
    }
}
