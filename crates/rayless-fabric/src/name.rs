//! What names a link, and what opens it.

use rayless_proto::ids::{GroupId, Rank};
use std::fmt;

/// A link's name: it appears in every error, in `status` and in the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LinkName {
    /// The group whose workers it joins.
    pub group: GroupId,
    /// The sending rank.
    pub from: Rank,
    /// The receiving rank.
    pub to: Rank,
    /// Tells apart links between the same two ranks (activations and sampled tokens, say).
    pub channel: u16,
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}->{}.{} of group {}", self.from, self.to, self.channel, self.group.short())
    }
}

/// The secret by which the two ends of one link recognise each other; made at random per link by
/// whoever launches the group and told to both ends over authenticated sessions.
#[derive(Clone, Copy)]
pub struct Ticket(pub [u8; 32]);

impl Ticket {
    /// Compares without telling by its duration where two tickets differ.
    pub fn matches(&self, other: &[u8; 32]) -> bool {
        self.0.iter().zip(other).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(..)")
    }
}
