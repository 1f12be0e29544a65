//! Messages between a daemon and a keeper.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_proto::{
    codec::{decode, encode},
    v1::keeper::{FromKeeper, KeeperConfig, ToKeeper},
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
    goes_round!(bytes, ToKeeper, FromKeeper, KeeperConfig);
});
