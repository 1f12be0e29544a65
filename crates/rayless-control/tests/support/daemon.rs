//! What a node's daemon does with the effects of its `Member` and, on the head's host, of its `Head`.

use super::{
    steps::{DriverState, KeeperPhase, KeeperSim, ReservationState},
    wire::Frame,
    world::{Event, MS, World, host_of, node_id},
};
use rayless_control::{
    Candidate, Head, Member, SessionId,
    head::{self, Story},
    liveness::Detector,
    member::{self, MemberConfig, Target},
};
use rayless_proto::{
    ids::{ClusterId, GroupId, Incarnation, NodeId, PlacementGroupId, RequestId, Term},
    v1::control::{EndedGroup, FromHead, HeadTerm, HeldGroup, HeldPlacementGroup, ToHead, ToNode},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

pub struct HeadSide {
    pub head: Head,
    pub detector: Detector<(NodeId, Incarnation)>,
    pub timer: Option<Duration>,
}

/// Who waits for the answer to a request.
#[derive(Debug, Clone)]
pub enum Asker {
    Driver(usize),
    Reservation(usize),
    Operator(String),
}

pub struct Daemon {
    pub member: Member,
    pub head: Option<HeadSide>,
    pub candidate: Option<Candidate>,
    pub candidate_timer: Option<Duration>,
    pub echo: Detector<()>,
    pub requests: BTreeMap<RequestId, (Asker, ToHead)>,
    pub next_request: RequestId,
    /// Answered requests: a second answer changes nothing.
    pub told: BTreeSet<RequestId>,
    pub ended: VecDeque<EndedGroup>,
    /// Launches that were answered with a placement, and their drivers.
    pub placed: Vec<(RequestId, usize)>,
    /// What a head has told this standby of the past.
    pub story: Story,
    pub bundles: BTreeMap<PlacementGroupId, HeldPlacementGroup>,
    pub draining: BTreeSet<u32>,
    pub fenced: bool,
    pub timer: Option<Duration>,
}

impl World {
    /// Starts the daemon: a new life of the node.
    pub fn start(&mut self, host: usize) {
        let now = self.instant();
        let stands = self.store.is_some();
        // Where there are several heads, the user names two.
        let named = if stands { 2 } else { 1 };
        let joins = [1, 2].iter().take(named).map(|n| Target::At(([10, 0, 0, *n], 6379).into())).collect();
        let h = &mut self.hosts[host];
        if h.daemon.is_some() {
            return;
        }
        h.boot += 1;
        h.incarnation += 1;
        h.refused = None;
        let boot = h.boot;
        let targets = match (h.is_head, stands) {
            (true, true) => Vec::new(),
            (true, false) => vec![Target::Here],
            (false, _) => joins,
        };
        let config = MemberConfig {
            head: "10.0.0.1:6379".into(),
            targets,
            seen: h.seen,
            incarnation: Incarnation(h.incarnation),
            jitter_seed: host as u64 * 7919,
        };
        let saved = h.head_state.clone();
        let is_head = h.is_head;
        let dead_after = self.dead_after;
        let head = (is_head && !stands).then(|| {
            let mut cluster = [0; 16];
            cluster[..8].copy_from_slice(&self.rng.next().to_le_bytes());
            let config = head::HeadConfig {
                node: node_id(host),
                term: Term(0),
                heads: Vec::new(),
                cluster: ClusterId(cluster),
                seed: self.rng.next(),
                dead_after,
                unix_us: 1_700_000_000_000_000 + u64::try_from(self.now.as_micros()).unwrap_or(0),
            };
            let head = saved
                .and_then(|bytes| Head::restore(config.clone(), &bytes, now).ok())
                .unwrap_or_else(|| Head::new(config, now));
            HeadSide { head, detector: Detector::new(dead_after), timer: None }
        });
        self.hosts[host].daemon = Some(Daemon {
            member: Member::new(config, now),
            head,
            candidate: None,
            candidate_timer: None,
            echo: Detector::new(dead_after),
            requests: BTreeMap::new(),
            next_request: 1,
            told: BTreeSet::new(),
            ended: VecDeque::new(),
            placed: Vec::new(),
            story: Story::default(),
            bundles: BTreeMap::new(),
            draining: BTreeSet::new(),
            fenced: false,
            timer: None,
        });
        let name = self.hosts[host].name.clone();
        self.say(format!("daemon of {name} starts, life {}", self.hosts[host].incarnation));
        if is_head && stands {
            self.stand(host);
        }
        self.hand_in_tokens(host, None);
        self.pump_head(host);
        self.pump_member(host);
        self.after(100 * MS, Event::NetTick { host, boot });
        let first = Duration::from_millis(self.rng.below(500));
        self.after(first, Event::Beat { host, boot });
    }

    /// SIGKILL: nobody is told. Keepers and drivers live on; clients that wait see their socket close.
    pub fn kill_daemon(&mut self, host: usize) {
        if self.hosts[host].daemon.take().is_none() {
            return;
        }
        self.hosts[host].boot += 1;
        let name = self.hosts[host].name.clone();
        self.say(format!("daemon of {name} is killed"));
        self.lose_clients(host);
    }

    fn lose_clients(&mut self, host: usize) {
        for driver in self.drivers.iter_mut().filter(|d| d.host == host && d.state == DriverState::Asking) {
            driver.state = DriverState::Failed("the local daemon is gone".into());
        }
        for reservation in &mut self.reservations {
            if reservation.host == host && reservation.state == ReservationState::Asking {
                reservation.state = ReservationState::Refused("the local daemon is gone".into());
            }
        }
    }

    /// Power loss: daemon, keepers, drivers, all at once, and no packet leaves.
    pub fn kill_host(&mut self, host: usize) {
        self.kill_daemon(host);
        self.hosts[host].keepers.clear();
        if std::mem::take(&mut self.hosts[host].paused) {
            self.hosts[host].deferred.clear();
            self.after(100 * MS, Event::StepTick { host });
        }
        for driver in self.drivers.iter_mut().filter(|d| d.host == host && d.state.is_live()) {
            driver.state = DriverState::Killed;
        }
    }

    /// `rayless stop`: groups are ended first, then the head is told.
    pub fn leave(&mut self, host: usize) {
        let groups: Vec<GroupId> = self.hosts[host].keepers.keys().copied().collect();
        for group in groups {
            let name = self.hosts[host].name.clone();
            self.end_keeper(host, group, &format!("node {name} is being stopped"));
            self.on_keeper_reaped(host, group);
        }
        self.member_in(host, member::Input::Leave);
        self.candidate_in(host, rayless_control::election::Input::Leave);
        self.hosts[host].daemon = None;
        self.hosts[host].boot += 1;
        self.lose_clients(host);
    }

    pub fn member_in(&mut self, host: usize, input: member::Input) {
        let now = self.instant();
        let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
        daemon.member.handle(now, input);
        self.pump_member(host);
    }

    pub fn on_member_timer(&mut self, host: usize, boot: u64) {
        if self.hosts[host].boot == boot {
            if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                daemon.timer = None;
            }
            self.member_in(host, member::Input::Timer);
        }
    }

    pub fn on_head_timer(&mut self, host: usize, boot: u64) {
        if self.hosts[host].boot == boot {
            if let Some(side) = self.hosts[host].daemon.as_mut().and_then(|d| d.head.as_mut()) {
                side.timer = None;
            }
            self.head_in(host, head::Input::Timer);
        }
    }

    pub fn head_in(&mut self, host: usize, input: head::Input) {
        if !self.may_decide(host) {
            return;
        }
        let now = self.instant();
        let Some(side) = self.hosts[host].daemon.as_mut().and_then(|d| d.head.as_mut()) else { return };
        let begun = Instant::now();
        side.head.handle(now, input);
        self.head_time += begun.elapsed();
        self.touched = true;
        self.pump_head(host);
    }

    fn pump_head(&mut self, host: usize) {
        loop {
            let now = self.instant();
            if !self.may_decide(host) {
                return;
            }
            let Some(side) = self.hosts[host].daemon.as_mut().and_then(|d| d.head.as_mut()) else { return };
            let by = side.head.by();
            let begun = Instant::now();
            let effect = side.head.poll_effect();
            self.head_time += begun.elapsed();
            let Some(effect) = effect else { break };
            match effect {
                head::Effect::Send { session, message, .. } => {
                    if let Some(conn) = self.conn_of_head(session) {
                        self.send_frame(conn, false, Frame::Down(Box::new(FromHead { by, message })));
                    }
                }
                head::Effect::Close { session } => self.close_from_head(session),
                head::Effect::Watch { node, incarnation } => side.detector.watch((node, incarnation), now),
                head::Effect::Unwatch { node, incarnation } => side.detector.forget((node, incarnation)),
                head::Effect::Superseded(term) => {
                    self.candidate_in(host, rayless_control::election::Input::Superseded(term));
                }
                head::Effect::Notify(event) => self.say(format!("[{}] {}", event.kind, event.cause)),
                head::Effect::SaveState(bytes) => self.hosts[host].head_state = Some(bytes),
                head::Effect::EndOverlap => self.end_overlap(host),
            }
        }
        let (base, boot, now) = (self.base, self.hosts[host].boot, self.now);
        let Some(side) = self.hosts[host].daemon.as_mut().and_then(|d| d.head.as_mut()) else { return };
        if let Some(at) = side.head.next_timeout().map(|at| at.saturating_duration_since(base).max(now))
            && side.timer.is_none_or(|t| at < t)
        {
            side.timer = Some(at);
            self.after(at - now, Event::HeadTimer { host, boot });
        }
    }

    fn pump_member(&mut self, host: usize) {
        loop {
            let now = self.instant();
            let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
            let Some(effect) = daemon.member.poll_effect() else { break };
            match effect {
                member::Effect::Dial(session, target) => self.dial(host, session, target),
                member::Effect::Join(session, incarnation) => {
                    let join = self.join_message(host, incarnation);
                    self.send_on(host, session, join);
                }
                member::Effect::Send(session, message) => self.send_on(host, session, message),
                member::Effect::Close(session) => self.close_from_node(host, session),
                member::Effect::Welcomed { dead_after, term, cluster, .. } => {
                    let seen = HeadTerm { cluster, term };
                    if self.hosts[host].seen.is_some_and(|s| s.cluster == cluster && s.term > term) {
                        self.broken = Some(format!("{} obeys a head that was replaced", self.hosts[host].name));
                    }
                    self.hosts[host].seen = Some(seen);
                    let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
                    daemon.echo.set_dead_after(dead_after);
                    daemon.echo.watch((), now);
                    self.on_welcomed(host);
                }
                member::Effect::Lost(_) => daemon.echo.forget(()),
                member::Effect::Deliver(message) => self.node_message(host, message),
                member::Effect::KillWorkers(cause) => {
                    daemon.fenced = true;
                    let name = self.hosts[host].name.clone();
                    self.say(format!("{name} is fenced and kills its workers: {cause}"));
                    let groups: Vec<GroupId> = self.hosts[host].keepers.keys().copied().collect();
                    for group in groups {
                        self.end_keeper(host, group, &format!("node {name} was declared dead: {cause}"));
                    }
                    self.reborn_when_clean(host);
                }
                member::Effect::Refused(refusal) => {
                    let name = self.hosts[host].name.clone();
                    self.say(format!("{name} is refused and ends: {}", refusal.cause));
                    self.hosts[host].refused = Some(refusal);
                    self.hosts[host].daemon = None;
                    self.hosts[host].boot += 1;
                    self.lose_clients(host);
                    return;
                }
                member::Effect::Talk(line) => self.hosts[host].talk.push(line),
            }
        }
        let (base, boot, now) = (self.base, self.hosts[host].boot, self.now);
        let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
        if let Some(at) = daemon.member.next_timeout().map(|at| at.saturating_duration_since(base).max(now))
            && daemon.timer.is_none_or(|t| at < t)
        {
            daemon.timer = Some(at);
            self.after(at - now, Event::MemberTimer { host, boot });
        }
    }

    fn send_on(&mut self, host: usize, session: SessionId, message: ToHead) {
        if let Some(conn) = self.conn_of_member(host, session) {
            self.send_frame(conn, true, Frame::Up(Box::new(message)));
        }
    }

    pub fn tell_head(&mut self, host: usize, message: ToHead) {
        let session = self.hosts[host].daemon.as_ref().and_then(|d| d.member.session());
        if let Some(session) = session {
            self.send_on(host, session, message);
        }
    }

    fn join_message(&self, host: usize, incarnation: Incarnation) -> ToHead {
        let h = &self.hosts[host];
        let is_launch = |message: &ToHead| matches!(message, ToHead::CreateGroup { .. });
        let is_live = |driver: usize| self.drivers[driver].state.is_live();
        let held = h.keepers.iter().map(|(group, k)| HeldGroup {
            group: *group,
            name: k.name.clone(),
            world_size: k.world_size,
            driver_node: k.driver_node,
            ranks: k.ranks.clone(),
            pids: k.pids.clone(),
            states: k.states.clone(),
            links: k.links.clone(),
            launch: k.requester.filter(|_| k.driver.is_none()),
        });
        ToHead::Join {
            info: self.info(host, incarnation.0),
            head_address: "10.0.0.1".into(),
            seen: h.seen,
            held: held.collect(),
            ended: h.daemon.iter().flat_map(|d| d.ended.iter().cloned()).collect(),
            asks: h
                .daemon
                .iter()
                .flat_map(|d| d.requests.iter().filter(|(_, r)| is_launch(&r.1)).map(|r| *r.0))
                .collect(),
            told: h.daemon.iter().flat_map(|d| d.placed.iter().filter(|p| is_live(p.1)).map(|p| p.0)).collect(),
            held_placement_groups: h.daemon.iter().flat_map(|d| d.bundles.values().cloned()).collect(),
        }
    }

    fn on_welcomed(&mut self, host: usize) {
        self.tell_tokens(host, "");
        let up: Vec<GroupId> = self.hosts[host]
            .keepers
            .iter()
            .filter(|(_, k)| k.phase == KeeperPhase::Up)
            .map(|(group, _)| *group)
            .collect();
        for group in up {
            self.tell_head(host, ToHead::KeeperReady { group });
        }
        let Some(daemon) = self.hosts[host].daemon.as_ref() else { return };
        let gpus: Vec<(u32, bool)> = daemon.draining.iter().map(|index| (*index, true)).collect();
        let again: Vec<ToHead> = daemon.requests.values().map(|(_, message)| message.clone()).collect();
        if !gpus.is_empty() {
            self.tell_head(host, ToHead::GpuDraining { gpus });
        }
        for message in again {
            self.tell_head(host, message);
        }
    }

    /// A client's request, numbered; sent now or with the next welcome.
    pub fn ask(&mut self, host: usize, asker: Asker, message: impl FnOnce(RequestId) -> ToHead) -> Option<RequestId> {
        let daemon = self.hosts[host].daemon.as_mut()?;
        let request = daemon.next_request;
        daemon.next_request += 1;
        let message = message(request);
        daemon.requests.insert(request, (asker, message.clone()));
        if self.hosts[host].daemon.as_ref().is_some_and(|d| d.member.is_welcomed()) {
            self.tell_head(host, message);
        }
        Some(request)
    }

    /// The client of a request went away.
    pub fn give_up(&mut self, host: usize, request: RequestId) {
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.requests.remove(&request);
            self.tell_head(host, ToHead::CancelRequest { request });
        }
    }

    fn node_message(&mut self, host: usize, message: ToNode) {
        match message {
            ToNode::StartKeeper { group, name, world_size, driver_node, ranks, requester } => {
                let keeper = KeeperSim::new(name, world_size, driver_node, ranks, requester, self.now, self.dead_after);
                self.start_keeper(host, group, keeper);
            }
            ToNode::StopKeeper { group, cause } => {
                if self.hosts[host].keepers.contains_key(&group) {
                    self.end_keeper(host, group, &cause);
                } else {
                    self.tell_head(host, ToHead::GroupEnded { group, cause: String::new() });
                }
            }
            ToNode::HoldPlacementGroup(held) => {
                if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                    daemon.bundles.insert(held.id, held);
                }
            }
            ToNode::DropPlacementGroup(id) => {
                if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                    daemon.bundles.remove(&id);
                }
            }
            ToNode::Waiting { request, table } => match self.asker(host, request) {
                Some(Asker::Driver(d)) => {
                    self.drivers[d].tables += 1;
                    self.drivers[d].table = Some(table);
                }
                Some(Asker::Reservation(r)) => self.reservations[r].table = Some(table),
                _ => {}
            },
            ToNode::GroupPlaced { request, group, placements, .. } => match self.answered(host, request) {
                Some(Asker::Driver(d)) => {
                    if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                        daemon.placed.push((request, d));
                    }
                    self.on_placed(d, group, placements);
                }
                _ => self.decline(host, request),
            },
            ToNode::PlacementGroupPlaced { request, id, nodes } => match self.answered(host, request) {
                Some(Asker::Reservation(r)) => {
                    self.reservations[r].state = ReservationState::Placed;
                    self.reservations[r].id = Some(id);
                    self.reservations[r].hosts = nodes.into_iter().map(host_of).collect();
                }
                _ => self.decline(host, request),
            },
            ToNode::Done { request } => {
                if let Some(Asker::Operator(label)) = self.answered(host, request) {
                    self.answers.insert(label, "done".into());
                }
            }
            ToNode::RequestRefused { request, refusal, table } => match self.answered(host, request) {
                Some(Asker::Driver(d)) => {
                    let hint =
                        if refusal.hint.is_empty() { String::new() } else { format!(" (hint: {})", refusal.hint) };
                    let cause = format!("{:?}: {}{hint}", refusal.kind, refusal.cause);
                    self.drivers[d].state = DriverState::Refused(cause);
                    self.drivers[d].table = table;
                }
                Some(Asker::Reservation(r)) => self.reservations[r].state = ReservationState::Refused(refusal.cause),
                Some(Asker::Operator(label)) => {
                    self.answers.insert(label, format!("refused: {}", refusal.cause));
                }
                None => {}
            },
            ToNode::NodeVerdict { node, state, .. } => {
                let about = host_of(node);
                for driver in self.drivers.iter_mut().filter(|d| d.host == host && d.state.is_live()) {
                    driver.verdicts.insert(about, state);
                }
            }
            ToNode::Tokens(set) => self.take_tokens(host, set.marks()),
            ToNode::Story { whole, events, ended } => {
                if let Some(daemon) = self.hosts[host].daemon.as_mut() {
                    daemon.story.take(whole, events, ended);
                }
            }
            ToNode::Welcome { .. }
            | ToNode::Refused(_)
            | ToNode::Fenced { .. }
            | ToNode::Status { .. }
            | ToNode::Elsewhere { .. }
            | ToNode::Heads(_)
            | ToNode::KeeperStopped { .. }
            | ToNode::MakeReport(_)
            | ToNode::ReportPart { .. }
            | ToNode::Notice(_) => {}
        }
    }

    fn asker(&self, host: usize, request: RequestId) -> Option<Asker> {
        self.hosts[host].daemon.as_ref()?.requests.get(&request).map(|r| r.0.clone())
    }

    fn answered(&mut self, host: usize, request: RequestId) -> Option<Asker> {
        let daemon = self.hosts[host].daemon.as_mut()?;
        let asker = daemon.requests.remove(&request).map(|r| r.0)?;
        daemon.told.insert(request);
        Some(asker)
    }

    /// Something was placed for a client that is gone (not for one that was told already).
    fn decline(&mut self, host: usize, request: RequestId) {
        if self.hosts[host].daemon.as_ref().is_some_and(|d| !d.told.contains(&request)) {
            self.tell_head(host, ToHead::CancelRequest { request });
        }
    }

    fn start_keeper(&mut self, host: usize, group: GroupId, keeper: KeeperSim) {
        if let Some(known) = self.hosts[host].keepers.get(&group) {
            if known.phase == KeeperPhase::Up {
                self.tell_head(host, ToHead::KeeperReady { group });
            }
            return;
        }
        if !self.started.insert((host, group)) {
            self.broken =
                Some(format!("the keeper of {} is started a second time on {}", keeper.name, self.hosts[host].name));
        }
        self.hosts[host].keepers.insert(group, keeper);
        self.check_devices(host);
        if !self.hosts[host].mute {
            self.after(30 * MS, Event::KeeperUp { host, group });
        }
    }

    pub fn reborn_when_clean(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        let Some(daemon) = h.daemon.as_mut().filter(|d| d.fenced) else { return };
        if h.keepers.is_empty() {
            daemon.fenced = false;
            daemon.ended.clear();
            daemon.bundles.clear();
            h.incarnation += 1;
            let next = Incarnation(h.incarnation);
            self.member_in(host, member::Input::Reborn(next));
        }
    }
}
