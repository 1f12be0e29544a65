//! The shared memory of a group on one host, in which a process of the group has written anything at all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_worker::ring::fuzzed::{Step, play};

fuzz_target!(|said: Vec<(u8, u16, u64, &[u8])>| {
    let steps: Vec<Step<'_>> = said
        .iter()
        .take(64)
        .map(|&(kind, at, value, bytes)| match kind % 8 {
            0 => Step::Trample(at, value),
            // The words that say who is where lie in the first kilobytes.
            1 => Step::Trample(at % 640, value % 8192),
            2 => Step::Scribble(at, bytes),
            3 | 4 => Step::Call(value, bytes),
            5 => Step::Read,
            _ => Step::Collect,
        })
        .collect();
    play(&steps);
});
