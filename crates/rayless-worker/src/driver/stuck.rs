//! Alive but stuck: a call makes no progress though every process and session is well.
//!
//! The oldest call under way is the measure: calls run in order, so the group moves when it changes. Where it stays for too long, each keeper is
//! asked what its ranks do, and the driver's callback gets a report; then again after twice the time. Nothing is ended by that: loading
//! weights takes minutes. Only a call that its caller marked as a step has a deadline, and its time runs while it is the oldest.

use super::{GroupFailure, calls::Pending, core::Core, error::list};
use rayless_proto::{
    codec,
    ids::{CallId, Rank},
    limits::STUCK_AFTER,
    v1::step::{Kind, Look, RankLook},
};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// A keeper answers within about two seconds, which is how long a stack may take.
const ANSWER: Duration = Duration::from_secs(4);
/// Between two looks at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Ranks named in one line of cause.
const NAMED: usize = 8;
/// Lines of a stack in a message; all of it is in the rank's log.
const FRAMES: usize = 24;

/// What is known of the progress of a group.
pub(super) struct Watch {
    stuck_after: Duration,
    /// The oldest call, and since when it is that.
    oldest: Option<(CallId, Instant)>,
    /// Time without progress at which the ranks are looked at next.
    next: Duration,
    look: Option<Looking>,
}

/// A look under way.
struct Looking {
    call: CallId,
    waited: Duration,
    /// The step deadline that is over.
    deadline: Option<Duration>,
    until: Instant,
    /// Peers that have not answered.
    left: BTreeSet<usize>,
    ranks: Vec<RankLook>,
}

/// What a group does that makes no progress.
#[derive(Debug, Clone)]
pub struct StuckReport {
    /// The call that is waited for.
    pub call: CallId,
    /// How long.
    pub waited: Duration,
    /// All ranks of the nodes that answered, in ascending order, with the name of the node.
    pub ranks: Vec<(RankLook, String)>,
    /// Nodes that did not answer.
    pub silent: Vec<String>,
    /// When the next report comes, if nothing moves.
    pub again: Duration,
}

impl StuckReport {
    /// For people: what is waited for, then a line per rank, below those that are stuck where they are.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("no progress for {} s: call {} has not ended", self.waited.as_secs(), self.call)];
        let mut stacks = false;
        for (rank, node) in &self.ranks {
            lines.push(format!("rank {} on node {node} (pid {}): {}", rank.rank, rank.pid, rank.sentence()));
            if !rank.stack.is_empty() {
                stacks = true;
                lines.extend(rank.excerpt(FRAMES).iter().map(|frame| format!("rank {}| {frame}", rank.rank)));
            }
        }
        lines.extend(self.silent.iter().map(|node| format!("node {node}: no word of what its ranks do")));
        let whole = if stacks { "; all stacks are in the logs of these ranks (`rayless logs --rank N`)" } else { "" };
        lines.push(format!("next report in {} s, if nothing moves{whole}", self.again.as_secs()));
        lines
    }
}

impl Watch {
    pub(super) const fn new(stuck_after: Duration) -> Self {
        Self { stuck_after, oldest: None, next: stuck_after, look: None }
    }

    /// Where nobody said otherwise.
    pub(super) const fn standard() -> Self {
        Self::new(STUCK_AFTER)
    }

    /// This process slept for so long: the ranks may have worked all the while.
    pub(super) fn slept(&mut self, so_long: Duration) {
        if let Some((_, since)) = &mut self.oldest {
            *since += so_long;
        }
    }
}

impl Core {
    /// Each half second: whether the group moves.
    pub(super) fn watch_progress(&mut self, now: Instant) {
        if self.end.is_some() {
            return;
        }
        if let Some(look) = &self.watch.look {
            if now >= look.until {
                self.end_look();
            }
            return;
        }
        let Some((call, pending)) = self.calls.first_key_value() else {
            self.watch.oldest = None;
            return;
        };
        let call = *call;
        let since = match self.watch.oldest {
            Some((of, since)) if of == call => since,
            // It was behind another one until now, or it is the first after a rest.
            Some(_) => now,
            None => pending.sent,
        };
        let deadline = pending.step_deadline;
        if self.watch.oldest.is_none_or(|(of, _)| of != call) {
            self.watch.next = self.watch.stuck_after;
        }
        self.watch.oldest = Some((call, since));
        let waited = now.saturating_duration_since(since);
        if let Some(deadline) = deadline.filter(|deadline| waited >= *deadline) {
            self.begin_look(call, waited, Some(deadline), true, now);
        } else if waited >= self.watch.next && !self.watch.stuck_after.is_zero() {
            let first = self.watch.next == self.watch.stuck_after;
            self.watch.next = (waited * 2).min(waited + LONGEST_PAUSE);
            self.begin_look(call, waited, None, first, now);
        }
    }

    fn begin_look(&mut self, call: CallId, waited: Duration, deadline: Option<Duration>, stacks: bool, now: Instant) {
        let still = deadline.map_or(self.watch.stuck_after, |deadline| deadline.min(STUCK_AFTER));
        let look = Look { still_ms: u64::try_from(still.as_millis()).unwrap_or(u64::MAX), stacks };
        let left = self.tell_all(Kind::Look, &codec::encode(&look));
        self.watch.look = Some(Looking { call, waited, deadline, until: now + ANSWER, left, ranks: Vec::new() });
    }

    /// A keeper's answer.
    pub(super) fn take_look(&mut self, index: usize, ranks: Vec<RankLook>) {
        let Some(look) = &mut self.watch.look else { return };
        if look.left.remove(&index) {
            look.ranks.extend(ranks);
        }
        if look.left.is_empty() {
            self.end_look();
        }
    }

    fn end_look(&mut self) {
        let Some(mut look) = self.watch.look.take() else { return };
        // It ended while the ranks were being asked.
        let Some(pending) = self.calls.get(&look.call) else { return };
        look.ranks.sort_by_key(|rank| rank.rank);
        if let Some(deadline) = look.deadline {
            let failure = over(&look, pending, deadline, |rank| self.node_name(rank));
            return self.fail(failure);
        }
        let still = u64::try_from(self.watch.stuck_after.as_millis()).unwrap_or(u64::MAX);
        // Ranks that note new things all the time take long, but they are not stuck.
        if look.left.is_empty() && !look.ranks.iter().any(|rank| rank.is_stuck(still)) {
            return;
        }
        self.callbacks.stuck(StuckReport {
            call: look.call,
            waited: look.waited,
            silent: look.left.iter().map(|index| self.peer_name(*index)).collect(),
            ranks: look.ranks.into_iter().map(|rank| (self.node_name(rank.rank), rank)).map(|(n, r)| (r, n)).collect(),
            again: self.watch.next.saturating_sub(look.waited),
        });
    }
}

/// The one cause of a group whose step took too long.
fn over(look: &Looking, pending: &Pending, deadline: Duration, node: impl Fn(Rank) -> String) -> GroupFailure {
    let still = u64::try_from(deadline.min(STUCK_AFTER).as_millis()).unwrap_or(u64::MAX);
    let stuck: Vec<&RankLook> = look.ranks.iter().filter(|rank| rank.is_stuck(still)).collect();
    let missing = pending.missing();
    let ranks: Vec<Rank> =
        if stuck.is_empty() { missing.clone() } else { stuck.iter().map(|rank| rank.rank).collect() };
    let mut named: Vec<String> = stuck
        .iter()
        .take(NAMED)
        .map(|rank| format!("rank {} on node {} (pid {}): {}", rank.rank, node(rank.rank), rank.pid, rank.sentence()))
        .collect();
    if stuck.len() > NAMED {
        named.push(format!("and {} more", stuck.len() - NAMED));
    }
    if named.is_empty() {
        named.push(format!("no reply from rank {}", list(&missing)));
    }
    let cause = format!(
        "call {} took longer than the step deadline of {} s: {}",
        look.call,
        deadline.as_secs_f64(),
        named.join("; ")
    );
    let stacks: Vec<String> = stuck
        .iter()
        .take(NAMED)
        .flat_map(|rank| rank.excerpt(FRAMES).into_iter().map(|frame| format!("rank {}| {frame}", rank.rank)))
        .collect();
    GroupFailure::Stuck { ranks, cause, stacks: stacks.join("\n") }
}
