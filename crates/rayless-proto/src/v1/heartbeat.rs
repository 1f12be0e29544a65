//! A heartbeat: 24 bytes in a QUIC datagram, the same layout in both directions.
//!
//! ```text
//! 0   8  sequence number, counted up by the node; the head echoes it
//! 8   8  incarnation of the node, echoed
//! 16  8  node: microseconds of its own clock at sending, echoed, so that it learns the round trip
//! ```

/// One heartbeat, or the echo of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Counted up by the node.
    pub sequence: u64,
    /// Which life of the node speaks.
    pub incarnation: u64,
    /// Microseconds on the node's own clock.
    pub sent_us: u64,
}

impl Heartbeat {
    /// Bytes of a heartbeat.
    pub const LEN: usize = 24;

    /// The datagram.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&self.sequence.to_le_bytes());
        out[8..16].copy_from_slice(&self.incarnation.to_le_bytes());
        out[16..].copy_from_slice(&self.sent_us.to_le_bytes());
        out
    }

    /// Reads a datagram; `None` for any other length.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().ok()?;
        let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |all, b| all << 8 | u64::from(*b));
        Some(Self { sequence: word(0), incarnation: word(8), sent_us: word(16) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back() {
        let beat = Heartbeat { sequence: 1, incarnation: u64::MAX, sent_us: 0x0102_0304_0506_0708 };
        assert_eq!(Heartbeat::decode(&beat.encode()), Some(beat));
        assert_eq!(Heartbeat::decode(&beat.encode()[1..]), None);
    }
}
