//! Frames on a byte stream: a length in four bytes, little endian, then the payload.
//!
//! A length that is over the limit ends the connection before a byte of the payload is read, and memory is taken as
//! bytes arrive, not as they are announced: a header alone makes nobody hold a megabyte.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes before each payload.
pub const HEADER: usize = 4;
/// Most that is reserved ahead of what has arrived.
const STEP: usize = 64 << 10;
/// Up to this a frame is copied behind its header, so that it leaves in one system call and one TLS record.
const JOIN: usize = 16 << 10;

/// A frame could not be read or written. After any of these the stream is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The peer closed the stream between two frames.
    #[error("closed by the peer")]
    Closed,
    /// The peer announced, or the caller gave, more than the limit.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// Bytes announced.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The stream failed, or ended within a frame.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads frames. Unlike [`read_frame`] it may be dropped while waiting and asked again (in a `select!`), because
/// it keeps what has arrived.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    limit: usize,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames of up to `limit` bytes from `stream`.
    pub fn new(stream: R, limit: usize) -> Self {
        Self { stream, limit, buffer: Vec::new() }
    }

    /// The next payload.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub async fn next(&mut self) -> Result<Vec<u8>, FrameError> {
        while self.buffer.len() < HEADER {
            if self.fill(HEADER).await? == 0 {
                return Err(if self.buffer.is_empty() { FrameError::Closed } else { cut_short() });
            }
        }
        let length = length_of([self.buffer[0], self.buffer[1], self.buffer[2], self.buffer[3]], self.limit)?;
        while self.buffer.len() < HEADER + length {
            if self.fill(HEADER + length).await? == 0 {
                return Err(cut_short());
            }
        }
        let mut frame = std::mem::take(&mut self.buffer);
        frame.drain(..HEADER);
        Ok(frame)
    }

    /// From the next frame on, up to `limit` bytes.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The stream, for what is not a frame. Bytes of a frame already begun are kept here.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.stream
    }

    /// Takes in what is there, up to `end` bytes in all, so that nothing of the next frame is consumed.
    async fn fill(&mut self, end: usize) -> io::Result<usize> {
        let missing = end - self.buffer.len();
        self.buffer.reserve(missing.min(STEP));
        let room = missing.min(self.buffer.capacity() - self.buffer.len());
        (&mut self.stream).take(room as u64).read_buf(&mut self.buffer).await
    }
}

/// Reads one frame of up to `limit` bytes. Not to be dropped half-way: see [`FrameReader`].
///
/// # Errors
/// See [`FrameError`].
pub async fn read_frame<R: AsyncRead + Unpin>(stream: &mut R, limit: usize) -> Result<Vec<u8>, FrameError> {
    FrameReader::new(stream, limit).next().await
}

/// Writes one frame. Not to be dropped half-way. A buffering stream (TLS) is flushed.
///
/// # Errors
/// [`FrameError::TooLong`] before anything is written, or [`FrameError::Io`].
pub async fn write_frame<W: AsyncWrite + Unpin>(
    stream: &mut W,
    payload: &[u8],
    limit: usize,
) -> Result<(), FrameError> {
    let header = header_of(payload.len(), limit)?;
    if payload.len() <= JOIN {
        stream.write_all(&[&header, payload].concat()).await?;
    } else {
        stream.write_all(&header).await?;
        stream.write_all(payload).await?;
    }
    stream.flush().await?;
    Ok(())
}

/// The header of a payload of `length` bytes, for those that write it themselves.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn header_of(length: usize, limit: usize) -> Result<[u8; HEADER], FrameError> {
    match u32::try_from(length) {
        Ok(word) if length <= limit => Ok(word.to_le_bytes()),
        _ => Err(FrameError::TooLong { length, limit }),
    }
}

/// The length in a header, for those that read it themselves.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn length_of(header: [u8; HEADER], limit: usize) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > limit { Err(FrameError::TooLong { length, limit }) } else { Ok(length) }
}

fn cut_short() -> FrameError {
    FrameError::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended within a frame"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::duplex;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn frames_arrive_as_they_were_sent_however_they_are_cut() {
        block_on(async {
            // A pipe of 7 bytes: every frame crosses it in pieces.
            let (mut near, far) = duplex(7);
            let sent: Vec<Vec<u8>> = [0, 1, 6, 7, 8, 100, JOIN, JOIN + 1].iter().map(|n| vec![*n as u8; *n]).collect();
            let copy = sent.clone();
            let writer = tokio::spawn(async move {
                for frame in copy {
                    write_frame(&mut near, &frame, 1 << 20).await.unwrap();
                }
            });
            let mut reader = FrameReader::new(far, 1 << 20);
            for frame in sent {
                assert_eq!(reader.next().await.unwrap(), frame);
            }
            assert!(matches!(reader.next().await, Err(FrameError::Closed)));
            writer.await.unwrap();
        });
    }

    #[test]
    fn a_reader_that_is_dropped_while_waiting_loses_nothing() {
        block_on(async {
            let (mut near, far) = duplex(64);
            let mut reader = FrameReader::new(far, 100);
            for byte in [5, 0, 0, 0, b'h', b'e', b'l', b'l'] {
                near.write_all(&[byte]).await.unwrap();
                tokio::select! {
                    biased;
                    _ = reader.next() => panic!("not complete yet"),
                    () = std::future::ready(()) => {}
                }
            }
            near.write_all(b"o").await.unwrap();
            assert_eq!(reader.next().await.unwrap(), b"hello");
        });
    }

    #[test]
    fn a_header_alone_takes_no_memory() {
        block_on(async {
            let (mut near, far) = duplex(64);
            near.write_all(&(4u32 << 20).to_le_bytes()).await.unwrap();
            near.write_all(b"x").await.unwrap();
            let mut reader = FrameReader::new(far, 4 << 20);
            tokio::select! {
                biased;
                _ = reader.next() => panic!("not complete yet"),
                () = std::future::ready(()) => {}
            }
            assert!(reader.buffer.capacity() <= 3 * STEP, "{}", reader.buffer.capacity());
            drop(near);
            assert!(matches!(reader.next().await, Err(FrameError::Io(_))));
        });
    }

    #[test]
    fn too_long_is_refused_on_both_sides() {
        block_on(async {
            let (mut near, mut far) = duplex(64);
            assert!(matches!(
                write_frame(&mut near, b"four", 3).await,
                Err(FrameError::TooLong { length: 4, limit: 3 })
            ));
            near.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
            assert!(matches!(read_frame(&mut far, 3).await, Err(FrameError::TooLong { .. })));
        });
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_give_more_than_was_sent(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            block_on(async {
                let mut reader = FrameReader::new(&bytes[..], 64);
                let mut total = 0;
                while let Ok(frame) = reader.next().await {
                    assert!(frame.len() <= 64);
                    total += frame.len() + HEADER;
                }
                assert!(total <= bytes.len());
            });
        }
    }
}
