//! Waiting without sleeping, where that pays.
//!
//! While calls follow each other, looking again and again beats a futex by far, as long as there is a core for everyone who looks. Where a
//! group's own processes outnumber the cores nobody spins: those that are done would take the time of those that are not. The core is
//! given away (`sched_yield`) between looks; on a machine that is busy with other things that hands it to someone who keeps it for
//! milliseconds, so a yield that came back late ends the spinning for a while.

use std::time::{Duration, Instant};

/// How long to look at most; `RAYLESS_SPIN_US` overrides it and the rule about cores, 0 is never.
const DEFAULT: Duration = Duration::from_micros(100);
/// No useful spin is longer.
const LONGEST: Duration = Duration::from_millis(10);
/// A yield among a group's own workers comes back within this; a longer one went to somebody else.
const LATE: Duration = Duration::from_micros(60);
/// How long not to spin after a late yield.
const PAUSE: Duration = Duration::from_secs(1);

/// One thread's spinning.
#[derive(Debug)]
pub(crate) struct Spin {
    limit: Duration,
    not_before: Option<Instant>,
}

/// One wait: from its start to its limit.
#[derive(Debug)]
pub(crate) struct Spinning {
    until: Option<Instant>,
}

impl Spin {
    /// For one of `processes` of this group and host that may look at the same time.
    pub(crate) fn among(processes: usize) -> Self {
        let by_hand = std::env::var("RAYLESS_SPIN_US").ok().and_then(|text| text.parse().ok());
        let limit = by_hand.map_or_else(
            || {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                if processes <= cores { DEFAULT } else { Duration::ZERO }
            },
            Duration::from_micros,
        );
        Self { limit: limit.min(LONGEST), not_before: None }
    }

    /// Begins a wait.
    pub(crate) fn begin(&mut self) -> Spinning {
        if self.limit.is_zero() {
            return Spinning { until: None };
        }
        let now = Instant::now();
        if self.not_before.is_some_and(|at| now < at) {
            return Spinning { until: None };
        }
        self.not_before = None;
        Spinning { until: Some(now + self.limit) }
    }

    /// Gives the core away once; `false` where it is time to sleep.
    pub(crate) fn again(&mut self, spinning: &mut Spinning) -> bool {
        let Some(until) = spinning.until else { return false };
        let before = Instant::now();
        if before >= until {
            return false;
        }
        rustix::thread::sched_yield();
        let now = Instant::now();
        if now.duration_since(before) > LATE {
            self.not_before = Some(now + PAUSE);
            spinning.until = None;
        }
        // Even then one more look: what was waited for may have come meanwhile.
        true
    }
}
