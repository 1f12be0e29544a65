//! Which of several daemons is the head: whoever holds the head's key in a store, and only while its lease surely holds.
//!
//! # The store
//! It keeps, for one cluster, a *seat* per candidate and the key of the head, each bound to a lease that ends by itself when it is
//! not renewed, a counter of terms, and the cluster's id. Nothing else: nodes bring what they hold, so a new head needs no state.
//!
//! # Safety
//! - **E1** Time is counted from the moment a request is made, never from its answer, and a fifth of the lease is given away: this
//!   candidate stops deciding before the store can give the head's key to another.
//! - **E2** Every input is judged by the clock first. A process that was stopped for a while finds that its lease is over before
//!   it does anything else ([`Candidate::holds`] is asked before each decision and before each message that leaves).
//! - **E3** The clock may stand still with the machine. So a term is never used twice, it is on every message, and nodes refuse
//!   a lower one than they have seen: what slips through E1 and E2 is not obeyed.
//! - **E4** A lease that was not renewed in time is never used again, even if the store still has it: the next one brings a new term.
//! - **E5** Who does not have the cluster's present token has no seat: nobody could join it. The store names the authority of a token that the
//!   head and all who live accept; a candidate that lacks it has missed a rotation.
//!
//! The time handed in should be one that counts a suspended machine's sleep (CLOCK_BOOTTIME).

use rayless_proto::{
    ids::{ClusterId, Term},
    v1::status::HeadSeat,
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// A lease is renewed this often in its time: two renewals may fail.
const RENEWALS: u32 = 3;
/// This part of a lease is given away: clocks that run at different speeds, messages on their way.
const MARGIN: u32 = 5;
/// Between two attempts while the lease holds but the store does not answer.
const RETRY_RENEWAL: Duration = Duration::from_millis(250);
/// Between two attempts to get a lease.
const RETRY: Duration = Duration::from_secs(1);
/// Attempts are numbered; the answer to an earlier one than the last of its kind says nothing.
pub type Attempt = u64;

/// What a [`Candidate`] needs to know.
#[derive(Debug, Clone)]
pub struct CandidateConfig {
    /// Its seat; `active` is not looked at.
    pub seat: HeadSeat,
    /// How long a lease holds without being renewed. The store may round it up.
    pub lease: Duration,
    /// Id of the cluster, if the store has none yet.
    pub cluster: ClusterId,
    /// The highest term that this node knows of: the next one is higher, even if the store has lost its memory.
    pub seen: Term,
    /// The store, for messages to people.
    pub store: String,
    /// Names of the authorities of the tokens that this daemon accepts.
    pub authorities: Vec<String>,
}

/// What is in the store, at one moment of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The store's own count of changes: a view with a lower one is older.
    pub revision: u64,
    /// The head, if there is one.
    pub head: Option<Throne>,
    /// All candidates with a living lease, the head among them.
    pub seats: Vec<HeadSeat>,
    /// The last term.
    pub term: Term,
    /// The cluster, once there was a head.
    pub cluster: Option<ClusterId>,
    /// Name of the authority that whoever may be the head must accept, once a head has named one.
    pub authority: Option<String>,
}

/// The key of the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Throne {
    /// Whose it is.
    pub seat: HeadSeat,
    /// The term under which it is.
    pub term: Term,
    /// The lease that it is bound to.
    pub lease: u64,
    /// When the key was last written, by the store's count.
    pub revision: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The lease is granted for `lease_time`, and the seat taken under it.
    Registered {
        /// Which attempt.
        attempt: Attempt,
        /// The lease.
        lease: u64,
        /// How long it holds.
        lease_time: Duration,
    },
    /// The lease is renewed.
    Renewed(Attempt),
    /// The store does not know the lease (any more).
    LeaseOver(Attempt),
    /// The head's key is this candidate's.
    Claimed {
        /// Which attempt.
        attempt: Attempt,
        /// Its term.
        term: Term,
        /// The cluster.
        cluster: ClusterId,
        /// The store's count.
        revision: u64,
    },
    /// Somebody else was first, or the terms have moved on. A [`Input::Observed`] follows.
    NotClaimed(Attempt),
    /// No answer, or none that makes sense: one line of cause.
    StoreFailed(Attempt, String),
    /// What the store holds, after each change.
    Observed(View),
    /// A node has been a member under this term.
    Superseded(Term),
    /// The tokens that this daemon accepts have changed, or who else has them.
    Authorities {
        /// Names of the authorities that it accepts.
        held: Vec<String>,
        /// While it is the head: the one of them that every candidate must have from here on.
        wanted: String,
    },
    /// The user stops this daemon; it decides nothing any more.
    Leave,
    /// [`Candidate::next_timeout`] has come.
    Timer,
}

impl Input {
    /// [`Input::Authorities`] of a daemon that accepts these, the one of the present token first. `all_have_it`: as the head, whether every living node
    /// has that token. While it is spread the next head must have the one before, so that a head that dies then has a successor.
    pub fn authorities(held: Vec<String>, all_have_it: bool) -> Option<Self> {
        let wanted = if all_have_it { held.first() } else { held.last() }?.clone();
        Some(Self::Authorities { held, wanted })
    }
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Give back the lease named, if any; get a new one and take a seat under it; have the store watched from then on. Answered by
    /// `Registered` or `StoreFailed`.
    Register {
        /// Number of this attempt.
        attempt: Attempt,
        /// The lease of an earlier attempt.
        give_back: Option<u64>,
    },
    /// Renew the lease. Answered by `Renewed`, `LeaseOver` or `StoreFailed`.
    Renew {
        /// Number of this attempt.
        attempt: Attempt,
        /// Which lease.
        lease: u64,
    },
    /// Write the head's key under the lease and the term, if neither has changed since the view. Answered by `Claimed`, `NotClaimed`
    /// or `StoreFailed`.
    Claim {
        /// Number of this attempt.
        attempt: Attempt,
        /// Under which lease.
        lease: u64,
        /// The term that it will be.
        term: Term,
        /// The term in the store as seen.
        after: Term,
        /// Revision of the head's key as seen; 0: there is none.
        key_revision: u64,
        /// The cluster: that in the store, or else this daemon's proposal.
        cluster: ClusterId,
    },
    /// While the head's key has this revision, have the store name this authority as the one that a candidate must have. Not
    /// answered: it is asked again with each renewal, until the view shows it.
    NameAuthority {
        /// Revision of the head's key.
        key_revision: u64,
        /// The authority.
        authority: String,
    },
    /// Give the lease back, and with it seat and key: the next one takes over at once.
    GiveBack(u64),
    /// This daemon is the head from here on.
    Activate {
        /// Under this term.
        term: Term,
        /// Of this cluster.
        cluster: ClusterId,
    },
    /// It no longer is (one line of cause): drop the head and its sessions, without a word to anyone.
    StepDown(String),
    /// Who is the head, and who stands by; the head first, if there is one.
    Heads(Vec<HeadSeat>),
    /// A line for people.
    Talk(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// No lease. Registers at `until`.
    Resting {
        until: Instant,
    },
    /// Asked for one.
    Registering,
    /// Has given it back, for it lacks the cluster's present token (E5). The store is watched all the same.
    Barred,
    /// Has one: sure until `sure`.
    Standing {
        lease: u64,
        sure: Instant,
    },
    /// Has one, and the head's key under it.
    Active {
        lease: u64,
        sure: Instant,
        term: Term,
        cluster: ClusterId,
        since: u64,
    },
    Ended,
}

/// One daemon that may be the head.
#[derive(Debug)]
pub struct Candidate {
    config: CandidateConfig,
    state: State,
    attempts: Attempt,
    /// The attempt under way, of each kind, and when it was made.
    registering: Option<(Attempt, Instant)>,
    renewing: Option<(Attempt, Instant)>,
    claiming: Option<(Attempt, Instant)>,
    renew_at: Instant,
    lease_time: Duration,
    /// A lease that may still live in the store but is not used any more.
    left: Option<u64>,
    view: Option<View>,
    told: Vec<HeadSeat>,
    trouble: Option<String>,
    /// As the head: the authority that a candidate must have.
    wanted: Option<String>,
    effects: VecDeque<Effect>,
}

impl Candidate {
    /// A candidate that registers at once: poll for effects.
    pub fn new(config: CandidateConfig, now: Instant) -> Self {
        let lease_time = config.lease;
        let mut candidate = Self {
            config,
            state: State::Resting { until: now },
            attempts: 0,
            registering: None,
            renewing: None,
            claiming: None,
            renew_at: now,
            lease_time,
            left: None,
            view: None,
            told: Vec::new(),
            trouble: None,
            wanted: None,
            effects: VecDeque::new(),
        };
        candidate.register(now);
        candidate
    }

    /// Whether this daemon may decide at this moment (E2).
    pub fn holds(&self, now: Instant) -> bool {
        matches!(self.state, State::Active { sure, .. } if now < sure)
    }

    /// The term under which this daemon is the head; it may have run out since ([`Self::holds`]).
    pub const fn term(&self) -> Option<Term> {
        match self.state {
            State::Active { term, .. } => Some(term),
            _ => None,
        }
    }

    /// Who is the head, for those who take this daemon for it. Without a lease this candidate sees nothing of the store, and does
    /// not know.
    pub fn head(&self) -> Option<(&HeadSeat, Term, ClusterId)> {
        if !matches!(self.state, State::Standing { .. } | State::Active { .. } | State::Barred) {
            return None;
        }
        let view = self.view.as_ref()?;
        let throne = view.head.as_ref()?;
        Some((&throne.seat, throne.term, view.cluster?))
    }

    /// All other candidates that were there at the last look, the head first.
    pub fn others(&self) -> impl Iterator<Item = &HeadSeat> {
        self.told.iter().filter(|seat| seat.node != self.config.seat.node)
    }

    /// Whether it may not be the head, for it has missed a rotation of the cluster's token: one line.
    pub fn barred(&self) -> Option<String> {
        matches!(self.state, State::Barred).then(|| {
            "this daemon cannot be the head: the cluster's token was rotated while it was away, and the one it has is no longer in force".to_owned()
        })
    }

    /// Why no head is known, or what is amiss; `None` while all is well.
    pub fn trouble(&self) -> Option<String> {
        if let Some(line) = self.barred() {
            return Some(line);
        }
        let store = &self.config.store;
        match (&self.trouble, &self.view) {
            (Some(cause), _) => Some(format!("the store at {store} does not answer ({cause}), so nobody may decide")),
            (None, Some(view)) if view.head.is_some() => None,
            (None, Some(_)) => Some("no daemon is the head at this moment; a standby is about to take over".to_owned()),
            (None, None) => Some(format!("the store at {store} has not answered yet")),
        }
    }

    /// The next effect, oldest first.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to hand in [`Input::Timer`], on the clock that is handed in.
    pub fn next_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Resting { until } => Some(until),
            State::Registering | State::Barred | State::Ended => None,
            State::Standing { sure, .. } | State::Active { sure, .. } if self.renewing.is_some() => Some(sure),
            State::Standing { sure, .. } | State::Active { sure, .. } => Some(sure.min(self.renew_at)),
        }
    }

    /// Takes one event.
    pub fn handle(&mut self, now: Instant, input: Input) {
        if matches!(self.state, State::Ended) {
            return;
        }
        self.check_lease(now);
        match input {
            Input::Timer => {}
            Input::Registered { attempt, lease, lease_time } => self.on_registered(attempt, lease, lease_time, now),
            Input::Renewed(attempt) => {
                if let Some(asked) = take(&mut self.renewing, attempt) {
                    self.trouble = None;
                    let until = self.sure_until(asked);
                    self.renew_at = asked + self.lease_time / RENEWALS;
                    if let State::Standing { sure, .. } | State::Active { sure, .. } = &mut self.state {
                        *sure = until;
                    }
                    self.name_authority();
                    // A claim that came to nothing, or a change that was missed.
                    self.claim_if_free(now);
                }
            }
            Input::LeaseOver(attempt) => {
                if take(&mut self.renewing, attempt).is_some() {
                    self.give_up("its lease in the store has ended", now);
                    self.register(now);
                }
            }
            Input::Claimed { attempt, term, cluster, revision } => {
                if take(&mut self.claiming, attempt).is_some() {
                    self.on_claimed(term, cluster, revision);
                }
            }
            Input::NotClaimed(attempt) => {
                let _ = take(&mut self.claiming, attempt);
            }
            Input::StoreFailed(attempt, cause) => self.on_failed(attempt, cause, now),
            Input::Observed(view) => self.on_observed(view, now),
            Input::Superseded(term) => {
                self.config.seen = self.config.seen.max(term);
                if self.term().is_some_and(|mine| mine < term) {
                    self.give_up(&format!("a node has been a member under term {}", term.0), now);
                    self.register(now);
                }
            }
            Input::Authorities { held, wanted } => {
                self.config.authorities = held;
                self.wanted = Some(wanted);
                self.name_authority();
                self.check_token(now);
            }
            Input::Leave => {
                if let State::Standing { lease, .. } | State::Active { lease, .. } = self.state {
                    self.effects.push_back(Effect::GiveBack(lease));
                }
                if self.term().is_some() {
                    self.effects.push_back(Effect::StepDown("this daemon is being stopped".into()));
                }
                self.state = State::Ended;
            }
        }
        self.on_time(now);
    }

    /// E2: nothing is done on a lease that may be over.
    fn check_lease(&mut self, now: Instant) {
        if let State::Standing { sure, .. } | State::Active { sure, .. } = self.state
            && now >= sure
        {
            let cause = self.trouble.clone().unwrap_or_else(|| "this process was not running in time".into());
            self.give_up(&format!("its lease in the store could not be renewed: {cause}"), now);
        }
    }

    fn on_time(&mut self, now: Instant) {
        match self.state {
            State::Resting { until } if until <= now => self.register(now),
            State::Standing { lease, .. } | State::Active { lease, .. }
                if self.renewing.is_none() && self.renew_at <= now =>
            {
                let attempt = self.next_attempt();
                self.renewing = Some((attempt, now));
                self.effects.push_back(Effect::Renew { attempt, lease });
            }
            _ => {}
        }
    }

    fn register(&mut self, now: Instant) {
        let attempt = self.next_attempt();
        self.registering = Some((attempt, now));
        (self.renewing, self.claiming) = (None, None);
        self.state = State::Registering;
        self.effects.push_back(Effect::Register { attempt, give_back: self.left.take() });
    }

    fn on_registered(&mut self, attempt: Attempt, lease: u64, lease_time: Duration, now: Instant) {
        let Some(asked) = take(&mut self.registering, attempt) else { return };
        self.trouble = None;
        self.lease_time = lease_time.min(self.config.lease);
        let sure = self.sure_until(asked);
        self.renew_at = asked + self.lease_time / RENEWALS;
        if now >= sure {
            // The answer took longer than the lease holds.
            self.left = Some(lease);
            self.state = State::Resting { until: now + RETRY };
            return;
        }
        self.state = State::Standing { lease, sure };
        self.check_token(now);
        self.claim_if_free(now);
    }

    /// E5.
    fn check_token(&mut self, now: Instant) {
        let named = self.view.as_ref().and_then(|view| view.authority.as_ref());
        let lacks = named.is_some_and(|authority| !self.config.authorities.contains(authority));
        match self.state {
            State::Standing { lease, .. } if lacks => {
                (self.renewing, self.claiming) = (None, None);
                self.state = State::Barred;
                self.effects.push_back(Effect::GiveBack(lease));
                self.effects.extend(self.barred().map(Effect::Talk));
            }
            State::Barred if !lacks => {
                self.effects
                    .push_back(Effect::Talk("this daemon has the cluster's present token: it stands by again".into()));
                self.register(now);
            }
            _ => {}
        }
    }

    /// As the head: has the store say what a candidate must have, if it does not yet.
    fn name_authority(&mut self) {
        let State::Active { since, .. } = self.state else { return };
        let named = self.view.as_ref().and_then(|view| view.authority.as_ref());
        if let Some(authority) = self.wanted.as_ref().filter(|wanted| named != Some(wanted)) {
            self.effects.push_back(Effect::NameAuthority { key_revision: since, authority: authority.clone() });
        }
    }

    fn on_failed(&mut self, attempt: Attempt, cause: String, now: Instant) {
        let known = if take(&mut self.registering, attempt).is_some() {
            self.state = State::Resting { until: now + RETRY };
            true
        } else if take(&mut self.renewing, attempt).is_some() {
            self.renew_at = now + RETRY_RENEWAL;
            true
        } else {
            // It may have been carried out all the same: the next view tells.
            take(&mut self.claiming, attempt).is_some()
        };
        if known {
            if self.trouble.is_none() {
                let store = &self.config.store;
                self.effects.push_back(Effect::Talk(format!("the store at {store} does not answer: {cause}")));
            }
            self.trouble = Some(cause);
        }
    }

    fn on_observed(&mut self, view: View, now: Instant) {
        if self.view.as_ref().is_some_and(|known| known.revision > view.revision) {
            return;
        }
        self.config.seen = self.config.seen.max(view.term);
        let throne = view.head.clone();
        let mut heads = view.seats.clone();
        for seat in &mut heads {
            seat.active = throne.as_ref().is_some_and(|throne| throne.seat.node == seat.node);
        }
        // A head whose seat is not seen (yet) is the head all the same.
        if let Some(throne) = throne.as_ref().filter(|throne| !heads.iter().any(|seat| seat.node == throne.seat.node)) {
            heads.push(HeadSeat { active: true, ..throne.seat.clone() });
        }
        heads.sort_by(|a, b| (!a.active, &a.name, a.node).cmp(&(!b.active, &b.name, b.node)));
        let (revision, cluster) = (view.revision, view.cluster);
        self.view = Some(view);
        if let State::Active { lease, term, since, .. } = self.state
            && revision >= since
            && !throne.as_ref().is_some_and(|throne| throne.lease == lease && throne.term == term)
        {
            let cause = match &throne {
                Some(other) => format!("{} is the head under term {}", other.seat.name, other.term.0),
                None => "its key was taken out of the store".to_owned(),
            };
            self.give_up(&cause, now);
            self.register(now);
        }
        // The answer to a claim was lost.
        if let (State::Standing { lease, .. }, Some(throne), Some(cluster)) = (self.state, &throne, cluster)
            && throne.lease == lease
        {
            self.claiming = None;
            self.on_claimed(throne.term, cluster, throne.revision);
        }
        self.check_token(now);
        if heads != self.told {
            self.told.clone_from(&heads);
            self.effects.push_back(Effect::Heads(heads));
        }
        self.claim_if_free(now);
    }

    fn claim_if_free(&mut self, now: Instant) {
        let (State::Standing { lease, .. }, None, Some(view)) = (self.state, self.claiming, &self.view) else { return };
        // A former life of this very node is over for sure: there is one daemon in a run dir.
        let free =
            view.head.as_ref().is_none_or(|throne| throne.seat.node == self.config.seat.node && throne.lease != lease);
        if !free {
            return;
        }
        let known_cluster = view.cluster;
        let (after, key_revision) = (view.term, view.head.as_ref().map_or(0, |throne| throne.revision));
        // There is none after the last: who has seen that one has been lied to, and is no head.
        let Some(term) = self.config.seen.max(after).0.checked_add(1).map(Term) else { return };
        let attempt = self.next_attempt();
        self.claiming = Some((attempt, now));
        let cluster = known_cluster.unwrap_or(self.config.cluster);
        self.effects.push_back(Effect::Claim { attempt, lease, term, after, key_revision, cluster });
    }

    fn on_claimed(&mut self, term: Term, cluster: ClusterId, revision: u64) {
        // Not with a lease that ran out meanwhile: then `check_lease` has left `Standing`.
        let State::Standing { lease, sure } = self.state else { return };
        self.config.seen = self.config.seen.max(term);
        self.state = State::Active { lease, sure, term, cluster, since: revision };
        self.effects.push_back(Effect::Activate { term, cluster });
        self.name_authority();
    }

    /// Leaves the lease (E4). Where this was the head, it is not any more.
    fn give_up(&mut self, cause: &str, now: Instant) {
        let (State::Standing { lease, .. } | State::Active { lease, .. }) = self.state else { return };
        if let State::Active { term, .. } = self.state {
            self.effects.push_back(Effect::StepDown(format!("no longer the head (term {}): {cause}", term.0)));
        }
        self.left = Some(lease);
        (self.renewing, self.claiming) = (None, None);
        self.state = State::Resting { until: now };
    }

    /// E1.
    fn sure_until(&self, asked: Instant) -> Instant {
        asked + self.lease_time - self.lease_time / MARGIN
    }

    const fn next_attempt(&mut self) -> Attempt {
        self.attempts += 1;
        self.attempts
    }
}

/// When the attempt was made, if it is the one under way.
fn take(slot: &mut Option<(Attempt, Instant)>, attempt: Attempt) -> Option<Instant> {
    slot.take_if(|(under_way, _)| *under_way == attempt).map(|(_, asked)| asked)
}
