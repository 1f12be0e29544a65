//! Keepers, drivers and the step sessions between them: they decide a placed group's fate, not the head.

use super::{
    daemon::Asker,
    world::{Event, MS, World, host_of, node_id},
};
use rayless_control::liveness::{Detector, Transition};
use rayless_proto::{
    ids::{GroupId, NodeId, PlacementGroupId, RequestId},
    v1::{
        control::{EndedGroup, GroupSpec, NeedHave, Placement, RankAllocation, Requester, ToHead, WorkerState},
        link::{LinkReport, LinkState, LinkTransport},
        status::NodeState,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// How long a keeper waits for its driver's first session.
const DRIVER_WAIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeeperPhase {
    Starting,
    Up,
    Ending(String),
}

pub struct KeeperSim {
    pub name: String,
    pub world_size: u32,
    pub driver_node: NodeId,
    pub ranks: Vec<RankAllocation>,
    pub pids: Vec<u32>,
    pub states: Vec<WorkerState>,
    pub links: Vec<LinkReport>,
    pub requester: Option<Requester>,
    pub phase: KeeperPhase,
    pub driver: Option<usize>,
    pub watch: Detector<()>,
    pub since: Duration,
}

impl KeeperSim {
    pub fn new(
        name: String,
        world_size: u32,
        driver_node: NodeId,
        ranks: Vec<RankAllocation>,
        requester: Option<Requester>,
        now: Duration,
        dead_after: Duration,
    ) -> Self {
        let count = ranks.len();
        Self {
            name,
            world_size,
            driver_node,
            ranks,
            pids: vec![0; count],
            states: vec![WorkerState::Starting; count],
            links: Vec::new(),
            requester,
            phase: KeeperPhase::Starting,
            driver: None,
            watch: Detector::new(dead_after),
            since: now,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DriverState {
    Asking,
    Placed,
    Refused(String),
    Failed(String),
    Stopped,
    Killed,
    Vanished,
}

impl DriverState {
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Asking | Self::Placed)
    }
}

pub struct Driver {
    pub name: String,
    pub host: usize,
    pub spec: GroupSpec,
    pub request: Option<RequestId>,
    pub state: DriverState,
    pub group: Option<GroupId>,
    pub placements: Vec<Placement>,
    /// Hosts of its keepers; those with a session.
    pub hosts: BTreeSet<usize>,
    pub connected: BTreeSet<usize>,
    pub watch: Detector<usize>,
    pub verdicts: BTreeMap<usize, NodeState>,
    pub table: Option<NeedHave>,
    pub tables: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReservationState {
    Asking,
    Placed,
    Refused(String),
    Removed,
}

pub struct Reservation {
    pub name: String,
    pub host: usize,
    pub request: Option<RequestId>,
    pub state: ReservationState,
    pub id: Option<PlacementGroupId>,
    pub hosts: Vec<usize>,
    pub table: Option<NeedHave>,
}

impl World {
    /// `WorkerGroup.start` on a host.
    pub fn launch(&mut self, name: &str, host: usize, mut spec: GroupSpec) -> usize {
        spec.name = name.to_owned();
        spec.driver_node = node_id(host);
        let driver = self.drivers.len();
        spec.driver_pid = 1000 + u32::try_from(driver).unwrap_or(0);
        self.drivers.push(Driver {
            name: name.to_owned(),
            host,
            spec: spec.clone(),
            request: None,
            state: DriverState::Asking,
            group: None,
            placements: Vec::new(),
            hosts: BTreeSet::new(),
            connected: BTreeSet::new(),
            watch: Detector::new(self.dead_after),
            verdicts: BTreeMap::new(),
            table: None,
            tables: 0,
        });
        let request = self.ask(host, Asker::Driver(driver), |request| ToHead::CreateGroup { request, spec });
        self.drivers[driver].request = request;
        if request.is_none() {
            self.drivers[driver].state = DriverState::Failed("no daemon on this host".into());
        }
        driver
    }

    pub fn driver(&self, name: &str) -> Option<usize> {
        self.drivers.iter().rposition(|d| d.name == name)
    }

    pub fn on_placed(&mut self, driver: usize, group: GroupId, placements: Vec<Placement>) {
        let host = self.drivers[driver].host;
        self.drivers[driver].state = DriverState::Placed;
        self.drivers[driver].group = Some(group);
        let hosts: BTreeSet<usize> = placements.iter().map(|p| host_of(p.node)).collect();
        self.drivers[driver].placements = placements;
        self.drivers[driver].hosts.clone_from(&hosts);
        for other in hosts {
            let trip = self.delay(host, other) * 2;
            self.after(trip, Event::StepOpen { driver, host: other, tries: 0 });
        }
        self.after(500 * MS, Event::StepPing { driver });
    }

    pub fn on_step_open(&mut self, driver: usize, host: usize, tries: u32) {
        let d = &self.drivers[driver];
        let Some(group) = d.group.filter(|_| d.state == DriverState::Placed) else { return };
        let from = d.host;
        let reachable = self.passes(from, host, false) && self.passes(host, from, false) && !self.hosts[host].paused;
        let up = self.hosts[host].keepers.get(&group).is_some_and(|k| k.phase == KeeperPhase::Up);
        if !(reachable && up) {
            if tries > 25 {
                let name = self.hosts[host].name.clone();
                self.fail_driver(driver, &format!("cannot reach the keeper on node {name}"));
            } else {
                self.after(200 * MS, Event::StepOpen { driver, host, tries: tries + 1 });
            }
            return;
        }
        let now = self.instant();
        self.drivers[driver].connected.insert(host);
        self.drivers[driver].watch.watch(host, now);
        if let Some(keeper) = self.hosts[host].keepers.get_mut(&group) {
            keeper.driver = Some(driver);
            keeper.watch.watch((), now);
        }
        self.after(300 * MS, Event::WorkersReady { host, group });
    }

    pub fn on_keeper_up(&mut self, host: usize, group: GroupId) {
        if let Some(keeper) = self.hosts[host].keepers.get_mut(&group)
            && keeper.phase == KeeperPhase::Starting
        {
            keeper.phase = KeeperPhase::Up;
            self.tell_head(host, ToHead::KeeperReady { group });
        }
    }

    pub fn on_workers_ready(&mut self, host: usize, group: GroupId) {
        let mut changes = Vec::new();
        if let Some(keeper) = self.hosts[host].keepers.get_mut(&group)
            && keeper.phase == KeeperPhase::Up
        {
            for at in 0..keeper.ranks.len() {
                keeper.pids[at] = 4000 + keeper.ranks[at].rank;
                keeper.states[at] = WorkerState::Ready;
                changes.push((keeper.ranks[at].rank, keeper.pids[at]));
            }
        }
        for (rank, pid) in changes {
            self.tell_head(host, ToHead::WorkerChanged { group, rank, pid, state: WorkerState::Ready });
        }
    }

    pub fn on_step_ping(&mut self, driver: usize) {
        if self.drivers[driver].state != DriverState::Placed {
            return;
        }
        self.after(500 * MS, Event::StepPing { driver });
        let from = self.drivers[driver].host;
        for host in self.drivers[driver].connected.clone() {
            // Loss only delays what TCP carries.
            if self.passes(from, host, false) {
                let delay = self.delay(from, host);
                self.after(delay, Event::StepBeat { driver, host, to_driver: false });
            }
            if self.passes(host, from, false) && !self.hosts[host].paused {
                let delay = self.delay(host, from);
                self.after(delay, Event::StepBeat { driver, host, to_driver: true });
            }
        }
    }

    pub fn on_step_beat(&mut self, driver: usize, host: usize, to_driver: bool) {
        let now = self.instant();
        let d = &mut self.drivers[driver];
        let Some(group) = d.group else { return };
        let keeper = self.hosts[host].keepers.get_mut(&group);
        if to_driver {
            // Only a keeper that is there speaks.
            if keeper.is_some_and(|k| k.phase == KeeperPhase::Up) {
                let _ = d.watch.heard(host, now);
            }
        } else if let Some(keeper) = keeper {
            let _ = keeper.watch.heard((), now);
        }
    }

    pub fn on_step_tick(&mut self, host: usize) {
        let late = self.hosts[host].late;
        self.after(100 * MS + late, Event::StepTick { host });
        let now = self.instant();
        for driver in 0..self.drivers.len() {
            if self.drivers[driver].host != host || self.drivers[driver].state != DriverState::Placed {
                continue;
            }
            let changes = self.drivers[driver].watch.tick(now);
            if let Some((silent, _)) = changes.into_iter().find(|(_, t)| *t == Transition::Dead) {
                let name = self.hosts[silent].name.clone();
                let seconds = self.dead_after.as_secs_f64();
                self.fail_driver(driver, &format!("node {name} has been silent for {seconds:.1} s"));
            }
        }
        let mut over = Vec::new();
        for (group, keeper) in &mut self.hosts[host].keepers {
            let silent = keeper.watch.tick(now).iter().any(|(_, t)| *t == Transition::Dead);
            if keeper.phase == KeeperPhase::Up && silent {
                over.push((*group, "the driver has been silent for too long".to_owned()));
            } else if keeper.phase == KeeperPhase::Up
                && keeper.driver.is_none()
                && self.now - keeper.since > DRIVER_WAIT
            {
                over.push((*group, "no driver came".to_owned()));
            }
        }
        for (group, cause) in over {
            self.end_keeper(host, group, &cause);
        }
    }

    /// A keeper kills its workers and tells its driver; reaped a little later.
    pub fn end_keeper(&mut self, host: usize, group: GroupId, cause: &str) {
        let Some(keeper) = self.hosts[host].keepers.get_mut(&group) else { return };
        if matches!(keeper.phase, KeeperPhase::Ending(_)) {
            return;
        }
        keeper.phase = KeeperPhase::Ending(cause.to_owned());
        keeper.states.fill(WorkerState::Dead);
        let driver = keeper.driver;
        self.after(200 * MS, Event::KeeperReaped { host, group });
        if let Some(driver) = driver {
            let delay = self.delay(host, self.drivers[driver].host);
            let cause = cause.to_owned();
            self.after(delay, Event::StepEnd { driver, host, to_driver: true, cause, tries: 0 });
        }
    }

    pub fn on_keeper_reaped(&mut self, host: usize, group: GroupId) {
        let Some(keeper) = self.hosts[host].keepers.remove(&group) else { return };
        let cause = match keeper.phase.clone() {
            KeeperPhase::Ending(cause) => cause,
            KeeperPhase::Starting | KeeperPhase::Up => "the keeper died".to_owned(),
        };
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.ended.push_back(EndedGroup {
                group,
                name: keeper.name,
                world_size: keeper.world_size,
                driver_node: keeper.driver_node,
                cause: cause.clone(),
                time_us: 1_700_000_000_000_000 + u64::try_from(self.now.as_micros()).unwrap_or(0),
                ranks: vec![(node_id(host), keeper.ranks.iter().map(|rank| rank.rank).collect())],
            });
            if daemon.ended.len() > 64 {
                daemon.ended.pop_front();
            }
            self.tell_head(host, ToHead::GroupEnded { group, cause });
            self.reborn_when_clean(host);
        }
    }

    pub fn on_step_end(&mut self, driver: usize, host: usize, to_driver: bool, cause: String, tries: u32) {
        let d = &self.drivers[driver];
        let (from, to) = if to_driver { (host, d.host) } else { (d.host, host) };
        if !self.passes(from, to, false) {
            // TCP tries again for a while; silence is quicker, as a rule.
            if tries < 25 {
                self.after(200 * MS, Event::StepEnd { driver, host, to_driver, cause, tries: tries + 1 });
            }
            return;
        }
        let Some(group) = d.group else { return };
        if !to_driver {
            self.end_keeper(host, group, &cause);
        } else if cause.is_empty() {
            self.stop_driver(driver);
        } else {
            self.fail_driver(driver, &cause);
        }
    }

    fn end_sessions(&mut self, driver: usize, cause: &str) {
        let from = self.drivers[driver].host;
        for host in self.drivers[driver].hosts.clone() {
            let delay = self.delay(from, host);
            let cause = cause.to_owned();
            self.after(delay, Event::StepEnd { driver, host, to_driver: false, cause, tries: 0 });
        }
    }

    /// The driver's decision: one cause, everything torn down.
    pub fn fail_driver(&mut self, driver: usize, cause: &str) {
        if self.drivers[driver].state == DriverState::Placed {
            self.drivers[driver].state = DriverState::Failed(cause.to_owned());
            self.end_sessions(driver, cause);
        }
    }

    /// `WorkerGroup.stop()`.
    pub fn stop_driver(&mut self, driver: usize) {
        if self.drivers[driver].state == DriverState::Placed {
            self.drivers[driver].state = DriverState::Stopped;
            self.end_sessions(driver, "");
        }
    }

    /// SIGKILL of the driver: its sockets close.
    pub fn kill_driver(&mut self, driver: usize) {
        match self.drivers[driver].state {
            DriverState::Asking => self.vanish(driver),
            DriverState::Placed => {
                self.drivers[driver].state = DriverState::Killed;
                let name = self.hosts[self.drivers[driver].host].name.clone();
                self.end_sessions(driver, &format!("the driver on node {name} died"));
            }
            _ => {}
        }
    }

    /// The client goes away before it has an answer.
    pub fn vanish(&mut self, driver: usize) {
        let (host, request) = (self.drivers[driver].host, self.drivers[driver].request);
        if self.drivers[driver].state == DriverState::Asking {
            self.drivers[driver].state = DriverState::Vanished;
            if let Some(request) = request {
                self.give_up(host, request);
            }
        }
    }

    pub fn kill_worker(&mut self, driver: usize, rank: u32) -> bool {
        let Some(group) = self.drivers[driver].group else { return false };
        let Some(p) = self.drivers[driver].placements.iter().find(|p| p.rank == rank) else { return false };
        let host = host_of(p.node);
        let cause = format!("rank {rank} on node {} was killed by signal 9", self.hosts[host].name);
        self.end_keeper(host, group, &cause);
        true
    }

    /// Both ends of a link tell how it is: each its keeper, that its daemon, that the head.
    pub fn report_link(&mut self, driver: usize, (from, to): (u32, u32), transport: LinkTransport, state: LinkState) {
        let Some(group) = self.drivers[driver].group else { return };
        for (rank, by_sender) in [(from, true), (to, false)] {
            let Some(p) = self.drivers[driver].placements.iter().find(|p| p.rank == rank) else { continue };
            let host = host_of(p.node);
            let report = LinkReport { transport: Some(transport), ..LinkReport::new(from, to, 0, by_sender, state) };
            if let Some(keeper) = self.hosts[host].keepers.get_mut(&group) {
                report.clone().put_into(&mut keeper.links, usize::MAX);
                self.tell_head(host, ToHead::LinkChanged { group, report });
            }
        }
    }

    /// SIGKILL of a keeper: its workers die with it, its sockets close, the daemon sees its socket close.
    pub fn kill_keeper(&mut self, driver: usize, host: usize) {
        if let Some(group) = self.drivers[driver].group {
            let cause = format!("the keeper on node {} died", self.hosts[host].name);
            self.end_keeper(host, group, &cause);
        }
    }

    pub fn reserve(&mut self, name: &str, host: usize, message: impl FnOnce(RequestId) -> ToHead) {
        let at = self.reservations.len();
        self.reservations.push(Reservation {
            name: name.to_owned(),
            host,
            request: None,
            state: ReservationState::Asking,
            id: None,
            hosts: Vec::new(),
            table: None,
        });
        let request = self.ask(host, Asker::Reservation(at), message);
        self.reservations[at].request = request;
        if request.is_none() {
            self.reservations[at].state = ReservationState::Refused("no daemon on this host".into());
        }
    }

    pub fn remove_reservation(&mut self, at: usize) {
        let (host, id) = (self.reservations[at].host, self.reservations[at].id);
        match (self.reservations[at].state.clone(), id) {
            (ReservationState::Placed, Some(id)) => {
                let label = format!("remove {}", self.reservations[at].name);
                self.ask(host, Asker::Operator(label), |request| ToHead::RemovePlacementGroup { request, id });
            }
            (ReservationState::Asking, _) => {
                if let Some(request) = self.reservations[at].request {
                    self.give_up(host, request);
                }
            }
            _ => {}
        }
        self.reservations[at].state = ReservationState::Removed;
    }
}
