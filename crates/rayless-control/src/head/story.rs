//! What later heads should know of the past: the last events, and the groups that are over with their causes.
//!
//! The head tells it to its standbys over their own sessions, all of it once and then what is new, at most each [`STORY_PERIOD`]; a standby that becomes
//! the head begins with it. What ended while there was no head is in what nodes say at their join. The state file has it, too.

use super::{
    Head,
    model::{Group, Keeper, Part, Phase},
};
use crate::SessionId;
use rayless_proto::{
    ids::{GroupId, NodeId},
    limits::{MAX_CAUSE, MAX_ENDED_GROUPS, MAX_EVENTS, MAX_STORY_GROUPS, STORY_PERIOD},
    resources::Allocation,
    v1::{
        control::{EndedGroup, RankAllocation, ToNode, WorkerState},
        status::Event,
    },
};
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

/// The past as a head leaves it to the next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Story {
    events: VecDeque<Event>,
    ended: VecDeque<EndedGroup>,
}

impl Story {
    pub(super) fn new(events: Vec<Event>, ended: Vec<EndedGroup>) -> Self {
        Self { events: events.into(), ended: ended.into() }
    }

    /// Takes a [`ToNode::Story`]. What is too old for the limits is forgotten.
    pub fn take(&mut self, whole: bool, events: Vec<Event>, ended: Vec<EndedGroup>) {
        if whole {
            *self = Self::default();
        }
        self.events.extend(events);
        self.ended.extend(ended);
        self.events.drain(..self.events.len().saturating_sub(MAX_EVENTS));
        self.ended.drain(..self.ended.len().saturating_sub(MAX_ENDED_GROUPS));
    }

    /// Whether nobody has told anything yet.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty() && self.ended.is_empty()
    }
}

/// How far standbys have been told.
#[derive(Debug, Default)]
pub(super) struct Telling {
    /// Events ever kept, and groups ever ended.
    events: u64,
    ends: u64,
    /// There is something that somebody may not know.
    due: bool,
    last: Option<Instant>,
    told: BTreeMap<NodeId, Told>,
}

impl Telling {
    /// The number of the group that ends now.
    pub(super) const fn next_end(&mut self) -> u64 {
        self.ends += 1;
        self.ends
    }
}

#[derive(Debug, Clone, Copy)]
struct Told {
    session: SessionId,
    events: u64,
    ends: u64,
}

impl Head {
    /// What the next head should know.
    pub fn story(&self) -> Story {
        Story { events: self.events.iter().map(shortened).collect(), ended: self.ended_after(0).into() }
    }

    /// Begins with the past that another head, or this daemon's last life, has left. Before anybody joins.
    pub fn remember(&mut self, story: Story, now: Instant) {
        for event in story.events.into_iter().rev() {
            self.events.push_front(event);
            self.telling.events += 1;
        }
        self.events.drain(..self.events.len().saturating_sub(MAX_EVENTS));
        for ended in story.ended {
            self.remember_ended(&ended, now);
        }
        self.prune_groups();
        let me = self.config.heads.iter().find(|seat| seat.node == self.config.node).map(|seat| seat.name.clone());
        if let Some(name) = me {
            self.note("head-changed", format!("{name} is the head now (term {})", self.config.term.0), now);
        }
    }

    /// Enters a group that is over and that this head has never heard of. `false` if it has.
    fn remember_ended(&mut self, ended: &EndedGroup, now: Instant) -> bool {
        if self.groups.contains_key(&ended.group) || self.buried_groups.contains(&ended.group) {
            return false;
        }
        let mut group = Group {
            name: ended.name.clone(),
            world_size: ended.world_size,
            driver_node: ended.driver_node,
            driver_pid: 0,
            phase: if ended.cause.is_empty() { Phase::Stopped } else { Phase::Failed },
            cause: ended.cause.clone(),
            requester: None,
            told_on: None,
            parts: BTreeMap::new(),
            ended: Some(self.moment_of(ended.time_us, now)),
            resumed: None,
            end_number: self.telling.next_end(),
        };
        for (node, ranks) in &ended.ranks {
            group.parts.insert(*node, gone(ranks, now));
        }
        self.groups.insert(ended.group, group);
        self.dirty = true;
        true
    }

    /// A node says that its part of this group has ended, perhaps long ago.
    pub(super) fn on_ended_before(&mut self, node: NodeId, ended: &EndedGroup, now: Instant) {
        let id = ended.group;
        let at = self.moment_of(ended.time_us, now);
        if self.remember_ended(ended, now) {
            let Some(title) = self.groups.get(&id).map(|g| g.title(id)) else { return };
            if !ended.cause.is_empty() {
                let line = format!("group {title} failed before this head knew of it: {}", ended.cause);
                self.note("group-failed", line, now);
            }
            return self.prune_groups();
        }
        let Some(group) = self.groups.get_mut(&id) else { return };
        if group.parts.contains_key(&node) {
            // Said before, as a rule: then it changes nothing.
            return self.on_group_ended(node, id, &ended.cause, now);
        }
        if group.phase.is_over() {
            // Several nodes tell a new head of one end: the first of them knows why.
            if group.ended.is_some_and(|known| at < known) && group.cause != ended.cause {
                group.ended = Some(at);
                group.cause.clone_from(&ended.cause);
                group.phase = if ended.cause.is_empty() { Phase::Stopped } else { Phase::Failed };
            }
            for (_, ranks) in ended.ranks.iter().filter(|(of, _)| *of == node) {
                group.parts.insert(node, gone(ranks, now));
            }
        } else if !group.is_whole() {
            let placing = group.phase == Phase::Placing;
            match ended.cause.as_str() {
                "" if placing => self.end_group(id, Phase::Failed, "a part of it ended at once", now),
                "" => self.end_group(id, Phase::Stopped, "", now),
                cause => self.end_group(id, Phase::Failed, cause, now),
            }
        }
    }

    /// An event was kept.
    pub(super) const fn has_noted(&mut self) {
        self.telling.events += 1;
        self.telling.due = true;
    }

    /// Somebody may not know what there is to know.
    pub(super) const fn story_due(&mut self) {
        self.telling.due = true;
    }

    pub(super) fn next_telling(&self) -> Option<Instant> {
        self.telling.due.then(|| self.telling.last.map_or(self.started, |at| at + STORY_PERIOD))
    }

    pub(super) fn tell_story_if_due(&mut self, now: Instant) {
        if self.next_telling().is_none_or(|at| now < at) {
            return;
        }
        self.telling.due = false;
        self.telling.last = Some(now);
        let others = self.config.heads.iter().map(|seat| seat.node).filter(|node| *node != self.config.node);
        let standbys: BTreeMap<NodeId, SessionId> =
            others.filter_map(|node| Some((node, self.nodes.get(&node)?.session?))).collect();
        self.telling.told.retain(|node, told| standbys.get(node) == Some(&told.session));
        for (node, session) in standbys {
            let told = self.telling.told.get(&node).copied();
            let (events, ends) = told.map_or((0, 0), |told| (told.events, told.ends));
            let fresh = usize::try_from(self.telling.events - events).unwrap_or(usize::MAX).min(self.events.len());
            let mut events: Vec<Event> = self.events.iter().skip(self.events.len() - fresh).map(shortened).collect();
            let ended = self.ended_after(ends);
            let mut whole = told.is_none();
            let mut parts = ended.chunks(MAX_STORY_GROUPS);
            while let Some(ended) = parts.next().or_else(|| (whole || !events.is_empty()).then_some(&[][..])) {
                let (events, ended) = (std::mem::take(&mut events), ended.to_vec());
                self.send(node, ToNode::Story { whole: std::mem::take(&mut whole), events, ended });
            }
            let (events, ends) = (self.telling.events, self.telling.ends);
            self.telling.told.insert(node, Told { session, events, ends });
        }
    }

    /// Groups that ended after that many others, oldest first.
    pub(super) fn ended_after(&self, ends: u64) -> Vec<EndedGroup> {
        let mut ended: Vec<(u64, GroupId, &Group)> = self
            .groups
            .iter()
            .filter(|(_, g)| g.phase.is_over() && g.end_number > ends)
            .map(|(id, g)| (g.end_number, *id, g))
            .collect();
        ended.sort_unstable_by_key(|(number, ..)| *number);
        ended.into_iter().map(|(_, id, group)| self.ended_group(id, group)).collect()
    }

    fn ended_group(&self, id: GroupId, group: &Group) -> EndedGroup {
        let ranks = |part: &Part| part.ranks.iter().map(|rank| rank.rank).collect();
        EndedGroup {
            group: id,
            name: group.name.clone(),
            world_size: group.world_size,
            driver_node: group.driver_node,
            cause: group.cause.chars().take(MAX_CAUSE).collect(),
            time_us: group.ended.map_or(0, |at| self.wall_clock(at)),
            ranks: group.parts.iter().map(|(node, part)| (*node, ranks(part))).collect(),
        }
    }

    /// When that was, as far as this process can say.
    fn moment_of(&self, time_us: u64, now: Instant) -> Instant {
        let ago = Duration::from_micros(self.wall_clock(now).saturating_sub(time_us));
        now.checked_sub(ago).unwrap_or(self.started)
    }
}

/// A part that holds nothing.
fn gone(ranks: &[u32], now: Instant) -> Part {
    let rank = |rank: &u32| RankAllocation { rank: *rank, allocation: Allocation::default(), placement_group: None };
    let mut part = Part::new(ranks.iter().map(rank).collect(), Keeper::Gone, now);
    part.states.fill(WorkerState::Dead);
    part
}

fn shortened(event: &Event) -> Event {
    Event { cause: event.cause.chars().take(MAX_CAUSE).collect(), ..event.clone() }
}
