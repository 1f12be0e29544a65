//! This node's part of the groups: what the head wants of it, what its keepers say, what is over.

use super::{
    Talk,
    core::{Core, STATE_REPORT_PERIOD},
    drain::{self, Used},
    event::Event,
    keepers::{self, Keeper},
};
use crate::inventory::{
    self,
    gpu::{self, Probe},
    rdma,
};
use rayless_proto::{
    ids::{GroupId, NodeId},
    limits::{HEARTBEAT_PERIOD, MAX_CAUSE, MAX_ENDED_GROUPS, MAX_ENDED_LOGS, MAX_LINK_ENDS},
    v1::{
        control::{EndedGroup, HeldGroup, RankAllocation, Requester, ToHead},
        keeper::{FromKeeper, KeeperConfig},
        local::ClientReply,
        status::NodeState,
    },
};
use rayless_worker::keeper::KeeperHandle;
use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};
use tokio::{sync::oneshot, time::timeout};

/// How long a keeper waits for its driver's first session. The driver is told once all keepers are up, and then has only
/// to connect: a longer silence is a driver that died in between.
const DRIVER_WAIT: Duration = Duration::from_secs(60);

/// How long a daemon that finds groups with GPUs waits for NVML before it joins without: where it hangs, so do the groups.
const GPU_LOOK_TIMEOUT: Duration = Duration::from_secs(10);

impl Core {
    /// The head wants a keeper for these ranks.
    pub(crate) fn start_keeper(
        &mut self,
        group: GroupId,
        name: String,
        world_size: u32,
        driver_node: NodeId,
        ranks: Vec<RankAllocation>,
        requester: Option<Requester>,
    ) {
        if let Some(keeper) = self.keepers.get(&group) {
            // Asked again after the head or the session was lost.
            if keeper.is_up() {
                self.tell_head(ToHead::KeeperReady { group });
            }
            return;
        }
        let held = keepers::held_before_start(group, name.clone(), world_size, driver_node, ranks.clone(), requester);
        let leaf = match self.identity.issue_delegate() {
            Ok(leaf) => leaf,
            Err(error) => {
                let cause = format!("no identity for a keeper on {}: {error}", self.info.name);
                return self.tell_ended(held, cause);
            }
        };
        self.look_at_rdma();
        let uuid = |index: u32| self.info.gpus.iter().find(|gpu| gpu.index == index).map(|gpu| gpu.uuid.clone());
        let gpu_uuids = ranks
            .iter()
            .map(|rank| rank.allocation.gpus.iter().filter_map(|share| uuid(share.index)).collect())
            .collect();
        let config = KeeperConfig {
            group,
            name,
            world_size,
            driver_node,
            node: self.info.id,
            node_name: self.info.name.clone(),
            node_address: self.info.address.clone(),
            run_dir: self.run.path().to_string_lossy().into_owned(),
            ranks,
            gpu_uuids,
            node_env: self.info.node_env.clone(),
            leaf,
            dead_after_ms: u64::try_from(self.dead_after.as_millis()).unwrap_or(u64::MAX),
            driver_wait_ms: u64::try_from(DRIVER_WAIT.as_millis()).unwrap_or(u64::MAX),
            links: self.info.links.clone(),
            requester,
        };
        let keeper = Keeper::starting(held);
        // A GPU that another group shares is not back to anything after this one.
        let shared: BTreeSet<u32> = self.keepers.values().flat_map(Keeper::gpus).collect();
        let measured: Vec<u32> =
            if self.gpus_measured { keeper.gpus().difference(&shared).copied().collect() } else { Vec::new() };
        self.keepers.insert(group, keeper);
        tracing::info!(%group, "starting a keeper");
        keepers::start(self.exe.clone(), config, measured, self.run.clone(), self.events.clone());
    }

    /// A launch is the moment at which it matters what RDMA devices there are: the driver is told of them with the placement.
    fn look_at_rdma(&mut self) {
        let found = rdma::look(&self.info.links.rdma_devices, &self.gpu_places);
        if found != self.info.rdma {
            self.info.rdma = found;
            let info = self.info.clone();
            self.tell_head(ToHead::Update { info });
        }
    }

    /// The head wants this node's part of the group ended.
    pub(crate) fn stop_keeper(&mut self, group: GroupId, cause: &str) {
        match self.keepers.get_mut(&group) {
            Some(keeper) => keeper.stop(cause),
            None if self.ending.contains_key(&group) => {}
            None => self.tell_head(ToHead::GroupEnded { group, cause: String::new() }),
        }
    }

    pub(crate) fn keeper_started(&mut self, group: GroupId, started: Result<Box<KeeperHandle>, String>, used: Used) {
        let Some(keeper) = self.keepers.get_mut(&group) else {
            // Given up meanwhile (declared dead): it must not live on unseen.
            if let Ok(handle) = started {
                handle.stop("its node was declared dead");
            }
            return;
        };
        match started {
            Ok(handle) => {
                keeper.used = used;
                keeper.attach(*handle, self.events.clone());
                let driver = keeper.held.driver_node;
                // It was alive a moment ago. Kept, so that it can be withdrawn where the head falls silent.
                let verdict = self.verdicts.entry(driver).or_insert_with(|| (driver.short(), NodeState::Alive));
                keeper.verdict(driver, verdict.1);
                if keeper.stopping.is_none() {
                    self.tell_head(ToHead::KeeperReady { group });
                }
            }
            Err(cause) => {
                tracing::error!(%group, "{cause}");
                let cause = format!("{} cannot start its workers: {}", self.info.name, one_line(&cause));
                keepers::forget(&self.run, group);
                if let Some(keeper) = self.keepers.remove(&group) {
                    self.tell_ended(keeper.held, cause);
                }
            }
        }
    }

    pub(crate) fn keeper_said(&mut self, group: GroupId, message: FromKeeper) {
        let Some(keeper) = self.keepers.get_mut(&group) else { return };
        match message {
            FromKeeper::Held(held) => keeper.held = held,
            FromKeeper::WorkerChanged { rank, pid, state } => {
                if keeper.worker_changed(rank, pid, state) {
                    self.tell_head(ToHead::WorkerChanged { group, rank, pid, state });
                }
            }
            FromKeeper::Link(report) => {
                report.clone().put_into(&mut keeper.held.links, MAX_LINK_ENDS);
                self.tell_head(ToHead::LinkChanged { group, report });
            }
            FromKeeper::Stuck { line } => self.tell_head(ToHead::RanksStuck { group, line }),
            // This daemon does not ask.
            FromKeeper::Looked { .. } => {}
            FromKeeper::Ended { cause } => keeper.ended = Some(cause),
        }
    }

    /// The keeper's process is gone, and with it (PDEATHSIG) every worker.
    pub(crate) fn keeper_gone(&mut self, group: GroupId) {
        let Some(keeper) = self.keepers.remove(&group) else { return };
        keepers::forget(&self.run, group);
        let run = self.run.clone();
        tokio::task::spawn_blocking(move || run.remove_old_logs(MAX_ENDED_GROUPS, MAX_ENDED_LOGS));
        let said_so = keeper.ended.is_some();
        let cause = match (keeper.ended, keeper.stopping) {
            (Some(cause), _) | (None, Some(cause)) => cause,
            (None, None) => format!("the keeper on {} died", self.info.name),
        };
        tracing::info!(%group, cause, "a keeper has ended");
        if said_so {
            self.after_keeper(group, keeper.held, cause, keeper.used);
        } else {
            // Killed: nobody has looked after what its workers had started.
            keepers::sweep(group, self.info.id, keeper.held.pids.clone(), keeper.used, self.events.clone());
            self.sweeping += 1;
            self.ending.insert(group, (keeper.held, cause));
        }
    }

    /// What a killed keeper left is gone.
    pub(crate) fn keeper_swept(&mut self, group: GroupId, used: Used) {
        self.sweeping = self.sweeping.saturating_sub(1);
        if let Some((held, cause)) = self.ending.remove(&group) {
            self.after_keeper(group, held, cause, used);
        }
    }

    /// No process of the group is left here: its GPUs' memory is waited for.
    fn after_keeper(&mut self, group: GroupId, held: HeldGroup, cause: String, used: Used) {
        let still_held: BTreeSet<u32> = self.keepers.values().flat_map(Keeper::gpus).collect();
        let before = drain::worth_watching(used, &still_held);
        if before.is_empty() {
            self.tell_ended(held, cause);
        } else {
            // The head hears that GPUs drain before it hears that they are given back.
            self.ending.insert(group, (held, cause));
            drain::watch(group, before, self.events.clone());
        }
    }

    /// Not all memory of its GPUs is back.
    pub(crate) fn group_drains(&mut self, group: GroupId, gpus: &[u32]) {
        self.draining.entry(group).or_default().extend(gpus);
        self.tell_head(ToHead::GpuDraining { gpus: gpus.iter().map(|index| (*index, true)).collect() });
        self.end_group(group);
    }

    /// All of it is.
    pub(crate) fn group_drained(&mut self, group: GroupId) {
        if let Some(gpus) = self.draining.remove(&group) {
            let others: BTreeSet<u32> = self.draining.values().flatten().copied().collect();
            let back: Vec<(u32, bool)> = gpus.difference(&others).map(|index| (*index, false)).collect();
            if !back.is_empty() {
                self.tell_head(ToHead::GpuDraining { gpus: back });
            }
        }
        self.end_group(group);
    }

    /// What the group held here is free.
    fn tell_ended(&mut self, held: HeldGroup, cause: String) {
        if self.ended.len() >= MAX_ENDED_GROUPS {
            self.ended.pop_front();
        }
        let HeldGroup { group, name, world_size, driver_node, ranks, .. } = held;
        self.ended.push_back(EndedGroup {
            group,
            name,
            world_size,
            driver_node,
            cause: cause.chars().take(MAX_CAUSE).collect(),
            time_us: super::unix_us(),
            ranks: vec![(self.info.id, ranks.iter().map(|rank| rank.rank).collect())],
        });
        self.tell_head(ToHead::GroupEnded { group, cause });
    }

    fn end_group(&mut self, group: GroupId) {
        if let Some((held, cause)) = self.ending.remove(&group) {
            self.tell_ended(held, cause);
        }
    }

    /// After a join: what the new session knows nothing of.
    pub(crate) fn tell_what_is_here(&mut self) {
        let up = self.keepers.iter().filter(|(_, keeper)| keeper.is_up() && keeper.stopping.is_none());
        for (group, stopped) in up.map(|(group, keeper)| (*group, keeper.is_stopped())).collect::<Vec<_>>() {
            self.tell_head(ToHead::KeeperReady { group });
            if stopped {
                self.tell_head(ToHead::KeeperStopped { group, stopped });
            }
        }
        let gpus: BTreeSet<u32> = self.draining.values().flatten().copied().collect();
        if !gpus.is_empty() {
            self.tell_head(ToHead::GpuDraining { gpus: gpus.into_iter().map(|index| (index, true)).collect() });
        }
    }

    /// Ready/busy changes whose second is over.
    pub(crate) fn report_worker_states(&mut self, now: Instant) {
        let mut due = Vec::new();
        for (group, keeper) in &mut self.keepers {
            let changed = keeper.take_changed(now, STATE_REPORT_PERIOD).into_iter();
            due.extend(changed.map(|(rank, pid, state)| ToHead::WorkerChanged { group: *group, rank, pid, state }));
        }
        for message in due {
            self.tell_head(message);
        }
    }

    /// The head's view of another node, for the drivers and keepers here.
    pub(crate) fn verdict(&mut self, node: NodeId, name: String, state: NodeState, cause: &str) {
        if matches!(state, NodeState::Dead | NodeState::Left) {
            self.verdicts.remove(&node);
        } else {
            self.verdicts.insert(node, (name.clone(), state));
        }
        self.pass_on(node, &name, state, cause);
    }

    /// While the head is silent nobody can tell whether its last word still holds: it may be this node that is cut off.
    pub(crate) fn head_in_doubt(&mut self, doubt: bool) {
        let (state, cause) =
            if doubt { (NodeState::Suspect, "this node does not hear the head") } else { (NodeState::Alive, "") };
        for (node, name) in self.held_alive() {
            self.pass_on(node, &name, state, cause);
        }
    }

    fn pass_on(&mut self, node: NodeId, name: &str, state: NodeState, cause: &str) {
        for keeper in self.keepers.values() {
            keeper.verdict(node, state);
        }
        let verdict = ClientReply::NodeVerdict { node, name: name.to_owned(), state, cause: cause.to_owned() };
        self.tell_drivers(&verdict);
    }

    /// Tells every driver of this node.
    pub(crate) fn tell_drivers(&mut self, news: &ClientReply) {
        let drivers: Vec<_> =
            self.clients.iter().filter(|(_, client)| client.is_driver).map(|(client, _)| *client).collect();
        for client in drivers {
            self.answer(client, 0, news.clone());
        }
    }

    /// Twice a second: whether a keeper is stopped. Its driver would take it for one that is late, since this node lives.
    pub(crate) fn look_at_keepers(&mut self, now: Instant) {
        if self.keepers.is_empty() || now < self.next_look {
            return;
        }
        self.next_look = now + HEARTBEAT_PERIOD;
        let changed: Vec<_> = self
            .keepers
            .iter_mut()
            .filter_map(|(group, keeper)| keeper.stopped_changed().map(|stopped| (*group, stopped)))
            .collect();
        for (group, stopped) in changed {
            tracing::warn!(%group, "its keeper {}", if stopped { "is stopped (SIGSTOP)" } else { "runs again" });
            self.tell_head(ToHead::KeeperStopped { group, stopped });
        }
    }

    /// Without a head nobody vouches for any node.
    pub(crate) fn head_is_lost(&mut self, now: Instant) {
        for (node, name) in self.held_alive() {
            self.verdict(node, name, NodeState::Suspect, "this node has lost the head");
        }
        self.requests_lost(now);
    }

    fn held_alive(&self) -> Vec<(NodeId, String)> {
        let alive = self.verdicts.iter().filter(|(_, (_, state))| *state == NodeState::Alive);
        alive.map(|(node, (name, _))| (*node, name.clone())).collect()
    }

    /// A driver on another host wants its keeper.
    pub(crate) fn step_session(&self, group: GroupId, from: String, stream: OwnedFd) {
        let Some(hand_over) = self.keepers.get(&group).and_then(Keeper::hand_over) else {
            tracing::warn!(%group, from, "a step session for a group that has no keeper here is closed");
            return;
        };
        tokio::spawn(async move {
            if let Err(error) = hand_over.session(stream).await {
                tracing::warn!(%group, from, %error, "a step session could not be handed to its keeper");
            }
        });
    }

    /// Asks NVML on a thread of its own: it may take seconds. Nobody waits for it, unless groups of an earlier daemon hold GPUs: a head that hears of
    /// this node without them ends these groups. (NVML is quick while GPUs are in use.)
    pub(crate) async fn look_for_gpus(&mut self, talk: &mut dyn FnMut(Talk)) {
        let (tx, rx) = oneshot::channel();
        let spawned = thread::Builder::new().name("nvml".to_owned()).spawn(move || {
            let _ = tx.send(gpu::probe());
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot look for GPUs");
            return;
        }
        let mut probe = Box::pin(rx);
        if self.keepers.values().any(|keeper| !keeper.gpus().is_empty()) {
            talk(Talk::Line("looking for the GPUs that they hold".to_owned()));
            match timeout(GPU_LOOK_TIMEOUT, &mut probe).await {
                Ok(Ok(found)) => return self.gpus_found(&found, talk),
                Ok(Err(_)) => return,
                Err(_) => talk(Talk::Line(format!("NVML does not answer after {} s", GPU_LOOK_TIMEOUT.as_secs()))),
            }
        }
        let events = self.events.clone();
        tokio::spawn(async move {
            if let Ok(found) = probe.await {
                let _ = events.send(Event::GpusFound(found)).await;
            }
        });
    }

    /// NVML has answered after the start. (Where `--gpus` told a number, it was asked before.)
    pub(crate) fn gpus_found(&mut self, probe: &Probe, talk: &mut dyn FnMut(Talk)) {
        for note in &probe.notes {
            talk(Talk::Line(note.clone()));
        }
        inventory::add_gpus(&mut self.info.resources, &mut self.info.versions, probe, probe.gpus.len());
        self.info.gpus.clone_from(&probe.gpus);
        self.gpus_measured = !self.info.gpus.is_empty();
        self.gpu_places.clone_from(&probe.places);
        self.info.rdma = rdma::look(&self.info.links.rdma_devices, &self.gpu_places);
        tracing::info!(gpus = self.info.gpus.len(), "NVML has answered");
        let info = self.info.clone();
        self.tell_head(ToHead::Update { info });
    }
}

/// The cause without its hint: a line of a status table.
fn one_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
