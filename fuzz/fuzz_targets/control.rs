//! Membership messages: from an authenticated node, and from the head.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_proto::{
    codec::{decode, encode},
    v1::control::{FromHead, ToHead},
};

/// What is accepted must be a message in its own right: it goes round again unchanged.
macro_rules! goes_round {
    ($bytes:expr, $($type:ty),+) => {$(
        if let Ok(message) = decode::<$type>($bytes) {
            assert_eq!(decode::<$type>(&encode(&message)), Ok(message));
        }
    )+};
}

fuzz_target!(|bytes: &[u8]| {
    goes_round!(bytes, ToHead, FromHead);
});
