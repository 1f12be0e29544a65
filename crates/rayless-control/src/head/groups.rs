//! The life of a group: keepers told to start, all up, driver told, running, ended, reaped.
//!
//! Until the driver is told (`Phase::Placing`) the head decides: any fault fails the group. From then on the sessions between
//! driver and keepers decide, and the head learns the end from the first `GroupEnded`: it tells the other nodes to stop theirs,
//! all with that one cause.

use super::{
    Head,
    model::{Group, Keeper, Part, Phase, Requester, StopWait},
};
use rayless_proto::{
    ids::{GroupId, NodeId, PlacementGroupId, Rank},
    limits::{KEEPER_START_TIMEOUT, MAX_CAUSE, MAX_ENDED_GROUPS, REAP_TIMEOUT, STOP_REPEAT_PERIOD},
    resources::Allocation,
    v1::{
        control::{GroupSpec, PlacedNode, Placement, RankAllocation, Refusal, RefusalKind, ToNode, WorkerState},
        link::LinkReport,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Where a rank goes: its node, its share, and the bundle that it is carved from.
pub(super) type Seat = (NodeId, Allocation, Option<(PlacementGroupId, u32)>);

impl Head {
    /// Takes the seats and tells their nodes to start. The seats were found free just now.
    pub(super) fn start_group(&mut self, requester: Requester, spec: &GroupSpec, seats: Vec<Seat>, now: Instant) {
        let id = loop {
            let id = GroupId(self.draw());
            if !self.groups.contains_key(&id) {
                break id;
            }
        };
        let mut ranks: BTreeMap<NodeId, Vec<RankAllocation>> = BTreeMap::new();
        for (rank, (node, allocation, placement_group)) in (0..).zip(seats) {
            ranks.entry(node).or_default().push(RankAllocation { rank, allocation, placement_group });
        }
        let mut group = Group {
            name: spec.name.clone(),
            world_size: u32::try_from(spec.bundles.len()).unwrap_or(u32::MAX),
            driver_node: spec.driver_node,
            driver_pid: spec.driver_pid,
            phase: Phase::Placing,
            cause: String::new(),
            requester: Some(requester),
            told_on: None,
            parts: BTreeMap::new(),
            ended: None,
            resumed: None,
            end_number: 0,
        };
        for (node, ranks) in ranks {
            let mut part = Part::new(ranks, Keeper::Starting, now);
            part.counted = self.take_ranks(node, &part.ranks);
            group.parts.insert(node, part);
        }
        let nodes: Vec<NodeId> = group.parts.keys().copied().collect();
        let names: Vec<String> = nodes.iter().map(|n| self.node_name(*n)).collect();
        let line = format!("group {} of {} ranks goes to {}", group.title(id), group.world_size, names.join(", "));
        self.groups.insert(id, group);
        self.note("group-starting", line, now);
        for node in nodes {
            self.send_start(id, node, now);
        }
        self.dirty = true;
    }

    /// Tells a node to start its part, (again) from now on the clock.
    pub(super) fn send_start(&mut self, id: GroupId, node: NodeId, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let Some(part) = group.parts.get_mut(&node) else { return };
        part.told = now;
        let message = ToNode::StartKeeper {
            group: id,
            name: group.name.clone(),
            world_size: group.world_size,
            driver_node: group.driver_node,
            ranks: part.ranks.clone(),
            requester: group.requester,
        };
        self.send(node, message);
    }

    /// Takes each rank's share out of the node's pool or its bundle's. Says which it got.
    pub(super) fn take_ranks(&mut self, node: NodeId, ranks: &[RankAllocation]) -> Vec<bool> {
        let take = |rank: &RankAllocation| match rank.placement_group {
            None => self.nodes.get_mut(&node).is_some_and(|n| n.pool.take_exactly(&rank.allocation)),
            Some(from) => self.bundle_mut(from, node).is_some_and(|b| b.pool.take_exactly(&rank.allocation)),
        };
        ranks.iter().map(take).collect()
    }

    fn give_rank(&mut self, node: NodeId, rank: &RankAllocation) {
        match rank.placement_group {
            None => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.pool.give(&rank.allocation);
                }
            }
            Some(from) => {
                if let Some(bundle) = self.bundle_mut(from, node) {
                    bundle.pool.give(&rank.allocation);
                }
            }
        }
        self.stirred = true;
    }

    /// A part is over: what it held is free (R2).
    pub(super) fn release_part(&mut self, id: GroupId, node: NodeId) {
        let Some(part) = self.groups.get_mut(&id).and_then(|g| g.parts.get_mut(&node)) else { return };
        if part.keeper == Keeper::Gone {
            return;
        }
        part.keeper = Keeper::Gone;
        part.states.fill(WorkerState::Dead);
        part.links.clear();
        let counted: Vec<RankAllocation> = part.counted_ranks().cloned().collect();
        part.counted.fill(false);
        for rank in &counted {
            self.give_rank(node, rank);
        }
        self.dirty = true;
        self.settle_placement_groups();
    }

    pub(super) fn on_keeper_ready(&mut self, node: NodeId, id: GroupId, now: Instant) {
        let Some(part) = self.groups.get_mut(&id).and_then(|g| g.parts.get_mut(&node)) else {
            let cause = "the head does not know this group".to_owned();
            self.send(node, ToNode::StopKeeper { group: id, cause });
            return;
        };
        match part.keeper {
            Keeper::Starting => {
                part.keeper = Keeper::Up;
                self.dirty = true;
                self.tell_driver_when_all_up(id, now);
            }
            // It was told to stop after it was told to start, or will be told again.
            Keeper::Up | Keeper::Stopping => {}
            Keeper::Gone => {
                let cause = self.groups.get(&id).map(|g| g.cause.clone()).unwrap_or_default();
                self.send(node, ToNode::StopKeeper { group: id, cause });
            }
        }
    }

    pub(super) fn tell_driver_when_all_up(&mut self, id: GroupId, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let awaited = group.resumed.as_ref().is_some_and(|resumed| resumed.asked.is_none());
        let all_up = group.is_whole() && group.parts.values().all(|p| p.keeper == Keeper::Up);
        if group.phase != Phase::Placing || awaited || !all_up {
            return;
        }
        group.phase = Phase::Placed;
        group.resumed = None;
        self.dirty = true;
        let title = group.title(id);
        self.note("group-placed", format!("group {title} is placed"), now);
        self.send_placed(id);
    }

    /// Tells whoever asked that the group is placed; also again, if it asks again on another session. (On one session the
    /// answer to a repeated question would cross the first one, and look like a second group.)
    pub(super) fn send_placed(&mut self, id: GroupId) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let Some(requester) = group.requester else { return };
        let session = self.nodes.get(&requester.node).and_then(|n| n.session);
        if session.is_none() || std::mem::replace(&mut group.told_on, session) == session {
            return;
        }
        let Some(group) = self.groups.get(&id) else { return };
        let mut placements: Vec<Placement> = Vec::new();
        let mut nodes = Vec::new();
        for (node_id, part) in &group.parts {
            let Some(node) = self.nodes.get(node_id) else { continue };
            nodes.push(PlacedNode {
                id: *node_id,
                name: node.info.name.clone(),
                address: node.info.address.clone(),
                port: node.info.port,
                host_id: node.info.host_id.clone(),
                node_env: node.info.node_env.clone(),
                versions: node.info.versions.clone(),
                link_policy: node.info.links.policy.clone(),
                has_rdma: !node.info.rdma.devices.is_empty(),
            });
            for (local_rank, rank) in (0..).zip(&part.ranks) {
                let uuid = |index| node.info.gpus.iter().find(|g| g.index == index).map(|g| g.uuid.clone());
                placements.push(Placement {
                    rank: rank.rank,
                    local_rank,
                    node: *node_id,
                    allocation: rank.allocation.clone(),
                    gpu_uuids: rank.allocation.gpus.iter().filter_map(|g| uuid(g.index)).collect(),
                });
            }
        }
        placements.sort_by_key(|p| p.rank);
        let message = ToNode::GroupPlaced { request: requester.request, group: id, placements, nodes };
        self.reply(requester, message);
    }

    pub(super) fn on_worker_changed(
        &mut self,
        node: NodeId,
        id: GroupId,
        rank: Rank,
        pid: u32,
        state: WorkerState,
        now: Instant,
    ) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let Some(part) = group.parts.get_mut(&node).filter(|p| p.keeper != Keeper::Gone) else { return };
        let Some(at) = part.ranks.iter().position(|r| r.rank == rank) else { return };
        part.pids[at] = pid;
        part.states[at] = state;
        // No worker is started before the driver has come.
        self.driver_came(id, now);
        self.check_running(id, now);
    }

    pub(super) fn on_link_changed(&mut self, node: NodeId, id: GroupId, report: LinkReport) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let Some(part) = group.parts.get_mut(&node).filter(|p| p.keeper != Keeper::Gone) else { return };
        part.take_report(report);
    }

    /// Ranks that make no progress: told, not judged. The driver ends the group when its patience does.
    pub(super) fn on_ranks_stuck(&mut self, node: NodeId, id: GroupId, line: &str, now: Instant) {
        let Some(group) = self.groups.get(&id).filter(|g| g.phase.is_live() && g.parts.contains_key(&node)) else {
            return;
        };
        let line: String = line.chars().take(MAX_CAUSE).collect();
        let line = format!("group {} on {}: {line}", group.title(id), self.node_name(node));
        self.note("ranks-stuck", line, now);
    }

    /// The driver decides, by its own session: it only must not take the node's life for the keeper's.
    pub(super) fn on_keeper_stopped(&mut self, node: NodeId, id: GroupId, stopped: bool, now: Instant) {
        let Some(group) = self.groups.get(&id).filter(|g| g.phase.is_live() && g.parts.contains_key(&node)) else {
            return;
        };
        let (title, driver) = (group.title(id), group.driver_node);
        let name = self.node_name(node);
        if stopped {
            self.note("keeper-stopped", format!("group {title}: its keeper on {name} is stopped (SIGSTOP)"), now);
        } else {
            self.note("keeper-resumed", format!("group {title}: its keeper on {name} runs again"), now);
        }
        self.send(driver, ToNode::KeeperStopped { group: id, node, stopped });
    }

    pub(super) fn check_running(&mut self, id: GroupId, now: Instant) {
        let Some(group) = self.groups.get_mut(&id).filter(|g| g.phase == Phase::Placed) else { return };
        let states = group.parts.values().flat_map(|p| &p.states);
        let able = states.filter(|s| matches!(s, WorkerState::Ready | WorkerState::Busy)).count();
        if able == group.world_size as usize {
            group.phase = Phase::Running;
            let title = group.title(id);
            self.dirty = true;
            self.note("group-running", format!("group {title}: all workers are ready"), now);
        }
    }

    pub(super) fn on_group_ended(&mut self, node: NodeId, id: GroupId, cause: &str, now: Instant) {
        let Some(group) = self.groups.get(&id) else { return };
        if !group.parts.contains_key(&node) {
            return;
        }
        let (phase, name) = (group.phase, self.node_name(node));
        self.release_part(id, node);
        match phase {
            Phase::Placing => {
                let cause =
                    if cause.is_empty() { format!("its keeper on {name} ended at once") } else { cause.to_owned() };
                self.end_group(id, Phase::Failed, &cause, now);
            }
            Phase::Placed | Phase::Running | Phase::Lost if cause.is_empty() => {
                self.end_group(id, Phase::Stopped, "", now);
            }
            Phase::Placed | Phase::Running | Phase::Lost => self.end_group(id, Phase::Failed, cause, now),
            Phase::Failed | Phase::Stopped => self.prune_groups(),
        }
    }

    /// Ends a group with one cause, everywhere. The first end counts; later ones change nothing.
    pub(super) fn end_group(&mut self, id: GroupId, phase: Phase, cause: &str, now: Instant) {
        let Some(group) = self.groups.get_mut(&id).filter(|g| !g.phase.is_over()) else { return };
        let untold = group.phase == Phase::Placing;
        group.phase = phase;
        group.resumed = None;
        cause.clone_into(&mut group.cause);
        group.ended = Some(now);
        group.end_number = self.telling.next_end();
        let (title, requester) = (group.title(id), group.requester);
        let parts: Vec<NodeId> = group.parts.keys().copied().collect();
        for node in parts {
            self.stop_part(id, node, now);
        }
        if let Some(requester) = requester.filter(|_| untold) {
            let cause = if cause.is_empty() { "the launch was stopped" } else { cause };
            self.refuse(requester, RefusalKind::Failed, cause, "");
        }
        self.dirty = true;
        match phase {
            Phase::Failed => {
                self.note("group-failed", format!("group {title} failed: {cause}"), now);
                self.send_notice(id);
            }
            _ => self.note("group-stopped", format!("group {title} stopped"), now),
        }
        self.prune_groups();
    }

    /// Has the last event in the log of each node of the group, too: whoever looks there first finds the one cause.
    fn send_notice(&mut self, id: GroupId) {
        let Some(event) = self.events.back().cloned() else { return };
        let nodes =
            self.groups.get(&id).map(|g| g.parts.keys().copied().chain([g.driver_node]).collect::<BTreeSet<_>>());
        for node in nodes.unwrap_or_default() {
            // The head's own node has it from `Effect::Notify`.
            if node != self.config.node {
                self.send(node, ToNode::Notice(event.clone()));
            }
        }
    }

    /// Tells a node to end its part.
    pub(super) fn stop_part(&mut self, id: GroupId, node: NodeId, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let cause = group.cause.clone();
        let Some(part) = group.parts.get_mut(&node).filter(|p| p.keeper != Keeper::Gone) else { return };
        part.keeper = Keeper::Stopping;
        part.told = now;
        self.send(node, ToNode::StopKeeper { group: id, cause });
    }

    pub(super) fn on_stop_group(&mut self, requester: Requester, group: Option<GroupId>, now: Instant) {
        let groups: Vec<GroupId> = match group {
            Some(id) if self.groups.contains_key(&id) => vec![id],
            Some(id) if self.buried_groups.contains(&id) => {
                return self.reply(requester, ToNode::Done { request: requester.request });
            }
            Some(id) => {
                let hint = "`rayless status` lists the groups";
                return self.refuse(requester, RefusalKind::Invalid, format!("there is no group {id}"), hint);
            }
            None => {
                self.refuse_all_waiting("everything was stopped by `rayless stop --all`");
                let all: Vec<_> = self.placement_groups.keys().copied().collect();
                for id in all {
                    self.begin_removal(id, now);
                }
                self.groups.keys().copied().collect()
            }
        };
        for id in &groups {
            self.end_group(*id, Phase::Stopped, "", now);
        }
        self.wait_for_end(requester, groups.into_iter().collect(), BTreeSet::new(), now);
    }

    pub(super) fn wait_for_end(
        &mut self,
        requester: Requester,
        groups: BTreeSet<GroupId>,
        placement_groups: BTreeSet<PlacementGroupId>,
        now: Instant,
    ) {
        self.stops.retain(|s| s.requester != requester);
        // Reaping has its own limit on the node; what a node says after that comes too late for this answer.
        let until = now + REAP_TIMEOUT + Duration::from_secs(1);
        self.stops.push(StopWait { requester, groups, placement_groups, until });
    }

    /// Answers those whose groups are reaped. Parts on dead nodes are not waited for.
    pub(super) fn settle_stops(&mut self, now: Instant) {
        if self.stops.is_empty() {
            return;
        }
        let over = |id: &GroupId| {
            self.groups.get(id).is_none_or(|g| {
                g.parts.iter().all(|(n, p)| p.keeper == Keeper::Gone || self.nodes.get(n).is_none_or(|n| n.is_gone()))
            })
        };
        let removed = |id: &PlacementGroupId| !self.placement_groups.contains_key(id);
        let done =
            |s: &StopWait| now >= s.until || (s.groups.iter().all(over) && s.placement_groups.iter().all(removed));
        let (finished, rest): (Vec<StopWait>, Vec<StopWait>) = self.stops.iter().cloned().partition(|s| done(s));
        self.stops = rest;
        for stop in finished {
            let request = stop.requester.request;
            self.reply(stop.requester, ToNode::Done { request });
        }
    }

    pub(super) fn on_cancel(&mut self, requester: Requester, now: Instant) {
        if let Some(node) = self.nodes.get_mut(&requester.node) {
            node.launches.asks.remove(&requester.request);
            node.launches.told.remove(&requester.request);
        }
        let before = self.queue.len();
        self.queue.retain(|w| w.requester != requester);
        self.stirred |= self.queue.len() != before;
        self.stops.retain(|s| s.requester != requester);
        let group = self.groups.iter().find(|(_, g)| g.requester == Some(requester)).map(|(id, _)| *id);
        if let Some(id) = group {
            // Nobody is left to be told that it was refused.
            if let Some(group) = self.groups.get_mut(&id) {
                group.requester = None;
            }
            self.end_group(id, Phase::Stopped, "", now);
        }
        let bundles = self.placement_groups.iter().find(|(_, p)| p.requester == Some(requester)).map(|(id, _)| *id);
        if let Some(id) = bundles {
            self.begin_removal(id, now);
        }
    }

    /// Keepers that did not come up in time, and stops that were not answered.
    pub(super) fn check_deadlines(&mut self, now: Instant) {
        let mut late = Vec::new();
        let mut unanswered = Vec::new();
        for (id, group) in &self.groups {
            for (node, part) in &group.parts {
                match part.keeper {
                    Keeper::Starting if now >= part.told + KEEPER_START_TIMEOUT => late.push((*id, *node)),
                    Keeper::Stopping if now >= part.told + STOP_REPEAT_PERIOD && self.is_connected(*node) => {
                        unanswered.push((*id, *node));
                    }
                    _ => {}
                }
            }
        }
        for (id, node) in late {
            let seconds = KEEPER_START_TIMEOUT.as_secs();
            let cause = format!("node {} did not start its keeper within {seconds} s", self.node_name(node));
            self.end_group(id, Phase::Failed, &cause, now);
        }
        for (id, node) in unanswered {
            self.stop_part(id, node, now);
        }
    }

    pub(super) fn next_part_deadline(&self) -> Option<Instant> {
        let parts = self.groups.values().flat_map(|g| &g.parts);
        let deadline = |(node, part): (&NodeId, &Part)| match part.keeper {
            Keeper::Starting => Some(part.told + KEEPER_START_TIMEOUT),
            // Without a session its next join settles it.
            Keeper::Stopping => self.is_connected(*node).then(|| part.told + STOP_REPEAT_PERIOD),
            Keeper::Up | Keeper::Gone => None,
        };
        parts.filter_map(deadline).min()
    }

    /// Forgets all but the last ended groups; of those with a part left somewhere, none.
    pub(super) fn prune_groups(&mut self) {
        let mut over: Vec<(Option<Instant>, GroupId)> = self
            .groups
            .iter()
            .filter(|(_, g)| g.phase.is_over() && g.is_reaped())
            .map(|(id, g)| (g.ended, *id))
            .collect();
        if over.len() <= MAX_ENDED_GROUPS {
            return;
        }
        over.sort_unstable();
        for (_, id) in over.iter().take(over.len() - MAX_ENDED_GROUPS) {
            self.groups.remove(id);
            self.bury_group(*id);
        }
    }

    /// What to say to someone who asks again for a group that it was already given, or that has ended meanwhile.
    pub(super) fn answer_again(&mut self, id: GroupId) {
        let Some(group) = self.groups.get(&id) else { return };
        let (phase, Some(requester)) = (group.phase, group.requester) else { return };
        match phase {
            Phase::Placing => {}
            Phase::Placed | Phase::Running | Phase::Lost => self.send_placed(id),
            Phase::Failed | Phase::Stopped => {
                let cause =
                    if group.cause.is_empty() { "the group was stopped".to_owned() } else { group.cause.clone() };
                let refusal = Refusal { kind: RefusalKind::Failed, cause, hint: String::new() };
                self.reply(requester, ToNode::RequestRefused { request: requester.request, refusal, table: None });
            }
        }
    }
}
