//! Handshakes in progress: so many and no more, and the oldest makes way.
//!
//! Refusing the newest would let a handful of silent connections keep everybody out for as long as a handshake
//! may take. A true peer is through in milliseconds; the oldest one is the likeliest idler.

use crate::counters::{Counters, Refused};
use std::{collections::VecDeque, sync::Arc};
use tokio::task::AbortHandle;

/// The tasks that shake hands.
#[derive(Debug)]
pub(crate) struct HalfOpen {
    tasks: VecDeque<AbortHandle>,
    limit: usize,
    counters: Arc<Counters>,
}

impl HalfOpen {
    pub(crate) fn new(limit: usize, counters: Arc<Counters>) -> Self {
        Self { tasks: VecDeque::new(), limit, counters }
    }

    /// How many there are.
    pub(crate) fn len(&mut self) -> usize {
        self.tasks.retain(|task| !task.is_finished());
        self.tasks.len()
    }

    /// Takes in one more; the oldest is broken off where there are too many.
    pub(crate) fn admit(&mut self, task: AbortHandle) {
        if self.len() >= self.limit
            && let Some(oldest) = self.tasks.pop_front()
        {
            oldest.abort();
            self.counters.refuse(Refused::TooMany);
        }
        self.tasks.push_back(task);
    }
}

impl Drop for HalfOpen {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}
