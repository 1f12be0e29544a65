//! Links over RDMA: the sender writes into the receiver's memory.
//!
//! The receiver owns [`SLOTS`] slots of [`SLOT`] bytes and tells their place in the accept data. A chunk of the stream
//! is one WRITE into the next slot and one SEND chained behind it that says so (16 bytes): one doorbell. A message of up
//! to a slot is one chunk. Room comes back in cumulative credits, one message for half of the slots, for which
//! the sender keeps RECVs in reserve, so a RECV is always there before what fills it.
//!
//! Only what RoCE, iWARP and eRDMA share is used: no immediate data (siw refuses it), no polling of memory (iWARP
//! gives no order of placement), inline as far as the device grants it. The sender is the connecting side, for on
//! iWARP the connecting side must send first.

mod inbound;
mod outbound;

use crate::{
    config::LinkConfig,
    dtype::DTypeSet,
    error::{EstablishError, TransportError},
    greeting::{Context, Greeting},
    name::{LinkName, Ticket},
    recv::RecvLink,
    send::SendLink,
    tensor::PeerLimits,
    transport::{Counters, Level},
    wake::{EventWake, is_ready, poll_for},
};
use rayless_proto::ids::GroupId;
use rayless_verbs::{Access, Connected, Endpoint, MAX_PRIVATE, Range, RegionId, Remote, Request, Sizes, VerbsError};
use rustix::event::{PollFd, PollFlags};
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

/// Slots of a link.
pub const SLOTS: usize = 8;
/// Bytes of a slot.
pub const SLOT: usize = 256 << 10;
/// Chunks after which room is given back.
const CREDIT_EVERY: u64 = SLOTS as u64 / 2;
/// Bytes of the SEND behind a WRITE: chunk number, length.
const NOTICE: usize = 16;
/// Bytes that the sender reads back before it closes: the answer comes after all that was sent before is in its place, at
/// the receiver, whether or not the receiver's program looks.
const FLUSH: usize = 8;
/// Bytes of what the receiver sends back: credits, kind, length of a reason, the reason.
const RETURN: usize = 16 + REASON;
const REASON: usize = 496;
/// RECVs that the sender keeps for them: two credits can be under way, and the last words.
const RETURNS: usize = 4;
/// A sender never has more than 2 requests per slot in progress, and the flush.
const SENDER: Sizes = Sizes { sends: 2 * SLOTS as u32 + 2, recvs: RETURNS as u32, inline: 64 };
/// Every 16th credit is signaled, so that at most 32 requests are in progress.
const RECEIVER: Sizes = Sizes { sends: 34, recvs: SLOTS as u32, inline: 64 };

/// What the connecting side says: its greeting in the 56 bytes that every transport carries.
fn encode_greeting(greeting: &Greeting) -> [u8; MAX_PRIVATE] {
    let mut out = [0u8; MAX_PRIVATE];
    out[0] = VERSION;
    out[1] = u8::from(greeting.verify);
    out[2..4].copy_from_slice(&greeting.name.channel.to_le_bytes());
    out[4..12].copy_from_slice(&greeting.name.group.0);
    out[12..16].copy_from_slice(&greeting.name.from.to_le_bytes());
    out[16..20].copy_from_slice(&greeting.name.to.to_le_bytes());
    out[24..56].copy_from_slice(&greeting.ticket);
    out
}

pub(crate) fn decode_greeting(private: &[u8]) -> Option<Greeting> {
    let part = |at: usize, len: usize| private.get(at..at + len);
    if *private.first()? != VERSION {
        return None;
    }
    Some(Greeting {
        name: LinkName {
            group: GroupId(part(4, 8)?.try_into().ok()?),
            from: u32::from_le_bytes(part(12, 4)?.try_into().ok()?),
            to: u32::from_le_bytes(part(16, 4)?.try_into().ok()?),
            channel: u16::from_le_bytes(part(2, 2)?.try_into().ok()?),
        },
        ticket: part(24, 32)?.try_into().ok()?,
        level: Level::Rdma,
        index: 0,
        count: 1,
        verify: *private.get(1)? != 0,
        max_message: u64::MAX,
    })
}

/// Version of the private data and of the bytes behind it. Not 0, which padding looks like.
const VERSION: u8 = 1;

/// The accepting side's answer: where the slots are, and what it takes.
struct Slots {
    place: Remote,
    limits: PeerLimits,
}

impl Slots {
    fn encode(&self) -> [u8; 40] {
        let mut out = [0u8; 40];
        out[0] = VERSION;
        out[1] = SLOTS as u8;
        out[4..8].copy_from_slice(&self.place.rkey.to_le_bytes());
        out[8..16].copy_from_slice(&self.place.address.to_le_bytes());
        out[16..24].copy_from_slice(&(SLOT as u64).to_le_bytes());
        out[24..32].copy_from_slice(&self.limits.dtypes.bits().to_le_bytes());
        out[32..40].copy_from_slice(&self.limits.max_message.to_le_bytes());
        out
    }

    fn decode(private: &[u8]) -> Option<Self> {
        let part = |at: usize| Some(u64::from_le_bytes(private.get(at..at + 8)?.try_into().ok()?));
        let same = *private.first()? == VERSION && usize::from(*private.get(1)?) == SLOTS && part(16)? == SLOT as u64;
        same.then_some(())?;
        Some(Self {
            place: Remote { rkey: (part(0)? >> 32) as u32, address: part(8)? },
            limits: PeerLimits { dtypes: DTypeSet::from_bits(part(24)?), max_message: part(32)? },
        })
    }
}

/// For the fuzz target: reads an answer, which must be one again when it is written.
#[cfg(fuzzing)]
pub(crate) fn decode_slots(private: &[u8]) {
    if let Some(slots) = Slots::decode(private) {
        assert!(Slots::decode(&slots.encode()).is_some_and(|again| again.place.address == slots.place.address));
    }
}

/// Opens the sending end of a link to a listening receiver, through the device that has the address `from` (if
/// given) and reaches `to`. Blocks for at most `config.handshake`.
pub fn connect(
    to: SocketAddr,
    from: Option<IpAddr>,
    name: LinkName,
    ticket: Ticket,
    config: &LinkConfig,
) -> Result<SendLink, EstablishError> {
    let context = Context::new(name, Level::Rdma, config);
    let failed = |error: VerbsError| failure(&context, error);
    let mut endpoint = Endpoint::to(to, from, SENDER, context.deadline()).map_err(failed)?;
    let staging = endpoint.allocate(SLOTS * SLOT, Access::Source).map_err(failed)?;
    let notices = endpoint.allocate(SLOTS * NOTICE, Access::Source).map_err(failed)?;
    // On iWARP what a READ brings is written by the peer.
    let sink = endpoint.allocate(FLUSH, Access::RemoteWrite).map_err(failed)?;
    let returns = endpoint.allocate(RETURNS * RETURN, Access::Receive).map_err(failed)?;
    endpoint.post_recvs(&std::array::from_fn::<_, RETURNS, _>(|i| cell(returns, i, RETURN))).map_err(failed)?;
    let greeting = Greeting::new(name, ticket, Level::Rdma, 0, 1, config);
    let (endpoint, answer) = endpoint.connect(&encode_greeting(&greeting), context.deadline()).map_err(failed)?;
    let Some(Slots { place, mut limits }) = Slots::decode(&answer) else {
        return Err(context.refused("the peer's slots are of another version".to_owned()));
    };
    limits.max_message = limits.max_message.min(config.max_message);
    let outbound = outbound::RdmaOutbound::new(endpoint, outbound::Regions { staging, notices, returns, sink }, place);
    let outbound = outbound.map_err(|e| context.failed("eventfd", e))?;
    Ok(SendLink::new(name, Box::new(outbound), limits, config))
}

/// The receiving end, for a request whose ticket was right.
pub(crate) fn accept(context: &Context, config: &LinkConfig, request: Request) -> Result<RecvLink, EstablishError> {
    let failed = |error: VerbsError| failure(context, error);
    let mut endpoint = Endpoint::for_request(request, RECEIVER).map_err(failed)?;
    let slots = endpoint.allocate(SLOTS * SLOT, Access::RemoteReadWrite).map_err(failed)?;
    let notices = endpoint.allocate(SLOTS * NOTICE, Access::Receive).map_err(failed)?;
    // One cell per credit that may be in progress, and one for the last words.
    let returns = endpoint.allocate((inbound::CREDIT_CELLS + 1) * RETURN, Access::Source).map_err(failed)?;
    endpoint.post_recvs(&std::array::from_fn::<_, SLOTS, _>(|i| cell(notices, i, NOTICE))).map_err(failed)?;
    let limits = PeerLimits { dtypes: config.dtypes, max_message: config.max_message };
    let answer = Slots { place: endpoint.remote(slots), limits }.encode();
    let endpoint = endpoint.accept(&answer, context.deadline()).map_err(failed)?;
    let inbound = inbound::RdmaInbound::new(endpoint, slots, notices, returns);
    let inbound = inbound.map_err(|e| context.failed("eventfd", e))?;
    Ok(RecvLink::new(context.link, Box::new(inbound), config))
}

/// The `i`th cell of a region of equal cells, with `i` as its id.
const fn cell(region: RegionId, i: usize, len: usize) -> (Range, u64) {
    (Range { region, offset: i * len, len }, i as u64)
}

/// Sleeps until a work request has completed, the connection has ended, the waker is called, or `at_most` has passed. True: the
/// connection has ended, and what came before is still to be reaped.
fn sleep(endpoint: &mut Endpoint<Connected>, wake: &EventWake, at_most: Duration) -> Result<bool, TransportError> {
    let mut fds = [
        PollFd::from_borrowed_fd(wake.fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(endpoint.completion_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(endpoint.connection_fd(), PollFlags::IN),
    ];
    poll_for(&mut fds, at_most)?;
    let [woken, completion, connection] = fds.map(|fd| is_ready(&fd));
    if woken {
        wake.drain();
    }
    if completion {
        endpoint.acknowledge();
    }
    Ok(connection && endpoint.ended().map_err(verbs)?.is_some())
}

/// With what the endpoint has counted, while there is one.
fn counted(endpoint: Option<&Endpoint<Connected>>, counters: Counters) -> Counters {
    let Some(endpoint) = endpoint else { return counters };
    let posted = endpoint.posted();
    Counters {
        work_requests: posted.work_requests,
        doorbells: posted.doorbells,
        completions: posted.completions,
        ..counters
    }
}

fn verbs(error: VerbsError) -> TransportError {
    match error {
        VerbsError::Call { call, errno } => TransportError::system(call, errno),
        other => TransportError::system("verbs", other),
    }
}

fn failure(context: &Context, error: VerbsError) -> EstablishError {
    match error {
        VerbsError::Refused { reason } => context.refused(reason),
        VerbsError::TimedOut { .. } => context.timed_out(),
        other => EstablishError::Failed { link: context.link, transport: Level::Rdma.name(), cause: other.to_string() },
    }
}

/// Reads a request's greeting. A request that brings none is refused here.
pub(crate) fn greet(
    listener: &mut rayless_verbs::Listener,
    deadline: Instant,
) -> Result<Option<(Greeting, Request)>, VerbsError> {
    let request = listener.accept(deadline)?;
    match decode_greeting(request.private()) {
        Some(greeting) => Ok(Some((greeting, request))),
        None => {
            request.reject("no link greeting of this version");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_and_slots_fit_into_private_data_and_read_back_padded() {
        let name = LinkName { group: GroupId([3; 8]), from: 1, to: 2, channel: 700 };
        let config = LinkConfig { verify: true, ..LinkConfig::default() };
        let greeting = Greeting::new(name, Ticket([9; 32]), Level::Rdma, 0, 1, &config);
        let back = decode_greeting(&encode_greeting(&greeting)).unwrap();
        assert_eq!((back.name, back.verify), (name, true));
        assert_eq!(back.misfit(&Ticket([9; 32]), &config), None);
        assert!(decode_greeting(&[0; MAX_PRIVATE]).is_none() && decode_greeting(&[]).is_none());

        let limits = PeerLimits { dtypes: DTypeSet::ALL, max_message: 77 };
        let place = Remote { address: u64::MAX - 1, rkey: 0xdead_beef };
        let mut padded = Slots { place, limits }.encode().to_vec();
        padded.resize(MAX_PRIVATE, 0);
        let back = Slots::decode(&padded).unwrap();
        assert_eq!((back.place, back.limits.max_message, back.limits.dtypes), (place, 77, DTypeSet::ALL));
        assert!(Slots::decode(&[0; MAX_PRIVATE]).is_none());
    }
}
