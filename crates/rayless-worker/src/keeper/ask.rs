//! Asking a keeper what it and its ranks do, without a daemon: for `rayless report`.

use super::KeeperError;
use rayless_net::{framing, unix};
use rayless_proto::{
    codec,
    limits::{MAX_LINK_ENDS, MAX_LOCAL_MESSAGE},
    v1::{
        control::HeldGroup,
        keeper::{FromKeeper, ToKeeper},
        link::LinkReport,
        step::{Look, RankLook},
    },
};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// What a keeper tells of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What it holds.
    pub held: HeldGroup,
    /// The ends of links on its host.
    pub links: Vec<LinkReport>,
    /// Its ranks, with their stacks.
    pub ranks: Vec<RankLook>,
}

/// Asks the keeper behind `socket`; it goes on as before. Blocks for `within` at most.
///
/// # Errors
/// Where it is gone or does not answer in time.
pub fn ask(socket: &Path, within: Duration) -> Result<Answer, KeeperError> {
    asked(socket, Instant::now() + within)
        .map_err(|source| KeeperError::Io { what: format!("no answer of the keeper at {}", socket.display()), source })
}

fn asked(socket: &Path, until: Instant) -> io::Result<Answer> {
    let mut stream = unix::connect_std(socket).map_err(io::Error::other)?;
    let mut request = b"D".to_vec();
    for message in [ToKeeper::Watch, ToKeeper::Look(Look { still_ms: 0, stacks: true })] {
        let message = codec::encode(&message);
        request.extend_from_slice(&framing::header_of(message.len(), MAX_LOCAL_MESSAGE).map_err(io::Error::other)?);
        request.extend_from_slice(&message);
    }
    stream.set_write_timeout(Some(left(until)?))?;
    stream.write_all(&request)?;
    let (mut held, mut links) = (None, Vec::new());
    loop {
        match next(&mut stream, until)? {
            FromKeeper::Held(all) => held = Some(all),
            FromKeeper::Link(link) if links.len() < MAX_LINK_ENDS => links.push(link),
            FromKeeper::Looked { ranks } => {
                let held = held.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                return Ok(Answer { held, links, ranks });
            }
            FromKeeper::Ended { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => {}
        }
    }
}

fn next(stream: &mut UnixStream, until: Instant) -> io::Result<FromKeeper> {
    let mut header = [0; framing::HEADER];
    fill(stream, &mut header, until)?;
    let mut frame = vec![0; framing::length_of(header, MAX_LOCAL_MESSAGE).map_err(io::Error::other)?];
    fill(stream, &mut frame, until)?;
    codec::decode(&frame).map_err(io::Error::other)
}

fn fill(stream: &mut UnixStream, mut bytes: &mut [u8], until: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}
