//! The state of a running group in its driver: one lock, no blocking under it.
//!
//! Whoever holds the lock moves bytes: the caller sends, a waiting caller or the pump receives. See `shared` for who does when.

use super::{
    CallError, GroupFailure, LogLine, Progress, RankInfo,
    callbacks::CallbackThread,
    calls::{Pending, Slot},
    peer::{LocalRing, Outgoing, Peer},
    stuck::Watch,
};
use crate::{
    client::{LocalClient, Unasked},
    event,
    ring::{AskedSet, CallWriter, ReplyReader, Ring, RingError},
    session::{Frame, JUST_AFTER, Session, SessionError, plain_header},
    stopped::is_stopped,
};
use rayless_proto::{
    codec,
    ids::{CallId, GroupId, NodeId, Rank},
    limits::{HEARTBEAT_PERIOD, MAX_CALL, MAX_CALLS_IN_FLIGHT, MAX_LINK_ENDS, OBSERVER_LATE, REAP_TIMEOUT},
    v1::{
        link::LinkReport,
        status::NodeState,
        step::{FLAG_ERROR, FLAG_LAST, KeeperEvent, Kind},
    },
};
use rustix::event::epoll::{self, EventData, EventFlags};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

/// An orderly stop gives the workers 2 s before they are killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// In the hot epoll set: the eventfd by which workers of this host wake the collector. Lower numbers are sessions.
pub(super) const REPLIES: u64 = u64::MAX;

/// How a group ended.
#[derive(Clone)]
pub(super) enum End {
    Failed(GroupFailure),
    Stopped,
}

impl End {
    pub(super) fn as_error(&self) -> CallError {
        match self {
            Self::Failed(failure) => CallError::Failed(failure.clone()),
            Self::Stopped => CallError::Stopped,
        }
    }
}

/// News of the start, for the thread that starts the group.
#[derive(Default)]
pub(super) struct Starting {
    pub(super) pids: BTreeMap<Rank, u32>,
    pub(super) versions: BTreeMap<Rank, Vec<(String, String)>>,
    pub(super) news: VecDeque<Progress>,
}

pub(super) struct Core {
    pub(super) ranks: Arc<[RankInfo]>,
    peers: Vec<Peer>,
    local: Option<LocalRing>,
    pub(super) calls: BTreeMap<CallId, Pending>,
    last_call: CallId,
    pub(super) end: Option<End>,
    /// Every keeper said that its processes are reaped, or is not waited for any more.
    pub(super) over: bool,
    give_up_at: Option<Instant>,
    pub(super) starting: Starting,
    /// The last word of each end of a link that is not closed.
    pub(super) links: Vec<LinkReport>,
    pub(super) callbacks: CallbackThread,
    pub(super) watch: Watch,
    dead_after: Duration,
    verdicts: HashMap<NodeId, (NodeState, String)>,
    group: GroupId,
    /// Nodes whose keeper is stopped, by the word of their daemons.
    stopped: BTreeSet<NodeId>,
    pub(super) client: Option<LocalClient>,
    /// All that a waiting caller must see at once; also part of the pump's own set.
    pub(super) hot: OwnedFd,
    /// Something was decided that a waiting thread may wait for.
    pub(super) changed: bool,
}

impl Core {
    pub(super) fn new(
        group: GroupId,
        ranks: Arc<[RankInfo]>,
        peers: Vec<Peer>,
        callbacks: CallbackThread,
        dead_after: Duration,
        client: Option<LocalClient>,
    ) -> io::Result<Self> {
        let hot = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, peer) in peers.iter().enumerate() {
            if let Some(session) = &peer.session {
                epoll::add(&hot, session.fd(), EventData::new_u64(index as u64), peer.interest)?;
            }
        }
        let mut core = Self {
            ranks,
            peers,
            local: None,
            calls: BTreeMap::new(),
            last_call: 0,
            end: None,
            over: false,
            give_up_at: None,
            starting: Starting::default(),
            links: Vec::new(),
            callbacks,
            watch: Watch::standard(),
            dead_after,
            verdicts: HashMap::new(),
            group,
            stopped: BTreeSet::new(),
            client,
            hot,
            changed: false,
        };
        // What the peers were given to begin with.
        (0..core.peers.len()).for_each(|index| core.send_to(index));
        Ok(core)
    }

    /// Ranks of this host.
    pub(super) fn local_workers(&self) -> usize {
        self.peers.iter().filter(|peer| peer.local).map(|peer| peer.ranks.len()).sum()
    }

    // ---- sending

    /// Sends a call to every rank.
    pub(super) fn call(
        &mut self,
        payload: Arc<[u8]>,
        asked: Vec<Rank>,
        timeout: Option<Duration>,
        step_deadline: Option<Duration>,
    ) -> Result<(CallId, Slot), CallError> {
        if let Some(end) = &self.end {
            return Err(end.as_error());
        }
        if payload.len() as u64 > MAX_CALL {
            return Err(CallError::TooLarge(payload.len() as u64));
        }
        if self.calls.len() >= MAX_CALLS_IN_FLIGHT {
            self.collect();
        }
        if self.calls.len() >= MAX_CALLS_IN_FLIGHT {
            return Err(self.too_many());
        }
        let call = self.last_call + 1;
        self.last_call = call;
        let slot = Slot::default();
        let list: Arc<[u8]> = asked.iter().flat_map(|rank| rank.to_le_bytes()).collect();
        let outgoing = |payload| Outgoing { call, asked: Arc::clone(&list), payload, at: 0, begun: false };
        let set = self.local.as_ref().map(|local| {
            let mut set = AskedSet::default();
            for (index, rank) in local.ranks.iter().enumerate() {
                if asked.binary_search(rank).is_ok() {
                    set.insert(index);
                }
            }
            set
        });
        if asked.is_empty() {
            let _ = slot.set(Ok(Vec::new()));
        } else {
            let timeout = timeout.map(|after| (Instant::now() + after, after));
            let mut pending = Pending::new(asked, timeout, Arc::clone(&slot));
            pending.step_deadline = step_deadline;
            self.calls.insert(call, pending);
        }
        // The other hosts first: their way is longer.
        for index in 0..self.peers.len() {
            if !self.peers[index].local {
                self.peers[index].outgoing.push_back(outgoing(Arc::clone(&payload)));
                self.send_to(index);
            }
        }
        if let (Some(local), Some(set)) = (&mut self.local, set) {
            local.outgoing.push_back((outgoing(payload), set));
            self.send_local();
        }
        Ok((call, slot))
    }

    fn too_many(&self) -> CallError {
        let oldest = self.calls.iter().find_map(|(call, pending)| Some((*call, pending.missing().first().copied()?)));
        // A call that nobody owes anything is not in the map.
        let (call, rank) = oldest.unwrap_or((self.last_call, 0));
        // Of those that owe the oldest call, on this host the one furthest behind in the ring is the one to blame.
        let furthest = self.local.as_ref().and_then(|local| local.ranks.get(local.writer.slowest()).copied());
        let owes = |rank: &Rank| self.calls.get(&call).is_some_and(|pending| pending.missing().contains(rank));
        let rank = furthest.filter(owes).unwrap_or(rank);
        CallError::TooManyInFlight { in_flight: self.calls.len(), rank, node: self.node_name(rank), call }
    }

    pub(super) fn peer_name(&self, index: usize) -> String {
        self.peers.get(index).map(|peer| peer.name.clone()).unwrap_or_default()
    }

    /// Sends a frame to every keeper there is; to whom it went.
    pub(super) fn tell_all(&mut self, kind: Kind, payload: &[u8]) -> BTreeSet<usize> {
        let mut told = BTreeSet::new();
        for index in 0..self.peers.len() {
            if let Some(session) = &mut self.peers[index].session {
                session.queue(plain_header(kind), &[payload]);
                told.insert(index);
                self.send_to(index);
            }
        }
        told
    }

    pub(super) fn node_name(&self, rank: Rank) -> String {
        self.ranks.get(rank as usize).map(|info| info.node_name.clone()).unwrap_or_default()
    }

    fn send_to(&mut self, index: usize) {
        match self.peers[index].send() {
            Ok(()) => self.set_interest(index),
            Err(error) => {
                // Its last words may be here already, and say why.
                let _ = self.receive(index);
                self.lose(index, &error);
            }
        }
    }

    fn send_local(&mut self) {
        let sent = self.local.as_mut().map_or(Ok(()), LocalRing::send);
        if let Err(error) = sent {
            self.ring_broken(error);
        }
    }

    fn set_interest(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        let mut interest = EventFlags::IN;
        if peer.wants_room() {
            interest |= EventFlags::OUT;
        }
        if let Some(session) = peer.session.as_ref().filter(|_| interest != peer.interest) {
            let _ = epoll::modify(&self.hot, session.fd(), EventData::new_u64(index as u64), interest);
            peer.interest = interest;
        }
    }

    // ---- receiving

    /// Takes the replies of this host's workers that are there, and gives the ring what waits for room in it. Whether there was anything.
    pub(super) fn collect(&mut self) -> bool {
        let Some(local) = &mut self.local else { return false };
        let mut got = Vec::new();
        let mut broken = None;
        for (index, reader) in local.readers.iter_mut().enumerate() {
            loop {
                match reader.try_next() {
                    Ok(Some(fragment)) => got.push((local.ranks[index], fragment)),
                    Ok(None) => break,
                    Err(error) => {
                        broken = Some(error);
                        break;
                    }
                }
            }
        }
        let any = !got.is_empty();
        for (rank, fragment) in got {
            self.take_reply(rank, fragment.call, fragment.last, fragment.error, fragment.payload);
        }
        if let Some(error) = broken {
            self.ring_broken(error);
        }
        if self.local.as_ref().is_some_and(|local| !local.outgoing.is_empty()) {
            self.send_local();
        }
        any
    }

    fn ring_broken(&mut self, error: RingError) {
        let rank = self.local.as_ref().and_then(|local| local.ranks.get(error.reader as usize).copied()).unwrap_or(0);
        self.nonsense(rank, error.what);
    }

    fn nonsense(&mut self, rank: Rank, what: &str) {
        let node = self.node_name(rank);
        let cause = format!("rank {rank} on node {node} broke the protocol: {what}");
        self.fail(GroupFailure::WorkerDied { rank, node, cause, tail: String::new() });
    }

    /// What the hot set reported: `token` is a session or `REPLIES`.
    pub(super) fn on_ready(&mut self, token: u64, flags: EventFlags) {
        if token == REPLIES {
            if let Some(local) = &self.local {
                event::clear(&local.event);
            }
            self.collect();
            return;
        }
        let index = token as usize;
        if index >= self.peers.len() {
            return;
        }
        if flags.intersects(!EventFlags::OUT)
            && let Err(error) = self.receive(index)
        {
            self.lose(index, &error);
        }
        if self.peers[index].wants_room() || flags.contains(EventFlags::OUT) {
            self.send_to(index);
        }
    }

    fn receive(&mut self, index: usize) -> Result<(), SessionError> {
        let Some(session) = &mut self.peers[index].session else { return Ok(()) };
        session.read()?;
        loop {
            // An event on the way may have ended the session.
            let Some(session) = &mut self.peers[index].session else { return Ok(()) };
            let Some(frame) = session.next_frame()? else { return Ok(()) };
            self.take_frame(index, frame)?;
        }
    }

    fn take_frame(&mut self, index: usize, frame: Frame) -> Result<(), SessionError> {
        let (header, payload) = (frame.header, frame.payload);
        let broken = |what: &str| SessionError::Protocol(what.to_owned());
        match header.kind {
            Kind::Ping => {}
            Kind::Reply | Kind::Log if !self.peers[index].ranks.contains(&header.rank) => {
                return Err(broken("a reply or line of another host's rank"));
            }
            Kind::Reply => {
                let (last, error) = (header.flags & FLAG_LAST != 0, header.flags & FLAG_ERROR != 0);
                self.take_reply(header.rank, header.call, last, error, payload);
            }
            Kind::Log => {
                let text = String::from_utf8_lossy(&payload).into_owned();
                self.callbacks.log(LogLine { rank: header.rank, stderr: header.flags & FLAG_ERROR != 0, text });
            }
            Kind::Event => {
                let event =
                    codec::decode::<KeeperEvent>(&payload).map_err(|e| SessionError::Protocol(e.to_string()))?;
                self.take_event(index, event)?;
            }
            Kind::Launch | Kind::Call | Kind::Stop | Kind::Look => return Err(broken("a keeper sends no such frame")),
        }
        Ok(())
    }

    fn take_event(&mut self, index: usize, event: KeeperEvent) -> Result<(), SessionError> {
        let named = |rank: &Rank| self.peers[index].ranks.contains(rank);
        match event {
            KeeperEvent::Launched { pids } => {
                if !pids.iter().all(|(rank, _)| named(rank)) {
                    return Err(SessionError::Protocol("a process of another host's rank".into()));
                }
                if self.peers[index].local {
                    self.open_ring(index)?;
                }
                self.starting.pids.extend(pids.iter().copied());
                let node = self.peers[index].name.clone();
                self.starting.news.push_back(Progress::Launched { node, pids });
                self.changed = true;
            }
            KeeperEvent::Ready { rank, versions } if named(&rank) => {
                self.starting.versions.insert(rank, versions);
                let (ready, of) = (self.starting.versions.len(), self.ranks.len());
                self.starting.news.push_back(Progress::Ready { rank, ready, of });
                self.changed = true;
            }
            KeeperEvent::Ready { .. } => return Err(SessionError::Protocol("ready of another host's rank".into())),
            KeeperEvent::Changed { .. } => {}
            KeeperEvent::Link(report) if named(if report.by_sender { &report.from } else { &report.to }) => {
                report.put_into(&mut self.links, MAX_LINK_ENDS * self.peers.len());
            }
            KeeperEvent::Link(_) => return Err(SessionError::Protocol("a link of another host's rank".into())),
            KeeperEvent::Failed { rank, cause, tail } => {
                // What the worker answered before it died counts.
                self.collect();
                let node = self.peers[index].name.clone();
                self.fail(match rank.filter(named_in(&self.peers[index].ranks)) {
                    Some(rank) => GroupFailure::WorkerDied { rank, node, cause, tail },
                    None => GroupFailure::Ended { cause },
                });
            }
            KeeperEvent::Looked { ranks } => {
                if !ranks.iter().all(|look| named(&look.rank)) {
                    return Err(SessionError::Protocol("a look at another host's rank".into()));
                }
                self.take_look(index, ranks);
            }
            KeeperEvent::Ended => {
                self.close_session(index);
                if self.end.is_none() {
                    let cause = format!("the keeper on node {} ended", self.peers[index].name);
                    self.fail(GroupFailure::Ended { cause });
                }
            }
        }
        Ok(())
    }

    /// The ring and its eventfd have come with the event.
    fn open_ring(&mut self, index: usize) -> Result<(), SessionError> {
        let peer = &mut self.peers[index];
        let mut next = || peer.session.as_mut().and_then(Session::take_fd);
        let (Some(ring), Some(event)) = (next(), next()) else {
            return Err(SessionError::Protocol("no ring came with the launch".into()));
        };
        let ring = Ring::open(ring.as_fd())?;
        if ring.readers() != peer.ranks.len() || self.local.is_some() {
            return Err(SessionError::Protocol("the ring is not for the ranks of this host".into()));
        }
        let ring = Arc::new(ring);
        epoll::add(&self.hot, &event, EventData::new_u64(REPLIES), EventFlags::IN).map_err(io::Error::from)?;
        self.local = Some(LocalRing {
            writer: CallWriter::new(Arc::clone(&ring)),
            readers: (0..peer.ranks.len()).map(|reader| ReplyReader::new(Arc::clone(&ring), reader)).collect(),
            ranks: peer.ranks.clone(),
            ring,
            event,
            outgoing: VecDeque::new(),
        });
        Ok(())
    }

    fn take_reply(&mut self, rank: Rank, call: CallId, last: bool, error: bool, payload: Vec<u8>) {
        // Of a call that is over: an error of a rank that was not asked, most likely. It is in that rank's log.
        let Some(pending) = self.calls.get_mut(&call) else { return };
        if let Err(nonsense) = pending.take(call, rank, last, error, payload) {
            self.nonsense(rank, nonsense.0);
            return;
        }
        self.after(call);
    }

    /// Tells who waits for `call` where it is done, and forgets it where nothing more can come.
    fn after(&mut self, call: CallId) {
        let Some(pending) = self.calls.get_mut(&call) else { return };
        if let Some(callback) = pending.take_callback() {
            self.callbacks.run(callback);
        }
        self.changed |= pending.is_done();
        if pending.is_complete() {
            self.calls.remove(&call);
        }
    }

    // ---- calls, seen from their handles

    pub(super) fn missing(&self, call: CallId) -> Vec<Rank> {
        self.calls.get(&call).map(Pending::missing).unwrap_or_default()
    }

    pub(super) fn on_done(&mut self, call: CallId, callback: Box<dyn FnOnce() + Send>) {
        match self.calls.get_mut(&call).filter(|pending| !pending.is_done()) {
            Some(pending) => pending.set_on_done(callback),
            None => self.callbacks.run(callback),
        }
    }

    // ---- time

    /// When something must be decided though nothing came.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.calls.values().filter_map(Pending::next_deadline).chain(self.give_up_at).min()
    }

    pub(super) fn expire(&mut self, now: Instant) {
        let due: Vec<CallId> = self
            .calls
            .iter()
            .filter(|(_, pending)| pending.next_deadline().is_some_and(|at| at <= now))
            .map(|(call, _)| *call)
            .collect();
        for call in due {
            if let Some(pending) = self.calls.get_mut(&call) {
                pending.settle(call, Some(now));
            }
            self.after(call);
        }
        if self.give_up_at.is_some_and(|at| at <= now) {
            (0..self.peers.len()).for_each(|index| self.close_session(index));
        }
    }

    /// Each half second: pings, and a look at each peer's last sign of life.
    pub(super) fn tick(&mut self, now: Instant, due: Instant) -> Instant {
        let late = now.duration_since(due);
        let slept = late > OBSERVER_LATE;
        if slept {
            self.watch.slept(late);
        }
        self.watch_progress(now);
        let mut next = now + HEARTBEAT_PERIOD;
        for index in 0..self.peers.len() {
            if self.silence(index, now) > self.dead_after {
                // Whoever was to read may have been kept from it.
                if let Err(error) = self.receive(index) {
                    self.lose(index, &error);
                }
            }
            let verdict = self.verdicts.get(&self.peers[index].node);
            let peer = &mut self.peers[index];
            let Some(session) = &mut peer.session else { continue };
            if slept {
                // It was this process that slept: the peer may have spoken all the while.
                session.heard = now;
            }
            let silence = now.saturating_duration_since(session.heard);
            // A keeper that is late is borne longer than one that the kernel holds stopped.
            let stopped = self.stopped.contains(&peer.node)
                || (silence > self.dead_after && session.peer_pid().is_some_and(is_stopped));
            let vouched = peer.local || matches!(verdict, Some((NodeState::Alive, _)));
            let limit = self.dead_after * if vouched && !stopped { 3 } else { 1 };
            if silence > limit {
                let mut cause = format!("silent for {:.1} s", silence.as_secs_f64());
                if stopped {
                    cause.push_str(", its keeper is stopped (SIGSTOP)");
                }
                if let Some((state, why)) = verdict.filter(|(state, _)| *state != NodeState::Alive) {
                    cause = format!("{cause}, {} for the head", state.name());
                    if !why.is_empty() {
                        cause = format!("{cause} ({why})");
                    }
                }
                session.end_by_reset();
                self.lose(index, &SessionError::Protocol(cause));
                continue;
            }
            // The look that finds it silent for too long comes at that moment, not up to half a second later.
            next = next.min(session.heard + limit + JUST_AFTER);
            if silence <= self.dead_after {
                next = next.min(session.heard + self.dead_after + JUST_AFTER);
            }
            if now.duration_since(session.spoke) >= HEARTBEAT_PERIOD / 2 {
                session.queue_ping();
            }
            self.send_to(index);
        }
        next
    }

    fn silence(&self, index: usize, now: Instant) -> Duration {
        self.peers[index]
            .session
            .as_ref()
            .map_or(Duration::ZERO, |session| now.saturating_duration_since(session.heard))
    }

    pub(super) fn take_verdicts(&mut self) {
        let Some(client) = &mut self.client else { return };
        match client.take_unasked() {
            Ok(unasked) => unasked.into_iter().for_each(|news| self.take_unasked(news)),
            Err(_) => {
                // The daemon is gone: what it said last is of no more worth. The group lives on.
                self.client = None;
                self.verdicts.clear();
                self.stopped.clear();
            }
        }
    }

    pub(super) fn take_unasked(&mut self, news: Unasked) {
        match news {
            Unasked::Verdict(verdict) => {
                self.verdicts.insert(verdict.node, (verdict.state, verdict.cause));
            }
            Unasked::KeeperStopped { group, node, stopped: true } if group == self.group => {
                self.stopped.insert(node);
            }
            Unasked::KeeperStopped { group, node, stopped: false } if group == self.group => {
                self.stopped.remove(&node);
            }
            Unasked::KeeperStopped { .. } => {}
        }
    }

    // ---- the end

    /// A session is over without `Ended`.
    fn lose(&mut self, index: usize, error: &SessionError) {
        if self.peers[index].session.is_none() {
            return;
        }
        // What this host's workers answered before counts.
        self.collect();
        if self.peers[index].session.is_none() {
            return;
        }
        self.close_session(index);
        let peer = &self.peers[index];
        let cause = match (peer.local, error) {
            (true, SessionError::Closed) => {
                format!("the keeper on node {} (this host) ended without a word", peer.name)
            }
            (_, SessionError::Protocol(what)) => format!("lost node {} ({}): {what}", peer.name, peer.address),
            _ => format!("lost the keeper on node {} ({}): {}", peer.name, peer.address, error.in_words()),
        };
        let failure = GroupFailure::NodeDied { node: peer.node, name: peer.name.clone(), cause };
        self.fail(failure);
    }

    fn close_session(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        if let Some(session) = peer.session.take() {
            let _ = epoll::delete(&self.hot, session.fd());
        }
        peer.outgoing.clear();
        self.look_for_the_end();
    }

    /// Once the last session is gone nothing of the group is held on to, however long its handles live.
    fn look_for_the_end(&mut self) {
        self.over = self.peers.iter().all(|peer| peer.session.is_none());
        self.changed |= self.over;
        if self.over
            && let Some(local) = self.local.take()
        {
            // Closing is not enough: the keeper has the same eventfd.
            let _ = epoll::delete(&self.hot, &local.event);
        }
    }

    /// The group is over by a fault: every pending and later call fails, all keepers are told to kill.
    pub(super) fn fail(&mut self, failure: GroupFailure) {
        if self.end.is_some() {
            return;
        }
        self.callbacks.failure(failure.clone());
        let cause = failure.to_string();
        self.finish(End::Failed(failure), &cause, REAP_TIMEOUT);
    }

    /// The group is over by its driver's will.
    pub(super) fn stop(&mut self) {
        self.links.clear();
        if self.end.is_none() {
            self.finish(End::Stopped, "", STOP_TIMEOUT + REAP_TIMEOUT);
        }
    }

    fn finish(&mut self, end: End, cause: &str, timeout: Duration) {
        for (_, mut pending) in std::mem::take(&mut self.calls) {
            pending.finish(Err(end.as_error()));
            if let Some(callback) = pending.take_callback() {
                self.callbacks.run(callback);
            }
        }
        self.end = Some(end);
        self.changed = true;
        self.give_up_at = Some(Instant::now() + timeout);
        if let Some(local) = &mut self.local {
            // Closing the ring is the keeper's part: workers that left before it knows why would look like dead ones.
            local.outgoing.clear();
        }
        for index in 0..self.peers.len() {
            let peer = &mut self.peers[index];
            // A call that is only half sent stays so: the keeper ends whatever it has of it.
            peer.outgoing.clear();
            if let Some(session) = &mut peer.session {
                session.queue(plain_header(Kind::Stop), &[cause.as_bytes()]);
                self.send_to(index);
            }
        }
        self.look_for_the_end();
    }

    /// After the end: callbacks under way are done, then their thread ends.
    pub(super) fn close_callbacks(&mut self) {
        self.callbacks.close();
    }

    // ---- sleeping

    /// The thread that collects is about to sleep; `true` where there is something to do first.
    pub(super) fn before_sleep(&mut self) -> bool {
        if let Some(local) = &self.local {
            local.ring.collector_sleeps();
        }
        self.collect()
    }

    pub(super) fn after_sleep(&self) {
        if let Some(local) = &self.local {
            local.ring.collector_wakes();
        }
    }
}

fn named_in(ranks: &[Rank]) -> impl Fn(&Rank) -> bool {
    move |rank| ranks.contains(rank)
}
