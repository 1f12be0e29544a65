//! How one payload is lent instead of copied into the ring, apart from any memory, so that loom can try every interleaving of it.
//!
//! One word in the shared memory holds the number of the newest loan and what became of it. The sender offers; the receiver
//! copies and only then takes, or declines; the sender revokes when its caller wants the tensors back. Each of the last three is a
//! compare-and-swap from the offer, so exactly one of them happens: bytes count as received only if the sender had not
//! let go of them before the last of them was copied.

/// The word, in shared memory or in a model of it.
pub trait Word {
    /// Reads, acquiring.
    fn load(&self) -> u64;
    /// Writes, releasing.
    fn store(&self, value: u64);
    /// Replaces `from`, acquiring and releasing; false where the word is another.
    fn replace(&self, from: u64, to: u64) -> bool;
}

/// What became of a loan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The receiver may copy.
    Offered,
    /// It has copied all: the sender may use its tensors again.
    Taken,
    /// It cannot read this memory: the bytes have to come through the ring.
    Declined,
    /// The sender took its tensors back: what was copied means nothing.
    Revoked,
}

const fn word(number: u64, fate: Fate) -> u64 {
    number << 2 | fate as u64
}

/// The sender lends. Numbers begin with 1, since an empty word would be an offer of 0.
pub fn offer(at: &impl Word, number: u64) {
    at.store(word(number, Fate::Offered));
}

/// The receiver has copied everything. False: too late, none of it counts.
pub fn take(at: &impl Word, number: u64) -> bool {
    at.replace(word(number, Fate::Offered), word(number, Fate::Taken))
}

/// The receiver wants the bytes through the ring. False: the sender has taken the tensors back meanwhile.
pub fn decline(at: &impl Word, number: u64) -> bool {
    at.replace(word(number, Fate::Offered), word(number, Fate::Declined))
}

/// The sender takes its tensors back: from here on nothing that is copied counts. False: the receiver was done before.
pub fn revoke(at: &impl Word, number: u64) -> bool {
    at.replace(word(number, Fate::Offered), word(number, Fate::Revoked))
}

/// What became of loan `number`; `None`: the word is about another one, which the protocol rules out.
pub fn fate(at: &impl Word, number: u64) -> Option<Fate> {
    let found = at.load();
    let all = [Fate::Offered, Fate::Taken, Fate::Declined, Fate::Revoked];
    all.into_iter().find(|fate| word(number, *fate) == found)
}
