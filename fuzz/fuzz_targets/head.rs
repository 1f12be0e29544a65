//! The head and nodes that say anything, in any order: its books stay right, and a head restored from its state file is one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_control::{
    SessionId,
    head::{Effect, Head, HeadConfig, Input},
    liveness::Transition,
};
use rayless_proto::{
    codec::decode,
    ids::{ClusterId, Incarnation, NodeId, Term},
    v1::control::ToHead,
};
use std::time::{Duration, Instant};

#[allow(dead_code)]
#[path = "../../crates/rayless-proto/tests/samples/mod.rs"]
mod samples;

fn config() -> HeadConfig {
    HeadConfig {
        node: node(0),
        term: Term(2),
        heads: Vec::new(),
        cluster: ClusterId([1; 16]),
        seed: 1,
        dead_after: Duration::from_secs(3),
        unix_us: 1_700_000_000_000_000,
    }
}

/// The samples' own node is among them.
fn node(byte: u8) -> NodeId {
    NodeId([4 + byte % 4; 32])
}

fuzz_target!(|script: Vec<(u8, u8, Vec<u8>)>| {
    let begin = Instant::now();
    let mut now = begin;
    let mut head = Head::new(config(), begin);
    let known = samples::to_head();
    for (action, who, bytes) in script.into_iter().take(64) {
        let session = SessionId(u64::from(who % 8));
        let input = match action % 8 {
            0 => Input::SessionOpened { session, node: node(who), address: "10.0.0.2".into() },
            1 => Input::SessionClosed { session },
            2 => {
                let transition =
                    [Transition::Alive, Transition::Suspect, Transition::Dead][usize::from(action / 8 % 3)];
                Input::Liveness { node: node(who), incarnation: Incarnation(u64::from(action / 32)), transition }
            }
            3 => {
                now += Duration::from_millis(u64::from(who) * 97);
                Input::Timer
            }
            4 => match decode(&bytes) {
                Ok(message) => Input::Message { session, message },
                Err(_) => continue,
            },
            _ => {
                let mut message = known[usize::from(action / 8) % known.len()].clone();
                // Nearly always a join in the name of the session's own node: others are refused at once.
                if let ToHead::Join { info, held, .. } = &mut message {
                    info.id = node(who);
                    info.incarnation = Incarnation(bytes.first().map_or(1, |b| u64::from(b % 4)));
                    if bytes.len() % 2 == 0 {
                        held.clear();
                    }
                }
                Input::Message { session, message }
            }
        };
        head.handle(now, input);
        while let Some(effect) = head.poll_effect() {
            if let Effect::SaveState(bytes) = effect {
                let restored = Head::restore(config(), &bytes, now).expect("what a head saves it can read");
                restored.audit().expect("restored books are right");
            }
        }
        head.audit().expect("books are right");
        let _ = head.status(now);
    }
});
