//! The head's state file: cluster id, nodes, live groups, placement groups, and the ids of those that are over.
//!
//! ```text
//! 0   4  magic "RLHS"
//! 4   2  version of this layout, little endian: 2
//! 6   8  FNV-1a 64 of what follows, little endian: a torn write is noticed
//! 14  n  rkyv
//! ```
//! It is a help, not needed: a head without it adopts what nodes bring. With it the cluster keeps its id, dead nodes stay dead, and
//! what ended stays ended.

use super::{
    Head, HeadConfig, Story,
    model::{Bundle, Group, Keeper, Launches, Node, Part, Phase, PlacementGroup, Requester},
};
use crate::pool::Pool;
use rayless_proto::{
    codec,
    ids::{ClusterId, GroupId, NodeId, PlacementGroupId},
    limits::REJOIN_TIMEOUT,
    resources::{Allocation, Strategy},
    v1::{
        control::{EndedGroup, NodeInfo, RankAllocation, WorkerState},
        status::{Event, NodeState},
    },
};
use rkyv::{Archive, Deserialize, Serialize};
use std::time::Instant;

const MAGIC: [u8; 4] = *b"RLHS";
const VERSION: u16 = 2;
const HEADER: usize = 14;

/// The bytes are not a head's state. The head starts without: nothing is lost but history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state file is damaged or of another version")]
pub struct RestoreError;

#[derive(Archive, Serialize, Deserialize)]
struct SavedState {
    cluster: ClusterId,
    nodes: Vec<SavedNode>,
    groups: Vec<SavedGroup>,
    placement_groups: Vec<SavedPlacementGroup>,
    over_groups: Vec<GroupId>,
    over_placement_groups: Vec<PlacementGroupId>,
    events: Vec<Event>,
    ended: Vec<EndedGroup>,
}

#[derive(Archive, Serialize, Deserialize)]
struct SavedNode {
    info: NodeInfo,
    state: NodeState,
    cause: String,
}

#[derive(Archive, Serialize, Deserialize)]
struct SavedGroup {
    id: GroupId,
    name: String,
    world_size: u32,
    driver_node: NodeId,
    driver_pid: u32,
    phase: Phase,
    cause: String,
    requester: Option<Requester>,
    parts: Vec<SavedPart>,
}

#[derive(Archive, Serialize, Deserialize)]
struct SavedPart {
    node: NodeId,
    ranks: Vec<RankAllocation>,
    pids: Vec<u32>,
    states: Vec<WorkerState>,
    keeper: Keeper,
}

#[derive(Archive, Serialize, Deserialize)]
struct SavedPlacementGroup {
    id: PlacementGroupId,
    name: String,
    strategy: Strategy,
    bundle_count: u32,
    bundles: Vec<(u32, NodeId, Allocation)>,
    requester: Option<Requester>,
    orphaned: bool,
    removing: bool,
}

impl Head {
    /// The state file's bytes as of now.
    pub(super) fn saved_state(&self) -> Vec<u8> {
        let reaped = |id: &GroupId| self.groups.get(id).is_some_and(Group::is_reaped);
        let kept = self.groups.iter().filter(|(_, g)| !(g.phase.is_over() && g.is_reaped()));
        let state = SavedState {
            cluster: self.config.cluster,
            nodes: self
                .nodes
                .values()
                .map(|n| SavedNode {
                    info: n.info.clone(),
                    // An assumed death is none for the next head either.
                    state: if n.awaited.is_some() { NodeState::Suspect } else { n.state },
                    cause: n.cause.clone(),
                })
                .collect(),
            groups: kept.map(|(id, g)| save_group(*id, g)).collect(),
            placement_groups: self.placement_groups.iter().map(|(id, p)| save_placement_group(*id, p)).collect(),
            over_groups: self.buried_groups.iter().copied().collect(),
            over_placement_groups: self.buried_bundles.iter().copied().collect(),
            events: self.events.iter().cloned().collect(),
            ended: self.ended_after(0).into_iter().filter(|ended| reaped(&ended.group)).collect(),
        };
        let body = codec::encode(&state);
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&fnv1a(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// A head that goes on where the one before it was when it last saved. The cluster's id is the saved one. Nodes that were
    /// alive are suspect until they dial, and taken for dead if they do not within [`REJOIN_TIMEOUT`].
    ///
    /// # Errors
    /// [`RestoreError`] for anything but a whole state file of this version.
    pub fn restore(config: HeadConfig, bytes: &[u8], now: Instant) -> Result<Self, RestoreError> {
        let saved = read(bytes)?;
        let mut head = Self::new(config, now);
        head.config.cluster = saved.cluster;
        head.remember(Story::new(saved.events, saved.ended), now);
        head.buried_groups = saved.over_groups.into();
        head.buried_bundles = saved.over_placement_groups.into();
        for node in saved.nodes {
            head.restore_node(node, now);
        }
        for group in saved.placement_groups {
            head.restore_placement_group(group);
        }
        for group in saved.groups {
            head.restore_group(group, now);
        }
        let line = format!("the head restarted and remembers {} nodes, {} groups", head.nodes.len(), head.groups.len());
        head.note("head-restarted", line, now);
        Ok(head)
    }

    fn restore_node(&mut self, saved: SavedNode, now: Instant) {
        let (id, incarnation) = (saved.info.id, saved.info.incarnation);
        let was_here = matches!(saved.state, NodeState::Alive | NodeState::Suspect);
        let node = Node {
            pool: Pool::of_node(&saved.info.resources, saved.info.gpus.iter().map(|g| g.index)),
            info: saved.info,
            state: if was_here { NodeState::Suspect } else { saved.state },
            incarnation,
            session: None,
            heard: None,
            rtt_us: 0,
            awaited: was_here.then_some(now + REJOIN_TIMEOUT),
            tokens: Vec::new(),
            token_problem: String::new(),
            contest: None,
            launches: Launches::default(),
            cause: if was_here { "it has yet to dial the restarted head".into() } else { saved.cause },
            since: now,
        };
        self.nodes.insert(id, node);
    }

    fn restore_placement_group(&mut self, saved: SavedPlacementGroup) {
        let mut group = PlacementGroup {
            name: saved.name,
            strategy: saved.strategy,
            bundle_count: saved.bundle_count,
            bundles: std::collections::BTreeMap::new(),
            requester: saved.requester,
            told_on: None,
            orphaned: saved.orphaned,
            removing: saved.removing,
        };
        for (index, node, allocation) in saved.bundles {
            if self.nodes.get_mut(&node).is_some_and(|n| n.pool.take_exactly(&allocation)) {
                group.bundles.insert(index, Bundle::new(node, allocation));
            }
        }
        self.placement_groups.insert(saved.id, group);
    }

    fn restore_group(&mut self, saved: SavedGroup, now: Instant) {
        let mut group = Group {
            name: saved.name,
            world_size: saved.world_size,
            driver_node: saved.driver_node,
            driver_pid: saved.driver_pid,
            phase: saved.phase,
            cause: saved.cause,
            requester: saved.requester,
            told_on: None,
            parts: std::collections::BTreeMap::new(),
            ended: saved.phase.is_over().then_some(now),
            resumed: None,
            end_number: if saved.phase.is_over() { self.telling.next_end() } else { 0 },
        };
        for saved in saved.parts {
            let mut part = Part::new(saved.ranks, saved.keeper, now);
            part.pids = saved.pids;
            part.states = saved.states;
            if part.keeper != Keeper::Gone {
                part.counted = self.take_ranks(saved.node, &part.ranks);
            }
            group.parts.insert(saved.node, part);
        }
        // A launch that came over from an earlier head, and whose nodes had not all come when this was saved.
        group.resumed = (group.phase == Phase::Placing && !group.is_whole()).then(|| Self::resumed(now));
        self.groups.insert(saved.id, group);
    }
}

impl Story {
    /// The past alone, out of a head's state file.
    ///
    /// # Errors
    /// As for [`Head::restore`].
    pub fn of_state(bytes: &[u8]) -> Result<Self, RestoreError> {
        read(bytes).map(|saved| Self::new(saved.events, saved.ended))
    }
}

fn read(bytes: &[u8]) -> Result<SavedState, RestoreError> {
    let body = bytes.get(HEADER..).ok_or(RestoreError)?;
    let sum = fnv1a(body).to_le_bytes();
    if bytes[..4] != MAGIC || bytes[4..6] != VERSION.to_le_bytes() || bytes[6..HEADER] != sum {
        return Err(RestoreError);
    }
    codec::decode(body).map_err(|_| RestoreError)
}

fn save_group(id: GroupId, group: &Group) -> SavedGroup {
    let part = |(node, p): (&NodeId, &Part)| SavedPart {
        node: *node,
        ranks: p.ranks.clone(),
        pids: p.pids.clone(),
        states: p.states.clone(),
        keeper: p.keeper,
    };
    SavedGroup {
        id,
        name: group.name.clone(),
        world_size: group.world_size,
        driver_node: group.driver_node,
        driver_pid: group.driver_pid,
        phase: group.phase,
        cause: group.cause.clone(),
        requester: group.requester,
        parts: group.parts.iter().map(part).collect(),
    }
}

fn save_placement_group(id: PlacementGroupId, group: &PlacementGroup) -> SavedPlacementGroup {
    SavedPlacementGroup {
        id,
        name: group.name.clone(),
        strategy: group.strategy,
        bundle_count: group.bundle_count,
        bundles: group.bundles.iter().map(|(index, b)| (*index, b.node, b.allocation.clone())).collect(),
        requester: group.requester,
        orphaned: group.orphaned,
        removing: group.removing,
    }
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
