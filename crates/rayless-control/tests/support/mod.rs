//! A cluster in virtual time: a real [`Head`](rayless_control::Head), real `Member`s and `Detector`s, over a simulated network, with keepers and
//! drivers that behave as the real ones do. Everything follows from the seed.
//!
//! | file | what |
//! |---|---|
//! | `world` | time, events, hosts, invariants |
//! | `wire` | links, control sessions (reliable, in order), heartbeats (neither) |
//! | `daemon` | what a node's daemon does with the effects |
//! | `store` | the store that chooses one of several heads |
//! | `steps` | keepers, drivers and the sessions between them |
//! | `tokens` | what a daemon does with the cluster's tokens |
//! | `story` | the script language |
#![allow(dead_code, unreachable_pub, missing_docs, reason = "shared by several tests, each of which uses a part")]

pub mod daemon;
pub mod steps;
pub mod store;
pub mod story;
pub mod tokens;
pub mod wire;
pub mod world;
