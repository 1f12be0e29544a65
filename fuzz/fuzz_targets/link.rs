//! Messages between two workers that open a link, and between a worker and its keeper about links.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_proto::{
    codec::{decode, encode},
    v1::link::{LinkAnswer, LinkBoot, LinkOpening, LinkOutcome, LinkReport},
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
    goes_round!(bytes, LinkOpening, LinkAnswer, LinkOutcome, LinkBoot, LinkReport);
    // Names of workers are read from a stranger's first bytes.
    if let Ok(name) = std::str::from_utf8(bytes) {
        if let Some((group, rank)) = rayless_net::tcp::worker_of(name) {
            assert_eq!(rayless_net::tcp::link_name(group, rank), name.to_ascii_lowercase());
        }
    }
});
