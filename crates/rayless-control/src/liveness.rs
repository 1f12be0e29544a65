//! Silence into verdicts: alive, suspect, dead.
//!
//! # Bounds
//! With `D` = `dead_after` and `P` = [`Detector::PERIOD`], for a peer that falls silent for good and an observer that ticks when
//! [`Detector::next_tick`] says (each `P` while anybody is silent, seldom while all talk: a daemon at rest shall rest):
//! - an observer whose ticks come on time declares it suspect within `D/2 + P` and dead within `D + P` of its last sign, and never
//!   before `D/2` and `D`;
//! - one late tick (more than [`OBSERVER_LATE`] after it was due) restarts the window: it was the observer that slept, and what
//!   the peer sent meanwhile may be lost. Dead is then declared within `D + P` of that tick;
//! - an observer that is often late would never notice a death. So at most [`Detector::MAX_RESTARTS`] late ticks restart
//!   the window of one silence. After that a late tick counts as the longest tick that is still on time.
//!
//! An observer should read all that waits in its socket before it ticks: what came while it slept is then no longer silence.

use rayless_proto::limits::{HEARTBEAT_PERIOD, OBSERVER_LATE};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// A change in what a peer is held for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// Heard of again after it was suspect.
    Alive,
    /// Silent for longer than half the limit.
    Suspect,
    /// Silent for longer than the limit. Final: only a new [`Detector::watch`] makes it alive.
    Dead,
}

#[derive(Debug, Clone, Copy)]
struct Peer {
    /// Silence as the observer counts it: time that it was awake.
    silent: Duration,
    /// Up to when `silent` has been counted.
    counted: Instant,
    /// The last sign of life, or the start of the watch.
    heard: Instant,
    verdict: Transition,
    restarts: u32,
}

/// Watches any number of peers. Pure: the caller brings the time.
///
/// `P` names a peer; a node's heartbeats are watched as (node, incarnation), so that a ghost's cannot pass for its successor's.
#[derive(Debug)]
pub struct Detector<P> {
    dead_after: Duration,
    /// When the next tick is due, and how long after the last one that is.
    due: Option<(Instant, Duration)>,
    late_ticks: u64,
    peers: BTreeMap<P, Peer>,
}

impl<P: Ord + Copy> Detector<P> {
    /// Time between two calls of [`tick`](Self::tick) while anybody is silent.
    pub const PERIOD: Duration = Duration::from_millis(100);
    /// The longest time between two calls, while all talk (a quarter of `dead_after` where that is shorter).
    pub const CALM_PERIOD: Duration = HEARTBEAT_PERIOD;
    /// How many late ticks may restart the window of one silence of a peer.
    pub const MAX_RESTARTS: u32 = 3;

    /// A detector that declares death after `dead_after` of silence (at least twice the heartbeat period is sensible;
    /// less than [`PERIOD`](Self::PERIOD) is treated as that).
    pub fn new(dead_after: Duration) -> Self {
        Self { dead_after: dead_after.max(Self::PERIOD), due: None, late_ticks: 0, peers: BTreeMap::new() }
    }

    /// The limit in force.
    pub const fn dead_after(&self) -> Duration {
        self.dead_after
    }

    /// Another limit from here on (a node learns the cluster's with its welcome).
    pub fn set_dead_after(&mut self, dead_after: Duration) {
        self.dead_after = dead_after.max(Self::PERIOD);
    }

    /// Watches `peer` from `now` on as alive, whatever it was before. A peer that never sends anything is dead in time, too.
    pub fn watch(&mut self, peer: P, now: Instant) {
        if self.next_tick(now).is_none() {
            // Nobody was watched, so nobody had to tick: the first tick is not a late one.
            self.due = None;
        }
        let fresh = Peer { silent: Duration::ZERO, counted: now, heard: now, verdict: Transition::Alive, restarts: 0 };
        self.peers.insert(peer, fresh);
    }

    /// No longer watches `peer`.
    pub fn forget(&mut self, peer: P) {
        self.peers.remove(&peer);
    }

    /// A sign of life. Ignored for peers that are not watched and for dead ones.
    ///
    /// Returns [`Transition::Alive`] where the peer was suspect.
    #[must_use]
    pub fn heard(&mut self, peer: P, now: Instant) -> Option<Transition> {
        let peer = self.peers.get_mut(&peer).filter(|p| p.verdict != Transition::Dead)?;
        peer.silent = Duration::ZERO;
        peer.restarts = 0;
        peer.counted = peer.counted.max(now);
        peer.heard = peer.heard.max(now);
        (std::mem::replace(&mut peer.verdict, Transition::Alive) == Transition::Suspect).then_some(Transition::Alive)
    }

    /// Passes judgement. To be called when [`next_tick`](Self::next_tick) says; more often does no harm.
    #[must_use]
    pub fn tick(&mut self, now: Instant) -> Vec<(P, Transition)> {
        let (due, period) = self.due.unwrap_or((now, Self::PERIOD));
        let late = now.saturating_duration_since(due) > OBSERVER_LATE;
        let longest = period + OBSERVER_LATE;
        self.late_ticks += u64::from(late);
        let calm_period = (self.dead_after / 4).clamp(Self::PERIOD, Self::CALM_PERIOD);
        let mut is_calm = true;
        let mut changes = Vec::new();
        for (&name, peer) in &mut self.peers {
            if peer.verdict == Transition::Dead {
                continue;
            }
            let elapsed = now.saturating_duration_since(peer.counted);
            peer.counted = peer.counted.max(now);
            // A peer whose watch began after the last tick has not been missed by a sleeping observer.
            let slept = late && elapsed > longest;
            if slept && peer.restarts < Self::MAX_RESTARTS {
                peer.restarts += 1;
                peer.silent = Duration::ZERO;
                is_calm = false;
                continue;
            }
            peer.silent += elapsed.min(longest);
            // Of a peer that talks, nothing is heard for one heartbeat at most.
            is_calm &= peer.restarts == 0 && peer.silent <= calm_period + Self::PERIOD;
            let verdict = if peer.silent > self.dead_after {
                Transition::Dead
            } else if peer.silent > self.dead_after / 2 {
                Transition::Suspect
            } else {
                peer.verdict
            };
            if verdict != peer.verdict {
                peer.verdict = verdict;
                changes.push((name, verdict));
            }
        }
        let period = if is_calm { calm_period } else { Self::PERIOD };
        self.due = Some((now + period, period));
        changes
    }

    /// When [`tick`](Self::tick) is due next; `None` while nothing is watched.
    pub fn next_tick(&self, now: Instant) -> Option<Instant> {
        let watched = self.peers.values().any(|p| p.verdict != Transition::Dead);
        watched.then(|| self.due.map_or(now, |(due, _)| due))
    }

    /// What `peer` is held for, and how long ago it was heard of.
    pub fn view(&self, peer: P, now: Instant) -> Option<(Transition, Duration)> {
        self.peers.get(&peer).map(|p| (p.verdict, now.saturating_duration_since(p.heard)))
    }

    /// How many ticks came late so far: for people who wonder why a death took longer.
    pub const fn late_ticks(&self) -> u64 {
        self.late_ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: Duration = Duration::from_secs(3);
    type Watch = Detector<u8>;

    /// Ticks each `step` ms from `from` to `to` ms and returns the changes with their times.
    fn ticks(watch: &mut Watch, start: Instant, from: u64, to: u64, step: u64) -> Vec<(u64, Transition)> {
        let mut seen = Vec::new();
        let mut at = from;
        while at <= to {
            seen.extend(watch.tick(start + Duration::from_millis(at)).into_iter().map(|(_, t)| (at, t)));
            at += step;
        }
        seen
    }

    #[test]
    fn silence_is_suspect_then_dead_within_the_bounds() {
        let start = Instant::now();
        let mut watch = Watch::new(D);
        watch.watch(1, start);
        let seen = ticks(&mut watch, start, 0, 5000, 100);
        assert_eq!(seen, [(1600, Transition::Suspect), (3100, Transition::Dead)]);
        assert_eq!(watch.heard(1, start + 2 * D), None, "the dead do not come back by talking");
        assert_eq!(watch.next_tick(start + 2 * D), None);
    }

    #[test]
    fn a_sign_of_life_clears_the_suspicion_once() {
        let start = Instant::now();
        let mut watch = Watch::new(D);
        watch.watch(1, start);
        assert_eq!(ticks(&mut watch, start, 0, 2000, 100), [(1600, Transition::Suspect)]);
        assert_eq!(watch.heard(1, start + Duration::from_millis(2050)), Some(Transition::Alive));
        assert_eq!(watch.heard(1, start + Duration::from_millis(2060)), None);
        assert_eq!(ticks(&mut watch, start, 2100, 3500, 100), []);
    }

    #[test]
    fn an_observer_that_slept_blames_itself() {
        let start = Instant::now();
        let mut watch = Watch::new(D);
        watch.watch(1, start);
        assert_eq!(ticks(&mut watch, start, 0, 500, 100), []);
        // Ten seconds of pause: no verdict, and a whole window from the wake-up on.
        assert_eq!(ticks(&mut watch, start, 10_500, 13_400, 100), [(12_100, Transition::Suspect)]);
        assert_eq!(ticks(&mut watch, start, 13_500, 14_000, 100), [(13_600, Transition::Dead)]);
        assert_eq!(watch.late_ticks(), 1);
    }

    #[test]
    fn an_observer_that_is_always_late_still_notices() {
        let start = Instant::now();
        let mut watch = Watch::new(D);
        watch.watch(1, start);
        let seen = ticks(&mut watch, start, 0, 60_000, 500);
        assert_eq!(seen.last().map(|s| s.1), Some(Transition::Dead));
        let died = seen.last().map_or(0, |s| s.0);
        // Two calm ticks, three restarts, then eight ticks of 400 ms that count.
        assert!(died <= 500 * (2 + 3 + 8), "{died}");
        // And a peer that does talk is safe with such an observer.
        let mut watch = Watch::new(D);
        watch.watch(1, start);
        for beat in 0..200 {
            let now = start + Duration::from_millis(500 * beat);
            assert_eq!(watch.heard(1, now), None);
            assert_eq!(watch.tick(now), []);
        }
    }

    #[test]
    fn while_all_talk_it_rests_and_a_death_is_noticed_as_soon() {
        for (d, beat, last_words) in [(3000, 500, 5000), (3000, 500, 4990), (3000, 700, 7000), (1000, 200, 5000)] {
            let start = Instant::now();
            let mut watch = Watch::new(Duration::from_millis(d));
            watch.watch(1, start);
            let (mut now, mut spoken, mut ticks, mut seen) = (0, 0, 0, Vec::new());
            while seen.last().is_none_or(|(_, t)| *t != Transition::Dead) {
                while spoken + beat <= now.min(last_words) {
                    spoken += beat;
                    assert_eq!(watch.heard(1, start + Duration::from_millis(spoken)), None);
                }
                ticks += u64::from(now <= last_words);
                seen.extend(watch.tick(start + Duration::from_millis(now)).into_iter().map(|(_, t)| (now - spoken, t)));
                let next = watch.next_tick(start + Duration::from_millis(now)).unwrap_or(start);
                now = now.max(next.saturating_duration_since(start).as_millis() as u64);
            }
            let bound = |at: u64, limit: u64| at > limit && at <= limit + 100;
            assert!(matches!(seen[..], [(s, _), (x, _)] if bound(s, d / 2) && bound(x, d)), "{d} {beat}: {seen:?}");
            assert!(beat > 600 || ticks <= last_words / (d / 4).min(500) + 2, "{d} {beat}: {ticks}");
            assert_eq!(watch.late_ticks(), 0);
        }
    }

    #[test]
    fn a_new_watch_is_a_new_life() {
        let start = Instant::now();
        let mut watch = Watch::new(D);
        watch.watch(1, start);
        assert_eq!(ticks(&mut watch, start, 0, 4000, 100).len(), 2);
        watch.watch(1, start + Duration::from_millis(4000));
        assert_eq!(ticks(&mut watch, start, 4100, 5400, 100), []);
        watch.forget(1);
        assert_eq!(ticks(&mut watch, start, 5500, 9000, 100), []);
        assert_eq!(watch.view(1, start), None);
    }
}
