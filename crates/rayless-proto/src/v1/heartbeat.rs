//! A heartbeat: 24 bytes in a QUIC datagram, node to head.
//!
//! ```text
//! 0   8  sequence number, counted up by the node
//! 8   8  incarnation of the node
//! 16  8  round trip to the head in microseconds, as the node measured it last; 0 while unknown
//! ```
//!
//! The echo is QUIC's own acknowledgement, which the node asks the head to send at once: it is
//! authenticated, it measures the round trip, and it needs no acknowledgement in turn, so that a
//! heartbeat costs two packets and not three.

/// One heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Counted up by the node.
    pub sequence: u64,
    /// Which life of the node speaks.
    pub incarnation: u64,
    /// Round trip to the head in microseconds; 0 while unknown.
    pub rtt_us: u64,
}

impl Heartbeat {
    /// Bytes of a heartbeat.
    pub const LEN: usize = 24;

    /// The datagram.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&self.sequence.to_le_bytes());
        out[8..16].copy_from_slice(&self.incarnation.to_le_bytes());
        out[16..].copy_from_slice(&self.rtt_us.to_le_bytes());
        out
    }

    /// Reads a datagram; `None` for any other length.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().ok()?;
        let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |all, b| all << 8 | u64::from(*b));
        Some(Self { sequence: word(0), incarnation: word(8), rtt_us: word(16) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back() {
        let beat = Heartbeat { sequence: 1, incarnation: u64::MAX, rtt_us: 0x0102_0304_0506_0708 };
        assert_eq!(Heartbeat::decode(&beat.encode()), Some(beat));
        assert_eq!(Heartbeat::decode(&beat.encode()[1..]), None);
    }
}
