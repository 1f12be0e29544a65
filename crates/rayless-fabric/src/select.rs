//! Which transport a link gets, and why it did not get a better one.

use crate::transport::Level;

/// What the cluster and its user allow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// `--transport`: this one or none.
    pub only: Option<Level>,
    /// `--allow-tcp`: TCP although there are RDMA devices.
    pub allow_tcp: bool,
    /// Some node of the group has an RDMA device. Without one, TCP needs no flag.
    pub any_rdma_device: bool,
}

impl Policy {
    /// Why `level` is not allowed; `None` where it is.
    pub fn refusal(&self, level: Level) -> Option<String> {
        match self.only {
            Some(only) if only != level => Some(format!("--transport {only} was given")),
            None if level == Level::Tcp && self.any_rdma_device && !self.allow_tcp => {
                Some("the cluster has RDMA devices, so TCP takes --allow-tcp".to_owned())
            }
            _ => None,
        }
    }
}

/// One transport as it turned out for one link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Which.
    pub level: Level,
    /// Whether a transfer over it worked; else one line of cause.
    pub proven: Result<(), String>,
}

/// A transport that was not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejection {
    /// Which.
    pub level: Level,
    /// One line of cause.
    pub reason: String,
}

/// What a link gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The transport.
    pub level: Level,
    /// The better ones, with the reasons, best first.
    pub rejected: Vec<Rejection>,
}

/// No transport is both allowed and proven.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no transport: {}", .rejected.iter().map(|r| format!("{}: {}", r.level, r.reason)).collect::<Vec<_>>().join("; "))]
pub struct NoTransport {
    /// All of them, with the reasons, best first.
    pub rejected: Vec<Rejection>,
}

/// Takes the best candidate that is allowed and proven. A transport never gives way to TCP in silence: where there
/// are RDMA devices that takes a flag.
pub fn choose(mut candidates: Vec<Candidate>, policy: Policy) -> Result<Choice, NoTransport> {
    candidates.sort_by_key(|candidate| std::cmp::Reverse(candidate.level));
    let mut rejected = Vec::new();
    for Candidate { level, proven } in candidates {
        match policy.refusal(level).or_else(|| proven.err()) {
            None => return Ok(Choice { level, rejected }),
            Some(reason) => rejected.push(Rejection { level, reason }),
        }
    }
    Err(NoTransport { rejected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(shm: Result<(), &str>, rdma: Result<(), &str>, tcp: Result<(), &str>) -> Vec<Candidate> {
        [(Level::Tcp, tcp), (Level::Shm, shm), (Level::Rdma, rdma)]
            .map(|(level, proven)| Candidate { level, proven: proven.map_err(str::to_owned) })
            .into()
    }

    const ELSEWHERE: Result<(), &str> = Err("the ranks are on two hosts");

    #[test]
    fn the_best_proven_transport_is_taken() {
        let choice = choose(candidates(Ok(()), Ok(()), Ok(())), Policy::default()).unwrap();
        assert_eq!((choice.level, choice.rejected), (Level::Shm, vec![]));
        let choice = choose(candidates(ELSEWHERE, Ok(()), Ok(())), Policy::default()).unwrap();
        assert_eq!(choice.level, Level::Rdma);
        assert_eq!(choice.rejected[0].reason, "the ranks are on two hosts");
    }

    #[test]
    fn rdma_does_not_turn_into_tcp_without_a_flag() {
        let broken = || candidates(ELSEWHERE, Err("memlock is 64 KiB"), Ok(()));
        let policy = Policy { any_rdma_device: true, ..Policy::default() };
        let none = choose(broken(), policy).unwrap_err();
        assert_eq!(
            none.to_string(),
            "no transport: shm: the ranks are on two hosts; rdma: memlock is 64 KiB; \
             tcp: the cluster has RDMA devices, so TCP takes --allow-tcp"
        );
        let choice = choose(broken(), Policy { allow_tcp: true, ..policy }).unwrap();
        assert_eq!((choice.level, choice.rejected.len()), (Level::Tcp, 2));
        let choice = choose(broken(), Policy { only: Some(Level::Tcp), ..policy }).unwrap();
        assert_eq!(choice.level, Level::Tcp);
    }

    #[test]
    fn without_any_rdma_device_tcp_needs_no_flag() {
        let choice = choose(candidates(ELSEWHERE, Err("no device"), Ok(())), Policy::default()).unwrap();
        assert_eq!(choice.level, Level::Tcp);
    }

    #[test]
    fn a_transport_asked_for_by_name_is_not_replaced() {
        let policy = Policy { only: Some(Level::Rdma), allow_tcp: true, any_rdma_device: true };
        let none = choose(candidates(Ok(()), Err("no device"), Ok(())), policy).unwrap_err();
        assert_eq!(none.rejected.len(), 3);
    }
}
