//! Looking again before sleeping, where that pays: for links and for the steps that drive them.
//!
//! Between two hops or calls that follow each other closely, looking beats a sleep by far; the core is given away
//! (`sched_yield`) between looks. But where others want the core, a yield hands it to somebody who keeps it for
//! milliseconds. So a yield that came back late ends the spinning, for this wait and for a while: for a moment the first
//! time, since every host has its timers, and for longer each time that the next one follows soon.
//!
//! And a yield need not give the core to whoever is waited for: the scheduler may give it straight back, though that other one
//! is ready on the same core. Then what was waited for comes as soon as we sleep, and looking only held it up; where
//! that happens again and again, there is a pause too.

use std::time::{Duration, Instant};

/// A yield among a group's own workers comes back within this; a longer one went to somebody else.
const LATE: Duration = Duration::from_micros(60);
/// How long not to spin after a late yield: the first time, and at most.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A late yield within so many pauses after the last one makes the next pause twice as long. It costs a few milliseconds:
/// with this, a few hundredths of the time.
const SOON: u32 = 16;
/// Whoever waits for our core has done its part this soon after we sleep. (Another core would take as long to wake us up.)
const AT_ONCE: Duration = Duration::from_micros(20);
/// So many waits in a row that ended at once after looking in vain are no coincidence.
const IN_VAIN: u32 = 2;

/// One thread's, or one end's, spinning.
#[derive(Debug)]
pub struct Spin {
    limit: Duration,
    /// When the wait in progress was done with looking.
    looked_until: Option<Instant>,
    /// Waits in a row that ended at once after looking in vain, and whether the last one did.
    in_vain: u32,
    was_in_vain: bool,
    /// The last pause: its end and its length.
    paused: Option<(Instant, Duration)>,
}

impl Spin {
    /// Looks for `limit` at most; zero: sleeps at once.
    pub const fn new(limit: Duration) -> Self {
        Self { limit, looked_until: None, in_vain: 0, was_in_vain: false, paused: None }
    }

    /// Until when a wait that begins now may look; `None`: it sleeps at once.
    pub fn begin(&mut self) -> Option<Instant> {
        self.looked_until = None;
        if !std::mem::take(&mut self.was_in_vain) {
            self.in_vain = 0;
        }
        if self.limit.is_zero() {
            return None;
        }
        let now = Instant::now();
        if self.paused.is_some_and(|(end, _)| now < end) {
            return None;
        }
        Some(now + self.limit)
    }

    /// Gives the core away once; false when it is time to sleep.
    pub fn again(&mut self, until: &mut Option<Instant>) -> bool {
        let before = Instant::now();
        let Some(end) = *until else { return false };
        if before >= end {
            self.looked_until = Some(before);
            *until = None;
            return false;
        }
        std::thread::yield_now();
        let now = Instant::now();
        if now.duration_since(before) > LATE {
            self.pause(now);
            *until = None;
        }
        // Even then one more look: what was waited for may have come meanwhile.
        true
    }

    /// What was waited for has come, after looking or after a sleep.
    pub fn came(&mut self) {
        // Who found it by looking has nothing to learn.
        if self.looked_until.is_some() {
            self.came_at(Instant::now());
        }
    }

    fn came_at(&mut self, now: Instant) {
        self.was_in_vain = self.looked_until.is_some_and(|end| now.duration_since(end) <= AT_ONCE);
        if !self.was_in_vain {
            return;
        }
        self.in_vain += 1;
        if self.in_vain == IN_VAIN {
            self.in_vain = 0;
            self.pause(now);
        }
    }

    fn pause(&mut self, now: Instant) {
        let length = match self.paused {
            Some((end, last)) if now < end + SOON * last => (2 * last).min(LONGEST_PAUSE),
            _ => PAUSE,
        };
        self.paused = Some((now + length, length));
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
        spin.came();
        assert!(spin.begin().is_none());
    }

    #[test]
    fn after_a_late_yield_the_next_wait_sleeps_at_once() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        assert!(spin.begin().is_some());
        spin.pause(Instant::now() + LONGEST_PAUSE);
        assert!(spin.begin().is_none());
        spin.paused = Some((Instant::now(), PAUSE));
        assert!(spin.begin().is_some());
    }

    #[test]
    fn late_yields_that_follow_each_other_pause_for_longer_and_longer() {
        let mut spin = Spin::new(Duration::from_micros(50));
        let mut now = Instant::now();
        let mut lengths = Vec::new();
        for _ in 0..9 {
            spin.pause(now);
            let (end, length) = spin.paused.unwrap();
            assert_eq!(end, now + length);
            lengths.push(length.as_millis());
            now = end;
        }
        assert_eq!(lengths, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        spin.pause(now + SOON * LONGEST_PAUSE);
        assert_eq!(spin.paused.unwrap().1, PAUSE);
    }

    #[test]
    fn where_looking_holds_up_what_is_waited_for_the_next_waits_sleep() {
        let mut spin = Spin::new(Duration::from_micros(50));
        let start = Instant::now();
        let mut wait = |looked: bool, slept: Option<Duration>| {
            spin.begin();
            spin.looked_until = looked.then_some(start);
            slept.into_iter().for_each(|slept| spin.came_at(start + slept));
            spin.paused.is_some()
        };
        // Between two that were held up: one that took its time as over a network, one that did not look, one that found it.
        for other in [(true, Some(2 * AT_ONCE)), (false, Some(AT_ONCE)), (false, None)] {
            assert!(!wait(true, Some(AT_ONCE)));
            assert!(!wait(other.0, other.1));
        }
        assert!(!wait(true, Some(AT_ONCE)));
        assert!(wait(true, Some(AT_ONCE)));
    }
}
