//! Links over TCP: one stream for small payloads, all of them for large ones.
//!
//! The streams come connected from the caller, who has authenticated the peer on each (mutual TLS) and may go on
//! in clear, as NCCL does. A payload of [`STRIPE_FROM`] bytes or more is cut into blocks that go round the
//! streams: clouds limit a single flow, and the kernel spreads flows over cores.

mod inbound;
mod outbound;
pub(crate) mod tls;

pub use tls::connect_tls;

use crate::{
    config::LinkConfig,
    error::EstablishError,
    greeting::{Answer, Context, Greeting, MAX_STREAMS},
    name::{LinkName, Ticket},
    recv::RecvLink,
    send::SendLink,
    transport::Level,
};
use rustix::{fd::OwnedFd, net::sockopt::set_tcp_nodelay};
use std::net::TcpStream;

/// Payload bytes from which all streams are used.
pub const STRIPE_FROM: u64 = 1 << 20;
/// Bytes of a stripe's block.
const BLOCK: u64 = 256 << 10;

/// Opens the sending end of a link over connected streams (1 to 16). Blocks for at most `config.handshake`.
pub fn connect(
    streams: Vec<TcpStream>,
    name: LinkName,
    ticket: Ticket,
    config: &LinkConfig,
) -> Result<SendLink, EstablishError> {
    let context = Context::new(name, Level::Tcp, config);
    let count = u8::try_from(streams.len()).ok().filter(|n| (1..=MAX_STREAMS).contains(&usize::from(*n)));
    let Some(count) = count else {
        return Err(context.failed("opening", format!("{} streams; a link has 1 to {MAX_STREAMS}", streams.len())));
    };
    for (index, stream) in (0u8..).zip(&streams) {
        context.write_all(stream, &Greeting::new(name, ticket, Level::Tcp, index, count, config).encode())?;
    }
    let mut answer = Answer::welcome(config);
    for stream in &streams {
        answer = context.read_answer(stream)?;
        if matches!(answer, Answer::Refused(_)) {
            break;
        }
    }
    let limits = answer.limits(&context)?;
    let outbound = outbound::TcpOutbound::new(prepare(&context, streams)?).map_err(|e| context.failed("eventfd", e))?;
    Ok(SendLink::new(name, Box::new(outbound), limits, config))
}

/// The receiving end, once every stream has been greeted and answered.
pub(crate) fn receiver(
    context: &Context,
    config: &LinkConfig,
    streams: Vec<TcpStream>,
) -> Result<RecvLink, EstablishError> {
    let inbound = inbound::TcpInbound::new(prepare(context, streams)?).map_err(|e| context.failed("eventfd", e))?;
    Ok(RecvLink::new(context.link, Box::new(inbound), config))
}

fn prepare(context: &Context, streams: Vec<TcpStream>) -> Result<Vec<OwnedFd>, EstablishError> {
    streams
        .into_iter()
        .map(|stream| {
            // Whoever accepted it may have driven it from a reactor.
            stream.set_nonblocking(false).map_err(|e| context.failed("setting a stream to block", e))?;
            set_tcp_nodelay(&stream, true).map_err(|e| context.failed("setting TCP_NODELAY", e))?;
            Ok(stream.into())
        })
        .collect()
}

/// Which bytes of a payload go over which stream.
#[derive(Clone, Copy)]
struct Plan {
    total: u64,
    lanes: u64,
    block: u64,
}

impl Plan {
    const fn new(total: u64, streams: usize) -> Self {
        if total < STRIPE_FROM || streams == 1 {
            // One block of everything; `max(1)` keeps the arithmetic below defined for an empty payload.
            let block = if total == 0 { 1 } else { total };
            return Self { total, lanes: 1, block };
        }
        Self { total, lanes: streams as u64, block: BLOCK }
    }

    /// Offset and length of the payload bytes that follow the first `moved` of a lane; length 0: the lane is done.
    fn next(&self, lane: usize, moved: u64) -> (u64, u64) {
        let (row, within) = (moved / self.block, moved % self.block);
        let offset = (row * self.lanes + lane as u64) * self.block + within;
        (offset, self.total.saturating_sub(offset).min(self.block - within))
    }
}

/// Whether an error means that the peer is gone, not that the system refused the call.
fn is_gone(errno: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [Errno::PIPE, Errno::CONNRESET, Errno::CONNABORTED, Errno::TIMEDOUT, Errno::HOSTUNREACH, Errno::NETUNREACH]
        .contains(&errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lanes_of_a_plan_cover_each_byte_once() {
        for total in [0, 1, STRIPE_FROM - 1, STRIPE_FROM, STRIPE_FROM + 1, 5 * BLOCK + 7, 16 << 20] {
            for streams in [1, 2, 3, 4, 16] {
                let plan = Plan::new(total, streams);
                let mut ranges = Vec::new();
                for lane in 0..plan.lanes as usize {
                    let mut moved = 0;
                    loop {
                        let (offset, len) = plan.next(lane, moved);
                        if len == 0 {
                            break;
                        }
                        // As if the socket had taken only a part.
                        let took = len.min(100_000);
                        ranges.push((offset, took));
                        moved += took;
                    }
                }
                ranges.sort_unstable();
                let end = ranges.iter().fold(0, |end, (offset, len)| {
                    assert_eq!(end, *offset, "total {total}, {streams} streams");
                    offset + len
                });
                assert_eq!(end, total);
            }
        }
    }
}
