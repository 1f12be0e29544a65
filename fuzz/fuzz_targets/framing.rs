//! Length-limited frames on a byte stream, in pieces of any size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_net::framing::{FrameReader, HEADER};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, ReadBuf};

const LIMIT: usize = 1000;

/// Gives a few bytes at a time.
struct Pieces<'a>(&'a [u8], usize);

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = self.1.min(self.0.len()).min(into.remaining());
        let (now, later) = self.0.split_at(count);
        into.put_slice(now);
        self.0 = later;
        Poll::Ready(Ok(()))
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut reader = FrameReader::new(Pieces(bytes, usize::from(piece) + 1), LIMIT);
        let mut total = 0;
        while let Ok(frame) = reader.next().await {
            assert!(frame.len() <= LIMIT);
            assert_eq!(frame, bytes[total + HEADER..][..frame.len()]);
            total += frame.len() + HEADER;
        }
        assert!(total <= bytes.len());
    });
});
