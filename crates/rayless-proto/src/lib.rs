//! What rayless says on its wires: identifiers, resources, messages and limits.
//!
//! This crate does no I/O and takes no decision. Read it in this order:
//!
//! 1. [`ids`]: what names a node, a life of a node, a group, a call.
//! 2. [`resources`]: quantities in exact ten-thousandths, bundles, GPU shares.
//! 3. [`hello`]: the frozen first frame by which two builds find out whether they can talk.
//! 4. [`v1`]: the messages of protocol version 1, a file per conversation.
//! 5. [`codec`]: bytes to message and back; every received byte string goes through it.
//! 6. [`limits`]: every size, count and default time, each with unit and reason.
#![forbid(unsafe_code)]

pub mod codec;
pub mod hello;
pub mod ids;
pub mod limits;
pub mod resources;
pub mod v1;

/// Lowest protocol version that this build speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// Highest protocol version that this build speaks.
pub const PROTOCOL_MAX: u16 = 1;
/// Version of this build, as in `rayless --version`.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");
