//! What the workers of this host do, when their driver (or `rayless report`) asks: who makes no progress, in what, since when.

use super::group::Worker;
use crate::ring::Ring;
use rayless_proto::{
    limits::MAX_STACK,
    v1::{
        control::WorkerState,
        step::{Look, RankLook},
    },
};
use std::{future::Future, rc::Rc};
use tokio::task::spawn_local;

/// Bytes of stacks that one answer may carry: an event is at most 1 MiB.
const STACKS: usize = 768 << 10;
/// Ranks named in a line of `status`.
const NAMED: usize = 8;

/// What each worker says that it does, without its stacks.
pub(super) fn at(ring: &Ring, workers: &[Worker], states: impl Iterator<Item = WorkerState>) -> Vec<RankLook> {
    let of = |(index, (worker, state)): (usize, (&Worker, WorkerState))| RankLook {
        rank: worker.rank,
        pid: worker.pid,
        state,
        call: ring.state(index).1,
        doing: ring.doing(index),
        still_ms: ring.still_ms(index),
        link: ring.link_moved(index),
        stack: String::new(),
    };
    workers.iter().zip(states).enumerate().map(of).collect()
}

/// Has the stuck ones write their stacks, all at the same time; the future is to be awaited anywhere in the `LocalSet`.
pub(super) fn begin(
    workers: &[Worker],
    mut ranks: Vec<RankLook>,
    look: Look,
) -> impl Future<Output = Vec<RankLook>> + use<> {
    let stuck = |rank: &RankLook| {
        look.stacks && (rank.is_stuck(look.still_ms) || (look.still_ms == 0 && rank.state != WorkerState::Dead))
    };
    let limit = MAX_STACK.min(STACKS / ranks.iter().filter(|rank| stuck(rank)).count().max(1));
    let taking: Vec<_> = workers
        .iter()
        .zip(&ranks)
        .enumerate()
        .filter(|(_, (_, rank))| stuck(rank))
        .map(|(index, (worker, _))| {
            let (stacks, pidfd) = (Rc::clone(&worker.stacks), Rc::clone(&worker.pidfd));
            (index, spawn_local(async move { stacks.take(pidfd.get_ref(), limit).await }))
        })
        .collect();
    async move {
        for (index, stack) in taking {
            ranks[index].stack = stack.await.unwrap_or_default();
        }
        ranks
    }
}

/// The stuck ranks of this host in one line; `None` where there are none.
pub(super) fn line(ranks: &[RankLook], look: &Look) -> Option<String> {
    let stuck: Vec<_> = ranks.iter().filter(|rank| rank.is_stuck(look.still_ms)).collect();
    let named: Vec<String> =
        stuck.iter().take(NAMED).map(|rank| format!("rank {}: {}", rank.rank, rank.sentence())).collect();
    let more = stuck.len().saturating_sub(NAMED);
    match (named.is_empty(), more) {
        (true, _) => None,
        (false, 0) => Some(named.join("; ")),
        (false, more) => Some(format!("{}; and {more} more", named.join("; "))),
    }
}
