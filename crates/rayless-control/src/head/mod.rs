//! The head's side of membership: nodes, placement, the life of groups.
//!
//! [`Head`] is one struct; each file here holds what it does about one subject:
//!
//! | file | subject |
//! |---|---|
//! | `io` | inputs and effects |
//! | `model` | what it keeps |
//! | `nodes` | join, rejoin, leave, suspect, dead, fenced |
//! | `adopt` | what a joining node still holds, against the head's books |
//! | `resume` | launches that another head began |
//! | `groups` | from `StartKeeper` to the last `GroupEnded` |
//! | `bundles` | placement groups |
//! | `queue` | who waits, and in which order who is served |
//! | `table` | the need/have table and the line of cause |
//! | `tokens` | which cluster tokens are in force, and who has them |
//! | `state` | the state file |
//! | `story` | what later heads should know of the past |
//! | `report` | `status`, and the audit of the books |
//!
//! # Invariants (`Head::audit` recounts them)
//! - **R1** For each node, resource and device: free + held by groups and bundles = total.
//! - **R2** A part of a group holds its share from `StartKeeper` until `GroupEnded`, a join of its node without it, or the node's leave.
//! - **R3** A group that is over has no part that was not told to stop, and is stopped on every node that brings it back.
//! - **R4** An answer goes only to the life of a daemon that asked.

mod adopt;
mod bundles;
mod groups;
mod io;
mod model;
mod nodes;
mod queue;
mod report;
mod resume;
mod state;
mod story;
mod table;
mod tokens;

pub use io::{Effect, HeadConfig, Input};
pub use state::RestoreError;
pub use story::Story;

use crate::SessionId;
use model::{Brought, Group, Launches, Node, PlacementGroup, Requester, Session, StopWait, Waiting};
use rayless_proto::{
    ids::{ClusterId, GroupId, NodeId, PlacementGroupId, RequestId, Term},
    limits::{MAX_EVENTS, MAX_REPORT_PART, MAX_TOMBSTONES},
    v1::{
        control::{HeadTerm, Refusal, RefusalKind, ReportPart, ToHead, ToNode},
        status::{Event, HeadSeat},
    },
};
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

/// Shortest time between two saves of the head's state. The file is a help, not needed: nodes bring what they hold.
pub const SAVE_PERIOD: Duration = Duration::from_millis(250);

/// The head of a cluster.
#[derive(Debug)]
pub struct Head {
    config: HeadConfig,
    started: Instant,
    drawn: u64,
    sessions: BTreeMap<SessionId, Session>,
    nodes: BTreeMap<NodeId, Node>,
    groups: BTreeMap<GroupId, Group>,
    placement_groups: BTreeMap<PlacementGroupId, PlacementGroup>,
    /// In order of arrival.
    queue: VecDeque<Waiting>,
    stops: Vec<StopWait>,
    /// Groups and placement groups that are over and no longer in the tables above.
    buried_groups: VecDeque<GroupId>,
    buried_bundles: VecDeque<PlacementGroupId>,
    events: VecDeque<Event>,
    refused_handshakes: u64,
    /// `None` until the daemon has handed them in.
    tokens: Option<tokens::Tokens>,
    /// Counts changes of who is placeable and of what nodes have at all.
    shape: u64,
    /// Something became free: all who wait are worth another look.
    stirred: bool,
    /// Somebody new waits.
    arrived: bool,
    dirty: bool,
    saved: Option<Instant>,
    telling: story::Telling,
    effects: VecDeque<Effect>,
}

impl Head {
    /// A head that knows nobody yet.
    pub fn new(config: HeadConfig, now: Instant) -> Self {
        Self {
            config,
            started: now,
            drawn: 0,
            sessions: BTreeMap::new(),
            nodes: BTreeMap::new(),
            groups: BTreeMap::new(),
            placement_groups: BTreeMap::new(),
            queue: VecDeque::new(),
            stops: Vec::new(),
            buried_groups: VecDeque::new(),
            buried_bundles: VecDeque::new(),
            events: VecDeque::new(),
            refused_handshakes: 0,
            tokens: None,
            shape: 0,
            stirred: false,
            arrived: false,
            dirty: true,
            saved: None,
            telling: story::Telling::default(),
            effects: VecDeque::new(),
        }
    }

    /// The cluster's id: the restored one, else the one of the configuration.
    pub const fn cluster(&self) -> ClusterId {
        self.config.cluster
    }

    /// In whose name its messages go out.
    pub const fn by(&self) -> HeadTerm {
        HeadTerm { cluster: self.config.cluster, term: self.config.term }
    }

    /// Takes one event. Effects are then there to be polled.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::SessionOpened { session, node, address } => {
                self.sessions.insert(session, Session { node, address, joined: false });
            }
            Input::Message { session, message } => self.on_message(session, message, now),
            Input::SessionClosed { session } => self.on_session_closed(session),
            Input::Liveness { node, incarnation, transition } => self.on_liveness(node, incarnation, transition, now),
            Input::Heard { node, incarnation, ago, rtt_us } => {
                if let Some(node) = self.nodes.get_mut(&node).filter(|n| n.incarnation == incarnation) {
                    node.heard = now.checked_sub(ago).max(node.heard);
                    if rtt_us > 0 {
                        node.rtt_us = rtt_us;
                    }
                }
                // It decides nothing, and comes once per node and half second: what follows looks at every node.
                return;
            }
            Input::Heads(heads) => self.on_heads(heads),
            Input::HandshakeRefused { from, cause } => {
                self.refused_handshakes += 1;
                let line = format!("{from} was refused: {cause}");
                self.note_repeated("handshake-refused", line, now);
            }
            Input::Tokens { set, overlap } => self.on_tokens(set, overlap, now),
            Input::Timer => {}
        }
        self.check_overlap(now);
        self.check_awaited(now);
        self.check_deadlines(now);
        self.check_resumed(now);
        self.run_queue(now);
        self.settle_stops(now);
        self.tell_story_if_due(now);
        self.save_if_due(now);
    }

    /// The next effect, oldest first.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to hand in [`Input::Timer`] at the latest.
    pub fn next_timeout(&self) -> Option<Instant> {
        // Who is doubted is neither told nor refused before the doubt ends.
        let waits = self.queue.iter().map(|w| w.doubted.map_or_else(|| w.next_report.min(w.until), queue::doubt_ends));
        let stops = self.stops.iter().map(|s| s.until);
        let save = self.dirty.then(|| self.saved.map_or(self.started, |at| at + SAVE_PERIOD));
        let awaited = self.nodes.values().filter(|n| !n.is_gone()).filter_map(|n| n.awaited);
        let others = [self.next_part_deadline(), self.next_overlap_end(), self.next_resumed_end(), self.next_telling()]
            .into_iter()
            .flatten();
        waits.chain(stops).chain(save).chain(awaited).chain(others).min()
    }

    fn on_message(&mut self, session: SessionId, message: ToHead, now: Instant) {
        let Some(opened) = self.sessions.get(&session) else { return };
        let from = opened.node;
        if let ToHead::Join { info, seen, held, ended, asks, told, held_placement_groups, .. } = message {
            let higher = seen.filter(|seen| seen.cluster == self.config.cluster && seen.term > self.config.term);
            if let Some(higher) = higher {
                self.superseded(session, info.id, &info.name, higher.term, now);
            } else if !opened.joined {
                let launches = Launches { asks: asks.into_iter().collect(), told: told.into_iter().collect() };
                let brought = Brought { held, ended, held_bundles: held_placement_groups, launches };
                self.on_join(session, info, &brought, now);
            }
            return;
        }
        // A message on another session than the node's present one is a late one of an earlier session.
        let Some(node) = self.nodes.get(&from).filter(|n| n.session == Some(session)) else { return };
        let requester = |request: RequestId| Requester { node: from, incarnation: node.incarnation, request };
        match message {
            ToHead::Join { .. } => {}
            ToHead::Leave => self.on_leave(from, now),
            ToHead::CreateGroup { request, spec } => {
                let requester = requester(request);
                self.on_create_group(requester, spec, now);
            }
            ToHead::CancelRequest { request } => {
                let requester = requester(request);
                self.on_cancel(requester, now);
            }
            ToHead::CreatePlacementGroup { request, name, bundles, strategy, wait_ms } => {
                let requester = requester(request);
                self.on_create_placement_group(requester, name, bundles, strategy, wait_ms, now);
            }
            ToHead::RemovePlacementGroup { request, id } => {
                let requester = requester(request);
                self.on_remove_placement_group(requester, id, now);
            }
            ToHead::StopGroup { request, group } => {
                let requester = requester(request);
                self.on_stop_group(requester, group, now);
            }
            ToHead::Status { request } => {
                let requester = requester(request);
                let report = self.status(now);
                self.reply(requester, ToNode::Status { request, report });
            }
            ToHead::KeeperReady { group } => self.on_keeper_ready(from, group, now),
            ToHead::WorkerChanged { group, rank, pid, state } => {
                self.on_worker_changed(from, group, rank, pid, state, now);
            }
            ToHead::LinkChanged { group, report } => self.on_link_changed(from, group, report),
            ToHead::GroupEnded { group, cause } => self.on_group_ended(from, group, &cause, now),
            ToHead::KeeperStopped { group, stopped } => self.on_keeper_stopped(from, group, stopped, now),
            ToHead::RanksStuck { group, line } => self.on_ranks_stuck(from, group, &line, now),
            ToHead::GpuDraining { gpus } => self.on_gpu_draining(from, &gpus),
            ToHead::Update { info } => self.on_update(from, info, now),
            ToHead::TokensHeld { marks, problem } => self.on_tokens_held(from, marks, problem, now),
            ToHead::AskReport { request, node } => {
                self.on_ask_report(requester(request), node);
            }
            ToHead::ReportMade { by, part } => self.on_report_made(from, by, part),
        }
    }

    /// A client of one node wants what another one has to say. Nothing is kept of it: the answer brings along who asked, and who asked knows
    /// how long to wait.
    fn on_ask_report(&mut self, by: Requester, node: NodeId) {
        let Some(asked) = self.nodes.get(&node) else {
            self.refuse(by, RefusalKind::Invalid, format!("no node {} is known", node.short()), "");
            return;
        };
        if asked.session.is_none() {
            let cause = format!("node {} is not connected to the head", asked.info.name);
            self.refuse(by, RefusalKind::Failed, cause, "");
            return;
        }
        self.send(node, ToNode::MakeReport(by));
    }

    fn on_report_made(&mut self, from: NodeId, by: Requester, mut part: ReportPart) {
        if part.archive.len() > MAX_REPORT_PART {
            let cause =
                format!("{} sent {} bytes, {MAX_REPORT_PART} are allowed", self.node_name(from), part.archive.len());
            part = ReportPart { archive: Vec::new(), cause };
        }
        self.reply(by, ToNode::ReportPart { request: by.request, part });
    }

    /// Another head has come after this one: whoever runs it ends it.
    fn superseded(&mut self, session: SessionId, node: NodeId, name: &str, higher: Term, now: Instant) {
        let mine = self.config.term.0;
        let line =
            format!("node {name} was a member under term {}, this head's is {mine}: it has been replaced", higher.0);
        let message = if mine == 0 {
            let cause = format!("node {name} was a member under a head with term {}, this one has no store", higher.0);
            let hint = "start the head with `--store`, or, if the store is given up for good, remove `term` from the node's run dir";
            ToNode::Refused(Refusal { kind: RefusalKind::Policy, cause, hint: hint.into() })
        } else {
            ToNode::Elsewhere { head: None, cause: line.clone() }
        };
        self.note_repeated("head-replaced", line, now);
        self.turn_away(session, node, message);
        self.effects.push_back(Effect::Superseded(higher));
    }

    fn on_heads(&mut self, heads: Vec<HeadSeat>) {
        if heads == self.config.heads {
            return;
        }
        self.config.heads = heads;
        self.story_due();
        let addresses: Vec<String> = self.config.heads.iter().map(|head| head.address.clone()).collect();
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        for node in nodes {
            self.send(node, ToNode::Heads(addresses.clone()));
        }
    }

    fn on_session_closed(&mut self, session: SessionId) {
        let Some(closed) = self.sessions.remove(&session) else { return };
        if let Some(node) = self.nodes.get_mut(&closed.node).filter(|n| n.session == Some(session)) {
            // Not dead by that: its heartbeats decide. Until it dials again nothing is placed on it.
            node.session = None;
            self.shape += 1;
        }
    }

    /// Sends to a node's present session; lost where there is none, to be repaired by its next join.
    fn send(&mut self, to: NodeId, message: ToNode) {
        if let Some(session) = self.nodes.get(&to).and_then(|n| n.session) {
            self.effects.push_back(Effect::Send { session, to, message });
        }
    }

    /// Answers a request, if the life of the daemon that asked still is (R4).
    fn reply(&mut self, to: Requester, message: ToNode) {
        if self.nodes.get(&to.node).is_some_and(|n| n.incarnation == to.incarnation) {
            self.send(to.node, message);
        }
    }

    fn refuse(&mut self, to: Requester, kind: RefusalKind, cause: impl Into<String>, hint: impl Into<String>) {
        let refusal = Refusal { kind, cause: cause.into(), hint: hint.into() };
        self.reply(to, ToNode::RequestRefused { request: to.request, refusal, table: None });
    }

    /// Keeps an event and has it told.
    fn note(&mut self, kind: &str, cause: impl Into<String>, now: Instant) {
        let event = Event { time_us: self.wall_clock(now), kind: kind.to_owned(), cause: cause.into() };
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event.clone());
        self.has_noted();
        self.dirty = true;
        self.effects.push_back(Effect::Notify(event));
    }

    /// Like [`note`](Self::note) for what strangers can cause: what repeats within a second only replaces the cause, so that
    /// they cannot flood the log or push the rest of the story out of `status`.
    fn note_repeated(&mut self, kind: &str, cause: String, now: Instant) {
        let time_us = self.wall_clock(now);
        match self.events.iter_mut().rev().find(|e| e.kind == kind) {
            Some(recent) if time_us.saturating_sub(recent.time_us) < 1_000_000 => recent.cause = cause,
            _ => self.note(kind, cause, now),
        }
    }

    fn wall_clock(&self, now: Instant) -> u64 {
        let since_start = now.saturating_duration_since(self.started).as_micros();
        self.config.unix_us.saturating_add(u64::try_from(since_start).unwrap_or(u64::MAX))
    }

    /// A number that no one can have had before from this head.
    fn draw(&mut self) -> [u8; 8] {
        // splitmix64: a bijection of its counter, so that no value repeats.
        self.drawn = self.drawn.wrapping_add(1);
        let mut x = self.config.seed.wrapping_add(self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)).to_be_bytes()
    }

    fn bury_group(&mut self, id: GroupId) {
        if self.buried_groups.len() >= MAX_TOMBSTONES {
            self.buried_groups.pop_front();
        }
        self.buried_groups.push_back(id);
    }

    fn bury_bundles(&mut self, id: PlacementGroupId) {
        if self.buried_bundles.len() >= MAX_TOMBSTONES {
            self.buried_bundles.pop_front();
        }
        self.buried_bundles.push_back(id);
    }

    fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.short(), |n| n.info.name.clone())
    }

    fn save_if_due(&mut self, now: Instant) {
        if self.dirty && self.saved.is_none_or(|at| now >= at + SAVE_PERIOD) {
            self.dirty = false;
            self.saved = Some(now);
            let bytes = self.saved_state();
            self.effects.push_back(Effect::SaveState(bytes));
        }
    }
}
