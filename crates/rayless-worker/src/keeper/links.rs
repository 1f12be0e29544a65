//! A worker's door for links: connections that ask for it by rank are passed to it, its reports come back.
//!
//! The keeper and each worker share one more socket pair. Towards the worker each byte carries one descriptor and says what it is; from it come
//! length-prefixed frames: an empty one once it listens, then a [`LinkReport`] for each change.

use rayless_net::{framing::FrameReader, unix};
use rayless_proto::{
    codec,
    v1::link::{LinkReport, MAX_LINK_FRAME},
};
use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
};
use tokio::{net::UnixStream, sync::mpsc};

/// Connections that wait for a worker that does not listen yet. The oldest gives way: who is still there calls again.
const MAX_WAITING: usize = 64;

/// A connection for a worker; of a TCP one nothing has been consumed, of a Unix one the bytes that name the rank.
#[derive(Debug)]
pub(super) enum Arrival {
    Tcp(OwnedFd),
    Unix(OwnedFd),
}

impl Arrival {
    const fn parts(&self) -> (u8, &OwnedFd) {
        match self {
            Self::Tcp(fd) => (crate::links::TCP_ARRIVAL, fd),
            Self::Unix(fd) => (crate::links::UNIX_ARRIVAL, fd),
        }
    }
}

/// Serves one worker until it is gone or closes its end.
pub(super) async fn serve(
    socket: UnixStream,
    mut arrivals: mpsc::UnboundedReceiver<Arrival>,
    mut report: impl FnMut(LinkReport),
) {
    let (read, write) = socket.into_split();
    let mut frames = FrameReader::new(read, MAX_LINK_FRAME);
    let mut waiting: VecDeque<Arrival> = VecDeque::new();
    let mut listens = false;
    loop {
        let next = waiting.front().filter(|_| listens).map(Arrival::parts);
        let pass = async {
            match next {
                Some((kind, fd)) => unix::send_fd(write.as_ref(), kind, fd.as_fd()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            passed = pass => match passed {
                Ok(()) => drop(waiting.pop_front()),
                Err(error) => {
                    tracing::info!(%error, "a worker takes no links any more");
                    return;
                }
            },
            Some(arrival) = arrivals.recv() => {
                if waiting.len() >= MAX_WAITING {
                    waiting.pop_front();
                }
                waiting.push_back(arrival);
            }
            frame = frames.next() => match frame {
                Ok(frame) if frame.is_empty() => listens = true,
                Ok(frame) => match codec::decode::<LinkReport>(&frame) {
                    Ok(said) => report(said),
                    Err(error) => {
                        tracing::warn!(%error, "a worker's report of a link cannot be read");
                        return;
                    }
                },
                Err(_) => return,
            },
        }
    }
}
