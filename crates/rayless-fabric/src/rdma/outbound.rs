//! The sending end over RDMA.

use super::{CREDIT_EVERY, FLUSH, NOTICE, RETURN, SLOT, SLOTS, cell, counted, sleep, verbs};
use crate::{
    error::TransportError,
    scatter::Scatter,
    transport::{Counters, Cursor, End, Level, Outbound},
    wait::Wake,
    wake::EventWake,
};
use rayless_verbs::{Completion, Connected, Endpoint, MAX_BATCH, Operation, Range, RegionId, Remote, VerbsError, Work};
use rustix::io::Errno;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// What an orderly close gives the last bytes to arrive.
const LINGER: Duration = Duration::from_secs(5);
/// Ids of the send queue's completions; RECVs have small ones.
const CHUNK: u64 = 1 << 63;
const LAST: u64 = 1 << 62;

/// The sender's registered memory.
#[derive(Clone, Copy)]
pub(super) struct Regions {
    /// What the WRITEs send: a copy of the receiver's slots.
    pub(super) staging: RegionId,
    /// What the SENDs behind them send.
    pub(super) notices: RegionId,
    /// Where credits and last words come in.
    pub(super) returns: RegionId,
    /// Where the flush's READ goes.
    pub(super) sink: RegionId,
}

pub(super) struct RdmaOutbound {
    endpoint: Option<Endpoint<Connected>>,
    regions: Regions,
    slots: Remote,
    device: String,
    /// Chunks posted; chunks whose requests are known to be done; chunks that the receiver has emptied.
    posted: u64,
    done: u64,
    emptied: u64,
    last_done: bool,
    wake: Arc<EventWake>,
    counters: Counters,
}

impl RdmaOutbound {
    pub(super) fn new(endpoint: Endpoint<Connected>, regions: Regions, slots: Remote) -> Result<Self, Errno> {
        Ok(Self {
            device: endpoint.device(),
            endpoint: Some(endpoint),
            regions,
            slots,
            posted: 0,
            done: 0,
            emptied: 0,
            last_done: false,
            wake: Arc::new(EventWake::new()?),
            counters: Counters::default(),
        })
    }

    /// A slot is free at both ends: the receiver has emptied it, and our device has let go of its staging.
    const fn has_room(&self) -> bool {
        self.posted < self.emptied + SLOTS as u64 && self.posted < self.done + SLOTS as u64
    }

    /// Copies the next bytes of the message into the next slot's staging and posts WRITE and SEND.
    fn post_chunk(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<(), TransportError> {
        let Some(endpoint) = &mut self.endpoint else { return Err(closed()) };
        let slot = (self.posted % SLOTS as u64) as usize;
        let start = slot * SLOT;
        let of_head = (head.len() - cursor.head).min(SLOT);
        endpoint.copy_in(self.regions.staging, start, &head[cursor.head..cursor.head + of_head]).map_err(verbs)?;
        let mut len = of_head;
        let mut copied = Ok(());
        body.walk(cursor.body, (SLOT - len) as u64, |slice| {
            copied = endpoint.copy_in(self.regions.staging, start + len, slice);
            len += slice.len();
            copied.is_ok()
        });
        copied.map_err(verbs)?;
        let mut notice = [0u8; NOTICE];
        notice[0..8].copy_from_slice(&self.posted.to_le_bytes());
        notice[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        endpoint.copy_in(self.regions.notices, slot * NOTICE, &notice).map_err(verbs)?;
        let to = Remote { address: self.slots.address + start as u64, rkey: self.slots.rkey };
        let id = CHUNK | self.posted;
        let data = Range { region: self.regions.staging, offset: start, len };
        let write = Work { operation: Operation::Write(to), local: data, signaled: false, id };
        // The send queue is done in order, so one report tells of all before it.
        let signaled = (self.posted + 1).is_multiple_of(CREDIT_EVERY);
        let send = Work { operation: Operation::Send, local: cell(self.regions.notices, slot, NOTICE).0, signaled, id };
        if let Err(error) = endpoint.post(&[write, send]) {
            return Err(self.why_ended(error));
        }
        cursor.head += of_head;
        cursor.body += (len - of_head) as u64;
        self.posted += 1;
        Ok(())
    }

    /// Takes completions: our own requests that are done, and what the receiver sent back.
    fn reap(&mut self) -> Result<(), TransportError> {
        let mut completions = [Completion::default(); MAX_BATCH];
        loop {
            let Some(endpoint) = &mut self.endpoint else { return Err(closed()) };
            let taken = endpoint.poll(&mut completions).map_err(verbs)?;
            for completion in &completions[..taken] {
                if completion.status != 0 {
                    return Err(failed(endpoint, completion.status));
                }
                if !completion.is_recv {
                    match completion.id {
                        LAST => self.last_done = true,
                        id => self.done = (id & !CHUNK) + 1,
                    }
                    continue;
                }
                let at = completion.id as usize;
                let mut back = [0u8; RETURN];
                let len = completion.len.min(RETURN);
                endpoint.copy_out(self.regions.returns, at * RETURN, &mut back[..len]).map_err(verbs)?;
                let (credits, rest) = back.split_first_chunk::<8>().ok_or_else(closed)?;
                let credits = u64::from_le_bytes(*credits);
                if credits < self.emptied || credits > self.posted {
                    return Err(TransportError::system("a credit", "the receiver's count makes no sense"));
                }
                self.emptied = credits;
                let reason_len = usize::from(u16::from_le_bytes([rest[0], rest[1]]));
                if reason_len > 0 {
                    return Err(TransportError::reported(rest.get(8..8 + reason_len).unwrap_or_default()));
                }
                endpoint.post_recvs(&[cell(self.regions.returns, at, RETURN)]).map_err(verbs)?;
            }
            if taken < MAX_BATCH {
                return Ok(());
            }
        }
    }

    /// A request was not taken: the receiver's last words if there are any, else the end, else the error.
    fn why_ended(&mut self, error: VerbsError) -> TransportError {
        if let Err(reported) = self.reap() {
            return reported;
        }
        match self.endpoint.as_mut().map(Endpoint::ended) {
            Some(Ok(Some(_))) => gone(),
            _ if rayless_verbs::is_connection_error(&error) => gone(),
            _ => verbs(error),
        }
    }

    fn poll(&mut self, at_most: Duration) -> Result<(), TransportError> {
        let Some(endpoint) = &mut self.endpoint else { return Err(closed()) };
        if sleep(endpoint, &self.wake, at_most)? {
            // Last words came before the end.
            self.reap()?;
            return Err(gone());
        }
        Ok(())
    }

    /// Lets the receiver have everything, as far as it is there, before the connection is taken down.
    fn linger(&mut self) -> Result<(), TransportError> {
        let Some(endpoint) = &mut self.endpoint else { return Ok(()) };
        let local = Range { region: self.regions.sink, offset: 0, len: FLUSH };
        let flush = Work { operation: Operation::Read(self.slots), local, signaled: true, id: LAST };
        endpoint.post(&[flush]).map_err(verbs)?;
        let until = Instant::now() + LINGER;
        while !self.last_done {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if let Some(endpoint) = &mut self.endpoint {
                endpoint.arm().map_err(verbs)?;
            }
            self.reap()?;
            if !self.last_done {
                self.poll(left)?;
            }
        }
        Ok(())
    }
}

fn closed() -> TransportError {
    TransportError::gone("this end is closed")
}

fn gone() -> TransportError {
    TransportError::gone("the receiver closed its end of the connection, or its process ended")
}

fn failed(endpoint: &Endpoint<Connected>, status: i32) -> TransportError {
    match status {
        Completion::FLUSHED => gone(),
        _ => TransportError::gone(format!("the connection broke: {}", endpoint.status_text(status))),
    }
}

impl End for RdmaOutbound {
    fn level(&self) -> Level {
        Level::Rdma
    }

    fn device(&self) -> Option<&str> {
        Some(&self.device)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::<EventWake>::clone(&self.wake)
    }

    fn counters(&self) -> Counters {
        counted(self.endpoint.as_ref(), self.counters)
    }
}

impl Outbound for RdmaOutbound {
    fn write(&mut self, head: &[u8], body: &Scatter<'_>, cursor: &mut Cursor) -> Result<bool, TransportError> {
        loop {
            if cursor.head == head.len() && cursor.body == body.len() {
                return Ok(true);
            }
            if !self.has_room() {
                self.reap()?;
                if !self.has_room() {
                    return Ok(false);
                }
            }
            self.post_chunk(head, body, cursor)?;
        }
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        let Some(endpoint) = &mut self.endpoint else { return Err(closed()) };
        endpoint.arm().map_err(verbs)?;
        // One that came before the arming raises no event.
        self.reap()?;
        if self.has_room() {
            return Ok(());
        }
        self.counters.sleeps += 1;
        self.poll(at_most)
    }

    fn close(&mut self, whole: bool) {
        if whole {
            // A receiver that is gone, or slow beyond the time, reads the end of the connection instead.
            let _ = self.linger();
        }
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.disconnect();
        }
        self.counters = self.counters();
        self.endpoint = None;
    }
}
