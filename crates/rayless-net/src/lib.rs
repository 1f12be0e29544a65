//! The network of rayless: who may talk, over what, and how it is noticed that somebody is gone.
//!
//! Nothing here knows of membership, groups or tensors. Read it in this order:
//!
//! 1. [`token`]: the one secret of a cluster, in text, file and environment.
//! 2. [`identity`]: from the token to a certificate authority, a node's id, and mutual TLS 1.3.
//! 3. [`framing`]: length-limited frames on any byte stream.
#![deny(unsafe_code)] // allowed, block by block, in `os` only

pub mod framing;
pub mod identity;
pub mod token;
pub mod unix;
