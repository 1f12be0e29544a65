//! The first frame of a connection, and heartbeats.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_proto::{hello::Hello, v1::heartbeat::Heartbeat};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(hello) = Hello::decode(bytes) {
        assert!(!hello.build.chars().any(char::is_control));
        let _ = hello.agree().map_err(|error| error.to_string());
        let again = Hello::decode(&hello.encode());
        // A build string that is not UTF-8 is shown with replacement characters, which may be too long to go round.
        assert!(again.is_ok() || hello.build.contains('\u{fffd}'));
    }
    if let Some(beat) = Heartbeat::decode(bytes) {
        assert_eq!(beat.encode(), bytes);
    }
});
