//! Messages of protocol version 1, a file per conversation:
//!
//! | file | between | over |
//! |---|---|---|
//! | [`control`] | node and head | a QUIC stream |
//! | [`heartbeat`] | node and head | QUIC datagrams of a connection of its own |
//! | [`local`] | a client (command, driver) and its node's daemon | Unix socket |
//! | [`keeper`] | a daemon and a keeper | Unix socket |
//! | [`step`] | a driver and a keeper | TLS over TCP, or Unix socket on one host |
//! | [`link`] | two workers of a group | TLS over TCP |
//! | [`token`] | node and head, while a token is rotated | inside `control` |
//! | [`status`] | what `rayless status --json` shows | inside `control` and `local` |
//! | [`rdma`] | a node's RDMA devices | inside `control`, `status` and `link` |
//!
//! What people see of them is made in `status_json` (`StatusReport::to_json`) `need_have` (`NeedHave` as text)
//! and `rank_look` (a line per rank when nothing moves).
#[allow(missing_docs, reason = "rkyv derives undocumented types for enums with named fields")]
pub mod control;
pub mod heartbeat;
#[allow(missing_docs, reason = "rkyv derives undocumented types for enums with named fields")]
pub mod keeper;
#[allow(missing_docs, reason = "rkyv derives undocumented types for enums with named fields")]
pub mod link;
#[allow(missing_docs, reason = "rkyv derives undocumented types for enums with named fields")]
pub mod local;
mod need_have;
mod rank_look;
pub mod rdma;
pub mod status;
mod status_json;
#[allow(missing_docs, reason = "rkyv derives undocumented types for enums with named fields")]
pub mod step;
pub mod token;
