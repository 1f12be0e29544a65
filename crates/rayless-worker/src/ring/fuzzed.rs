//! Entry for the fuzz target `ring`: shared memory in which another process of the group has written anything.

use super::{
    Ring,
    calls::{AskedSet, CallReader, CallWriter, Record},
    replies::ReplyReader,
};
use crate::event;
use rayless_proto::limits::{MAX_CALL, MAX_FRAGMENT};
use std::{os::fd::AsFd as _, sync::Arc};

const READERS: usize = 2;
const RING: usize = 4096;
const REPLIES: usize = 4096;

/// What happens to the ring.
#[derive(Debug)]
pub enum Step<'a> {
    /// Somebody writes 8 bytes where it likes.
    Trample(u16, u64),
    /// Somebody writes bytes where it likes.
    Scribble(u16, &'a [u8]),
    /// The keeper, or the driver, writes a call.
    Call(u64, &'a [u8]),
    /// The workers read their calls.
    Read,
    /// The collector reads replies, and what is shown of the workers.
    Collect,
}

/// Plays the steps. Nobody may read outside of the ring, take more memory than a record may have, or panic.
#[allow(clippy::missing_panics_doc, clippy::expect_used, reason = "a panic is what the fuzzer looks for")]
pub fn play(steps: &[Step<'_>]) {
    let (fd, ring) = Ring::create_sized(READERS, RING, REPLIES).expect("a ring");
    let event = event::create().expect("an eventfd");
    let ring = Arc::new(ring);
    let length = ring.map.len();
    let mut writer = CallWriter::new(Arc::clone(&ring));
    let mut calls: Vec<_> = (0..READERS).map(|reader| CallReader::new(Arc::clone(&ring), reader)).collect();
    let mut replies: Vec<_> = (0..READERS).map(|reader| ReplyReader::new(Arc::clone(&ring), reader)).collect();
    for step in steps {
        match step {
            Step::Trample(at, value) => ring.map.write(usize::from(*at) % (length / 8) * 8, &value.to_le_bytes()),
            Step::Scribble(at, bytes) => {
                let at = usize::from(*at) % length;
                ring.map.write(at, &bytes[..bytes.len().min(length - at)]);
            }
            Step::Call(call, payload) => {
                let mut asked = AskedSet::default();
                asked.insert(0);
                let payload = &payload[..payload.len().min(RING / 4)];
                let _ = writer.push(&Record { call: *call, last: call % 3 != 0, asked, payload });
                writer.wake();
                let _ = writer.slowest();
            }
            Step::Read => {
                for reader in &mut calls {
                    // A worker that finds its ring broken ends.
                    while let Ok(Some(read)) = reader.try_next(event.as_fd()) {
                        assert!(read.payload.len() as u64 <= MAX_CALL);
                    }
                }
            }
            Step::Collect => {
                for (index, reader) in replies.iter_mut().enumerate() {
                    while let Ok(Some(reply)) = reader.try_next() {
                        assert!(reply.payload.len() <= MAX_FRAGMENT.min(REPLIES));
                    }
                    let _ = (ring.state(index), ring.doing(index), ring.link_moved(index), ring.still_ms(index));
                }
            }
        }
    }
    // A process that opens what is there now.
    if let Ok(again) = Ring::open(fd.as_fd()) {
        assert!(again.map.len() >= length);
    }
}
