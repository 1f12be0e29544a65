//! A link's settings.

use crate::dtype::DTypeSet;
use std::time::Duration;

/// Settings of one end of a link. The smaller `max_message` of both ends counts; `verify` must be the same at both.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Bytes of the largest payload. Default: 1 GiB.
    pub max_message: u64,
    /// Whether each payload carries a checksum (`--verify-links`). Default: no.
    pub verify: bool,
    /// How long an operation that has to wait looks again and again before it sleeps, where looking pays (see
    /// [`spin`](crate::spin)). Default: 50 µs; zero: sleep at once.
    pub spin: Duration,
    /// Whether long payloads over shared memory may go by one copy, where the system lets the receiver read the sender's memory.
    /// Default: yes.
    pub one_copy: bool,
    /// Element types that this end takes. Default: all.
    pub dtypes: DTypeSet,
    /// How long the handshake may take. Default: 5 s.
    pub handshake: Duration,
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            max_message: 1 << 30,
            verify: false,
            spin: Duration::from_micros(50),
            one_copy: true,
            dtypes: DTypeSet::ALL,
            handshake: Duration::from_secs(5),
        }
    }
}
