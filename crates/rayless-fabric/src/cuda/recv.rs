//! The receiving side.

use super::{
    CudaError, CudaReport, DEVICE_SLOT, Lane, ON_CALLERS_STREAM, Options,
    device::{Device, Event, Operation, OwnStream, PeerMemory, Pinned, Stream},
    page::{PAGE, Page, Process, WORDS_AT},
    retired::{End, Retired, retire, sweep},
    ring::{Ring, SLOTS, Slots, pieces},
    staging_ring,
};
use crate::{
    error::{Lost, LostKind, RecvError, Rejected, RejectedKind},
    header::DevicePath,
    recv::RecvLink,
    recv_queue::{RecvQueue, Sink},
    send::CHUNK,
    wait::Wait,
};
use std::{collections::VecDeque, fmt, sync::Arc};

/// Receives messages in device memory from one link.
///
/// Close (or drop) the [`RecvQueue`] before this.
pub struct CudaReceiver {
    options: Options,
    staged: Vec<(i32, Lane)>,
    slots: Borrowing,
    report: CudaReport,
    operations: Vec<Operation>,
    /// Sizes of the tensors of messages that were received ahead of their headers, oldest first.
    ahead: VecDeque<Vec<u64>>,
}

/// The peer's slots.
enum Borrowing {
    Undecided,
    No,
    Open(Lane, Page),
}

impl CudaReceiver {
    /// The receiving side of one link. Nothing is loaded or allocated before the first message.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            staged: Vec::new(),
            slots: Borrowing::Undecided,
            report: CudaReport::default(),
            operations: Vec::new(),
            ahead: VecDeque::new(),
        }
    }

    /// How payloads have travelled.
    pub const fn report(&self) -> &CudaReport {
        &self.report
    }

    /// Receives the next message before its header is there, by who knows what it will be: the stream waits for the payload, and the host
    /// for nothing. [`CudaReceiver::confirm`] must follow before another message is received, and before what comes of the tensors
    /// is given to anybody. `None`, and nothing has happened, where the way of the next message is not known: it must be a small
    /// one through slots, as the last one was.
    ///
    /// # Safety
    /// As [`CudaReceiver::recv`].
    pub unsafe fn recv_ahead(
        &mut self,
        queue: &RecvQueue,
        buffers: &[(u64, u64)],
        ordinal: i32,
        stream: Stream,
        keep: Box<dyn Send>,
    ) -> Result<Option<CudaReceived>, RecvError> {
        let link = queue.name();
        let total: u64 = buffers.iter().map(|(_, bytes)| *bytes).sum();
        // A sender that has once used slots goes on with them.
        if self.report.path != Some(DevicePath::Slots) || total > ON_CALLERS_STREAM || total == 0 {
            return Ok(None);
        }
        let lane = match &mut self.slots {
            Borrowing::Open(lane, _) if lane.ring.device.ordinal() == ordinal => lane,
            _ => return Ok(None),
        };
        let device = Arc::clone(&lane.ring.device);
        let reject = |reason: String| RecvError::from(Rejected { link, kind: RejectedKind::Device, reason });
        can_fill(&device, buffers, stream).map_err(reject)?;
        let first = lane.next;
        lane.next = first.wrapping_add(lane.ring.chunks(total));
        self.ahead.push_back(buffers.iter().map(|(_, bytes)| *bytes).collect());
        // SAFETY: by contract; the ring is retired after the event.
        let drained = unsafe { drain(lane, stream, buffers, total, first, &mut self.operations) };
        let event = Arc::new(drained.map_err(|error| reject(error.to_string()))?);
        lane.uses.add(&event, Some(keep));
        self.report.count(DevicePath::Slots);
        Ok(Some(CudaReceived { event }))
    }

    /// Waits for the header of the oldest message that was received ahead, if any, and compares. Another message than was expected
    /// loses the link: a stream has taken for one what is another.
    pub fn confirm(&mut self, queue: &mut RecvQueue, step: Option<u64>, wait: &Wait<'_>) -> Result<(), RecvError> {
        let Some(expected) = self.ahead.front() else { return Ok(()) };
        let announced = queue.recv_header(step, wait)?;
        let sizes = announced.schema.tensors.iter().map(|tensor| tensor.bytes);
        if announced.device != Some(DevicePath::Slots) || !sizes.clone().eq(expected.iter().copied()) {
            let found: Vec<u64> = sizes.collect();
            let cause = format!("tensors of {expected:?} bytes were received, but tensors of {found:?} bytes sent");
            let lost = |link: &mut RecvLink| Err(link.abandon(LostKind::Crossed, cause));
            return queue.with(&Wait::poll(), lost);
        }
        queue.taken_through_slots()?;
        self.ahead.pop_front();
        Ok(())
    }

    /// Receives the payload of the device message that `queue` has announced into `buffers` (address and bytes, one per tensor) of
    /// device `ordinal`. Returns at once: `stream` waits for what has not come; payloads over 1 MiB come on a stream of
    /// rayless, so call [`CudaReceived::hold`] before the buffers are read. `keep` is held until the buffers are filled.
    ///
    /// Where streams cannot wait for words the host waits here, within `wait`.
    ///
    /// # Safety
    /// `stream` must be a stream of that device, or 0; the buffers must stay allocated, and must not be used by
    /// anything but `stream` before this call, while `keep` lives.
    pub unsafe fn recv(
        &mut self,
        queue: &mut RecvQueue,
        buffers: &[(u64, u64)],
        ordinal: i32,
        stream: Stream,
        keep: Box<dyn Send>,
        wait: &Wait<'_>,
    ) -> Result<CudaReceived, RecvError> {
        let link = queue.name();
        let reject = |kind, reason: String| RecvError::from(Rejected { link, kind, reason });
        let refused = |error: CudaError| reject(RejectedKind::Device, error.to_string());
        if !self.ahead.is_empty() {
            let reason = "a message was received ahead and is not confirmed".to_owned();
            return Err(reject(RejectedKind::OutOfTurn, reason));
        }
        let announced = queue.recv_header(None, &Wait::poll())?;
        let Some(path) = announced.device else {
            let reason = "the message was in host memory; receive it with recv_payload".to_owned();
            return Err(reject(RejectedKind::OutOfTurn, reason));
        };
        let device = Device::open(ordinal).map_err(|error| reject(RejectedKind::Device, error.to_string()))?;
        let tensors = &announced.schema.tensors;
        if !buffers.iter().map(|(_, bytes)| *bytes).eq(tensors.iter().map(|tensor| tensor.bytes)) {
            let reason = format!("buffers of {:?} bytes", buffers.iter().map(|(_, bytes)| bytes).collect::<Vec<_>>());
            return Err(reject(RejectedKind::Mismatch, format!("{reason} for a message of {tensors:?}")));
        }
        can_fill(&device, buffers, stream).map_err(|reason| reject(RejectedKind::Device, reason))?;
        self.decide(queue, &device);
        let operations = self.options.stream_operations && device.has_stream_operations();
        self.report.host_waits = !operations;
        let scratch = &mut self.operations;
        let lane = match (path, &mut self.slots) {
            (DevicePath::Chunks, _) => staged(&mut self.staged, &device, operations).map_err(refused)?,
            (DevicePath::Slots, Borrowing::Open(lane, _)) if lane.ring.device.ordinal() == ordinal => lane,
            (DevicePath::Slots, _) => {
                let reason = format!("the payload is in slots that are not mapped for CUDA device {ordinal}");
                return Err(reject(RejectedKind::Device, reason));
            }
        };
        let total = announced.schema.payload_bytes();
        let first = lane.next;
        let event = if path == DevicePath::Chunks && !operations {
            // SAFETY: by contract.
            unsafe { drain_by_host(lane, queue, stream, buffers, total, wait, scratch)? }
        } else {
            let on_callers = total <= ON_CALLERS_STREAM;
            if path == DevicePath::Slots {
                queue.taken_through_slots()?;
            } else {
                // Before the stream is given its waits: what is there already needs none.
                queue.irecv_chunks(Box::new(StagedSink { ring: Arc::clone(&lane.ring), next: first, left: total }))?;
            }
            lane.next = first.wrapping_add(lane.ring.chunks(total));
            let stream = lane.stream(stream, on_callers);
            // SAFETY: the stream by contract, or ours; the buffers are kept, and the ring is retired, until the event.
            let drained = stream.and_then(|stream| unsafe { drain(lane, stream, buffers, total, first, scratch) });
            // The header has been taken, so a payload that cannot be taken loses the link.
            drained.map_err(|error| lose(queue, &error))?
        };
        let event = Arc::new(event);
        lane.uses.add(&event, Some(keep));
        self.report.count(path);
        Ok(CudaReceived { event })
    }

    /// Answers the peer's offer of slots, if it has made one.
    fn decide(&mut self, queue: &RecvQueue, device: &Arc<Device>) {
        if !matches!(self.slots, Borrowing::Undecided) {
            return;
        }
        let Some(shared) = queue.shared_page() else {
            self.report.no_slots = Some("the ends are not on one host, or payloads are verified".to_owned());
            self.slots = Borrowing::No;
            return;
        };
        let page = Page(shared);
        let Some(offer) = page.offered() else { return };
        let lane = if !self.options.slots {
            Err("switched off at the receiver".to_owned())
        } else if !(self.options.stream_operations && device.has_stream_operations()) {
            Err("the receiving device's streams cannot wait for words".to_owned())
        } else {
            sweep();
            let open = || -> Result<Lane, CudaError> {
                let slots = if offer.process == Process::own() {
                    Slots::Same(offer.address)
                } else {
                    Slots::Peer(PeerMemory::open(device, offer.handle)?)
                };
                // SAFETY: the page is whole mapped pages, for as long as `keep` lives.
                let words = unsafe { Pinned::register(device, page.0.host, PAGE, Arc::clone(&page.0.keep))? };
                // SAFETY: the page's words are the sender's, which offered slots of this size.
                Lane::new(unsafe { Ring::new(device, words, WORDS_AT, slots, DEVICE_SLOT) }, true)
            };
            open().map_err(|error| error.to_string())
        };
        self.slots = match lane {
            Ok(lane) if page.accept() => Borrowing::Open(lane, page),
            Ok(_) => Borrowing::No,
            Err(reason) => {
                page.refuse(&reason);
                self.report.no_slots = Some(reason);
                Borrowing::No
            }
        };
    }
}

/// Whether a stream of the device can put something into these buffers; if not, why.
fn can_fill(device: &Device, buffers: &[(u64, u64)], stream: Stream) -> Result<(), String> {
    if let Some((address, _)) = buffers.iter().find(|(address, bytes)| *bytes > 0 && !device.owns(*address)) {
        return Err(format!("the buffer at {address:#x} is not in memory of CUDA device {}", device.ordinal()));
    }
    if device.is_capturing(stream).map_err(|error| error.to_string())? {
        return Err("the stream is being captured into a graph".to_owned());
    }
    Ok(())
}

/// The staging memory for a device.
fn staged<'a>(
    all: &'a mut Vec<(i32, Lane)>,
    device: &Arc<Device>,
    operations: bool,
) -> Result<&'a mut Lane, CudaError> {
    let at = match all.iter().position(|(ordinal, _)| *ordinal == device.ordinal()) {
        Some(at) => at,
        None => {
            sweep();
            all.push((device.ordinal(), Lane::new(staging_ring(device)?, operations)?));
            all.len() - 1
        }
    };
    Ok(&mut all[at].1)
}

fn lose(queue: &mut RecvQueue, error: &CudaError) -> RecvError {
    let cause = format!("the device cannot take the payload: {error}");
    let lost = |link: &mut RecvLink| Err::<(), _>(link.abandon(LostKind::System, cause));
    match queue.with(&Wait::poll(), lost) {
        Err(error) => error,
        Ok(()) => RecvError::Closed { link: queue.name(), messages: queue.probe().messages() },
    }
}

/// Gives a stream all of a payload to take out of the ring, and returns the event after it.
///
/// # Safety
/// As [`Device::enqueue`], until the event.
unsafe fn drain(
    lane: &Lane,
    stream: Stream,
    buffers: &[(u64, u64)],
    total: u64,
    first: u32,
    operations: &mut Vec<Operation>,
) -> Result<Event, CudaError> {
    let (ring, slot) = (&lane.ring, lane.ring.slot_bytes() as u64);
    operations.clear();
    for i in 0..ring.chunks(total) {
        let start = u64::from(i) * slot;
        ring.drain(first.wrapping_add(i), pieces(buffers, start, total.min(start + slot)), operations);
    }
    // SAFETY: by contract.
    unsafe { ring.device.enqueue(stream, operations)? };
    Event::after(&ring.device, stream)
}

/// The same where streams cannot wait: the host waits for each chunk, and for the copy before in its slot.
///
/// # Safety
/// As `drain`.
unsafe fn drain_by_host(
    lane: &mut Lane,
    queue: &mut RecvQueue,
    stream: Stream,
    buffers: &[(u64, u64)],
    total: u64,
    wait: &Wait<'_>,
    operations: &mut Vec<Operation>,
) -> Result<Event, RecvError> {
    let ring = Arc::clone(&lane.ring);
    let mut start = 0;
    while start < total {
        let chunk = lane.next;
        let copy = &lane.copies[(chunk % SLOTS) as usize];
        let backoff = crate::backoff::Backoff::default();
        while matches!(copy.is_done(), Ok(false)) {
            backoff.pause();
        }
        let bytes = queue.with(wait, |link| {
            let Some(slot) = ring.slot_host(chunk) else { return Ok(None) };
            // SAFETY: the slot is this long, and nobody else uses it: the copy out of it before is done.
            let into = unsafe { std::slice::from_raw_parts_mut(slot.as_ptr(), CHUNK) };
            match link.recv_chunk(into, wait) {
                // Part of the payload has been handed on: the message cannot be asked for again.
                Err(RecvError::Stopped { stop, .. }) if start > 0 => {
                    Err(link.abandon(LostKind::Abandoned, format!("receiving {stop} after {start} of {total} bytes")))
                }
                other => other,
            }
        })?;
        let Some(bytes) = bytes else { break };
        let end = start + bytes as u64;
        operations.clear();
        ring.copy_out(chunk, pieces(buffers, start, end), operations);
        // SAFETY: by contract.
        let copied = unsafe { ring.device.enqueue(stream, operations) }.and_then(|()| copy.record(stream));
        copied.map_err(|error| lose(queue, &error))?;
        lane.next = chunk.wrapping_add(1);
        start = end;
    }
    if total == 0 {
        queue.with(wait, |link| link.recv_chunk(&mut [], wait))?;
    }
    Event::after(&ring.device, stream).map_err(|error| lose(queue, &error))
}

/// A staged payload on its way from the link.
struct StagedSink {
    ring: Arc<Ring>,
    next: u32,
    left: u64,
}

impl Sink for StagedSink {
    fn room(&mut self) -> Result<Option<&mut [u8]>, String> {
        if !self.ring.is_free(self.next) {
            return Ok(None);
        }
        let Some(slot) = self.ring.slot_host(self.next) else {
            return Err("the slots are not in host memory".to_owned());
        };
        // SAFETY: the slot is this long, lives as long as the ring, and is ours until `filled`: the device reads it only
        // after that.
        Ok(Some(unsafe { std::slice::from_raw_parts_mut(slot.as_ptr(), CHUNK) }))
    }

    fn filled(&mut self, bytes: usize) -> Result<(), String> {
        let expected = self.left.min(CHUNK as u64);
        if bytes as u64 != expected {
            return Err(format!("a chunk of {bytes} bytes came where one of {expected} belongs"));
        }
        self.ring.set_full(self.next);
        self.next = self.next.wrapping_add(1);
        self.left -= expected;
        Ok(())
    }

    /// The stream goes on waiting: what it waits for has not arrived. Closing this end lets it go.
    fn lost(&mut self, _: &Lost) {}
}

impl Drop for CudaReceiver {
    /// Lets go the streams that wait for what will not come any more; what they read is all ones.
    fn drop(&mut self) {
        for (_, mut lane) in self.staged.drain(..) {
            if !lane.uses.settle() {
                for back in (1..=SLOTS).rev() {
                    let chunk = lane.next.wrapping_sub(back);
                    if let (false, Some(slot)) = (lane.ring.is_full(chunk), lane.ring.slot_host(chunk)) {
                        // SAFETY: the slot is this long. Nobody fills it: the queue was closed before. A stream that still
                        // takes an older chunk out of it has been given that one's bytes, or gets these.
                        unsafe { slot.as_ptr().write_bytes(0xff, CHUNK) };
                    }
                }
                // In this order: once a word is set, the stream reads.
                for back in (1..=SLOTS).rev() {
                    lane.ring.set_full(lane.next.wrapping_sub(back));
                }
            }
            retire(Retired { ring: lane.ring, uses: lane.uses, end: End::Private, last: lane.next });
        }
        if let Borrowing::Open(mut lane, page) = std::mem::replace(&mut self.slots, Borrowing::No) {
            if !lane.uses.settle() {
                poison(&lane);
            }
            retire(Retired { ring: lane.ring, uses: lane.uses, end: End::Borrower(page), last: lane.next });
        }
    }
}

/// Overwrites the slots that have not been filled, on a stream of its own, and waits for that.
fn poison(lane: &Lane) {
    let chunks = (1..=SLOTS).map(|back| lane.next.wrapping_sub(back));
    let operations: Vec<Operation> =
        chunks.filter(|chunk| !lane.ring.is_full(*chunk)).map(|chunk| lane.ring.poison(chunk)).collect();
    let overwritten = OwnStream::new(&lane.ring.device).and_then(|own| {
        // SAFETY: the stream is ours; the ring is retired after this, and these operations wait for nothing.
        unsafe { lane.ring.device.enqueue(own.stream, &operations)? };
        let event = Event::after(&lane.ring.device, own.stream)?;
        while !event.is_done()? {
            std::thread::yield_now();
        }
        Ok(())
    });
    // A context in which even this fails runs nothing any more, so nothing reads the slots either.
    drop(overwritten);
}

impl fmt::Debug for CudaReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaReceiver").field("report", &self.report).finish_non_exhaustive()
    }
}

/// A payload that is coming, or has come.
pub struct CudaReceived {
    event: Arc<Event>,
}

impl CudaReceived {
    /// Makes `stream` wait for the payload, without a wait of the host.
    ///
    /// # Safety
    /// `stream` must be a stream of this process, or 0.
    pub unsafe fn hold(&self, stream: Stream) -> Result<(), CudaError> {
        self.event.hold(stream)
    }

    /// Whether the buffers are filled.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.event.is_done()
    }
}

impl fmt::Debug for CudaReceived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaReceived").finish_non_exhaustive()
    }
}
