//! Who was heard of, and when; who is to be told that we live.

use super::event::{Sign, Watch};
use crate::quic::Link;
use rayless_proto::{
    ids::{Incarnation, NodeId},
    limits::HEARTBEAT_PERIOD,
    v1::heartbeat::Heartbeat,
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Between two heartbeats while none is answered.
const ANXIOUS_PERIOD: Duration = Duration::from_millis(50);

/// A peer with a heartbeat connection, for `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerPulse {
    /// The peer.
    pub peer: NodeId,
    /// Which life of it; 0 for the head.
    pub incarnation: Incarnation,
    /// When it was heard of last.
    pub heard: Instant,
    /// The round trip; `None` while unknown.
    pub rtt: Option<Duration>,
}

/// The table, shared with the main thread (which only looks).
#[derive(Clone)]
pub(super) struct Pulses(Arc<Mutex<Table>>);

struct Table {
    watch: Box<dyn Watch>,
    peers: HashMap<NodeId, Entry>,
    looked: Instant,
}

struct Entry {
    link: Link,
    /// Tells this connection of the peer from a later one.
    number: u64,
    signs: u64,
    pulse: PeerPulse,
    /// For the node's side: what is sent, and when next.
    beat: Option<Beat>,
}

struct Beat {
    incarnation: Incarnation,
    sequence: u64,
    due: Instant,
}

impl Pulses {
    pub(super) fn new(watch: Box<dyn Watch>) -> Self {
        Self(Arc::new(Mutex::new(Table { watch, peers: HashMap::new(), looked: Instant::now() })))
    }

    /// What the main thread sees.
    pub(super) fn all(&self) -> Vec<PeerPulse> {
        self.lock().peers.values().map(|entry| entry.pulse).collect()
    }

    /// Takes in a connection; returns the one that it replaces. With `beats` this side sends the heartbeats.
    pub(super) fn open(&self, number: u64, link: Link, beats: Option<Incarnation>) -> Option<Link> {
        let now = Instant::now();
        let peer = link.peer().node;
        let pulse = PeerPulse { peer, incarnation: Incarnation(0), heard: now, rtt: None };
        let beat = beats.map(|incarnation| Beat { incarnation, sequence: 0, due: now });
        let entry = Entry { signs: link.signs_of_life(), link, number, pulse, beat };
        self.lock().peers.insert(peer, entry).map(|old| old.link)
    }

    /// Lets go of a connection, unless a later one has taken its place.
    pub(super) fn close(&self, peer: NodeId, number: u64) {
        let mut table = self.lock();
        if table.peers.get(&peer).is_some_and(|entry| entry.number == number) {
            table.peers.remove(&peer);
        }
    }

    /// A heartbeat came in on connection `number`.
    pub(super) fn heard(&self, peer: NodeId, number: u64, beat: Heartbeat, at: Instant) {
        let mut table = self.lock();
        let Table { watch, peers, .. } = &mut *table;
        if let Some(entry) = peers.get_mut(&peer).filter(|entry| entry.number == number) {
            entry.signs = entry.link.signs_of_life();
            entry.pulse.incarnation = Incarnation(beat.incarnation);
            entry.pulse.heard = at;
            entry.pulse.rtt = (beat.rtt_us > 0).then(|| Duration::from_micros(beat.rtt_us));
            watch.heard(entry.pulse.sign());
        }
    }

    /// Looks at every connection, sends what is due, lets the watch judge. Returns when to come back.
    pub(super) fn tick(&self) -> Instant {
        let mut table = self.lock();
        let Table { watch, peers, looked } = &mut *table;
        let now = Instant::now();
        let mut next = now + HEARTBEAT_PERIOD;
        for entry in peers.values_mut() {
            let signs = entry.link.signs_of_life();
            if signs != std::mem::replace(&mut entry.signs, signs) {
                // Some time since the last look: the earlier end is the safe one to assume.
                entry.pulse.heard = entry.pulse.heard.max(*looked);
                if entry.beat.is_some() {
                    entry.pulse.rtt = Some(entry.link.rtt());
                    watch.heard(entry.pulse.sign());
                } else if entry.pulse.incarnation != Incarnation(0) {
                    watch.heard(entry.pulse.sign());
                }
            }
            if let Some(beat) = &mut entry.beat {
                if beat.due <= now {
                    beat.send(&entry.link, entry.pulse.rtt);
                    // No echo of the last one: something is lost. Asked twenty times a second, a path that loses 30 % in each
                    // direction stays silent for two more seconds less than once in a billion times.
                    let silent = now.saturating_duration_since(entry.pulse.heard);
                    let period = if silent > HEARTBEAT_PERIOD * 5 / 4 { ANXIOUS_PERIOD } else { HEARTBEAT_PERIOD };
                    beat.due = (beat.due + period).max(now + period / 2);
                }
                next = next.min(beat.due);
            }
        }
        *looked = now;
        // The time of the judgement is taken anew: looking at a thousand peers takes a while.
        let wanted = watch.tick(Instant::now());
        wanted.map_or(next, |wanted| next.min(wanted))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Pulses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all()).finish()
    }
}

impl Beat {
    fn send(&mut self, link: &Link, rtt: Option<Duration>) {
        self.sequence += 1;
        let rtt_us = rtt.map_or(0, |rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1));
        let beat = Heartbeat { sequence: self.sequence, incarnation: self.incarnation.0, rtt_us };
        link.send_datagram(&beat.encode());
    }
}

impl PeerPulse {
    fn sign(&self) -> Sign {
        Sign { peer: self.peer, incarnation: self.incarnation, at: self.heard, rtt: self.rtt }
    }
}
