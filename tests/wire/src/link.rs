//! One direction of the wire: decides what becomes of each packet. No I/O and no clock of its own.

use crate::rule::Rule;
use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

/// Bytes under way in one direction; what does not fit is lost, as in a switch whose buffer is full.
const ROOM: usize = 16 << 20;

/// What to do with a packet at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Put it into the other end now.
    Now,
    /// Nothing: it is under way (see [`Direction::due`]) or lost.
    NotNow,
}

/// What became of the packets of a direction.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Counters {
    offered: u64,
    delivered: u64,
    bytes: u64,
    lost: u64,
    cut: u64,
    too_long: u64,
    no_room: u64,
    duplicated: u64,
    reordered: u64,
}

impl Counters {
    pub(crate) fn to_json(&self) -> String {
        let Self { offered, delivered, bytes, lost, cut, too_long, no_room, duplicated, reordered } = self;
        format!(
            "{{\"offered\":{offered},\"delivered\":{delivered},\"bytes\":{bytes},\"lost\":{lost},\"cut\":{cut},\"too_long\":{too_long},\"no_room\":{no_room},\"duplicated\":{duplicated},\"reordered\":{reordered}}}"
        )
    }
}

/// One direction with its rule, its random numbers and what is under way.
pub(crate) struct Direction {
    rule: Rule,
    random: Random,
    counters: Counters,
    under_way: BinaryHeap<Reverse<Waiting>>,
    room: usize,
    /// Packets offered so far: those due at the same time leave in this order.
    sequence: u64,
    /// When the latest packet that was not reordered arrives: no later one overtakes it.
    last: Duration,
    /// When the sender of a limited rate is free again.
    free: Duration,
}

/// A packet under way. Ordered by time, then by number.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    at: Duration,
    sequence: u64,
    packet: Vec<u8>,
}

impl Direction {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            rule: Rule::default(),
            random: Random(seed),
            counters: Counters::default(),
            under_way: BinaryHeap::new(),
            room: ROOM,
            sequence: 0,
            last: Duration::ZERO,
            free: Duration::ZERO,
        }
    }

    pub(crate) fn rule(&self) -> &Rule {
        &self.rule
    }

    /// From now on; what is under way arrives as it was decided, but not through a cut.
    pub(crate) fn set_rule(&mut self, rule: Rule) {
        self.rule = rule;
        if self.rule.cut {
            self.counters.cut += self.under_way.len() as u64;
            self.under_way.clear();
            self.room = ROOM;
        }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Decides on a packet that came in at `now`.
    pub(crate) fn offer(&mut self, now: Duration, packet: &[u8]) -> Fate {
        // Always as many draws: one setting does not change what another one hits.
        let [loss, duplicate, reorder, jitter] = [(); 4].map(|()| self.random.share());
        self.counters.offered += 1;
        self.sequence += 1;
        if self.rule.is_down(now) {
            self.counters.cut += 1;
            return Fate::NotNow;
        }
        if self.rule.mtu.is_some_and(|mtu| packet.len() > mtu) {
            self.counters.too_long += 1;
            return Fate::NotNow;
        }
        if loss < self.rule.loss {
            self.counters.lost += 1;
            return Fate::NotNow;
        }
        let mut at = now;
        if let Some(rate) = self.rule.rate {
            self.free = self.free.max(now) + Duration::from_secs_f64(packet.len() as f64 * 8.0 / rate);
            at = self.free;
        }
        at += self.rule.delay + self.rule.jitter.mul_f64(jitter);
        if reorder < self.rule.reorder {
            self.counters.reordered += 1;
            at += self.rule.hold;
        } else {
            at = at.max(self.last);
            self.last = at;
        }
        let twice = duplicate < self.rule.duplicate;
        if at <= now && self.under_way.is_empty() && !twice {
            self.count(packet);
            return Fate::Now;
        }
        self.keep(at, packet);
        if twice {
            self.counters.duplicated += 1;
            self.keep(at, packet);
        }
        Fate::NotNow
    }

    /// A packet that arrives by `now`, if there is one.
    pub(crate) fn due(&mut self, now: Duration) -> Option<Vec<u8>> {
        if self.next_due()? > now {
            return None;
        }
        let Reverse(first) = self.under_way.pop()?;
        self.room += first.packet.len();
        self.count(&first.packet);
        Some(first.packet)
    }

    /// When the next packet arrives.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.under_way.peek().map(|Reverse(first)| first.at)
    }

    fn keep(&mut self, at: Duration, packet: &[u8]) {
        if packet.len() > self.room {
            self.counters.no_room += 1;
            return;
        }
        self.room -= packet.len();
        self.under_way.push(Reverse(Waiting { at, sequence: self.sequence, packet: packet.to_vec() }));
    }

    fn count(&mut self, packet: &[u8]) {
        self.counters.delivered += 1;
        self.counters.bytes += packet.len() as u64;
    }
}

/// SplitMix64: small, and the same on every machine.
struct Random(u64);

impl Random {
    /// From 0 up to, not including, 1.
    fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn direction(changes: &[&str]) -> Direction {
        let mut direction = Direction::new(7);
        let mut rule = Rule::default();
        for change in changes {
            rule.change(change, Duration::ZERO).unwrap();
        }
        direction.set_rule(rule);
        direction
    }

    /// Sends `count` numbered packets, one a millisecond, and returns (number, arrival) of what arrives.
    fn send(direction: &mut Direction, count: u32) -> Vec<(u32, Duration)> {
        let mut arrived = Vec::new();
        let number = |packet: &[u8]| u32::from_le_bytes(packet.try_into().unwrap());
        for n in 0..count + 2000 {
            let now = MS * n;
            while let Some(packet) = direction.due(now) {
                arrived.push((number(&packet), now));
            }
            if n < count && direction.offer(now, &n.to_le_bytes()) == Fate::Now {
                arrived.push((n, now));
            }
        }
        arrived
    }

    #[test]
    fn a_perfect_wire_delivers_everything_at_once() {
        let arrived = send(&mut direction(&[]), 100);
        assert_eq!(arrived, (0..100).map(|n| (n, MS * n)).collect::<Vec<_>>());
    }

    #[test]
    fn loss_is_what_was_asked_for_and_the_same_every_time() {
        let once = send(&mut direction(&["loss=30"]), 10_000);
        assert!((6_800..7_200).contains(&once.len()), "{}", once.len());
        assert_eq!(once, send(&mut direction(&["loss=30"]), 10_000));
        // A delay changes when packets arrive, not which ones.
        let late = send(&mut direction(&["loss=30", "delay=50"]), 10_000);
        assert!(once.iter().zip(&late).all(|(a, b)| a.0 == b.0 && b.1 == a.1 + 50 * MS));
        assert_eq!(once.len(), late.len());
    }

    #[test]
    fn jitter_keeps_the_order_and_reordering_does_not() {
        let jittered = send(&mut direction(&["delay=20", "jitter=15"]), 1_000);
        assert_eq!(jittered.len(), 1_000);
        assert!(jittered.is_sorted_by_key(|(n, _)| *n));
        let mut mixed = send(&mut direction(&["reorder=10"]), 1_000);
        assert!(!mixed.is_sorted_by_key(|(n, _)| *n));
        mixed.sort();
        assert!(mixed.iter().map(|(n, _)| *n).eq(0..1_000));
    }

    #[test]
    fn a_cut_loses_what_is_under_way_too() {
        let mut direction = direction(&["delay=100"]);
        assert_eq!(direction.offer(Duration::ZERO, b"one"), Fate::NotNow);
        let mut cut = direction.rule().clone();
        cut.change("cut=on", Duration::ZERO).unwrap();
        direction.set_rule(cut);
        assert_eq!(direction.due(MS * 1000), None);
        assert_eq!(direction.offer(MS * 1000, b"two"), Fate::NotNow);
        assert_eq!((direction.counters().cut, direction.counters().delivered), (2, 0));
    }

    #[test]
    fn long_packets_fall_into_an_mtu_hole() {
        let mut direction = direction(&["mtu=1000"]);
        assert_eq!(direction.offer(MS, &[0; 1000]), Fate::Now);
        assert_eq!(direction.offer(MS, &[0; 1001]), Fate::NotNow);
        assert_eq!((direction.counters().too_long, direction.next_due()), (1, None));
    }

    #[test]
    fn a_rate_spaces_packets_and_a_full_buffer_loses_them() {
        // 8 Mbit/s: 1000 bytes take a millisecond.
        let mut direction = direction(&["rate=8"]);
        for _ in 0..3 {
            direction.offer(Duration::ZERO, &[0; 1000]);
        }
        let mut arrivals = Vec::new();
        while let Some(at) = direction.next_due() {
            arrivals.push(at);
            direction.due(at);
        }
        assert_eq!(arrivals, [MS, 2 * MS, 3 * MS]);
        for _ in 0..=ROOM / 1000 {
            direction.offer(Duration::ZERO, &[0; 1000]);
        }
        assert!(direction.counters().no_room > 0);
    }
}
