//! What was refused or dropped, and why. For `status`, metrics and tests; nothing decides by it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Of one reason, at most one line a time: a flood must not fill a disk.
const REPORT_EVERY: Duration = Duration::from_secs(1);

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

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// One refusal, told to people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Who was turned away.
    pub address: SocketAddr,
    /// Why.
    pub why: Refused,
    /// The same in one line.
    pub detail: String,
    /// How many more were turned away for that reason since the last time it was told.
    pub untold: u64,
}

type Listener = Box<dyn Fn(Refusal) + Send + Sync>;

/// Counts since the start of the process.
#[derive(Default)]
pub struct Counters {
    refused: [AtomicU64; Refused::ALL.len()],
    told: Mutex<[Option<(Instant, u64)>; Refused::ALL.len()]>,
    listener: OnceLock<Listener>,
    accepted: AtomicU64,
    datagrams: AtomicU64,
    stray_datagrams: AtomicU64,
}

impl Counters {
    /// Counts one refusal.
    pub fn refuse(&self, why: Refused) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    /// Counts one refusal and tells of it, in the log and to the listener, unless the same was told within a second.
    pub fn report(&self, why: Refused, address: SocketAddr, detail: &str) {
        self.refuse(why);
        let count = self.refused(why);
        let untold = {
            let now = Instant::now();
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            let last = &mut told[why as usize];
            let up_to = match last {
                Some((at, _)) if now.saturating_duration_since(*at) < REPORT_EVERY => return,
                Some((_, up_to)) => *up_to,
                None => 0,
            };
            *last = Some((now, count));
            count.saturating_sub(up_to + 1)
        };
        // The peer's words may be in it.
        let detail: String = detail.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
        tracing::warn!(%address, reason = why.name(), untold, "turned away: {detail}");
        if let Some(listener) = self.listener.get() {
            listener(Refusal { address, why, detail, untold });
        }
    }

    /// Calls `listener` (on the thread where it happened) for each refusal that is told. The first listener stays.
    pub fn on_refusal(&self, listener: impl Fn(Refusal) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
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

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.all()).finish()
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

    #[test]
    fn a_flood_is_counted_and_told_once() {
        let counters = Counters::default();
        let (tell, told) = std::sync::mpsc::channel();
        counters.on_refusal(move |refusal| tell.send(refusal).unwrap());
        let address = SocketAddr::from(([192, 0, 2, 1], 7));
        for _ in 0..1000 {
            counters.report(Refused::WrongToken, address, "the token differs\x1b[2J\nand more");
        }
        counters.report(Refused::Version, address, "");
        assert_eq!(counters.refused(Refused::WrongToken), 1000);
        let first = told.recv().unwrap();
        assert_eq!((first.why, first.untold), (Refused::WrongToken, 0));
        assert_eq!(first.detail, "the token differs[2J");
        assert_eq!(told.recv().unwrap().why, Refused::Version);
        assert!(told.try_recv().is_err());
    }
}
