//! The main loop: one queue of events, two state machines (`Member`, on a head also `Head`), and their effects.
//!
//! Whatever takes time (starting a keeper, asking NVML, a client that reads slowly) happens in tasks or threads that put
//! what came of it into the queue. So everything here is plain code on plain maps, in one order of events.

use super::{
    DaemonError, Ready, Talk,
    asked::{Client, Pending},
    event::{ClientId, Event, Events},
    keepers::Keeper,
    stand::{Stand, next_news},
    wire::{News, Wire},
};
use crate::{
    inventory::rdma,
    run_dir::{self, RunDir},
    tokens::Tokens,
};
use rayless_control::{
    Head, Member, SessionId, election,
    head::{self, Story},
    member::{self, Target},
};
use rayless_net::identity::{ClusterIdentity, NodeKey};
use rayless_proto::{
    ids::{GroupId, NodeId, PlacementGroupId, RequestId},
    limits::REAP_TIMEOUT,
    v1::{
        control::{
            EndedGroup, FromHead, HeadTerm, HeldGroup, HeldPlacementGroup, NodeInfo, RefusalKind, ToHead, ToNode,
        },
        local::ClientReply,
        status::NodeState,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Ready/busy changes of a group's workers are told to the head at most this often.
pub(crate) const STATE_REPORT_PERIOD: Duration = Duration::from_secs(1);
/// A fenced node's workers are dead within a second: keepers are asked for so long, then killed.
const FENCE_PATIENCE: Duration = Duration::from_millis(600);
/// A stopping daemon waits for its keepers this long before it kills them.
const STOP_PATIENCE: Duration = Duration::from_secs(REAP_TIMEOUT.as_secs() + 2);
/// After a kill the kernel needs a moment; then the daemon goes on without the keeper's word.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// What a daemon is made of, put together by [`super::run`].
pub(crate) struct Core {
    pub(crate) run: RunDir,
    pub(crate) exe: PathBuf,
    pub(crate) key: NodeKey,
    pub(crate) tokens: Tokens,
    pub(crate) identity: ClusterIdentity,
    pub(crate) info: NodeInfo,
    /// Where the GPUs are on the PCI bus, as far as known.
    pub(crate) gpu_places: rdma::Places,
    /// Whether GPUs come from NVML, so that their memory can be watched.
    pub(crate) gpus_measured: bool,
    pub(crate) dead_after: Duration,
    /// `--dead-after` of this node: how long *it* bears silence, whatever the cluster's value.
    pub(crate) own_dead_after: Option<Duration>,
    /// `--step-deadline`.
    pub(crate) step_deadline: Duration,
    /// The head as the user named it; empty on the head.
    pub(crate) head_address: String,
    /// The one that the user named, where it was one.
    pub(crate) named: Option<SocketAddr>,
    /// IP address of the head as this node dials it.
    pub(crate) head_ip: String,
    pub(crate) wire: Wire,
    pub(crate) events: Events,
    pub(crate) member: Member,
    /// The head, while it is in this process.
    pub(crate) head: Option<Head>,
    /// Where heads take turns: this daemon's part in that.
    pub(crate) stand: Option<Stand>,
    /// The highest term that this node was ever a member under.
    pub(crate) seen: Option<HeadTerm>,
    /// Which of several heads is being dialled.
    pub(crate) dialled: Option<SocketAddr>,
    /// This node's session with the head in the same process: as the member and as the head number it.
    pub(crate) inside: Option<(SessionId, SessionId)>,
    pub(crate) keepers: BTreeMap<GroupId, Keeper>,
    /// Groups whose keeper is gone while the memory of their GPUs is looked at: still held, cause not yet told to the head.
    pub(crate) ending: BTreeMap<GroupId, (HeldGroup, String)>,
    /// The last groups that ended here, with their causes: what was told of them may have been lost with its session.
    pub(crate) ended: VecDeque<EndedGroup>,
    /// On a standby: what the head has told it of the past.
    pub(crate) story: Story,
    /// GPUs whose memory is not back, by group.
    pub(crate) draining: BTreeMap<GroupId, BTreeSet<u32>>,
    pub(crate) placement_groups: BTreeMap<PlacementGroupId, HeldPlacementGroup>,
    pub(crate) clients: BTreeMap<ClientId, Client>,
    pub(crate) requests: BTreeMap<RequestId, Pending>,
    pub(crate) next_request: RequestId,
    /// What the head last said of other nodes.
    pub(crate) verdicts: BTreeMap<NodeId, (String, NodeState)>,
    pub(crate) started: Instant,
    /// How long to wait for the first welcome; `None` once it came.
    pub(crate) wait: Option<Duration>,
    pub(crate) phase: Phase,
    /// Groups of killed keepers whose leftovers are being ended.
    pub(crate) sweeping: usize,
    /// Parts of reports that are being made here for other nodes.
    pub(crate) reports: usize,
    /// When the keepers' processes are looked at next.
    pub(crate) next_look: Instant,
    /// Last failure to save the head's state, told once.
    pub(crate) save_failed: bool,
}

/// What the daemon is about.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Serving.
    Up,
    /// Declared dead: its keepers are on their way out; from `kill` on without asking.
    Fenced { kill: Instant, killed: bool },
    /// Stopping; these clients are told when the groups are ended.
    Leaving { kill: Instant, killed: bool, told: Vec<(ClientId, RequestId)> },
}

/// The loop goes on, or the daemon ends.
pub(crate) enum Flow {
    Go,
    End,
}

impl Core {
    /// Runs until the daemon is stopped or refused.
    pub(crate) async fn serve(
        mut self,
        mut queue: mpsc::Receiver<Event>,
        talk: &mut dyn FnMut(Talk),
    ) -> Result<(), DaemonError> {
        // What it wants from the start.
        self.stand_for(election::Input::Timer);
        loop {
            self.carry_out(talk)?;
            if let Flow::End = self.on_time(Instant::now(), talk)? {
                break;
            }
            self.carry_out(talk)?;
            let wake = self.next_wake();
            tokio::select! {
                event = queue.recv() => match event {
                    Some(event) => self.on_event(event, talk)?,
                    None => break,
                },
                news = self.wire.next() => match news {
                    Some(News::Member(input)) => self.member.handle(Instant::now(), input),
                    Some(News::Head(input)) => self.head_takes(input, Instant::now()),
                    Some(News::HeadInDoubt(doubt)) => self.head_in_doubt(doubt),
                    None => return Err(DaemonError::Failed("the network thread has ended".to_owned())),
                },
                news = next_news(&mut self.stand) => self.store_says(news)?,
                () = sleep_until(wake) => {}
            }
        }
        self.carry_out(talk)?;
        self.stand_no_more().await;
        // Answers that are under way reach their clients: their writers run before this task is polled again.
        for client in self.clients.values_mut() {
            client.close();
        }
        for _ in 0..16 {
            tokio::task::yield_now().await;
        }
        self.wire.close().await;
        Ok(())
    }

    fn on_event(&mut self, event: Event, talk: &mut dyn FnMut(Talk)) -> Result<(), DaemonError> {
        let now = Instant::now();
        match event {
            Event::ClientOpened { client, pid, outbox } => {
                self.clients.insert(client, Client::new(pid, outbox));
            }
            Event::ClientSaid { client, message } => self.client_said(client, message, now),
            Event::ClientGone { client } => self.client_gone(client),
            Event::KeeperStarted { group, started, used } => self.keeper_started(group, started, used),
            Event::KeeperSaid { group, message } => self.keeper_said(group, message),
            Event::KeeperGone { group } => self.keeper_gone(group),
            Event::Swept { group, used } => self.keeper_swept(group, used),
            Event::Draining { group, gpus } => self.group_drains(group, &gpus),
            Event::Drained { group } => self.group_drained(group),
            Event::GpusFound(probe) => self.gpus_found(&probe, talk),
            Event::StepSession { group, from, stream } => self.step_session(group, from, stream),
            Event::ReportMade { by, part } => self.report_made(by, part),
            Event::Signal(name) => {
                tracing::info!("{name}: leaving the cluster");
                self.begin_leave(None, now);
            }
        }
        Ok(())
    }

    /// Carries out what the machines want, until they want nothing more.
    fn carry_out(&mut self, talk: &mut dyn FnMut(Talk)) -> Result<(), DaemonError> {
        loop {
            let now = Instant::now();
            for line in self.take_said() {
                talk(Talk::Line(line));
            }
            if let Some(effect) = self.member.poll_effect() {
                self.member_effect(effect, now, talk)?;
            } else if self.may_decide()
                && let Some((effect, by)) = self.head.as_mut().and_then(|head| Some((head.poll_effect()?, head.by())))
            {
                self.head_effect(effect, by, now);
            } else {
                return Ok(());
            }
        }
    }

    fn member_effect(
        &mut self,
        effect: member::Effect,
        now: Instant,
        talk: &mut dyn FnMut(Talk),
    ) -> Result<(), DaemonError> {
        match effect {
            member::Effect::Dial(session, Target::At(address)) => {
                self.dialled = Some(address);
                self.head_ip = address.ip().to_string();
                self.wire.dial(session, address);
            }
            member::Effect::Dial(session, Target::Here) => match &mut self.head {
                Some(head) => {
                    self.wire.stay();
                    self.dialled = None;
                    self.head_ip.clone_from(&self.info.address);
                    let inside = self.wire.number_session();
                    self.inside = Some((session, inside));
                    let node = self.info.id;
                    head.handle(now, head::Input::SessionOpened { session: inside, node, address: String::new() });
                    self.member.handle(now, member::Input::Connected(session));
                }
                None => {
                    let gone = member::DialError::Unreachable("this daemon is no longer the head".to_owned());
                    self.member.handle(now, member::Input::DialFailed(session, gone));
                }
            },
            member::Effect::Join(session, incarnation) => {
                self.info.incarnation = incarnation;
                self.wire.set_incarnation(incarnation);
                let join = self.join_message();
                self.send_up(session, join, now);
            }
            member::Effect::Send(session, message) => self.send_up(session, message, now),
            member::Effect::Close(session) => match (&mut self.head, self.inside) {
                (Some(head), Some((mine, inside))) if mine == session => {
                    self.inside = None;
                    head.handle(now, head::Input::SessionClosed { session: inside });
                }
                _ => self.wire.hang_up(session),
            },
            member::Effect::Welcomed { cluster, term, head, your_address, dead_after, first, .. } => {
                self.keep_term(HeadTerm { cluster, term });
                // The head may be another one than the user named.
                if let Some(dialled) = self.dialled.filter(|dialled| self.named != Some(*dialled)) {
                    self.head_address = dialled.to_string();
                }
                self.dead_after = self.own_dead_after.unwrap_or(dead_after);
                self.wire.welcomed(head, self.dead_after);
                tracing::info!(head = %head.short(), your_address, "member of the cluster");
                self.wait = None;
                self.tell_tokens(String::new());
                self.tell_what_is_here();
                self.send_requests_again(now);
                if first {
                    talk(Talk::Ready(Ready {
                        name: self.info.name.clone(),
                        address: self.address(),
                        head_address: self.head_address.clone(),
                    }));
                } else if self.head.is_none() {
                    talk(Talk::Line(format!("back in the cluster of {}", self.head_address)));
                }
            }
            member::Effect::Lost(cause) => {
                self.wire.lost();
                // To be the head itself, or no longer, is said by itself.
                if self.dialled.is_some() && self.head.is_none() {
                    talk(Talk::Line(format!("lost the head at {}: {cause}; groups go on", self.head_address)));
                }
                self.head_is_lost(now);
            }
            member::Effect::Deliver(message) => self.head_said(message, now),
            member::Effect::KillWorkers(cause) => {
                talk(Talk::Line(format!("declared dead by the head ({cause}): ending {} groups", self.keepers.len())));
                for keeper in self.keepers.values_mut() {
                    keeper.stop(&format!("node {} was declared dead: {cause}", self.info.name));
                }
                if !matches!(self.phase, Phase::Leaving { .. }) {
                    self.phase = Phase::Fenced { kill: now + FENCE_PATIENCE, killed: false };
                }
            }
            member::Effect::Refused(refusal) => return Err(DaemonError::from_refusal(&refusal)),
            member::Effect::Talk(line) => {
                let waited = match self.wait {
                    Some(wait) if !wait.is_zero() => {
                        format!(" ({} s of {} s)", self.started.elapsed().as_secs(), wait.as_secs())
                    }
                    _ => String::new(),
                };
                // Refusing at once needs no announcement of a wait.
                if self.wait.is_none_or(|wait| !wait.is_zero()) {
                    talk(Talk::Line(format!("{line}{waited}")));
                }
                if self.wait.is_some_and(|wait| self.started.elapsed() >= wait) {
                    return Err(self.no_head());
                }
            }
        }
        Ok(())
    }

    fn head_effect(&mut self, effect: head::Effect, by: HeadTerm, now: Instant) {
        match effect {
            head::Effect::Send { session, mut message, .. } => {
                if let ToNode::Status { report, .. } = &mut message {
                    // Counted at the door, where also those are known that were not worth an event each.
                    report.refused_handshakes = self.wire.refused();
                }
                match self.inside {
                    Some((mine, inside)) if inside == session => {
                        self.member.handle(now, member::Input::Message(mine, FromHead { by, message }));
                    }
                    _ => self.wire.send_down(session, &FromHead { by, message }),
                }
            }
            head::Effect::Close { session } => match self.inside {
                Some((mine, inside)) if inside == session => {
                    self.inside = None;
                    self.member.handle(now, member::Input::Closed(mine, "closed by the head".to_owned()));
                }
                _ => self.wire.close_down(session),
            },
            head::Effect::Watch { node, incarnation } => self.wire.watch(node, incarnation),
            head::Effect::Unwatch { node, incarnation } => self.wire.unwatch(node, incarnation),
            head::Effect::Superseded(term) => self.stand_for(election::Input::Superseded(term)),
            head::Effect::EndOverlap => self.end_overlap(now),
            head::Effect::Notify(event) => tracing::info!("{}: {}", event.kind, event.cause),
            head::Effect::SaveState(bytes) => {
                // Where heads take turns the next one is another daemon, as a rule, and only the past is of use in this one's file.
                let file = if self.stand.is_some() { self.run.head_story() } else { self.run.head_state() };
                self.save_head(run_dir::write_atomically(&file, &bytes));
            }
        }
    }

    fn save_head(&mut self, outcome: std::io::Result<()>) {
        match outcome {
            Ok(()) => self.save_failed = false,
            // A full disk is no reason to end: nodes bring what they hold.
            Err(error) if !self.save_failed => {
                self.save_failed = true;
                tracing::error!(%error, "cannot save the head's state; a restart will rely on the nodes alone");
            }
            Err(_) => {}
        }
    }

    pub(crate) fn head_takes(&mut self, input: head::Input, now: Instant) {
        if !self.may_decide() {
            if let head::Input::Message { session, .. } = &input {
                self.not_the_head(*session, &input);
            }
            return;
        }
        if matches!(&input, head::Input::Message { message: ToHead::Status { .. }, .. }) {
            self.tell_heard(now);
        }
        let tokens_held = matches!(&input, head::Input::Message { message: ToHead::TokensHeld { .. }, .. });
        if let Some(head) = &mut self.head {
            head.handle(now, input);
        }
        if tokens_held {
            self.name_authority();
        }
    }

    /// The last heartbeat of each node, for a status that is about to be made.
    fn tell_heard(&mut self, now: Instant) {
        let Some(head) = &mut self.head else { return };
        for heard in self.wire.heard(now) {
            head.handle(now, heard);
        }
    }

    /// Sends to the head, wherever it is.
    pub(crate) fn send_up(&mut self, session: SessionId, message: ToHead, now: Instant) {
        match self.inside {
            Some((mine, inside)) if mine == session => {
                self.head_takes(head::Input::Message { session: inside, message }, now);
            }
            _ => self.wire.send_up(session, &message),
        }
    }

    /// Sends to the head if there is a session; otherwise the next join tells it all.
    pub(crate) fn tell_head(&mut self, message: ToHead) {
        if let Some(session) = self.member.session() {
            self.send_up(session, message, Instant::now());
        }
    }

    fn join_message(&self) -> ToHead {
        let held = self.keepers.values().map(|keeper| &keeper.held).chain(self.ending.values().map(|(held, _)| held));
        ToHead::Join {
            info: self.info.clone(),
            head_address: self.head_ip.clone(),
            seen: self.seen,
            held: held.cloned().collect(),
            ended: self.ended.iter().cloned().collect(),
            asks: self.requests.iter().filter(|(_, pending)| pending.is_launch()).map(|(number, _)| *number).collect(),
            told: self.clients.values().flat_map(|client| &client.launches).copied().collect(),
            held_placement_groups: self.placement_groups.values().cloned().collect(),
        }
    }

    /// All that is due by now.
    fn on_time(&mut self, now: Instant, talk: &mut dyn FnMut(Talk)) -> Result<Flow, DaemonError> {
        if self.member.next_timeout().is_some_and(|at| at <= now) {
            self.member.handle(now, member::Input::Timer);
        }
        self.stand_on_time();
        if self.may_decide()
            && let Some(head) = &mut self.head
            && head.next_timeout().is_some_and(|at| at <= now)
        {
            head.handle(now, head::Input::Timer);
        }
        if self.wait.is_some_and(|wait| !wait.is_zero() && self.started.elapsed() >= wait) {
            return Err(self.no_head());
        }
        self.report_worker_states(now);
        self.look_at_keepers(now);
        self.waits_for_head(now);
        match &mut self.phase {
            Phase::Up => Ok(Flow::Go),
            Phase::Fenced { kill, killed } => {
                let overdue = *kill <= now;
                if overdue && !*killed {
                    *killed = true;
                    *kill = now + KILL_PATIENCE;
                    self.kill_keepers();
                } else if self.keepers.is_empty() || overdue {
                    self.reborn(now, talk);
                }
                Ok(Flow::Go)
            }
            Phase::Leaving { kill, killed, told } => {
                let overdue = *kill <= now;
                if (self.keepers.is_empty() && self.sweeping == 0) || (overdue && *killed) {
                    for (client, request) in std::mem::take(told) {
                        self.answer(client, request, ClientReply::Done);
                    }
                    self.member.handle(now, member::Input::Leave);
                    return Ok(Flow::End);
                }
                if overdue {
                    *killed = true;
                    *kill = now + KILL_PATIENCE;
                    self.kill_keepers();
                }
                Ok(Flow::Go)
            }
        }
    }

    /// The next life, once nothing of the last one runs.
    fn reborn(&mut self, now: Instant, talk: &mut dyn FnMut(Talk)) {
        self.phase = Phase::Up;
        self.keepers.clear();
        self.ending.clear();
        self.ended.clear();
        self.placement_groups.clear();
        let next = self.run.next_incarnation().unwrap_or_else(|error| {
            tracing::error!(%error, "the new incarnation is not saved");
            rayless_proto::ids::Incarnation(self.member.incarnation().0 + 1)
        });
        talk(Talk::Line(format!("joining again as incarnation {}", next.0)));
        self.member.handle(now, member::Input::Reborn(next));
    }

    fn kill_keepers(&self) {
        for group in self.keepers.keys() {
            super::keepers::kill(&self.run, *group);
        }
    }

    /// Ends the groups of this node and then the daemon.
    pub(crate) fn begin_leave(&mut self, told: Option<(ClientId, RequestId)>, now: Instant) {
        if let Phase::Leaving { told: waiting, kill, killed } = &mut self.phase {
            match told {
                Some(who) => waiting.push(who),
                // A second signal: no more patience.
                None if !*killed => *kill = now,
                None => {}
            }
            return;
        }
        for keeper in self.keepers.values_mut() {
            keeper.stop(&format!("node {} is being stopped", self.info.name));
        }
        self.phase = Phase::Leaving { kill: now + STOP_PATIENCE, killed: false, told: told.into_iter().collect() };
    }

    fn next_wake(&self) -> Option<Instant> {
        let phase = match &self.phase {
            Phase::Up => None,
            Phase::Fenced { kill, .. } | Phase::Leaving { kill, .. } => Some(*kill),
        };
        let wait = self.wait.filter(|wait| !wait.is_zero()).map(|wait| self.started + wait);
        let reports = self.keepers.values().filter_map(|keeper| keeper.next_report(STATE_REPORT_PERIOD)).min();
        let head = self.head.as_ref().and_then(Head::next_timeout);
        let stand = self.stand.as_ref().and_then(Stand::next_timeout);
        let look = (!self.keepers.is_empty()).then_some(self.next_look);
        [self.member.next_timeout(), head, stand, phase, wait, reports, look, self.next_wait_report()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Nobody was found within `--wait`.
    fn no_head(&self) -> DaemonError {
        let cause = self.member.waiting_for().unwrap_or_default();
        let waited = match self.wait {
            Some(wait) if !wait.is_zero() => format!(" within {} s", wait.as_secs_f64()),
            _ => String::new(),
        };
        DaemonError::NoHead(format!(
            "no head at {}{waited}: {}\nhint: start `rayless head` there, or wait longer with `--wait` (see `rayless join --help`)",
            self.head_address,
            cause.trim_start_matches(&format!("waiting for the head at {}: ", self.head_address))
        ))
    }

    /// `IP:port` of this node.
    pub(crate) fn address(&self) -> String {
        let NodeInfo { address, port, .. } = &self.info;
        if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
    }

    /// Why there is no head, for a client.
    pub(crate) fn no_head_refusal(&self) -> rayless_proto::v1::control::Refusal {
        if let Some(refusal) = self.no_head_because_of_store() {
            return refusal;
        }
        rayless_proto::v1::control::Refusal {
            kind: RefusalKind::NoHead,
            cause: self.member.waiting_for().unwrap_or_else(|| "the head did not answer".to_owned()),
            hint: format!("start `rayless head` on {}; running groups go on without it", self.head_address),
        }
    }

    /// A later life of this node must refuse heads that this one has seen replaced.
    fn keep_term(&mut self, seen: HeadTerm) {
        if self.seen == Some(seen) {
            return;
        }
        self.seen = Some(seen);
        // A head without a store has no terms.
        if seen.term.0 > 0
            && let Err(error) = self.run.keep_term(seen)
        {
            tracing::error!(%error, "the term is not saved; a restart of this daemon would not know that earlier heads were replaced");
        }
    }

    /// A message of the head for this node.
    fn head_said(&mut self, message: ToNode, now: Instant) {
        match message {
            ToNode::StartKeeper { group, name, world_size, driver_node, ranks, requester } => {
                self.start_keeper(group, name, world_size, driver_node, ranks, requester);
            }
            ToNode::StopKeeper { group, cause } => self.stop_keeper(group, &cause),
            ToNode::HoldPlacementGroup(held) => {
                self.placement_groups.insert(held.id, held);
            }
            ToNode::DropPlacementGroup(id) => {
                self.placement_groups.remove(&id);
            }
            ToNode::NodeVerdict { node, name, state, cause } => self.verdict(node, name, state, &cause),
            ToNode::KeeperStopped { group, node, stopped } => {
                self.tell_drivers(&ClientReply::KeeperStopped { group, node, stopped });
            }
            ToNode::Tokens(set) => self.take_tokens(&set),
            ToNode::Story { whole, events, ended } => self.story.take(whole, events, ended),
            ToNode::Notice(event) => tracing::info!("head: {}: {}", event.kind, event.cause),
            ToNode::MakeReport(by) => self.make_report(by),
            answer => self.answer_from_head(answer, now),
        }
    }
}

async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
