//! Placement groups: bundles that are reserved on nodes, for groups to be carved out of.
//!
//! A bundle is bookkeeping only, no process: it is told to its node so that a restarted head can learn it from there, and told again to
//! a node that comes back without it. A bundle on a dead node stays reserved there. The whole placement group ends when
//! one of its nodes leaves, or comes back with less than the bundle needs.

use super::{
    Head,
    model::{Bundle, Phase, PlacementGroup, Requester, Want},
};
use rayless_proto::{
    ids::{GroupId, Incarnation, NodeId, PlacementGroupId},
    resources::{Allocation, Resources, Strategy},
    v1::control::{HeldPlacementGroup, RefusalKind, ToNode},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

impl Head {
    pub(super) fn on_create_placement_group(
        &mut self,
        requester: Requester,
        name: String,
        bundles: Vec<Resources>,
        strategy: Strategy,
        wait_ms: u64,
        now: Instant,
    ) {
        let known = self.placement_groups.iter().find(|(_, p)| p.requester == Some(requester)).map(|(id, _)| *id);
        if let Some(id) = known {
            return self.send_bundles_placed(id);
        }
        self.enqueue(requester, Want::Bundles { name, bundles, strategy }, wait_ms, now);
    }

    /// Reserves the seats, which were found free just now.
    pub(super) fn start_placement_group(
        &mut self,
        requester: Requester,
        name: &str,
        strategy: Strategy,
        seats: Vec<(NodeId, Allocation)>,
        now: Instant,
    ) {
        let id = loop {
            let id = PlacementGroupId(self.draw());
            if !self.placement_groups.contains_key(&id) {
                break id;
            }
        };
        let mut bundles = BTreeMap::new();
        for (index, (node, allocation)) in (0..).zip(seats) {
            if self.nodes.get_mut(&node).is_some_and(|n| n.pool.take_exactly(&allocation)) {
                bundles.insert(index, Bundle::new(node, allocation));
            }
        }
        let group = PlacementGroup {
            name: name.to_owned(),
            strategy,
            bundle_count: u32::try_from(bundles.len()).unwrap_or(u32::MAX),
            bundles,
            requester: Some(requester),
            told_on: None,
            orphaned: false,
            removing: false,
        };
        let nodes: BTreeSet<NodeId> = group.bundles.values().map(|b| b.node).collect();
        self.note("placement-group-placed", format!("placement group {name} ({}) is placed", id.short()), now);
        self.placement_groups.insert(id, group);
        for node in nodes {
            self.send_hold(id, node);
        }
        self.send_bundles_placed(id);
        self.dirty = true;
    }

    /// This bundle, if it lies on this node.
    pub(super) fn bundle_mut(&mut self, from: (PlacementGroupId, u32), node: NodeId) -> Option<&mut Bundle> {
        let bundle = self.placement_groups.get_mut(&from.0)?.bundles.get_mut(&from.1)?;
        (bundle.node == node).then_some(bundle)
    }

    /// Tells a node which bundles it holds.
    pub(super) fn send_hold(&mut self, id: PlacementGroupId, node: NodeId) {
        let Some(group) = self.placement_groups.get(&id) else { return };
        let here = group.bundles.iter().filter(|(_, b)| b.node == node);
        let held = HeldPlacementGroup {
            id,
            name: group.name.clone(),
            strategy: group.strategy,
            bundle_count: group.bundle_count,
            bundles: here.map(|(index, b)| (*index, b.allocation.clone())).collect(),
        };
        self.send(node, ToNode::HoldPlacementGroup(held));
    }

    fn send_bundles_placed(&mut self, id: PlacementGroupId) {
        let Some(group) = self.placement_groups.get_mut(&id) else { return };
        let Some(requester) = group.requester else { return };
        let session = self.nodes.get(&requester.node).and_then(|n| n.session);
        if session.is_none() || std::mem::replace(&mut group.told_on, session) == session {
            return;
        }
        let nodes = group.bundles.values().map(|b| b.node).collect();
        self.reply(requester, ToNode::PlacementGroupPlaced { request: requester.request, id, nodes });
    }

    pub(super) fn on_remove_placement_group(&mut self, requester: Requester, id: PlacementGroupId, now: Instant) {
        if !self.placement_groups.contains_key(&id) {
            if self.buried_bundles.contains(&id) {
                return self.reply(requester, ToNode::Done { request: requester.request });
            }
            let cause = format!("there is no placement group {id}");
            return self.refuse(requester, RefusalKind::Invalid, cause, "`rayless status` lists them");
        }
        self.begin_removal(id, now);
        self.wait_for_end(requester, BTreeSet::new(), [id].into(), now);
    }

    /// Stops the groups carved out of it; it is given back once they are reaped.
    pub(super) fn begin_removal(&mut self, id: PlacementGroupId, now: Instant) {
        self.end_removal_of_groups(id, Phase::Stopped, "", now);
        self.settle_placement_groups();
    }

    fn end_removal_of_groups(&mut self, id: PlacementGroupId, phase: Phase, cause: &str, now: Instant) {
        let Some(group) = self.placement_groups.get_mut(&id) else { return };
        group.removing = true;
        self.dirty = true;
        let carved: Vec<GroupId> =
            self.groups.iter().filter(|(_, g)| g.is_carved_from(id)).map(|(group, _)| *group).collect();
        for group in carved {
            self.end_group(group, phase, cause, now);
        }
        self.refuse_waiting_for(id);
    }

    /// Gives back the placement groups that are to be removed and from which nothing is held any more.
    pub(super) fn settle_placement_groups(&mut self) {
        let free: Vec<PlacementGroupId> = self
            .placement_groups
            .iter()
            .filter(|(id, p)| (p.removing || p.orphaned) && !self.groups.values().any(|g| g.is_carved_from(**id)))
            .map(|(id, _)| *id)
            .collect();
        for id in free {
            self.refuse_waiting_for(id);
            let Some(group) = self.placement_groups.remove(&id) else { continue };
            for bundle in group.bundles.values() {
                if let Some(node) = self.nodes.get_mut(&bundle.node) {
                    node.pool.give(&bundle.allocation);
                }
            }
            let nodes: BTreeSet<NodeId> = group.bundles.values().map(|b| b.node).collect();
            for node in nodes {
                self.send(node, ToNode::DropPlacementGroup(id));
            }
            self.bury_bundles(id);
            self.stirred = true;
            self.dirty = true;
        }
    }

    /// The clients of a node are gone, except those of its life `keep`: what they reserved ends with what was carved out of it.
    pub(super) fn orphan_bundles(&mut self, node: NodeId, keep: Option<Incarnation>) {
        for group in self.placement_groups.values_mut() {
            group.orphaned |= group.requester.is_some_and(|r| r.node == node && Some(r.incarnation) != keep);
        }
        self.settle_placement_groups();
    }

    /// Ends the placement groups with bundles on a node that is gone for good. The node's pool is no longer of interest.
    pub(super) fn lose_bundles(&mut self, node: NodeId, cause: &str, now: Instant) {
        let lost: Vec<(PlacementGroupId, u32)> = self
            .placement_groups
            .iter()
            .flat_map(|(id, p)| p.bundles.iter().filter(|(_, b)| b.node == node).map(|(index, _)| (*id, *index)))
            .collect();
        for (id, index) in lost {
            if let Some(bundle) = self.placement_groups.get(&id).and_then(|p| p.bundles.get(&index)) {
                let allocation = bundle.allocation.clone();
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.pool.give(&allocation);
                }
            }
            self.drop_bundle(id, index, cause, now);
        }
    }

    /// A bundle is no longer there (and no longer in its node's pool): the placement group and all carved out of it end.
    pub(super) fn drop_bundle(&mut self, id: PlacementGroupId, index: u32, cause: &str, now: Instant) {
        let Some(group) = self.placement_groups.get_mut(&id) else { return };
        let Some(bundle) = group.bundles.remove(&index) else { return };
        let name = group.name.clone();
        for part in self.groups.values_mut().filter_map(|g| g.parts.get_mut(&bundle.node)) {
            for (rank, counted) in part.ranks.iter().zip(&mut part.counted) {
                *counted &= rank.placement_group != Some((id, index));
            }
        }
        self.note("placement-group-lost", format!("placement group {name} ends: {cause}"), now);
        self.end_removal_of_groups(id, Phase::Failed, cause, now);
        self.settle_placement_groups();
    }
}
