//! The network of rayless: who may talk, over what, and how it is noticed that somebody is gone.
//!
//! Nothing here knows of membership, groups or tensors. Read it in this order:
//!
//! 1. [`token`]: the one secret of a cluster, in text, file and environment.
//! 2. [`identity`]: from the token to a certificate authority, a node's id, and mutual TLS 1.3.
//! 3. [`framing`]: length-limited frames on any byte stream.
//! 4. [`counters`]: what was refused or dropped, for `status` and metrics.
//! 5. [`quic`]: endpoint and session, the first frame, limits on strangers.
//! 6. [`heartbeat`]: the thread that owns all QUIC traffic of a daemon.
//! 7. [`tcp`]: the same identity over TCP; reading a session's name before it is handed over.
//! 8. [`unix`]: local sockets, their owner, and descriptors passed over them.
//! 9. [`link`]: the handshake between two workers, after which tensors may follow in clear.
//! 10. [`congestion`]: how fast the streams of links may send.
//! 11. [`interfaces`]: which address, which interface, whether something translates in between.
#![deny(unsafe_code)] // allowed in `os` only

pub mod congestion;
pub mod counters;
pub mod framing;
pub mod heartbeat;
pub mod identity;
pub mod interfaces;
pub mod link;
pub mod quic;
pub mod tcp;
pub mod token;
pub mod unix;

mod client_hello;
mod half_open;
mod holder;
mod os;
mod runtime;
mod udp;
