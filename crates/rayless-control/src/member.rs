//! A node's side of membership: dial, join, be welcomed, lose the head, join again, be fenced.
//!
//! The machine owns no message but `Leave`: when it says [`Effect::Join`], the daemon composes `ToHead::Join` from what it
//! holds *at that moment* (keepers being started included), sends it first on that session, and from then on sends every
//! change on it too. What arrives on another session than the present one is a ghost's and is dropped here.
//!
//! Where several daemons take turns as head, the member dials one after the other until one of them is the head; a standby says
//! who is. The heads to try come from the user, from each welcome, and on a standby from the store. A head whose term is lower than
//! the highest that this node has ever been a member under has been replaced, and nothing that it says is done.
//!
//! After each [`Effect::Welcomed`] the daemon sends its clients' unanswered requests again, under the same request numbers:
//! the head knows by (node, incarnation, number) which ones it already has.

use crate::SessionId;
use rayless_proto::{
    ids::{ClusterId, Incarnation, NodeId, Term},
    limits::{HANDSHAKE_TIMEOUT, WAIT_REPORT_PERIOD},
    v1::control::{FromHead, HeadTerm, Refusal, ToHead, ToNode},
};
use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// First pause between two dials; doubles up to [`BACK_OFF_MAX`].
pub const BACK_OFF_MIN: Duration = Duration::from_millis(20);
/// Longest pause between two dials: how much later than possible a node may notice that the head is back.
pub const BACK_OFF_MAX: Duration = Duration::from_secs(1);
/// First limit of a dial. The next ones are 1.5 s and [`HANDSHAKE_TIMEOUT`], then it starts again: a head that comes up is
/// found soon by a fresh dial, and a slow wire is given its time by the long ones.
pub const DIAL_LIMIT_MIN: Duration = Duration::from_millis(300);
const DIAL_LIMIT_FACTOR: u32 = 5;
const DIAL_LIMIT_STEPS: u32 = 3;

/// What a [`Member`] needs to know.
#[derive(Debug, Clone)]
pub struct MemberConfig {
    /// The head's address as the user gave it, for messages to people.
    pub head: String,
    /// Whom to dial, in this order. None on a standby that has not heard of the head yet.
    pub targets: Vec<Target>,
    /// The highest term that any life of this node was a member under.
    pub seen: Option<HeadTerm>,
    /// Which life of the node this is.
    pub incarnation: Incarnation,
    /// Any number that differs between nodes (the id's first bytes, say): spreads the dials of many nodes.
    pub jitter_seed: u64,
}

/// Whom to dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The head in this process.
    Here,
    /// A daemon elsewhere.
    At(SocketAddr),
}

/// Why a dial failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DialError {
    /// Nobody there, or no answer in time: one line.
    Unreachable(String),
    /// Somebody there who does not take this node: wrong token, no common protocol version.
    Refused(Refusal),
}

/// What happened.
#[allow(clippy::large_enum_variant, reason = "each is moved once, into the member")]
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The dial of this session is through, hello exchanged, peer authenticated.
    Connected(SessionId),
    /// It is not.
    DialFailed(SessionId, DialError),
    /// A message of the head.
    Message(SessionId, FromHead),
    /// The session ended: one line of cause.
    Closed(SessionId, String),
    /// The head's echoes have been silent for longer than the limit (this node's own detector says so).
    HeadSilent,
    /// After [`Effect::KillWorkers`]: all keepers are told to die, and this is the node's next incarnation.
    Reborn(Incarnation),
    /// On a daemon that may be head itself: whom to dial from now on, the head first. One that is not the head any more is left, with
    /// this line of cause.
    Heads(Vec<Target>, String),
    /// The user stops this daemon; its groups are already ended.
    Leave,
    /// [`Member::next_timeout`] has come.
    Timer,
}

/// What is to be done, in this order.
#[allow(clippy::large_enum_variant, reason = "each is moved once, out of the member")]
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Dial; answered with `Connected` or `DialFailed` unless closed before.
    Dial(SessionId, Target),
    /// Compose `ToHead::Join` under this incarnation and send it as the first message of the session.
    Join(SessionId, Incarnation),
    /// Send this.
    Send(SessionId, ToHead),
    /// Close the session, or give the dial up; what was sent on it may still arrive.
    Close(SessionId),
    /// The node is a member. Send unanswered requests again now.
    Welcomed {
        /// On which session.
        session: SessionId,
        /// The cluster.
        cluster: ClusterId,
        /// The head's term, to be kept on disk: a later life of this node must refuse lower ones.
        term: Term,
        /// The head's node.
        head: NodeId,
        /// This node's IP address as the head sees it.
        your_address: String,
        /// The cluster's `--dead-after`.
        dead_after: Duration,
        /// Whether this is the first welcome in this process.
        first: bool,
    },
    /// No longer connected (one line of cause). Groups go on; the next dial is already planned.
    Lost(String),
    /// A message of the head for the daemon.
    Deliver(ToNode),
    /// This incarnation was declared dead (one line of cause): kill all keepers at once, count the incarnation up, then hand
    /// in [`Input::Reborn`]. Nothing is dialled before that.
    KillWorkers(String),
    /// The head does not take this node, which has never been a member: final, exit code by the refusal's kind.
    Refused(Refusal),
    /// A line for people, without its newline.
    Talk(String),
}

#[derive(Debug)]
enum State {
    /// Nobody to dial.
    Idle,
    Resting {
        until: Instant,
    },
    Dialing {
        session: SessionId,
        limit: Instant,
    },
    Joining {
        session: SessionId,
        limit: Instant,
    },
    Welcomed {
        session: SessionId,
        by: HeadTerm,
    },
    Fenced,
    Ended,
}

/// A node's side of its membership.
#[derive(Debug)]
pub struct Member {
    config: MemberConfig,
    state: State,
    sessions: u64,
    /// Whom to dial, and at whom the dialling is.
    targets: Vec<Target>,
    at: usize,
    /// Failed attempts since the last welcome.
    failures: u32,
    /// Times since then that somebody named the head.
    hints: u32,
    /// When the present dial began, and how long the last one that came through took.
    dialled: Instant,
    trip: Duration,
    last_failure: String,
    ever_welcomed: bool,
    talked: Option<(Instant, String)>,
    effects: VecDeque<Effect>,
}

impl Member {
    /// A node that dials at once: poll for effects.
    pub fn new(config: MemberConfig, now: Instant) -> Self {
        let targets = config.targets.clone();
        let mut member = Self {
            config,
            state: State::Idle,
            sessions: 0,
            targets,
            at: 0,
            failures: 0,
            hints: 0,
            dialled: now,
            trip: Duration::ZERO,
            last_failure: String::new(),
            ever_welcomed: false,
            talked: None,
            effects: VecDeque::new(),
        };
        member.dial(now);
        member
    }

    /// The session on which the daemon may send: from [`Effect::Join`] on, until it is lost.
    pub const fn session(&self) -> Option<SessionId> {
        match self.state {
            State::Joining { session, .. } | State::Welcomed { session, .. } => Some(session),
            _ => None,
        }
    }

    /// Whether the head has accepted this node and the session is up.
    pub const fn is_welcomed(&self) -> bool {
        matches!(self.state, State::Welcomed { .. })
    }

    /// Which life of the node this is.
    pub const fn incarnation(&self) -> Incarnation {
        self.config.incarnation
    }

    /// What the node waits for, as one line for people; `None` while it is a member.
    pub fn waiting_for(&self) -> Option<String> {
        let head = self.head();
        match self.state {
            State::Welcomed { .. } => None,
            State::Idle => Some("waiting for a head: none is known".into()),
            State::Fenced => Some("waiting for the workers of the life that was declared dead to be killed".into()),
            State::Ended => Some(self.last_failure.clone()),
            State::Joining { .. } => Some(format!("waiting for the head at {head} to take this node")),
            State::Resting { .. } | State::Dialing { .. } if self.failures == 0 => {
                Some(format!("dialling the head at {head}"))
            }
            State::Resting { .. } | State::Dialing { .. } => {
                Some(format!("waiting for the head at {head}: {} ({} tries)", self.last_failure, self.failures))
            }
        }
    }

    /// The next effect, oldest first.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to hand in [`Input::Timer`].
    pub const fn next_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Resting { until } => Some(until),
            State::Dialing { limit, .. } | State::Joining { limit, .. } => Some(limit),
            State::Idle | State::Welcomed { .. } | State::Fenced | State::Ended => None,
        }
    }

    /// Takes one event.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Timer => self.on_timer(now),
            Input::Connected(session) => self.on_connected(session, now),
            Input::DialFailed(session, error) => self.on_dial_failed(session, error, now),
            Input::Message(session, message) if self.session() == Some(session) => self.on_message(message, now),
            Input::Message(..) => {}
            Input::Closed(session, cause) => self.on_closed(session, &cause, now),
            Input::HeadSilent => {
                if let State::Welcomed { session, .. } = self.state {
                    self.effects.push_back(Effect::Close(session));
                    self.lost("no heartbeat echo from the head in time", now);
                }
            }
            Input::Reborn(incarnation) => {
                self.config.incarnation = self.config.incarnation.max(incarnation);
                if matches!(self.state, State::Fenced) {
                    self.failures = 0;
                    self.dial(now);
                }
            }
            Input::Heads(targets, cause) => self.on_heads(targets, &cause, now),
            Input::Leave => self.on_leave(),
        }
    }

    fn on_timer(&mut self, now: Instant) {
        match self.state {
            State::Resting { until } if until <= now => self.dial(now),
            State::Dialing { session, limit } if limit <= now => {
                self.effects.push_back(Effect::Close(session));
                self.failed("no answer".into(), now);
            }
            State::Joining { session, limit } if limit <= now => {
                self.effects.push_back(Effect::Close(session));
                self.failed("connected, but no answer to the join".into(), now);
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, session: SessionId, now: Instant) {
        if matches!(self.state, State::Dialing { session: mine, .. } if mine == session) {
            self.trip = now.saturating_duration_since(self.dialled);
            self.state = State::Joining { session, limit: now + HANDSHAKE_TIMEOUT };
            self.effects.push_back(Effect::Join(session, self.config.incarnation));
        } else {
            // A dial that was given up and came through all the same.
            self.effects.push_back(Effect::Close(session));
        }
    }

    fn on_dial_failed(&mut self, session: SessionId, error: DialError, now: Instant) {
        if !matches!(self.state, State::Dialing { session: mine, .. } if mine == session) {
            return;
        }
        match error {
            DialError::Unreachable(cause) => self.failed(cause, now),
            DialError::Refused(refusal) => self.refused(refusal, now),
        }
    }

    fn on_message(&mut self, message: FromHead, now: Instant) {
        let Some(session) = self.session() else { return };
        let FromHead { by, message } = message;
        if let ToNode::Elsewhere { head, cause } = message {
            self.effects.push_back(Effect::Close(session));
            return self.elsewhere(head.and_then(|head| head.parse().ok()), cause, now);
        }
        if let Some(cause) = self.is_stale(by) {
            self.effects.push_back(Effect::Close(session));
            return if self.is_welcomed() { self.lost(&cause, now) } else { self.failed(cause, now) };
        }
        match message {
            ToNode::Welcome { cluster, head, your_address, dead_after_ms, heads } => {
                if self.is_welcomed() {
                    return;
                }
                self.state = State::Welcomed { session, by };
                (self.failures, self.hints) = (0, 0);
                self.talked = None;
                self.config.seen = Some(by);
                self.learn(&heads);
                let first = !std::mem::replace(&mut self.ever_welcomed, true);
                let dead_after = Duration::from_millis(dead_after_ms);
                let term = by.term;
                self.effects.push_back(Effect::Welcomed {
                    session,
                    cluster,
                    term,
                    head,
                    your_address,
                    dead_after,
                    first,
                });
            }
            ToNode::Heads(heads) => self.learn(&heads),
            ToNode::Refused(refusal) => {
                self.effects.push_back(Effect::Close(session));
                self.refused(refusal, now);
            }
            ToNode::Fenced { cause } => {
                self.effects.push_back(Effect::Close(session));
                self.state = State::Fenced;
                self.effects.push_back(Effect::KillWorkers(cause));
            }
            other => self.effects.push_back(Effect::Deliver(other)),
        }
    }

    /// Whether who speaks in this name has been replaced: one line of cause.
    fn is_stale(&self, by: HeadTerm) -> Option<String> {
        let head = self.head();
        match (&self.state, self.config.seen) {
            (State::Welcomed { by: mine, .. }, _) if *mine == by => None,
            // A head that comes to power again comes over new sessions.
            (State::Welcomed { by: mine, .. }, _) => {
                Some(format!("the head at {head} has changed from term {} to {}", mine.term.0, by.term.0))
            }
            (_, Some(seen)) if seen.cluster == by.cluster && seen.term > by.term => {
                let (old, new) = (by.term.0, seen.term.0);
                Some(format!("the head at {head} has been replaced: its term is {old}, and {new} was here"))
            }
            _ => None,
        }
    }

    /// Heads as a head knows them, itself first. Those that the user named are kept behind them.
    fn learn(&mut self, heads: &[String]) {
        let known: Vec<Target> = heads.iter().filter_map(|head| head.parse().ok()).map(Target::At).collect();
        // A daemon that may be head itself began with none: it has them from the store, which knows better.
        if known.is_empty() || self.config.targets.is_empty() || self.config.targets.contains(&Target::Here) {
            return;
        }
        let named = self.config.targets.iter().filter(|target| !known.contains(target)).copied();
        self.targets = known.iter().copied().chain(named).collect();
        self.at = 0;
    }

    /// Who answered is not the head; perhaps it knows who is.
    fn elsewhere(&mut self, head: Option<SocketAddr>, cause: String, now: Instant) {
        let from_store = self.config.targets.is_empty();
        let named = head.map(Target::At).filter(|head| !from_store && self.targets.get(self.at) != Some(head));
        if self.is_welcomed() {
            self.effects.push_back(Effect::Lost(cause.clone()));
        }
        let Some(named) = named else { return self.failed(cause, now) };
        self.hints += 1;
        // Two that name each other are no news, and get the pauses of a failure.
        if self.hints > 2 {
            self.failed(cause, now);
        } else {
            self.state = State::Resting { until: now };
        }
        self.at = self.targets.iter().position(|target| *target == named).unwrap_or_else(|| {
            self.targets.push(named);
            self.targets.len() - 1
        });
    }

    fn on_heads(&mut self, targets: Vec<Target>, cause: &str, now: Instant) {
        if matches!(self.state, State::Fenced | State::Ended) {
            self.targets = targets;
            self.at = 0;
            return;
        }
        let dialled = self.targets.get(self.at).copied();
        let stays = dialled.is_some() && dialled == targets.first().copied() && !matches!(self.state, State::Idle);
        self.targets = targets;
        self.at = 0;
        if stays {
            return;
        }
        match self.state {
            State::Welcomed { session, .. } => {
                self.effects.push_back(Effect::Close(session));
                self.effects.push_back(Effect::Lost(cause.to_owned()));
            }
            State::Joining { session, .. } | State::Dialing { session, .. } => {
                self.effects.push_back(Effect::Close(session));
            }
            _ => {}
        }
        (self.failures, self.hints) = (0, 0);
        self.dial(now);
    }

    /// Who is being dialled, for people.
    fn head(&self) -> String {
        match self.targets.get(self.at) {
            Some(Target::At(address)) if self.targets.len() > 1 || self.config.targets.is_empty() => {
                address.to_string()
            }
            _ => self.config.head.clone(),
        }
    }

    fn on_closed(&mut self, session: SessionId, cause: &str, now: Instant) {
        match self.state {
            State::Welcomed { session: mine, .. } if mine == session => self.lost(cause, now),
            State::Dialing { session: mine, .. } | State::Joining { session: mine, .. } if mine == session => {
                self.failed(cause.to_owned(), now);
            }
            _ => {}
        }
    }

    fn on_leave(&mut self) {
        if let Some(session) = self.session() {
            self.effects.push_back(Effect::Send(session, ToHead::Leave));
            self.effects.push_back(Effect::Close(session));
        } else if let State::Dialing { session, .. } = self.state {
            self.effects.push_back(Effect::Close(session));
        }
        self.last_failure = "this node has left the cluster".into();
        self.state = State::Ended;
    }

    fn dial(&mut self, now: Instant) {
        let Some(target) = self.targets.get(self.at).copied() else {
            self.state = State::Idle;
            return;
        };
        self.sessions += 1;
        let session = SessionId(self.sessions);
        // With several to try, none is waited for long.
        let steps = if self.targets.len() > 1 { DIAL_LIMIT_STEPS - 1 } else { DIAL_LIMIT_STEPS };
        let step = self.rounds() % steps;
        // On a slow wire not even the first dial is cut short.
        let limit = (DIAL_LIMIT_MIN * DIAL_LIMIT_FACTOR.pow(step)).max(self.trip * 3).min(HANDSHAKE_TIMEOUT);
        self.dialled = now;
        self.state = State::Dialing { session, limit: now + limit };
        self.effects.push_back(Effect::Dial(session, target));
    }

    /// How often all have been tried since the last welcome.
    fn rounds(&self) -> u32 {
        self.failures / u32::try_from(self.targets.len()).unwrap_or(u32::MAX).max(1)
    }

    fn lost(&mut self, cause: &str, now: Instant) {
        self.effects.push_back(Effect::Lost(cause.to_owned()));
        self.failed(cause.to_owned(), now);
    }

    fn failed(&mut self, cause: String, now: Instant) {
        let pause = (BACK_OFF_MIN * 2u32.pow(self.rounds().min(10))).min(BACK_OFF_MAX);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Resting { until: now + self.jittered(pause) };
        // With several to try, nothing is amiss before all of them were tried.
        if self.at + 1 >= self.targets.len() {
            self.talk(&cause, now);
        }
        if !self.targets.is_empty() {
            self.at = (self.at + 1) % self.targets.len();
        }
        self.last_failure = cause;
    }

    /// Says it when it is new, and again every ten seconds.
    fn talk(&mut self, cause: &str, now: Instant) {
        let due = match &self.talked {
            Some((at, said)) => said != cause || now.saturating_duration_since(*at) >= WAIT_REPORT_PERIOD,
            None => true,
        };
        if due {
            self.talked = Some((now, cause.to_owned()));
            self.effects.push_back(Effect::Talk(format!("waiting for the head at {}: {cause}", self.head())));
        }
    }

    fn refused(&mut self, refusal: Refusal, now: Instant) {
        if self.ever_welcomed {
            // Groups may run here: a head that was replaced by one that we do not suit is no reason to give them up.
            self.failed(refusal.cause, now);
            self.state = State::Resting { until: now + self.jittered(BACK_OFF_MAX) };
        } else {
            self.last_failure.clone_from(&refusal.cause);
            self.state = State::Ended;
            self.effects.push_back(Effect::Refused(refusal));
        }
    }

    /// Between three quarters of `pause` and all of it, so that a thousand nodes do not dial in step.
    fn jittered(&self, pause: Duration) -> Duration {
        let mut x = self.config.jitter_seed ^ u64::from(self.failures).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        pause - pause / 4 * u32::try_from((x ^ (x >> 31)) % 256).unwrap_or(0) / 256
    }
}
