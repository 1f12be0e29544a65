//! A store with leases, as candidates use it, and what their daemons do with it. It may be down, slow, out of reach for some, and
//! lose its memory; while it is down leases do not run, and when it is back all have their whole time again, as in etcd.

use super::{
    daemon::HeadSide,
    wire::Frame,
    world::{Event, MS, World, node_id},
};
use rayless_control::{
    Candidate, Head,
    election::{self, CandidateConfig, Throne, View},
    head,
    liveness::Detector,
    member::{self, Target},
};
use rayless_proto::{
    ids::{ClusterId, Term},
    v1::{control::ToNode, status::HeadSeat},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// How long a daemon waits for an answer of the store.
const PATIENCE: Duration = Duration::from_secs(1);

pub struct Store {
    pub lease: Duration,
    pub up: bool,
    pub delay: Duration,
    /// Hosts that do not reach it.
    pub cut: BTreeSet<usize>,
    leases: BTreeMap<u64, Duration>,
    next_lease: u64,
    seats: BTreeMap<u64, HeadSeat>,
    throne: Option<Throne>,
    term: Term,
    cluster: Option<ClusterId>,
    authority: Option<String>,
    revision: u64,
    /// What each daemon was shown last.
    shown: BTreeMap<usize, (u64, u64)>,
}

impl Store {
    pub fn new(lease: Duration) -> Self {
        Self {
            lease,
            up: true,
            delay: MS,
            cut: BTreeSet::new(),
            leases: BTreeMap::new(),
            next_lease: 0,
            seats: BTreeMap::new(),
            throne: None,
            term: Term(0),
            cluster: None,
            authority: None,
            revision: 1,
            shown: BTreeMap::new(),
        }
    }

    fn view(&self) -> View {
        View {
            revision: self.revision,
            head: self.throne.clone(),
            seats: self.seats.values().cloned().collect(),
            term: self.term,
            cluster: self.cluster,
            authority: self.authority.clone(),
        }
    }

    fn revoke(&mut self, lease: u64) {
        let gone = self.seats.remove(&lease).is_some() | self.throne.take_if(|throne| throne.lease == lease).is_some();
        self.leases.remove(&lease);
        self.revision += u64::from(gone);
    }

    /// All that it ever knew is gone, and it counts from 1 again: an operator made a new one.
    pub fn lose_memory(&mut self) {
        let (lease, next) = (self.lease, self.next_lease);
        *self = Self { next_lease: next, revision: self.revision + 1, ..Self::new(lease) };
    }
}

impl World {
    pub fn use_store(&mut self, lease: Duration) {
        self.store = Some(Store::new(lease));
        self.after(100 * MS, Event::StoreTick);
    }

    /// A host's clock: one that stood still with its machine is behind.
    pub fn lease_clock(&self, host: usize) -> std::time::Instant {
        self.instant() - self.hosts[host].slept
    }

    pub fn seat(&self, host: usize) -> HeadSeat {
        let h = &self.hosts[host];
        HeadSeat { node: node_id(host), name: h.name.clone(), address: format!("{}:6379", h.address), active: false }
    }

    pub fn stand(&mut self, host: usize) {
        let Some(store) = &self.store else { return };
        let mut cluster = [0; 16];
        let lease = store.lease;
        cluster[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        let config = CandidateConfig {
            seat: self.seat(host),
            lease,
            cluster: ClusterId(cluster),
            seen: self.hosts[host].seen.map_or(Term(0), |seen| seen.term),
            store: "etcd://10.0.9.9:2379".into(),
            authorities: self.authorities(host),
        };
        let candidate = Candidate::new(config, self.lease_clock(host));
        if let Some(store) = &mut self.store {
            store.shown.remove(&host);
        }
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.candidate = Some(candidate);
        }
        self.pump_candidate(host);
    }

    pub fn candidate_in(&mut self, host: usize, input: election::Input) {
        let now = self.lease_clock(host);
        let Some(candidate) = self.hosts[host].daemon.as_mut().and_then(|d| d.candidate.as_mut()) else { return };
        candidate.handle(now, input);
        self.pump_candidate(host);
    }

    /// Whether the head here may decide now; asked before it does anything.
    pub fn may_decide(&mut self, host: usize) -> bool {
        let now = self.lease_clock(host);
        let Some(daemon) = self.hosts[host].daemon.as_mut() else { return false };
        let Some(candidate) = &daemon.candidate else { return true };
        if daemon.head.is_some() && !candidate.holds(now) {
            self.candidate_in(host, election::Input::Timer);
        }
        self.hosts[host].daemon.as_ref().is_some_and(|d| d.head.is_some())
    }

    pub fn pump_candidate(&mut self, host: usize) {
        let boot = self.hosts[host].boot;
        loop {
            let Some(candidate) = self.hosts[host].daemon.as_mut().and_then(|d| d.candidate.as_mut()) else { return };
            let Some(effect) = candidate.poll_effect() else { break };
            match effect {
                election::Effect::Activate { term, cluster } => self.activate(host, term, cluster),
                election::Effect::StepDown(cause) => self.step_down(host, &cause),
                election::Effect::Heads(heads) => self.heads_changed(host, heads),
                election::Effect::Talk(line) => self.hosts[host].talk.push(line),
                request => {
                    let delay = self.store.as_ref().map_or(MS, |s| s.delay) + self.delay_to_store();
                    let attempt = match &request {
                        election::Effect::Register { attempt, .. }
                        | election::Effect::Renew { attempt, .. }
                        | election::Effect::Claim { attempt, .. } => Some(*attempt),
                        _ => None,
                    };
                    self.after(delay, Event::StoreAsked { host, boot, request: Box::new(request) });
                    if let Some(attempt) = attempt {
                        let answer = election::Input::StoreFailed(attempt, "no answer".into());
                        self.after(PATIENCE, Event::StoreSays { host, boot, answer: Box::new(answer) });
                    }
                }
            }
        }
        let (now, clock) = (self.now, self.lease_clock(host));
        let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
        let due = daemon.candidate.as_ref().and_then(Candidate::next_timeout);
        if let Some(at) = due.map(|at| now + at.saturating_duration_since(clock))
            && daemon.candidate_timer.is_none_or(|t| at < t)
        {
            daemon.candidate_timer = Some(at);
            self.after(at - now, Event::CandidateTimer { host, boot });
        }
    }

    fn delay_to_store(&mut self) -> Duration {
        Duration::from_micros(self.rng.below(2000))
    }

    pub fn on_candidate_timer(&mut self, host: usize, boot: u64) {
        if self.hosts[host].boot == boot {
            if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                daemon.candidate_timer = None;
            }
            self.candidate_in(host, election::Input::Timer);
        }
    }

    pub fn on_store_says(&mut self, host: usize, boot: u64, answer: election::Input) {
        if self.hosts[host].boot == boot {
            self.candidate_in(host, answer);
        }
    }

    /// A request reaches the store, or not.
    pub fn on_store_asked(&mut self, host: usize, boot: u64, request: election::Effect) {
        let now = self.now;
        let Some(store) = self.store.as_mut() else { return };
        if !store.up || store.cut.contains(&host) {
            return;
        }
        let seat = HeadSeat {
            node: node_id(host),
            name: self.hosts[host].name.clone(),
            address: format!("{}:6379", self.hosts[host].address),
            active: false,
        };
        let answer = match request {
            election::Effect::Register { attempt, give_back } => {
                give_back.into_iter().for_each(|lease| store.revoke(lease));
                store.next_lease += 1;
                let lease = store.next_lease;
                store.leases.insert(lease, now + store.lease);
                store.seats.insert(lease, seat);
                store.revision += 1;
                election::Input::Registered { attempt, lease, lease_time: store.lease }
            }
            election::Effect::Renew { attempt, lease } => match store.leases.get_mut(&lease) {
                Some(until) => {
                    *until = now + store.lease;
                    election::Input::Renewed(attempt)
                }
                None => election::Input::LeaseOver(attempt),
            },
            election::Effect::Claim { attempt, lease, term, after, key_revision, cluster } => {
                let present = store.throne.as_ref().map_or(0, |throne| throne.revision);
                let lives = store.leases.contains_key(&lease);
                if !lives
                    || present != key_revision
                    || store.term != after
                    || store.cluster.is_some_and(|known| known != cluster)
                {
                    election::Input::NotClaimed(attempt)
                } else {
                    if term <= store.term {
                        self.broken = Some(format!("term {} is used twice", term.0));
                    }
                    store.revision += 1;
                    let revision = store.revision;
                    store.throne = Some(Throne { seat, term, lease, revision });
                    store.term = term;
                    let cluster = *store.cluster.get_or_insert(cluster);
                    election::Input::Claimed { attempt, term, cluster, revision }
                }
            }
            election::Effect::NameAuthority { key_revision, authority } => {
                if store.throne.as_ref().is_some_and(|throne| throne.revision == key_revision)
                    && store.authority.as_ref() != Some(&authority)
                {
                    store.authority = Some(authority);
                    store.revision += 1;
                }
                return;
            }
            election::Effect::GiveBack(lease) => return store.revoke(lease),
            _ => return,
        };
        let delay = store.delay;
        self.after(delay, Event::StoreSays { host, boot, answer: Box::new(answer) });
    }

    /// Leases end, and whoever reaches the store is shown what has changed.
    pub fn on_store_tick(&mut self) {
        self.after(100 * MS, Event::StoreTick);
        let now = self.now;
        let Some(store) = self.store.as_mut() else { return };
        if !store.up {
            // They do not run.
            store.leases.values_mut().for_each(|until| *until += 100 * MS);
            return;
        }
        let over: Vec<u64> = store.leases.iter().filter(|(_, until)| **until <= now).map(|(lease, _)| *lease).collect();
        over.into_iter().for_each(|lease| store.revoke(lease));
        let view = store.view();
        for host in 0..self.hosts.len() {
            let (boot, standing) =
                (self.hosts[host].boot, self.hosts[host].daemon.as_ref().is_some_and(|d| d.candidate.is_some()));
            let Some(store) = self.store.as_mut() else { return };
            if standing && !store.cut.contains(&host) && store.shown.get(&host) != Some(&(boot, view.revision)) {
                store.shown.insert(host, (boot, view.revision));
                let delay = store.delay;
                let answer = Box::new(election::Input::Observed(view.clone()));
                self.after(delay, Event::StoreSays { host, boot, answer });
            }
        }
    }

    /// After a time without it everybody has the whole lease again.
    pub fn store_up(&mut self) {
        let now = self.now;
        if let Some(store) = self.store.as_mut() {
            store.up = true;
            let lease = store.lease;
            store.leases.values_mut().for_each(|until| *until = now + lease);
        }
    }

    fn activate(&mut self, host: usize, term: Term, cluster: ClusterId) {
        self.say(format!("{} is the head, term {}", self.hosts[host].name, term.0));
        if self.active_terms.insert(term, host).is_some_and(|other| other != host) {
            self.broken = Some(format!("two daemons were the head under term {}", term.0));
        }
        let now = self.instant();
        let config = head::HeadConfig {
            node: node_id(host),
            term,
            heads: vec![HeadSeat { active: true, ..self.seat(host) }],
            cluster,
            seed: self.rng.next(),
            dead_after: self.dead_after,
            unix_us: 1_700_000_000_000_000 + u64::try_from(self.now.as_micros()).unwrap_or(0),
        };
        let dead_after = self.dead_after;
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            let mut head = Head::new(config, now);
            head.remember(daemon.story.clone(), now);
            daemon.head = Some(HeadSide { head, detector: Detector::new(dead_after), timer: None });
        }
        self.hand_in_tokens(host, None);
        self.member_in(host, member::Input::Heads(vec![Target::Here], "this daemon is the head now".into()));
    }

    fn step_down(&mut self, host: usize, cause: &str) {
        self.say(format!("{}: {cause}", self.hosts[host].name));
        let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
        let Some(side) = daemon.head.take() else { return };
        daemon.story = side.head.story();
        for conn in 0..self.conns.len() {
            if self.conns[conn].head_host == host && self.conns[conn].head_open {
                self.conns[conn].head_open = false;
                self.send_frame(conn, false, Frame::Close);
            }
        }
        let cause = "this daemon is no longer the head".to_owned();
        let candidate = self.hosts[host].daemon.as_ref().and_then(|d| d.candidate.as_ref());
        let others = candidate.into_iter().flat_map(Candidate::others).filter_map(|seat| seat.address.parse().ok());
        let others = others.map(Target::At).collect();
        self.member_in(host, member::Input::Heads(others, cause));
    }

    fn heads_changed(&mut self, host: usize, heads: Vec<HeadSeat>) {
        let Some(daemon) = self.hosts[host].daemon.as_ref() else { return };
        if daemon.head.is_some() {
            self.head_in(host, head::Input::Heads(heads));
        } else if let Some(other) = heads.iter().find(|seat| seat.active && seat.node != node_id(host)).cloned() {
            self.follow(host, &other);
        }
    }

    fn follow(&mut self, host: usize, head: &HeadSeat) {
        let Ok(address) = head.address.parse() else { return };
        let cause = format!("{} is the head now", head.name);
        self.member_in(host, member::Input::Heads(vec![Target::At(address)], cause));
    }

    /// What somebody hears who takes this daemon for the head.
    pub fn not_the_head(&self, host: usize) -> ToNode {
        let candidate = self.hosts[host].daemon.as_ref().and_then(|d| d.candidate.as_ref());
        let head = candidate.and_then(|c| c.head()).map(|(seat, ..)| seat).filter(|seat| seat.node != node_id(host));
        let cause = match head {
            Some(head) => format!("{} is the head", head.name),
            None => candidate.and_then(Candidate::trouble).unwrap_or_default(),
        };
        ToNode::Elsewhere { head: head.map(|head| head.address.clone()), cause }
    }

    /// Hosts that believe, each by a clock that goes right, that they may decide.
    pub fn check_heads(&mut self) {
        let holds = |h: &super::world::Host| {
            let at = self.instant() - h.slept;
            h.slept.is_zero() && h.daemon.as_ref().is_some_and(|d| d.candidate.as_ref().is_some_and(|c| c.holds(at)))
        };
        let who: Vec<String> = self.hosts.iter().filter(|h| holds(h)).map(|h| h.name.clone()).collect();
        if who.len() > 1 {
            self.broken = Some(format!("{who:?} may decide at the same time"));
        }
    }
}
