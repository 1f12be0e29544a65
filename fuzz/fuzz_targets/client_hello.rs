//! The first bytes that a stranger sends to the TCP port: the daemon looks for the server name in them.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../crates/rayless-net/src/client_hello.rs"]
mod client_hello;

use client_hello::{MAX, Parsed, parse};

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes);
    match &whole {
        Parsed::Name(name) => {
            assert!(!name.is_empty() && name.len() <= 253);
            assert!(name.bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase()));
        }
        // Nobody waits for more than that.
        Parsed::Incomplete => assert!(bytes.len() < MAX),
        Parsed::Other => {}
    }
    // Part of what is a hello may be one; part of what is none may not have told yet; a verdict never changes with more bytes.
    for end in [0, 1, 5, 6, 40, bytes.len() / 2] {
        let part = parse(&bytes[..end.min(bytes.len())]);
        assert!(part == Parsed::Incomplete || part == whole);
    }
});
