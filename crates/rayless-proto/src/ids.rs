//! Identifiers. Each has one text form (`Display`), which `FromStr` reads back.

use rkyv::{Archive, Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The text given was not an identifier of the kind asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind} id")]
pub struct ParseIdError {
    /// What was asked for, for example `node`.
    pub kind: &'static str,
    /// What was given.
    pub text: String,
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[rkyv(derive(PartialEq, Eq, PartialOrd, Ord, Hash))]
        pub struct $name(pub [u8; $bytes]);

        impl $name {
            /// The first eight hexadecimal digits: enough for people, never for decisions.
            pub fn short(&self) -> String {
                self.to_string().chars().take(8).collect()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($kind, ":{}"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let bad = || ParseIdError { kind: $kind, text: text.to_owned() };
                if text.len() != 2 * $bytes || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(bad());
                }
                let mut out = [0u8; $bytes];
                for (i, byte) in out.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
                }
                Ok(Self(out))
            }
        }
    };
}

hex_id!(
    /// A node: SHA-256 of the public key of its leaf certificate, so that a peer can check it
    /// against the handshake. It survives restarts of the daemon (the key lies in the run dir).
    NodeId, 32, "node");
hex_id!(
    /// A cluster: made at random by its first head, kept in the head's state and told to every node.
    ClusterId, 16, "cluster");
hex_id!(
    /// A group of workers: made at random by the head when it places the group.
    GroupId, 8, "group");
hex_id!(
    /// A placement group: made at random by the head.
    PlacementGroupId, 8, "placement group");

hex_id!(
    /// A cluster token, told from others without being shown: the first bytes of a hash of it.
    TokenMark, 8, "token");

/// One life of a node: counted up in the run dir at each start of its daemon. A message of a lower
/// incarnation than the highest seen is a ghost's and is dropped (the idea is SWIM's; foca
/// `src/identity.rs` carries it in the identity in the same way).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Incarnation(pub u64);

/// Which head in a row this is, where several take turns (`--store`): counted up in the store with each change, from 1. A head without
/// a store has term 0. Of two heads of one cluster the one with the lower term has been replaced, whatever it thinks itself.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Term(pub u64);

/// A worker's place in its group, from 0 to the world size less one.
pub type Rank = u32;

/// A call of a group: counted up from 1 by the driver, so that each worker can check the order.
pub type CallId = u64;

/// A request of one client on one connection, echoed in each reply to it.
pub type RequestId = u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_reads_back() {
        let id = GroupId([0, 1, 2, 3, 0xfc, 0xfd, 0xfe, 0xff]);
        assert_eq!(id.to_string(), "00010203fcfdfeff");
        assert_eq!(id.to_string().parse::<GroupId>(), Ok(id));
        assert_eq!(id.short(), "00010203");
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "0001", "00010203fcfdfefg", "0001020304050607ff", "éééé0203", "+1+1+1+1+1+1+1+1"] {
            assert!(text.parse::<GroupId>().is_err(), "{text}");
        }
    }
}
