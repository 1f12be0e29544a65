//! Where a group's calls go: over the sessions with its keepers, and into the ring of the driver's own host.

use crate::{
    ring::{AskedSet, CallWriter, Record, ReplyReader, Ring, RingError},
    session::{OUTPUT_SOFT_LIMIT, Session, SessionError, plain_header},
};
use rayless_proto::{
    ids::{CallId, NodeId, Rank},
    limits::MAX_FRAGMENT,
    v1::step::{FLAG_LAST, Header, Kind},
};
use rustix::event::epoll::EventFlags;
use std::{collections::VecDeque, os::fd::OwnedFd, sync::Arc};

/// What a session carries at once of a large call: the rest follows as the peer takes it.
const WIRE_FRAGMENT: usize = 256 << 10;

/// A call on its way to one peer.
pub(super) struct Outgoing {
    pub(super) call: CallId,
    /// Asked ranks, a u32 each.
    pub(super) asked: Arc<[u8]>,
    pub(super) payload: Arc<[u8]>,
    pub(super) at: usize,
    pub(super) begun: bool,
}

/// A keeper and the session with it.
pub(super) struct Peer {
    pub(super) node: NodeId,
    pub(super) name: String,
    pub(super) address: String,
    pub(super) local: bool,
    /// In the order of its ring's readers.
    pub(super) ranks: Vec<Rank>,
    pub(super) session: Option<Session>,
    pub(super) outgoing: VecDeque<Outgoing>,
    pub(super) interest: EventFlags,
}

impl Peer {
    pub(super) const fn new(
        node: NodeId,
        name: String,
        address: String,
        local: bool,
        ranks: Vec<Rank>,
        session: Session,
    ) -> Self {
        let outgoing = VecDeque::new();
        Self { node, name, address, local, ranks, session: Some(session), outgoing, interest: EventFlags::IN }
    }

    /// Queues what fits and sends what the kernel takes.
    pub(super) fn send(&mut self) -> Result<(), SessionError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        loop {
            while session.queued() < OUTPUT_SOFT_LIMIT {
                let Some(out) = self.outgoing.front_mut() else { break };
                let end = out.payload.len().min(out.at + WIRE_FRAGMENT);
                let last = end == out.payload.len();
                let asked: &[u8] = if std::mem::replace(&mut out.begun, true) { &[] } else { &out.asked };
                let header = Header {
                    flags: if last { FLAG_LAST } else { 0 },
                    asked: (asked.len() / 4) as u32,
                    call: out.call,
                    ..plain_header(Kind::Call)
                };
                session.queue(header, &[asked, &out.payload[out.at..end]]);
                out.at = end;
                if last {
                    self.outgoing.pop_front();
                }
            }
            session.flush()?;
            if self.outgoing.is_empty() || session.queued() > 0 {
                return Ok(());
            }
        }
    }

    pub(super) fn wants_room(&self) -> bool {
        !self.outgoing.is_empty() || self.session.as_ref().is_some_and(|session| session.queued() > 0)
    }
}

/// The ring of this host.
pub(super) struct LocalRing {
    pub(super) ring: Arc<Ring>,
    pub(super) writer: CallWriter,
    pub(super) readers: Vec<ReplyReader>,
    pub(super) ranks: Vec<Rank>,
    pub(super) event: OwnedFd,
    pub(super) outgoing: VecDeque<(Outgoing, AskedSet)>,
}

impl LocalRing {
    /// Writes what there is room for, and wakes the workers once.
    pub(super) fn send(&mut self) -> Result<(), RingError> {
        while let Some((out, asked)) = self.outgoing.front_mut() {
            let end = out.payload.len().min(out.at + MAX_FRAGMENT);
            let last = end == out.payload.len();
            let record = Record { call: out.call, last, asked: *asked, payload: &out.payload[out.at..end] };
            if !self.writer.push(&record)? {
                break;
            }
            out.at = end;
            if last {
                self.outgoing.pop_front();
            }
        }
        self.writer.wake();
        Ok(())
    }
}
