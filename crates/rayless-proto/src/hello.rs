//! The frozen first frame of every connection.
//!
//! Its layout never changes, whatever the protocol version, so that any two builds can name both
//! sides when they cannot talk. All integers are little endian:
//!
//! ```text
//! 0   4  magic "RAYL"
//! 4   2  lowest protocol version spoken
//! 6   2  highest protocol version spoken
//! 8   1  purpose: 1 control, 2 heartbeat, 3 step session, 4 tensor link
//! 9   1  length of the build string, at most 64
//! 10  n  build string, UTF-8, for example "0.1.0"
//! 10+n   reserved: a reader ignores what follows
//! ```

use crate::{BUILD, PROTOCOL_MAX, PROTOCOL_MIN, limits::MAX_HELLO};

const MAGIC: [u8; 4] = *b"RAYL";
const MAX_BUILD: usize = 64;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Membership messages between a node and the head.
    Control,
    /// Heartbeats between a node and the head.
    Heartbeat,
    /// A driver's session with a keeper.
    Step,
    /// Tensors between two workers.
    Link,
}

/// The first frame of each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Lowest protocol version spoken.
    pub protocol_min: u16,
    /// Highest protocol version spoken.
    pub protocol_max: u16,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Version of the build, for messages to people only.
    pub build: String,
}

/// Why a first frame was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not rayless at the other end, or bytes damaged on the way.
    #[error("the peer's first frame is not a rayless hello")]
    NotHello,
    /// Both speak rayless, but no common version.
    #[error(
        "protocol mismatch: this side is rayless {} (protocol {PROTOCOL_MIN}-{PROTOCOL_MAX}), the peer is rayless {build} (protocol {min}-{max})\nhint: install the same rayless on both: `pip install rayless=={}`",
        BUILD,
        BUILD
    )]
    Version {
        /// The peer's build.
        build: String,
        /// The peer's lowest version.
        min: u16,
        /// The peer's highest version.
        max: u16,
    },
}

impl Hello {
    /// This build's hello.
    pub fn of_this_build(purpose: Purpose) -> Self {
        Self { protocol_min: PROTOCOL_MIN, protocol_max: PROTOCOL_MAX, purpose, build: BUILD.to_owned() }
    }

    /// The bytes of the frame (without its length prefix).
    pub fn encode(&self) -> Vec<u8> {
        let build = &self.build.as_bytes()[..self.build.len().min(MAX_BUILD)];
        let mut out = Vec::with_capacity(10 + build.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.protocol_min.to_le_bytes());
        out.extend_from_slice(&self.protocol_max.to_le_bytes());
        out.push(match self.purpose {
            Purpose::Control => 1,
            Purpose::Heartbeat => 2,
            Purpose::Step => 3,
            Purpose::Link => 4,
        });
        out.push(build.len() as u8);
        out.extend_from_slice(build);
        out
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// [`HelloError::NotHello`] for anything that is not a hello.
    pub fn decode(frame: &[u8]) -> Result<Self, HelloError> {
        if frame.len() < 10 || frame.len() > MAX_HELLO || frame[..4] != MAGIC {
            return Err(HelloError::NotHello);
        }
        let length = usize::from(frame[9]);
        let build = frame.get(10..10 + length).filter(|_| length <= MAX_BUILD).ok_or(HelloError::NotHello)?;
        let purpose = match frame[8] {
            1 => Purpose::Control,
            2 => Purpose::Heartbeat,
            3 => Purpose::Step,
            4 => Purpose::Link,
            _ => return Err(HelloError::NotHello),
        };
        Ok(Self {
            protocol_min: u16::from_le_bytes([frame[4], frame[5]]),
            protocol_max: u16::from_le_bytes([frame[6], frame[7]]),
            purpose,
            // Only shown to people: characters that could play with a terminal are dropped.
            build: String::from_utf8_lossy(build).chars().filter(|c| !c.is_control()).collect(),
        })
    }

    /// The highest version that both sides speak.
    ///
    /// # Errors
    /// [`HelloError::Version`] where there is none.
    pub fn agree(&self) -> Result<u16, HelloError> {
        let version = self.protocol_max.min(PROTOCOL_MAX);
        if version < self.protocol_min.max(PROTOCOL_MIN) {
            return Err(HelloError::Version {
                build: self.build.clone(),
                min: self.protocol_min,
                max: self.protocol_max,
            });
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_frozen() {
        let hello = Hello { protocol_min: 1, protocol_max: 3, purpose: Purpose::Step, build: "0.1.0".into() };
        assert_eq!(hello.encode(), b"RAYL\x01\x00\x03\x00\x03\x050.1.0");
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn what_a_later_build_adds_is_ignored() {
        let mut frame = Hello::of_this_build(Purpose::Control).encode();
        frame.extend_from_slice(b"more");
        assert_eq!(Hello::decode(&frame), Ok(Hello::of_this_build(Purpose::Control)));
    }

    #[test]
    fn a_mismatch_names_both_sides() {
        let old = Hello { protocol_min: 7, protocol_max: 9, purpose: Purpose::Control, build: "9.9.9".into() };
        let told = old.agree().unwrap_err().to_string();
        assert!(told.contains(BUILD) && told.contains("9.9.9") && told.contains("hint:"), "{told}");
    }

    #[test]
    fn every_prefix_and_every_flip_is_survived() {
        let frame = Hello::of_this_build(Purpose::Control).encode();
        for n in 0..frame.len() {
            assert_eq!(Hello::decode(&frame[..n]), Err(HelloError::NotHello));
            for bit in 0..8 {
                let mut flipped = frame.clone();
                flipped[n] ^= 1 << bit;
                let _ = Hello::decode(&flipped);
            }
        }
    }
}
