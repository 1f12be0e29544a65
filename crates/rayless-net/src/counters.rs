//! What was refused or dropped, and why. For `status`, metrics and tests; nothing decides by it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a stranger, or what it sent, was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Its certificate is not of this cluster: another token, or none.
    WrongToken,
    /// It shook hands with a valid identity that may not open this kind of connection.
    NotAllowed,
    /// Its first frame was no `Hello`, or the first bytes no TLS handshake of rayless.
    NotRayless,
    /// No common protocol version.
    Version,
    /// It did not finish its handshake in time, or broke it off.
    Unfinished,
    /// It was the oldest of too many handshakes in progress.
    TooMany,
    /// A message on an established session was longer than allowed, or not a message.
    Malformed,
}

impl Refused {
    const ALL: [(Self, &'static str); 7] = [
        (Self::WrongToken, "wrong_token"),
        (Self::NotAllowed, "not_allowed"),
        (Self::NotRayless, "not_rayless"),
        (Self::Version, "version"),
        (Self::Unfinished, "unfinished"),
        (Self::TooMany, "too_many"),
        (Self::Malformed, "malformed"),
    ];
}

/// Counts since the start of the process.
#[derive(Debug, Default)]
pub struct Counters {
    refused: [AtomicU64; Refused::ALL.len()],
    accepted: AtomicU64,
    datagrams: AtomicU64,
    stray_datagrams: AtomicU64,
}

impl Counters {
    /// Counts one refusal.
    pub fn refuse(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    /// How often that happened.
    pub fn refused(&self, why: Refused) -> u64 {
        self.refused[why as usize].load(Relaxed)
    }

    /// Counts a handshake that led to a session.
    pub(crate) fn accept(&self) {
        self.accepted.fetch_add(1, Relaxed);
    }

    /// Handshakes that led to a session.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Relaxed)
    }

    /// Counts datagrams that the kernel handed to us, and those of them that cannot be rayless.
    pub(crate) fn datagrams(&self, all: u64, stray: u64) {
        self.datagrams.fetch_add(all, Relaxed);
        self.stray_datagrams.fetch_add(stray, Relaxed);
    }

    /// Every count with its name, in a fixed order.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        let mut out: Vec<_> = Refused::ALL.iter().map(|(why, name)| (*name, self.refused(*why))).collect();
        out.push(("accepted", self.accepted()));
        out.push(("datagrams", self.datagrams.load(Relaxed)));
        out.push(("stray_datagrams", self.stray_datagrams.load(Relaxed)));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_count_and_a_name_of_its_own() {
        let counters = Counters::default();
        for (at, (why, name)) in Refused::ALL.iter().enumerate() {
            assert_eq!(*why as usize, at);
            counters.refuse(*why);
            assert_eq!(counters.refused(*why), 1);
            assert!(counters.all().contains(&(name, 1)));
        }
    }
}
