//! The receiving end of a link whose sender has the ticket and then says anything: headers with a right checksum and wrong claims.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_fabric::fuzzed::{Claim, receive};

type Said<'a> = (u8, u8, u16, u64, Option<u32>, &'a [u8], &'a [u8]);

fuzz_target!(|input: (u8, Vec<Said<'_>>, &[u8])| {
    let (flags, said, rest) = input;
    let verify = flags & 1 != 0;
    let claims: Vec<Claim<'_>> = said
        .iter()
        .take(16)
        .map(|(kind, skip, slot, payload, schema, description, body)| Claim {
            kind: kind & 15,
            // Nearly always the number that is due.
            skip: u64::from(*skip).saturating_sub(250),
            slot: slot % 80,
            // Half of the time it is true.
            payload: if kind & 16 == 0 { body.len() as u64 } else { *payload },
            schema: schema.filter(|_| kind & 32 != 0),
            checksum: verify ^ (*skip == 249),
            description,
            body,
        })
        .collect();
    receive(verify, 1 << 16, &claims, rest);
});
