//! Every decoder on damaged messages: it refuses or gives a message that goes round again, and never panics. (`fuzz/` does the
//! same with more patience.)
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod samples;

use proptest::{prelude::*, sample::Index};
use rayless_proto::{
    codec::{decode, encode},
    hello::{Hello, Purpose},
    v1::{
        control::{FromHead, ToHead},
        heartbeat::Heartbeat,
        keeper::{FromKeeper, KeeperConfig, ToKeeper},
        link::{LinkAnswer, LinkBoot, LinkOpening, LinkOutcome, LinkReport},
        local::{ClientMessage, DaemonMessage},
        step::{HEADER, Header, KeeperEvent, Launch},
    },
};

/// What happens to a message on the way.
#[derive(Debug, Clone)]
enum Damage {
    Cut(Index),
    Extend(Vec<u8>),
    Set(Index, u8),
    Word(Index, u32),
    Swap(Index, Index),
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let one = prop_oneof![
        any::<Index>().prop_map(Damage::Cut),
        proptest::collection::vec(any::<u8>(), 1..40).prop_map(Damage::Extend),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        // Lengths and relative pointers are words: small, huge and negative ones are what breaks a decoder.
        (any::<Index>(), prop_oneof![0..64u32, Just(u32::MAX), Just(i32::MIN as u32), any::<u32>()])
            .prop_map(|(at, word)| Damage::Word(at, word)),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Damage::Swap(a, b)),
    ];
    proptest::collection::vec(one, 0..6)
}

fn damaged(mut bytes: Vec<u8>, damage: &[Damage]) -> Vec<u8> {
    for one in damage {
        if bytes.is_empty() {
            break;
        }
        match one {
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Extend(more) => bytes.extend_from_slice(more),
            Damage::Set(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Damage::Word(at, word) if bytes.len() >= 4 => {
                let at = at.index(bytes.len() / 4) * 4;
                bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            Damage::Word(..) => {}
            Damage::Swap(a, b) => {
                let (a, b) = (a.index(bytes.len()), b.index(bytes.len()));
                bytes.swap(a, b);
            }
        }
    }
    bytes
}

/// Undamaged samples come back as they were; damaged ones are refused or are messages in their own right.
macro_rules! check {
    ($name:ident, $type:ty, $samples:expr) => {
        proptest! {
            #[test]
            fn $name(which in any::<Index>(), damage in damage()) {
                let samples = $samples;
                let sample = &samples[which.index(samples.len())];
                let bytes = encode(sample);
                prop_assert_eq!(&decode::<$type>(&bytes).unwrap(), sample);
                if let Ok(message) = decode::<$type>(&damaged(bytes, &damage)) {
                    prop_assert_eq!(decode::<$type>(&encode(&message)).unwrap(), message);
                }
            }
        }
    };
}

check!(node_to_head, ToHead, samples::to_head());
check!(head_to_node, FromHead, samples::from_head());
check!(client_to_daemon, ClientMessage, samples::client_messages());
check!(daemon_to_client, DaemonMessage, samples::daemon_messages());
check!(daemon_to_keeper, ToKeeper, samples::to_keeper());
check!(keeper_to_daemon, FromKeeper, samples::from_keeper());
check!(keeper_config, KeeperConfig, samples::keeper_configs());
check!(driver_to_keeper, Launch, samples::launches());
check!(keeper_to_driver, KeeperEvent, samples::keeper_events());
check!(keeper_to_worker, LinkBoot, samples::link_boots());
check!(worker_to_keeper, LinkReport, [samples::link_report()]);
check!(link_opening, LinkOpening, samples::link_openings());
check!(link_answer, LinkAnswer, samples::link_answers());
check!(link_outcome, LinkOutcome, samples::link_outcomes());

proptest! {
    #[test]
    fn hello(damage in damage()) {
        let bytes = damaged(Hello::of_this_build(Purpose::Control).encode(), &damage);
        if let Ok(hello) = Hello::decode(&bytes) {
            prop_assert!(!hello.build.chars().any(char::is_control));
            let _ = hello.agree();
        }
    }

    #[test]
    fn step_header(bytes in any::<[u8; HEADER]>()) {
        if let Some(header) = Header::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn heartbeat(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        if let Some(beat) = Heartbeat::decode(&bytes) {
            prop_assert_eq!(&beat.encode()[..], &bytes[..]);
        }
    }
}

#[test]
fn the_example_of_a_status_is_what_is_shown() {
    let shown = format!("{:#}\n", samples::report().to_json());
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json/status.json");
    if std::env::var_os("WRITE_DOCUMENTS").is_some() {
        std::fs::write(&path, &shown).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap_or_default() == shown,
        "docs/json/status.json is out of date: run this test with WRITE_DOCUMENTS=1"
    );
}
