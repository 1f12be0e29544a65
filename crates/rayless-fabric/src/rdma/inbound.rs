//! The receiving end over RDMA.

use super::{CREDIT_EVERY, NOTICE, REASON, RETURN, SLOT, SLOTS, cell, counted, sleep, verbs};
use crate::{
    error::{LostKind, TransportError},
    scatter::ScatterMut,
    transport::{Counters, End, Inbound, Level},
    wait::Wake,
    wake::EventWake,
};
use rayless_verbs::{Completion, Connected, Endpoint, MAX_BATCH, Operation, Range, RegionId, Work};
use rustix::io::Errno;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Credits in progress at most; every half of them is signaled.
pub(super) const CREDIT_CELLS: usize = 32;
/// What the last words get to arrive.
const LINGER: Duration = Duration::from_secs(1);
/// Id of the last words' completion.
const LAST: u64 = 1 << 62;

pub(super) struct RdmaInbound {
    endpoint: Option<Endpoint<Connected>>,
    slots: RegionId,
    notices: RegionId,
    returns: RegionId,
    device: String,
    /// Bytes of the chunk in each slot.
    lens: [u32; SLOTS],
    /// Chunks that have come, that have been read, and that the sender knows to have been read.
    arrived: u64,
    emptied: u64,
    returned: u64,
    /// Bytes read of the chunk that is next.
    at: usize,
    /// RECVs to be posted again, with the next credit.
    spent: [u64; SLOTS],
    spent_len: usize,
    credits: u64,
    last_done: bool,
    /// How the connection ended; told when all chunks have been read.
    ended: Option<TransportError>,
    wake: Arc<EventWake>,
    counters: Counters,
}

impl RdmaInbound {
    pub(super) fn new(
        endpoint: Endpoint<Connected>,
        slots: RegionId,
        notices: RegionId,
        returns: RegionId,
    ) -> Result<Self, Errno> {
        Ok(Self {
            device: endpoint.device(),
            endpoint: Some(endpoint),
            slots,
            notices,
            returns,
            lens: [0; SLOTS],
            arrived: 0,
            emptied: 0,
            returned: 0,
            at: 0,
            spent: [0; SLOTS],
            spent_len: 0,
            credits: 0,
            last_done: false,
            ended: None,
            wake: Arc::new(EventWake::new()?),
            counters: Counters::default(),
        })
    }

    /// Takes completions: notices of chunks, and our own requests.
    fn reap(&mut self) -> Result<(), TransportError> {
        let mut completions = [Completion::default(); MAX_BATCH];
        loop {
            let Some(endpoint) = &mut self.endpoint else { return Ok(()) };
            let taken = endpoint.poll(&mut completions).map_err(verbs)?;
            for completion in &completions[..taken] {
                if completion.status != 0 {
                    let text = endpoint.status_text(completion.status);
                    self.ended.get_or_insert_with(|| match completion.status {
                        Completion::FLUSHED => gone(),
                        _ => TransportError::gone(format!("the connection broke: {text}")),
                    });
                    continue;
                }
                if !completion.is_recv {
                    self.last_done |= completion.id == LAST;
                    continue;
                }
                let mut notice = [0u8; NOTICE];
                endpoint.copy_out(self.notices, completion.id as usize * NOTICE, &mut notice).map_err(verbs)?;
                self.spent[self.spent_len] = completion.id;
                self.spent_len += 1;
                let number = u64::from_le_bytes(*notice.first_chunk().ok_or_else(gone)?);
                let len = u32::from_le_bytes([notice[8], notice[9], notice[10], notice[11]]);
                if number != self.arrived || len as usize > SLOT || number >= self.emptied + SLOTS as u64 {
                    let cause = format!("chunk {number} of {len} bytes came where chunk {} belongs", self.arrived);
                    return Err(TransportError { kind: LostKind::Crossed, cause });
                }
                self.lens[(number % SLOTS as u64) as usize] = len;
                self.arrived += 1;
            }
            if taken < MAX_BATCH {
                return Ok(());
            }
        }
    }

    /// Bytes that can be read of the chunk that is next: `None` when there is none.
    fn current(&mut self) -> Result<Option<(usize, usize)>, TransportError> {
        if self.emptied == self.arrived {
            self.reap()?;
            if self.emptied == self.arrived {
                return match &self.ended {
                    Some(ended) => Err(ended.clone()),
                    None => Ok(None),
                };
            }
        }
        let slot = (self.emptied % SLOTS as u64) as usize;
        Ok(Some((slot * SLOT + self.at, self.lens[slot] as usize - self.at)))
    }

    /// Counts bytes as read; an emptied slot is given back with the next credit.
    fn consume(&mut self, len: usize) -> Result<(), TransportError> {
        self.at += len;
        if self.at < self.lens[(self.emptied % SLOTS as u64) as usize] as usize {
            return Ok(());
        }
        self.at = 0;
        self.emptied += 1;
        if self.emptied - self.returned < CREDIT_EVERY || self.ended.is_some() {
            return Ok(());
        }
        self.returned = self.emptied;
        let Some(endpoint) = &mut self.endpoint else { return Ok(()) };
        let mut recvs = [cell(self.notices, 0, NOTICE); SLOTS];
        for (recv, id) in recvs.iter_mut().zip(&self.spent[..self.spent_len]) {
            *recv = cell(self.notices, *id as usize, NOTICE);
        }
        // The RECVs first: with the credit the sender may fill them.
        let posted = if self.spent_len > 0 { endpoint.post_recvs(&recvs[..self.spent_len]) } else { Ok(()) };
        self.spent_len = 0;
        let at = (self.credits % CREDIT_CELLS as u64) as usize;
        self.credits += 1;
        let signaled = self.credits.is_multiple_of(CREDIT_CELLS as u64 / 2);
        let posted = posted.and_then(|()| Self::post_return(endpoint, self.returns, at, self.emptied, "", signaled));
        if let Err(error) = posted {
            // The sender has gone; what it sent before is still read.
            let known = endpoint.ended().map_err(verbs)?.is_some() || rayless_verbs::is_connection_error(&error);
            self.ended = Some(if known { gone() } else { verbs(error) });
        }
        Ok(())
    }

    fn post_return(
        endpoint: &mut Endpoint<Connected>,
        region: RegionId,
        at: usize,
        emptied: u64,
        reason: &str,
        signaled: bool,
    ) -> Result<(), rayless_verbs::VerbsError> {
        let reason = &reason.as_bytes()[..reason.len().min(REASON)];
        let mut start = [0u8; 16];
        start[0..8].copy_from_slice(&emptied.to_le_bytes());
        start[8..10].copy_from_slice(&(reason.len() as u16).to_le_bytes());
        endpoint.copy_in(region, at * RETURN, &start)?;
        endpoint.copy_in(region, at * RETURN + 16, reason)?;
        let local = Range { region, offset: at * RETURN, len: 16 + reason.len() };
        let id = if reason.is_empty() { at as u64 } else { LAST };
        endpoint.post(&[Work { operation: Operation::Send, local, signaled, id }])
    }

    fn poll(&mut self, at_most: Duration) -> Result<(), TransportError> {
        let Some(endpoint) = &mut self.endpoint else { return Ok(()) };
        if sleep(endpoint, &self.wake, at_most)? {
            // Chunks that came before the end are still to be read.
            self.reap()?;
            self.ended.get_or_insert_with(gone);
        }
        Ok(())
    }

    /// Tells the sender why, and waits a little for it to be told.
    fn last_words(&mut self, reason: &str) -> Result<(), TransportError> {
        let Some(endpoint) = &mut self.endpoint else { return Ok(()) };
        // On iWARP the accepting side may not be the first to send.
        if reason.is_empty() || self.arrived == 0 || self.ended.is_some() || endpoint.ended().map_err(verbs)?.is_some()
        {
            return Ok(());
        }
        Self::post_return(endpoint, self.returns, CREDIT_CELLS, self.emptied, reason, true).map_err(verbs)?;
        let until = Instant::now() + LINGER;
        while !self.last_done && self.ended.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if let Some(endpoint) = &mut self.endpoint {
                endpoint.arm().map_err(verbs)?;
            }
            // More chunks may come meanwhile; their RECVs are not posted again, so they are soon held back.
            self.reap()?;
            if !self.last_done {
                self.poll(left)?;
            }
        }
        Ok(())
    }
}

fn gone() -> TransportError {
    TransportError::gone("the sender's connection ended without a goodbye")
}

impl End for RdmaInbound {
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

impl Inbound for RdmaInbound {
    fn read_head(&mut self, head: &mut [u8], filled: &mut usize) -> Result<bool, TransportError> {
        while *filled < head.len() {
            let Some((offset, available)) = self.current()? else { return Ok(false) };
            let len = available.min(head.len() - *filled);
            if let Some(endpoint) = &self.endpoint {
                endpoint.copy_out(self.slots, offset, &mut head[*filled..*filled + len]).map_err(verbs)?;
            }
            *filled += len;
            self.consume(len)?;
        }
        Ok(true)
    }

    fn read_body(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError> {
        while *filled < body.len() {
            let Some((offset, available)) = self.current()? else { return Ok(false) };
            let len = (available as u64).min(body.len() - *filled);
            let mut at = offset;
            let mut copied = Ok(());
            if let Some(endpoint) = &self.endpoint {
                body.walk(*filled, len, |slice| {
                    copied = endpoint.copy_out(self.slots, at, slice);
                    at += slice.len();
                    copied.is_ok()
                });
            }
            copied.map_err(verbs)?;
            *filled += len;
            self.consume(len as usize)?;
        }
        Ok(true)
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), TransportError> {
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.arm().map_err(verbs)?;
        }
        // One that came before the arming raises no event.
        self.reap()?;
        if self.arrived > self.emptied || self.ended.is_some() {
            return Ok(());
        }
        self.counters.sleeps += 1;
        self.poll(at_most)
    }

    fn close(&mut self, reason: &str) {
        // A sender that is gone needs no reason.
        let _ = self.last_words(reason);
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.disconnect();
        }
        self.counters = self.counters();
        self.endpoint = None;
    }
}
