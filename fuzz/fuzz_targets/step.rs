//! A step session: frames in pieces, with what an end of the session reads out of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_proto::{
    codec::{decode, encode},
    limits::MAX_LOCAL_MESSAGE,
    v1::step::{HEADER, Header, KeeperEvent, Kind, Launch, Look},
};
use std::{io::Write, os::unix::net::UnixStream};

#[allow(dead_code, unreachable_pub)]
#[path = "../../crates/rayless-worker/src/session.rs"]
mod session;

fuzz_target!(|input: (u16, &[u8])| {
    let (piece, bytes) = input;
    let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
    let mut session = session::Session::local(near).expect("a session");
    let mut taken = 0;
    for part in bytes.chunks(usize::from(piece) + 1) {
        far.write_all(part).expect("room for a part of at most 64 KiB");
        session.read().expect("bytes come in whatever they are");
        loop {
            match session.next_frame() {
                Ok(Some(frame)) => {
                    assert_eq!(frame.header.length as usize, frame.payload.len());
                    assert!(frame.payload.len() <= MAX_LOCAL_MESSAGE);
                    taken += HEADER + frame.payload.len();
                    look_into(frame.header, &frame.payload);
                }
                Ok(None) => break,
                // The session is given up here.
                Err(_) => return,
            }
        }
    }
    assert!(taken <= bytes.len());
});

fn look_into(header: Header, payload: &[u8]) {
    assert_eq!(Header::decode(&header.encode()), Some(header));
    match header.kind {
        Kind::Launch => {
            if let Ok(launch) = decode::<Launch>(payload) {
                assert_eq!(decode::<Launch>(&encode(&launch)), Ok(launch));
            }
        }
        Kind::Look => {
            if let Ok(look) = decode::<Look>(payload) {
                assert_eq!(decode::<Look>(&encode(&look)), Ok(look));
            }
        }
        Kind::Event => {
            if let Ok(event) = decode::<KeeperEvent>(payload) {
                assert_eq!(decode::<KeeperEvent>(&encode(&event)), Ok(event));
            }
        }
        _ => {}
    }
}
