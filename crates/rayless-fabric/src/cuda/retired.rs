//! Rings that nobody uses from here any more, but a stream or the peer perhaps still does.
//!
//! They wait here, and each time a ring is made or retired those that are free by now go. A process that ends takes the rest
//! along: the driver frees what a process had.

use super::{
    page::{Page, State},
    ring::{Ring, Uses, any_unfinished},
};
use std::sync::{Arc, Mutex, PoisonError};

/// A ring put aside.
pub(super) struct Retired {
    pub(super) ring: Arc<Ring>,
    pub(super) uses: Uses,
    /// What the other side was told, and is told once the ring is gone.
    pub(super) end: End,
    /// The number after that of its last chunk.
    pub(super) last: u32,
}

/// Which end of which ring it was.
pub(super) enum End {
    /// A ring of this process alone.
    Private,
    /// The sender's end of slots: they are free when the receiver has given its mapping back, or has ended.
    Lender(Page),
    /// The receiver's end: the sender is told when the mapping is gone.
    Borrower(Page),
}

static RETIRED: Mutex<Vec<Retired>> = Mutex::new(Vec::new());

/// Rings put aside that are still in use: none, once all streams and peers are done.
pub fn put_aside() -> usize {
    sweep();
    RETIRED.lock().unwrap_or_else(PoisonError::into_inner).len()
}

pub(super) fn retire(retired: Retired) {
    RETIRED.lock().unwrap_or_else(PoisonError::into_inner).push(retired);
    sweep();
}

/// Frees what can be freed, when that does not have to wait.
pub(super) fn sweep() {
    for retired in RETIRED.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
        retired.let_go();
    }
    if any_unfinished() {
        return;
    }
    let free: Vec<Retired> = {
        let mut all = RETIRED.lock().unwrap_or_else(PoisonError::into_inner);
        all.extract_if(.., Retired::is_free).collect()
    };
    for Retired { ring, end, .. } in free {
        drop(ring);
        if let End::Borrower(page) = end {
            page.close();
        }
    }
}

impl Retired {
    /// Ends its streams' waits, again if the peer's last writes overtook us.
    fn let_go(&mut self) {
        if !self.uses.settle() {
            self.end.release(&self.ring, self.last);
        }
    }

    fn is_free(&mut self) -> bool {
        self.uses.settle()
            && match &self.end {
                End::Private | End::Borrower(_) => true,
                End::Lender(page) => match page.state() {
                    State::Accepted => page.receiver().has_ended(),
                    State::Offered => page.withdraw(),
                    State::Nothing | State::Refused | State::Closed | State::Withdrawn => true,
                },
            }
    }
}

impl End {
    /// Ends the waits of this end's streams for chunks before number `last`.
    pub(super) fn release(&self, ring: &Ring, last: u32) {
        for back in 1..=super::ring::SLOTS {
            match self {
                Self::Private => {}
                Self::Lender(_) => ring.set_free(last.wrapping_sub(back)),
                Self::Borrower(_) => ring.set_full(last.wrapping_sub(back)),
            }
        }
    }
}
