//! What a joining node still holds, against the head's books.
//!
//! The node is right about what it holds, the head about what is over. So: what the node no longer holds is free (and its
//! group failed, unless the start was merely lost: then it is told to start again); what it holds of a group that is over is
//! stopped; what the head never heard of is adopted. Nothing is ever started that is held already.

use super::{
    Head,
    model::{Brought, Bundle, Group, Keeper, Part, Phase, PlacementGroup},
};
use crate::pool::Pool;
use rayless_proto::{
    ids::{GroupId, NodeId, PlacementGroupId},
    v1::control::{HeldGroup, HeldPlacementGroup, ToNode, WorkerState},
};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Instant,
};

/// How a node comes to join.
#[derive(Debug, Clone, Copy)]
pub(super) struct Life {
    /// As a new life of a node that was known.
    pub(super) reborn: bool,
    /// So that what it still runs has run all the time, even if it was taken for lost: its daemon was down, or the head was.
    pub(super) vouches: bool,
}

impl Head {
    pub(super) fn compare_books(&mut self, node: NodeId, life: Life, brought: &Brought, now: Instant) {
        let Brought { held, ended, held_bundles, launches } = brought;
        for group in ended {
            self.on_ended_before(node, group, now);
        }
        let start_again = self.drop_parts_not_held(node, life.reborn, held, now);
        self.rebuild_pool(node, !life.reborn, now);
        self.adopt_bundles(node, held_bundles, now);
        for group in held {
            self.adopt_group(node, life, group, now);
        }
        for id in start_again {
            if self.groups.get(&id).is_some_and(|g| g.phase == Phase::Placing) {
                self.send_start(id, node, now);
            }
        }
        self.take_launches(node, launches, now);
        for group in held {
            self.settle_launch(group.group, now);
            self.check_running(group.group, now);
        }
    }

    /// Frees the parts that the node no longer holds. Returns those whose start was lost on the way. (Not in a new life: a
    /// keeper that its last life was just starting may yet come up, and must not find a second one beside it.)
    fn drop_parts_not_held(&mut self, node: NodeId, reborn: bool, held: &[HeldGroup], now: Instant) -> Vec<GroupId> {
        let missing: Vec<(GroupId, Keeper, Phase)> = self
            .groups
            .iter()
            .filter(|(id, _)| !held.iter().any(|h| h.group == **id))
            .filter_map(|(id, g)| g.parts.get(&node).map(|p| (*id, p.keeper, g.phase)))
            .collect();
        let cause = format!("node {} came back without its part of the group", self.node_name(node));
        let mut start_again = Vec::new();
        for (id, keeper, phase) in missing {
            match keeper {
                Keeper::Gone => {}
                Keeper::Starting if phase == Phase::Placing && !reborn => start_again.push(id),
                Keeper::Stopping => self.release_part(id, node),
                Keeper::Starting | Keeper::Up => {
                    self.release_part(id, node);
                    self.end_group(id, Phase::Failed, &cause, now);
                }
            }
        }
        start_again
    }

    /// Takes what the books say out of a fresh pool of what the node has now. What no longer fits fails.
    pub(super) fn rebuild_pool(&mut self, id: NodeId, keep_draining: bool, now: Instant) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let mut pool = Pool::of_node(&node.info.resources, node.info.gpus.iter().map(|g| g.index));
        if keep_draining {
            for device in node.pool.devices().iter().filter(|d| d.draining) {
                pool.set_draining(device.index, true);
            }
        }
        let mut broken_bundles = Vec::new();
        for (pg, group) in &self.placement_groups {
            for (index, bundle) in group.bundles.iter().filter(|(_, b)| b.node == id) {
                if !pool.take_exactly(&bundle.allocation) {
                    broken_bundles.push((*pg, *index));
                }
            }
        }
        let mut broken_groups = Vec::new();
        for (group_id, group) in &mut self.groups {
            let Some(part) = group.parts.get_mut(&id) else { continue };
            let mut whole = true;
            for (rank, counted) in part.ranks.iter().zip(&mut part.counted) {
                if *counted && rank.placement_group.is_none() && !pool.take_exactly(&rank.allocation) {
                    (*counted, whole) = (false, false);
                }
            }
            if !whole {
                broken_groups.push(*group_id);
            }
        }
        node.pool = pool;
        let name = node.info.name.clone();
        let cause = format!("node {name} no longer has what was given out there");
        for group in broken_groups {
            self.end_group(group, Phase::Failed, &cause, now);
        }
        for (pg, index) in broken_bundles {
            self.drop_bundle(pg, index, &cause, now);
        }
    }

    fn adopt_bundles(&mut self, node: NodeId, held: &[HeldPlacementGroup], now: Instant) {
        for h in held {
            if self.buried_bundles.contains(&h.id) {
                self.send(node, ToNode::DropPlacementGroup(h.id));
                continue;
            }
            if let Entry::Vacant(unknown) = self.placement_groups.entry(h.id) {
                unknown.insert(PlacementGroup {
                    name: h.name.clone(),
                    strategy: h.strategy,
                    bundle_count: h.bundle_count,
                    bundles: BTreeMap::new(),
                    requester: None,
                    told_on: None,
                    orphaned: false,
                    removing: false,
                });
                self.note("placement-group-adopted", format!("placement group {} is still held", h.name), now);
            }
            for (index, allocation) in &h.bundles {
                let Some(group) = self.placement_groups.get_mut(&h.id) else { continue };
                match group.bundles.get(index) {
                    Some(known) if known.node == node && known.allocation == *allocation => {}
                    // Two nodes, or two shares, for one bundle: the books were there first.
                    Some(_) => {}
                    None => {
                        let taken = self.nodes.get_mut(&node).is_some_and(|n| n.pool.take_exactly(allocation));
                        if taken {
                            group.bundles.insert(*index, Bundle::new(node, allocation.clone()));
                        }
                    }
                }
            }
        }
        let untold: Vec<PlacementGroupId> = self
            .placement_groups
            .iter()
            .filter(|(id, p)| p.bundles.values().any(|b| b.node == node) && !held.iter().any(|h| h.id == **id))
            .map(|(id, _)| *id)
            .collect();
        for id in untold {
            self.send_hold(id, node);
        }
    }

    fn adopt_group(&mut self, node: NodeId, life: Life, held: &HeldGroup, now: Instant) {
        let id = held.group;
        if !self.groups.contains_key(&id) {
            let over = self.buried_groups.contains(&id);
            let launch = held.launch.filter(|_| !over);
            let adopted = Group {
                name: held.name.clone(),
                world_size: held.world_size,
                driver_node: held.driver_node,
                driver_pid: 0,
                phase: match launch {
                    Some(_) => Phase::Placing,
                    None if over => Phase::Failed,
                    None => Phase::Placed,
                },
                cause: if over { "it ended while this node was away".into() } else { String::new() },
                requester: launch,
                told_on: None,
                parts: BTreeMap::new(),
                ended: over.then_some(now),
                resumed: launch.map(|_| Self::resumed(now)),
                end_number: if over { self.telling.next_end() } else { 0 },
            };
            let title = adopted.title(id);
            self.groups.insert(id, adopted);
            if launch.is_some() {
                let line = format!("group {title} was being started under another head: its launch goes on");
                self.note("group-resumed", line, now);
            } else if !over {
                self.note("group-adopted", format!("group {title} still runs: adopted"), now);
            }
        }
        let consistent = self.take_part(node, held, now);
        let Some(phase) = self.groups.get(&id).map(|g| g.phase) else { return };
        if phase.is_over() {
            self.stop_part(id, node, now);
        } else if !consistent {
            let name = self.node_name(node);
            let cause = format!("what node {name} still held for the group had been given to others");
            self.end_group(id, Phase::Failed, &cause, now);
        } else if phase == Phase::Lost && life.vouches {
            self.revive(id, now);
        } else if phase == Phase::Lost {
            let cause = self.groups.get(&id).map(|g| g.cause.clone()).unwrap_or_default();
            self.end_group(id, Phase::Failed, &cause, now);
        }
        if held.launch.is_none() {
            self.driver_came(id, now);
        }
        self.dirty = true;
    }

    /// Enters into the books what the node holds of a group. `false` where that was not free.
    fn take_part(&mut self, node: NodeId, held: &HeldGroup, now: Instant) -> bool {
        let id = held.group;
        let Some(group) = self.groups.get_mut(&id) else { return true };
        let known = group.parts.get(&node);
        let same = known.is_some_and(|p| p.is_wholly_counted() && p.keeper != Keeper::Gone && p.ranks == held.ranks);
        // Of one that another head had started and whose driver has not come, the node says next whether it is up.
        let unknown = if held.launch.is_some() { Keeper::Starting } else { Keeper::Up };
        let keeper = known.map_or(unknown, |p| if p.keeper == Keeper::Gone { Keeper::Up } else { p.keeper });
        if !same {
            self.release_part(id, node);
            let mut ranks = held.ranks.clone();
            for rank in &mut ranks {
                // A head that does not know the bundle (nobody brought it back) must still not give its devices to others.
                if rank.placement_group.is_some_and(|from| self.bundle_mut(from, node).is_none()) {
                    rank.placement_group = None;
                }
            }
            let counted = self.take_ranks(node, &ranks);
            let mut part = Part::new(ranks, keeper, now);
            part.counted = counted;
            if let Some(group) = self.groups.get_mut(&id) {
                group.parts.insert(node, part);
            }
        }
        let Some(part) = self.groups.get_mut(&id).and_then(|g| g.parts.get_mut(&node)) else { return true };
        for at in 0..part.ranks.len() {
            part.pids[at] = held.pids.get(at).copied().unwrap_or(0);
            part.states[at] = held.states.get(at).copied().unwrap_or(WorkerState::Starting);
        }
        part.links.clear();
        held.links.iter().for_each(|report| part.take_report(report.clone()));
        part.is_wholly_counted()
    }

    fn revive(&mut self, id: GroupId, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.phase = Phase::Placed;
        group.cause.clear();
        let title = group.title(id);
        self.note("group-found", format!("group {title} has run all the time"), now);
    }
}
