//! A daemon that may be the head: its candidate, the store, and how it takes office and leaves it.
//!
//! The clock is asked before each input of the head and before each message that it sends: a process that was stopped finds out
//! that its lease is over before it does anything else.

use super::core::Core;
use crate::store::{self, StoreConfig, StoreHandle, StoreNews};
use rayless_control::{
    Candidate, Head, SessionId,
    election::{self, CandidateConfig},
    head::{self, HeadConfig, Story},
    member::{self, Target},
};
use rayless_proto::{
    ids::{ClusterId, Term},
    v1::{
        control::{FromHead, HeadTerm, Refusal, RefusalKind, ToHead, ToNode},
        status::HeadSeat,
    },
};
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::mpsc;

/// What a daemon that may be the head has besides.
#[derive(Debug)]
pub(crate) struct Stand {
    candidate: Candidate,
    store: Option<StoreHandle>,
    news: mpsc::UnboundedReceiver<StoreNews>,
    clock: LeaseClock,
    seat: HeadSeat,
    /// Where the store is, for people.
    shown: String,
    /// Lines for people that wait to be said.
    said: Vec<String>,
}

/// A clock that goes on while the machine sleeps, which `Instant` does not.
#[derive(Debug, Clone, Copy)]
struct LeaseClock {
    base: Instant,
    awake: Duration,
}

impl LeaseClock {
    fn new() -> Self {
        Self { base: Instant::now(), awake: boot_time() }
    }

    fn now(self) -> Instant {
        self.base + boot_time().saturating_sub(self.awake)
    }
}

fn boot_time() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Stand {
    /// A candidate for the seat, in the cluster of these authorities.
    pub(crate) fn new(
        config: StoreConfig,
        lease: Duration,
        seat: HeadSeat,
        authorities: Vec<String>,
        cluster: ClusterId,
        seen: Option<HeadTerm>,
    ) -> Self {
        let clock = LeaseClock::new();
        let shown = config.shown();
        let candidate = CandidateConfig {
            seat: seat.clone(),
            lease,
            cluster,
            seen: seen.map_or(Term(0), |seen| seen.term),
            store: shown.clone(),
            authorities: authorities.clone(),
        };
        let (store, news) = store::open(config, seat.clone(), authorities, lease);
        let candidate = Candidate::new(candidate, clock.now());
        Self { candidate, store: Some(store), news, clock, seat, shown, said: Vec::new() }
    }

    /// Where the store is, for people.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// When the candidate wants to be asked again.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let left = self.candidate.next_timeout()?.saturating_duration_since(self.clock.now());
        Some(Instant::now() + left)
    }

    /// Why there is no head, where there is none.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.candidate.trouble()
    }
}

/// The next news of the store; none where there is none. May be dropped while waiting.
pub(crate) async fn next_news(stand: &mut Option<Stand>) -> StoreNews {
    match stand {
        Some(stand) => match stand.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

impl Core {
    /// News of the store.
    pub(crate) fn store_says(&mut self, news: StoreNews) -> Result<(), super::DaemonError> {
        match news {
            StoreNews::Candidate(input) => self.stand_for(input),
            StoreNews::Foreign(head) => {
                let store = self.stand.as_ref().map(|stand| stand.shown.clone()).unwrap_or_default();
                return Err(super::DaemonError::Refused(format!(
                    "the store at {store} is that of a cluster with another token: {head}\nhint: take that cluster's token, or give this one a name of its own: `--store {store}/NAME`"
                )));
            }
        }
        Ok(())
    }

    /// Gives the candidate an input, and does what it says at once: nothing may come between its decision and the deed.
    pub(crate) fn stand_for(&mut self, input: election::Input) {
        let Some(stand) = &mut self.stand else { return };
        if let election::Input::Authorities { held, .. } = &input
            && let Some(store) = &stand.store
        {
            store.accept(held.clone());
        }
        stand.candidate.handle(stand.clock.now(), input);
        while let Some(effect) = self.stand.as_mut().and_then(|stand| stand.candidate.poll_effect()) {
            match effect {
                election::Effect::Activate { term, cluster } => self.take_office(term, cluster),
                election::Effect::StepDown(cause) => self.leave_office(&cause),
                election::Effect::Heads(heads) => self.heads_changed(heads),
                election::Effect::Talk(line) => self.say(line),
                request => {
                    if let Some(store) = self.stand.as_ref().and_then(|stand| stand.store.as_ref()) {
                        store.ask(request);
                    }
                }
            }
        }
    }

    /// Whether the head in this process, if there is one, may decide now; if not, it is gone after this.
    pub(crate) fn may_decide(&mut self) -> bool {
        if let Some(stand) = &self.stand
            && self.head.is_some()
            && !stand.candidate.holds(stand.clock.now())
        {
            self.stand_for(election::Input::Timer);
        }
        self.head.is_some()
    }

    /// The candidate's timer.
    pub(crate) fn stand_on_time(&mut self) {
        if let Some(stand) = &self.stand
            && stand.candidate.next_timeout().is_some_and(|at| at <= stand.clock.now())
        {
            self.stand_for(election::Input::Timer);
        }
    }

    /// Lines that wait to be said.
    pub(crate) fn take_said(&mut self) -> Vec<String> {
        self.stand.as_mut().map(|stand| std::mem::take(&mut stand.said)).unwrap_or_default()
    }

    /// Gives the lease back, so that another may take over at once.
    pub(crate) async fn stand_no_more(&mut self) {
        self.stand_for(election::Input::Leave);
        if let Some(store) = self.stand.as_mut().and_then(|stand| stand.store.take()) {
            store.close().await;
        }
    }

    fn say(&mut self, line: String) {
        tracing::info!("{line}");
        if let Some(stand) = &mut self.stand {
            stand.said.push(line);
        }
    }

    fn take_office(&mut self, term: Term, cluster: ClusterId) {
        let Some(stand) = &self.stand else { return };
        let heads = vec![HeadSeat { active: true, ..stand.seat.clone() }];
        let mut random = [0u8; 8];
        if let Err(error) = getrandom::fill(&mut random) {
            return self.say(format!("cannot be the head: no random numbers from the system: {error}"));
        }
        let now = Instant::now();
        let config = HeadConfig {
            node: self.info.id,
            term,
            heads,
            cluster,
            seed: u64::from_le_bytes(random),
            dead_after: self.own_dead_after.unwrap_or(self.dead_after),
            unix_us: super::unix_us(),
        };
        self.say(format!("this daemon is the head now (term {})", term.0));
        self.head_address = String::new();
        let mut head = Head::new(config, now);
        head.remember(self.past(), now);
        self.head = Some(head);
        let overlap = self.tokens.overlap_left(SystemTime::now());
        self.hand_in_tokens(overlap, now);
        let cause = "this daemon is the head now".to_owned();
        self.member.handle(now, member::Input::Heads(vec![Target::Here], cause));
    }

    /// What has happened, as far as this daemon knows: by the head's word, or else by what it wrote itself in its last life. The rest of that file is no good
    /// here: the last head was another daemon, as a rule, and nodes bring what they hold.
    fn past(&mut self) -> Story {
        let told = std::mem::take(&mut self.story);
        if !told.is_empty() {
            return told;
        }
        std::fs::read(self.run.head_story()).ok().and_then(|bytes| Story::of_state(&bytes).ok()).unwrap_or_default()
    }

    fn leave_office(&mut self, cause: &str) {
        self.say(cause.to_owned());
        if let Some(head) = self.head.take() {
            self.story = head.story();
        }
        self.inside = None;
        self.wire.drop_nodes("this daemon is no longer the head");
        let others: Vec<HeadSeat> = self.stand.iter().flat_map(|stand| stand.candidate.others().cloned()).collect();
        // Whoever takes over is among them, also where this daemon does not see the store.
        self.follow(&others, "this daemon is no longer the head");
    }

    fn heads_changed(&mut self, heads: Vec<HeadSeat>) {
        let me = self.info.id;
        if self.may_decide() {
            self.head_takes(head::Input::Heads(heads), Instant::now());
        } else if let Some(other) = heads.iter().find(|seat| seat.active && seat.node != me).cloned() {
            let cause = format!("{} is the head now", other.name);
            self.follow(&[other], &cause);
        }
    }

    fn follow(&mut self, heads: &[HeadSeat], cause: &str) {
        let targets: Vec<Target> = heads.iter().filter_map(|seat| seat.address.parse().ok()).map(Target::At).collect();
        if let Some(first) = heads.first() {
            self.head_address.clone_from(&first.address);
        }
        self.member.handle(Instant::now(), member::Input::Heads(targets, cause.to_owned()));
    }

    /// Somebody takes this daemon for the head, which it is not (now).
    pub(crate) fn not_the_head(&self, session: SessionId, input: &head::Input) {
        let (head::Input::Message { message: ToHead::Join { .. }, .. }, Some(stand)) = (input, &self.stand) else {
            return;
        };
        let known = stand.candidate.head().filter(|(seat, ..)| seat.node != self.info.id);
        let (head, by) = match known {
            Some((seat, term, cluster)) => (Some(seat), HeadTerm { cluster, term }),
            None => (None, HeadTerm { cluster: ClusterId([0; 16]), term: Term(0) }),
        };
        let cause = match head {
            Some(seat) => format!("{} is a standby; the head is {} at {}", self.info.name, seat.name, seat.address),
            None => stand
                .trouble()
                .unwrap_or_else(|| format!("{} is a standby and is about to find the head", self.info.name)),
        };
        let message = ToNode::Elsewhere { head: head.map(|seat| seat.address.clone()), cause };
        self.wire.send_down(session, &FromHead { by, message });
        self.wire.close_down(session);
    }

    /// Why there is no head, for a client: where this daemon may be it, the store is asked.
    pub(crate) fn no_head_because_of_store(&self) -> Option<Refusal> {
        let stand = self.stand.as_ref()?;
        let cause = stand.trouble()?;
        let hint = match stand.candidate.barred() {
            Some(_) => "start this daemon with the present token: `rayless token show` on the head".to_owned(),
            None => format!("see that etcd runs at {}; running groups go on without a head", stand.shown()),
        };
        Some(Refusal { kind: RefusalKind::NoHead, cause, hint })
    }
}
