//! A store that answers anything: HTTP, JSON, base 64, seats and terms, and the candidate that lives by them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_node::store::fuzzed::{Said, answers};

fuzz_target!(|input: (u8, u8, u64, Vec<&str>)| {
    let (kind, piece, number, texts) = input;
    let piece = if piece == 0 { usize::MAX } else { usize::from(piece) };
    match kind % 3 {
        0 => answers(&Said::Bytes(texts.concat().as_bytes()), piece),
        1 => {
            let bodies: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
            answers(&Said::Bodies(&bodies), piece);
        }
        _ => {
            let pairs: Vec<(&str, &str)> = texts
                .chunks(2)
                .map(|pair| {
                    let key = match pair[0] {
                        "" | "t" => "term",
                        "h" => "head",
                        "s" => "seats/x",
                        other => other,
                    };
                    (key, pair.get(1).copied().unwrap_or_default())
                })
                .collect();
            answers(&Said::Keys(&pairs, number), piece);
        }
    }
});
