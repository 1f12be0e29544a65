//! A node whose head says anything, and whose sessions come and go in any order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_control::{
    Member, SessionId,
    member::{DialError, Effect, Input, MemberConfig, Target},
};
use rayless_proto::{codec::decode, ids::Incarnation, v1::control::FromHead};
use std::time::{Duration, Instant};

#[allow(dead_code)]
#[path = "../../crates/rayless-proto/tests/samples/mod.rs"]
mod samples;

fuzz_target!(|script: Vec<(u8, u8, Vec<u8>)>| {
    let mut now = Instant::now();
    let config = MemberConfig {
        head: "10.0.0.1:6379".into(),
        targets: vec![Target::Here, Target::At(([10, 0, 0, 1], 6379).into())],
        seen: None,
        incarnation: Incarnation(1),
        jitter_seed: 7,
    };
    let mut member = Member::new(config, now);
    let known = samples::from_head();
    // The session that was dialled last, and the highest term under which the node was welcomed.
    let (mut dialled, mut highest) = (SessionId(0), 0);
    for (action, who, bytes) in script.into_iter().take(64) {
        let session = if who % 4 == 0 { SessionId(u64::from(who)) } else { dialled };
        let mut by = 0;
        let input = match action % 9 {
            0 => Input::Connected(session),
            1 => Input::DialFailed(session, DialError::Unreachable("no".into())),
            2 => Input::Closed(session, "gone".into()),
            3 => Input::HeadSilent,
            4 => Input::Reborn(Incarnation(u64::from(who))),
            5 => Input::Heads(vec![Target::At(([10, 0, 0, who], 6379).into()); usize::from(who % 3)], "moved".into()),
            6 => {
                now += Duration::from_millis(u64::from(who) * 97);
                Input::Timer
            }
            7 => match decode::<FromHead>(&bytes) {
                Ok(message) => Input::Message(session, message),
                Err(_) => continue,
            },
            _ => {
                let mut message = known[usize::from(action / 9) % known.len()].clone();
                message.by.term.0 = bytes.first().map_or(1, |byte| u64::from(byte % 8));
                Input::Message(session, message)
            }
        };
        if let Input::Message(_, message) = &input {
            by = message.by.term.0;
        }
        member.handle(now, input);
        while let Some(effect) = member.poll_effect() {
            match effect {
                Effect::Dial(session, _) => {
                    assert!(session > dialled, "a session's number is used once");
                    dialled = session;
                }
                Effect::Welcomed { term, .. } => {
                    assert!(term.0 >= highest, "welcomed by an older head than before");
                    highest = term.0;
                }
                Effect::Deliver(_) => assert!(by >= highest, "an older head than this node's own decides for it"),
                _ => {}
            }
        }
        let _ = (member.next_timeout(), member.waiting_for(), member.is_welcomed());
    }
});
