//! Message to bytes and back, with rkyv 0.8 and full validation before use.
//!
//! rkyv checks structure, not integrity: it runs on authenticated, integrity-protected channels
//! only (TLS, or a Unix socket of the same user). Length limits are the framing's, before this.

use rkyv::{
    Archive, Deserialize, Serialize,
    api::high::{HighDeserializer, HighSerializer, HighValidator},
    bytecheck::CheckBytes,
    rancor::Error,
    ser::allocator::ArenaHandle,
    util::AlignedVec,
};

/// Received bytes are not a message of the type expected. The connection they came on is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0} message")]
pub struct DecodeError(pub &'static str);

/// The bytes of `message`.
///
/// # Panics
/// Never: serialising owned data into memory has no failure but the allocator's.
pub fn encode<T>(message: &T) -> Vec<u8>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Error>>,
{
    match rkyv::to_bytes::<Error>(message) {
        Ok(bytes) => bytes.into_vec(),
        Err(error) => unreachable!("serialising to memory: {error}"),
    }
}

/// The message in `bytes`, checked whole before any part of it is used.
///
/// # Errors
/// [`DecodeError`] with the type's name, for anything but exactly one well-formed message.
pub fn decode<T>(bytes: &[u8]) -> Result<T, DecodeError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, Error>> + Deserialize<T, HighDeserializer<Error>>,
{
    // A frame's payload is not aligned; rkyv needs it to be.
    let mut aligned = AlignedVec::<16>::with_capacity(bytes.len());
    aligned.extend_from_slice(bytes);
    let name = || core::any::type_name::<T>().rsplit("::").next().unwrap_or("unknown");
    rkyv::from_bytes::<T, Error>(&aligned).map_err(|_| DecodeError(name()))
}
