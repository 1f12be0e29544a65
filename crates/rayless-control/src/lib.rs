//! Who is a member, what lies where, which groups live: the decisions of rayless, and nothing else.
//!
//! Sans-IO: no clock, no sockets, no threads, no randomness of its own. Each machine takes events and an
//! [`Instant`](std::time::Instant) and hands back effects; the daemon (`rayless-node`) carries them out, a simulator does the
//! same with virtual time. Read in this order:
//!
//! 1. [`liveness`]: who has been silent for too long, and the observer that distrusts itself first.
//! 2. [`member`]: a node's side: dial, join, be fenced, join again.
//! 3. [`pool`] and [`placement`]: exact fractions, devices, all or nothing.
//! 4. [`head`]: the head's side: nodes, groups, placement groups, who waits for what.
//! 5. [`election`]: which of several daemons is the head, by a lease in a store, and when it must stop being it.
//!
//! # Who decides what
//! - *Is a node alive?* Its heartbeats, watched by a [`liveness::Detector`]; never a closed session alone.
//! - *Is a group alive?* Before it is placed: the head. From then on its own sessions (driver and keepers): the head only
//!   tells them its verdicts and learns the end from `GroupEnded`. So a daemon that is down for a minute costs no engine.
//! - *Who is the head?* Who holds the lease, and only as long as it surely does. A head that is not sure is none; and its
//!   term, on each of its messages, tells nodes if it is wrong.
//! - *Is a resource free?* Only when its node says so (`GroupEnded`), or joins without holding it.
#![forbid(unsafe_code)]

pub mod election;
pub mod head;
pub mod liveness;
pub mod member;
pub mod placement;
pub mod pool;

pub use election::Candidate;
pub use head::Head;
pub use member::Member;

/// One connection of a node to the head, numbered by whoever owns the sockets: never used twice in the life of a process.
///
/// It tells the messages of a node's present session from late ones of an earlier session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);
