//! The handshake of a link (TCP, TLS, Unix socket, RDMA private data), and the front of a message: header and description.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| rayless_fabric::fuzzed::decoders(bytes));
