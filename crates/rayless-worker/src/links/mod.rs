//! Links between workers: which transport each gets, and how its two ends find each other.

mod policy;

pub use policy::{BadWish, Contradiction, together, transport, wishes_of};
