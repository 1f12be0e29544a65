//! What the head keeps: nodes, groups, placement groups, and who waits.

use crate::{SessionId, pool::Pool};
pub(super) use rayless_proto::v1::control::Requester;
use rayless_proto::{
    ids::{GroupId, Incarnation, NodeId, PlacementGroupId, RequestId, TokenMark},
    limits::MAX_LINK_ENDS,
    resources::{Allocation, Resources, Strategy},
    v1::{
        control::{EndedGroup, GroupSpec, HeldGroup, HeldPlacementGroup, NodeInfo, RankAllocation, WorkerState},
        link::LinkReport,
        status::{GroupState, NodeState},
    },
};
use rkyv::{Archive, Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// An authenticated control session.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) node: NodeId,
    pub(super) address: String,
    pub(super) joined: bool,
}

/// What a joining node says of groups.
#[derive(Debug, Clone)]
pub(super) struct Brought {
    pub(super) held: Vec<HeldGroup>,
    pub(super) ended: Vec<EndedGroup>,
    pub(super) held_bundles: Vec<HeldPlacementGroup>,
    pub(super) launches: Launches,
}

/// What a node said at its last join of the launches of its clients, by its own numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct Launches {
    /// Those that it is about to ask for again.
    pub(super) asks: BTreeSet<RequestId>,
    /// Those whose client was told and is still there.
    pub(super) told: BTreeSet<RequestId>,
}

/// How long the older of two lives of a node has to show that it still is, when the newer one comes from another host. Its session was replaced, so it dials
/// within milliseconds; longer than a lost packet or two.
pub(super) const CONTEST: Duration = Duration::from_millis(1500);
/// For so long it then is the node, whoever else comes with its key.
const CONTEST_WON: Duration = Duration::from_secs(60);

/// A second host came with a node's key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Contest {
    /// Then; the first one has not been heard of since.
    Since(Instant),
    /// The first one dialled again then.
    Won(Instant),
}

/// A node that joined at least once.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) info: NodeInfo,
    pub(super) state: NodeState,
    pub(super) incarnation: Incarnation,
    /// Its present control session. A node may be alive without one: it is about to dial again.
    pub(super) session: Option<SessionId>,
    pub(super) pool: Pool,
    pub(super) heard: Option<Instant>,
    pub(super) rtt_us: u64,
    /// Remembered by a restarted head and not heard of by it yet: taken for dead then. Such a death is only assumed, and
    /// whoever comes back from it is not fenced.
    pub(super) awaited: Option<Instant>,
    /// Marks of the cluster tokens that it accepts, by its own word in this session; the current one's first.
    pub(super) tokens: Vec<TokenMark>,
    /// Why it could not take those it was sent last.
    pub(super) token_problem: String,
    pub(super) contest: Option<Contest>,
    pub(super) launches: Launches,
    /// Why it is dead or left.
    pub(super) cause: String,
    /// When `state` became what it is.
    pub(super) since: Instant,
}

impl Node {
    /// Whether something may be started on it.
    pub(super) fn is_placeable(&self) -> bool {
        self.state == NodeState::Alive && self.session.is_some()
    }

    /// Whether `info` comes from another host with this node's key while this one is known to live: the same life cannot be in two places, and a newer
    /// one was contested and lost. Nor can the head's own, whose session is no network's.
    pub(super) fn is_claimed_elsewhere(&self, info: &NodeInfo, head: NodeId, now: Instant) -> bool {
        let won = |at: Instant| now.saturating_duration_since(at) < CONTEST_WON;
        !self.is_gone()
            && self.info.host_id != info.host_id
            && (info.id == head
                || self.incarnation >= info.incarnation
                || matches!(self.contest, Some(Contest::Won(at)) if won(at)))
    }

    pub(super) fn is_gone(&self) -> bool {
        matches!(self.state, NodeState::Dead | NodeState::Left)
    }
}

/// Life of a group as the head decides by it; `status` shows fewer states.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Keepers are starting; nobody has been told yet. The head decides.
    Placing,
    /// The driver knows; workers are starting. From here on the sessions decide.
    Placed,
    /// All workers are ready.
    Running,
    /// Every node of it is dead. It counts as failed, unless one of them comes back as a new life that still runs it.
    Lost,
    /// Ended by a fault.
    Failed,
    /// Ended in order.
    Stopped,
}

impl Phase {
    /// Whether it is to go on.
    pub(super) const fn is_live(self) -> bool {
        matches!(self, Self::Placing | Self::Placed | Self::Running)
    }

    pub(super) const fn is_over(self) -> bool {
        matches!(self, Self::Failed | Self::Stopped)
    }

    pub(super) const fn shown(self) -> GroupState {
        match self {
            Self::Placing | Self::Placed => GroupState::Starting,
            Self::Running => GroupState::Running,
            Self::Lost | Self::Failed => GroupState::Failed,
            Self::Stopped => GroupState::Stopped,
        }
    }
}

/// A keeper as far as the head knows.
#[derive(Archive, Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeper {
    /// Told to start.
    Starting,
    /// Takes sessions.
    Up,
    /// Told to end.
    Stopping,
    /// Ended, or gone with its node's last life. Holds nothing.
    Gone,
}

/// A group's part on one node.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) ranks: Vec<RankAllocation>,
    pub(super) pids: Vec<u32>,
    pub(super) states: Vec<WorkerState>,
    /// Ends of links that its ranks have; not saved, for nodes bring them.
    pub(super) links: Vec<LinkReport>,
    pub(super) keeper: Keeper,
    /// Which of `ranks` are taken out of a pool: all, but for what a node claims against the head's books.
    pub(super) counted: Vec<bool>,
    /// When it was last told to start or to stop.
    pub(super) told: Instant,
}

impl Part {
    pub(super) fn new(ranks: Vec<RankAllocation>, keeper: Keeper, now: Instant) -> Self {
        let count = ranks.len();
        let states = vec![WorkerState::Starting; count];
        Self { ranks, pids: vec![0; count], states, links: Vec::new(), keeper, counted: vec![false; count], told: now }
    }

    /// The ranks that are taken out of a pool.
    pub(super) fn counted_ranks(&self) -> impl Iterator<Item = &RankAllocation> {
        self.ranks.iter().zip(&self.counted).filter(|(_, counted)| **counted).map(|(rank, _)| rank)
    }

    /// Takes the report of an end of a link, if that end is at one of its ranks.
    pub(super) fn take_report(&mut self, mut report: LinkReport) {
        let of = if report.by_sender { report.from } else { report.to };
        if self.ranks.iter().any(|known| known.rank == of) {
            report.shorten();
            report.put_into(&mut self.links, MAX_LINK_ENDS);
        }
    }

    pub(super) fn is_wholly_counted(&self) -> bool {
        self.counted.iter().all(|c| *c)
    }
}

/// A group of workers.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) world_size: u32,
    pub(super) driver_node: NodeId,
    pub(super) driver_pid: u32,
    pub(super) phase: Phase,
    pub(super) cause: String,
    /// Unknown for groups that were adopted from nodes alone.
    pub(super) requester: Option<Requester>,
    /// The session on which the requester was told: it is not told twice on one.
    pub(super) told_on: Option<SessionId>,
    pub(super) parts: BTreeMap<NodeId, Part>,
    pub(super) ended: Option<Instant>,
    /// Begun by another head, and not yet known to be whole and waited for.
    pub(super) resumed: Option<Resumed>,
    /// Its place among those that ended under this head; 0 while it lives.
    pub(super) end_number: u64,
}

/// A launch under way that came over from another head.
#[derive(Debug, Clone)]
pub(super) struct Resumed {
    /// Ended then, if it is still not known to be whole and waited for.
    pub(super) until: Instant,
    /// What was asked for, once whoever asked has asked again, and when that was.
    pub(super) asked: Option<(GroupSpec, Instant)>,
}

impl Group {
    /// Whether the head knows where each of its ranks is. Not so while nodes have yet to bring theirs to a new head.
    pub(super) fn is_whole(&self) -> bool {
        self.parts.values().map(|p| p.ranks.len()).sum::<usize>() >= self.world_size as usize
    }

    /// Whether nothing of it is left anywhere.
    pub(super) fn is_reaped(&self) -> bool {
        self.parts.values().all(|p| p.keeper == Keeper::Gone)
    }

    /// Nodes that a change of `node` concerns: those of its ranks and its driver's.
    pub(super) fn nodes(&self) -> BTreeSet<NodeId> {
        let holding = self.parts.iter().filter(|(_, p)| p.keeper != Keeper::Gone);
        holding.map(|(n, _)| *n).chain([self.driver_node]).collect()
    }

    /// Whether some rank is carved out of this placement group.
    pub(super) fn is_carved_from(&self, id: PlacementGroupId) -> bool {
        let mut ranks = self.parts.values().filter(|p| p.keeper != Keeper::Gone).flat_map(|p| &p.ranks);
        ranks.any(|r| r.placement_group.is_some_and(|(from, _)| from == id))
    }

    /// For people: the name, with the id's first digits.
    pub(super) fn title(&self, id: GroupId) -> String {
        if self.name.is_empty() { id.short() } else { format!("{} ({})", self.name, id.short()) }
    }
}

/// A bundle of a placement group.
#[derive(Debug, Clone)]
pub(super) struct Bundle {
    pub(super) node: NodeId,
    pub(super) allocation: Allocation,
    /// What groups carve from.
    pub(super) pool: Pool,
}

impl Bundle {
    pub(super) fn new(node: NodeId, allocation: Allocation) -> Self {
        let pool = Pool::of_allocation(&allocation);
        Self { node, allocation, pool }
    }
}

/// A placement group.
#[derive(Debug, Clone)]
pub(super) struct PlacementGroup {
    pub(super) name: String,
    pub(super) strategy: Strategy,
    pub(super) bundle_count: u32,
    /// By index. Fewer than `bundle_count` while nodes have yet to rejoin a head that was restarted.
    pub(super) bundles: BTreeMap<u32, Bundle>,
    pub(super) requester: Option<Requester>,
    /// As for groups.
    pub(super) told_on: Option<SessionId>,
    /// The client that made it is gone with its daemon's life: given back when the last group carved out of it has ended.
    pub(super) orphaned: bool,
    /// To be given back as soon as no group holds a part of it; nothing is carved out of it any more.
    pub(super) removing: bool,
}

/// What a request that cannot be served yet asks for.
#[derive(Debug, Clone)]
pub(super) enum Want {
    Group(GroupSpec),
    Bundles { name: String, bundles: Vec<Resources>, strategy: Strategy },
}

impl Want {
    pub(super) fn bundles(&self) -> &[Resources] {
        match self {
            Self::Group(spec) => &spec.bundles,
            Self::Bundles { bundles, .. } => bundles,
        }
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Self::Group(spec) => &spec.name,
            Self::Bundles { name, .. } => name,
        }
    }

    pub(super) const fn strategy(&self) -> Strategy {
        match self {
            Self::Group(spec) => spec.strategy,
            Self::Bundles { strategy, .. } => *strategy,
        }
    }

    pub(super) const fn placement_group(&self) -> Option<PlacementGroupId> {
        match self {
            Self::Group(spec) => spec.placement_group,
            Self::Bundles { .. } => None,
        }
    }
}

/// A request that waits for nodes or resources.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) requester: Requester,
    pub(super) want: Want,
    pub(super) since: Instant,
    pub(super) until: Instant,
    pub(super) next_report: Instant,
    /// Its node joined again since then and has yet to ask again: the client may be gone. Not served meanwhile.
    pub(super) doubted: Option<Instant>,
    /// Nothing became free since it was last tried.
    pub(super) tried: bool,
    /// Whether it could be placed if nobody held anything, as of this version of the cluster's shape.
    pub(super) feasible: Option<(u64, bool)>,
}

/// Someone who wants to know when groups are reaped.
#[derive(Debug, Clone)]
pub(super) struct StopWait {
    pub(super) requester: Requester,
    pub(super) groups: BTreeSet<GroupId>,
    pub(super) placement_groups: BTreeSet<PlacementGroupId>,
    /// Answered then in any case.
    pub(super) until: Instant,
}
