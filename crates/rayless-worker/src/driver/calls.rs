//! Calls under way: which replies they wait for, and what becomes of them.

use super::{CallError, Reply};
use rayless_proto::{
    ids::{CallId, Rank},
    limits::MAX_CALL,
};
use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

/// After the first error of a call, how long the other ranks' replies are waited for: so the lowest rank that raised is the one
/// reported, and not the fastest.
const ERROR_GRACE: Duration = Duration::from_millis(100);

/// What a call comes to.
pub(super) type Outcome = Result<Vec<Reply>, CallError>;

/// Where the outcome of a call appears, once.
pub(super) type Slot = Arc<OnceLock<Outcome>>;

/// A call of which not all replies are in. It stays after a timeout or an error, to know its late replies when they come.
pub(super) struct Pending {
    /// Ascending.
    asked: Vec<Rank>,
    replies: Vec<Option<Vec<u8>>>,
    missing: usize,
    partial: HashMap<Rank, Vec<u8>>,
    /// The lowest rank that raised, and its exception.
    raised: Option<(Rank, Vec<u8>)>,
    grace: Option<Instant>,
    timeout: Option<(Instant, Duration)>,
    slot: Slot,
    on_done: Option<Box<dyn FnOnce() + Send>>,
    pub(super) sent: Instant,
    /// Of a call that is a step: how long it may take, from when it is the oldest.
    pub(super) step_deadline: Option<Duration>,
}

/// A reply that no worker of ours would send.
pub(super) struct Nonsense(pub(super) &'static str);

impl Pending {
    pub(super) fn new(asked: Vec<Rank>, timeout: Option<(Instant, Duration)>, slot: Slot) -> Self {
        let missing = asked.len();
        let replies = asked.iter().map(|_| None).collect();
        Self {
            asked,
            replies,
            missing,
            partial: HashMap::new(),
            raised: None,
            grace: None,
            timeout,
            slot,
            on_done: None,
            sent: Instant::now(),
            step_deadline: None,
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.slot.get().is_some()
    }

    /// All replies are in: nothing more will come.
    pub(super) const fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Asked ranks that have not answered.
    pub(super) fn missing(&self) -> Vec<Rank> {
        self.asked.iter().zip(&self.replies).filter(|(_, reply)| reply.is_none()).map(|(rank, _)| *rank).collect()
    }

    pub(super) fn set_on_done(&mut self, callback: Box<dyn FnOnce() + Send>) {
        self.on_done = Some(callback);
    }

    /// When something must be decided without news.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        if self.is_done() {
            return None;
        }
        self.grace.into_iter().chain(self.timeout.map(|(at, _)| at)).min()
    }

    /// Takes a fragment of a reply of `rank`.
    pub(super) fn take(
        &mut self,
        call: CallId,
        rank: Rank,
        last: bool,
        error: bool,
        payload: Vec<u8>,
    ) -> Result<(), Nonsense> {
        let whole = match self.partial.remove(&rank) {
            None => payload,
            Some(mut begun) => {
                if begun.len() as u64 + payload.len() as u64 > MAX_CALL {
                    return Err(Nonsense("a reply over the limit of 1 GiB"));
                }
                begun.extend_from_slice(&payload);
                begun
            }
        };
        if !last {
            self.partial.insert(rank, whole);
            return Ok(());
        }
        let place = self.asked.binary_search(&rank).ok();
        if place.is_none() && !error {
            return Err(Nonsense("a reply of a rank that was not asked"));
        }
        if let Some(place) = place {
            if self.replies[place].is_some() {
                return Err(Nonsense("a second reply to one call"));
            }
            self.missing -= 1;
            self.replies[place] = Some(Vec::new());
        }
        if self.is_done() {
            return Ok(());
        }
        if error {
            if self.raised.as_ref().is_none_or(|(other, _)| rank < *other) {
                self.raised = Some((rank, whole));
            }
            self.grace.get_or_insert_with(|| Instant::now() + ERROR_GRACE);
        } else if let Some(place) = place {
            self.replies[place] = Some(whole);
        }
        self.settle(call, None);
        Ok(())
    }

    /// Decides what can be decided now (`Some`: with the time in mind).
    pub(super) fn settle(&mut self, call: CallId, now: Option<Instant>) {
        if self.is_done() {
            return;
        }
        let late = |at: Instant| now.is_some_and(|now| now >= at);
        if let Some((rank, _)) = &self.raised {
            let lower_may_come = self.missing().iter().any(|missing| missing < rank);
            if !lower_may_come || self.grace.is_some_and(late) {
                if let Some((rank, payload)) = self.raised.take() {
                    self.finish(Err(CallError::Raised { call, rank, payload }));
                }
                return;
            }
        } else if self.missing == 0 {
            let replies = std::mem::take(&mut self.replies);
            let replies = self.asked.iter().zip(replies);
            let replies =
                replies.map(|(rank, payload)| Reply { rank: *rank, payload: Arc::new(payload.unwrap_or_default()) });
            let replies = replies.collect();
            self.finish(Ok(replies));
            return;
        }
        if let Some((_, after)) = self.timeout.filter(|(at, _)| late(*at)) {
            self.finish(Err(CallError::TimedOut { call, after, missing: self.missing() }));
        }
    }

    /// Ends the call with `outcome`, unless it is done.
    pub(super) fn finish(&mut self, outcome: Outcome) {
        let _ = self.slot.set(outcome);
        // Kept to know late replies by; their bytes are of no more use.
        self.replies.iter_mut().flatten().for_each(|reply| *reply = Vec::new());
    }

    /// The callback of a call that is done.
    pub(super) fn take_callback(&mut self) -> Option<Box<dyn FnOnce() + Send>> {
        if self.is_done() { self.on_done.take() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(asked: &[Rank]) -> (Pending, Slot) {
        let slot = Slot::default();
        (Pending::new(asked.to_vec(), None, Arc::clone(&slot)), slot)
    }

    #[test]
    fn replies_come_in_ascending_rank_whatever_the_order_of_arrival() {
        let (mut call, slot) = pending(&[1, 3]);
        assert!(call.take(1, 3, true, false, b"c".to_vec()).is_ok());
        assert_eq!(call.missing(), [1]);
        assert!(call.take(1, 1, false, false, b"a".to_vec()).is_ok());
        assert!(call.take(1, 1, true, false, b"b".to_vec()).is_ok());
        let replies = slot.get().unwrap().as_ref().unwrap();
        assert_eq!(
            *replies,
            [Reply { rank: 1, payload: Arc::new(b"ab".to_vec()) }, Reply { rank: 3, payload: Arc::new(b"c".to_vec()) }]
        );
        assert!(call.is_complete());
    }

    #[test]
    fn the_lowest_rank_that_raised_is_the_one_told() {
        let (mut call, slot) = pending(&[0, 1, 2]);
        assert!(call.take(1, 2, true, true, b"two".to_vec()).is_ok());
        assert!(slot.get().is_none());
        assert!(call.take(1, 0, true, false, Vec::new()).is_ok());
        assert!(call.take(1, 1, true, true, b"one".to_vec()).is_ok());
        let Some(Err(CallError::Raised { rank: 1, payload, .. })) = slot.get() else { panic!("{slot:?}") };
        assert_eq!(payload, b"one");
    }

    #[test]
    fn a_rank_that_was_not_asked_may_raise_but_not_answer() {
        let (mut call, slot) = pending(&[3]);
        assert!(call.take(1, 0, true, false, Vec::new()).is_err());
        assert!(call.take(1, 0, true, true, b"no".to_vec()).is_ok());
        assert!(matches!(slot.get(), Some(Err(CallError::Raised { rank: 0, .. }))));
        assert!(!call.is_complete());
        assert!(call.take(1, 3, true, false, b"late".to_vec()).is_ok());
        assert!(call.is_complete());
    }

    #[test]
    fn an_error_waits_for_lower_ranks_only_so_long() {
        let (mut call, slot) = pending(&[0, 1]);
        assert!(call.take(1, 1, true, true, b"one".to_vec()).is_ok());
        let due = call.next_deadline().unwrap();
        call.settle(1, Some(due - Duration::from_millis(1)));
        assert!(slot.get().is_none());
        call.settle(1, Some(due));
        assert!(matches!(slot.get(), Some(Err(CallError::Raised { rank: 1, .. }))));
    }

    #[test]
    fn a_second_reply_is_nonsense() {
        let (mut call, _) = pending(&[0, 1]);
        assert!(call.take(1, 1, true, false, Vec::new()).is_ok());
        assert!(call.take(1, 1, true, false, Vec::new()).is_err());
    }
}
