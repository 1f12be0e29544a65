//! The sending side.

use super::{
    CudaError, CudaReport, DEVICE_SLOT, Lane, ON_CALLERS_STREAM, Options,
    device::{Device, DeviceMemory, Event, Operation, Pinned, Stream},
    page::{Offer, PAGE, Page, Process, State, WORDS_AT},
    retired::{End, Retired, retire, sweep},
    ring::{Ring, SLOTS, Slots, pieces},
    staging_ring,
};
use crate::{
    error::{Rejected, RejectedKind, SendError},
    header::DevicePath,
    queue::{DevicePayload, SendHandle, SendQueue, Source},
    send::CHUNK,
    tensor::{Extra, TensorSpec, tensor_bytes},
    wait::Wait,
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

/// A tensor in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensor<'a> {
    /// Its form.
    pub spec: TensorSpec<'a>,
    /// Where it lies.
    pub address: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Sends messages in device memory over one link.
pub struct CudaSender {
    options: Options,
    staged: Vec<(i32, Staged)>,
    slots: Lending,
    report: CudaReport,
    operations: Vec<Operation>,
}

struct Staged {
    lane: Lane,
    progress: Arc<Progress>,
}

/// What the host has given to the device so far, where streams cannot write words.
#[derive(Default)]
struct Progress {
    enqueued: AtomicU32,
    failed: AtomicBool,
}

/// The slots that this end offers.
enum Lending {
    Untried,
    No,
    Offered(Lane, Page),
}

impl CudaSender {
    /// The sending side of one link. Nothing is loaded or allocated before the first message.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            staged: Vec::new(),
            slots: Lending::Untried,
            report: CudaReport::default(),
            operations: Vec::new(),
        }
    }

    /// How payloads have travelled.
    pub const fn report(&self) -> &CudaReport {
        &self.report
    }

    /// Sends a message whose tensors `stream` of device `ordinal` will have computed when it comes to this point. Does not wait
    /// (but where streams cannot wait for words: for room in the staging memory). The tensors may be written again
    /// by what the stream does after [`CudaSent::hold`]; `keep` is held until they have been read.
    ///
    /// # Safety
    /// `stream` must be a stream of that device, or 0, and the tensors' memory must stay allocated while `keep` lives.
    pub unsafe fn isend(
        &mut self,
        queue: &mut SendQueue,
        tensors: &[DeviceTensor<'_>],
        extra: Extra<'_>,
        ordinal: i32,
        stream: Stream,
        keep: Box<dyn Send>,
    ) -> Result<CudaSent, SendError> {
        let link = queue.name();
        let reject = |kind, reason: String| SendError::from(Rejected { link, kind, reason });
        let device = Device::open(ordinal).map_err(|error| reject(RejectedKind::Device, error.to_string()))?;
        check(&device, tensors, stream).map_err(|(kind, reason)| reject(kind, reason))?;
        let path = self.path(queue, &device);
        let operations = self.options.stream_operations && device.has_stream_operations();
        self.report.host_waits = !operations;
        let spans: Vec<(u64, u64)> = tensors.iter().map(|tensor| (tensor.address, tensor.bytes)).collect();
        let specs: Vec<TensorSpec<'_>> = tensors.iter().map(|tensor| tensor.spec).collect();
        let scratch = &mut self.operations;
        let (lane, progress) = match (path, &mut self.slots) {
            (DevicePath::Slots, Lending::Offered(lane, _)) => (lane, None),
            _ => {
                let staged = staged(&mut self.staged, &device, operations)
                    .map_err(|error| reject(RejectedKind::Device, error.to_string()))?;
                (&mut staged.lane, Some(Arc::clone(&staged.progress)))
            }
        };
        let total = spans.iter().map(|(_, bytes)| bytes).sum();
        let (first, count) = (lane.next, lane.ring.chunks(total));
        let at_once = total <= ON_CALLERS_STREAM && (0..count).all(|i| lane.ring.is_free(first.wrapping_add(i)));
        let mut event = None;
        let sent = queue.isend_device(&specs, extra, path, || {
            lane.next = first.wrapping_add(count);
            if operations {
                let stream = lane.stream(stream, at_once).map_err(|error| error.to_string())?;
                // SAFETY: the stream by contract, or ours; the tensors are kept, and the ring is retired, until the event.
                event = Some(unsafe { fill(lane, stream, &spans, total, first, scratch) }.map_err(|e| e.to_string())?);
            }
            Ok(match progress.clone() {
                None => DevicePayload::Slots,
                Some(progress) => DevicePayload::Chunks(Box::new(StagedSource {
                    ring: Arc::clone(&lane.ring),
                    progress: (!operations).then_some(progress),
                    next: first,
                    left: total,
                    events: lane.copies.clone(),
                })),
            })
        });
        let handle = match sent {
            Ok(handle) => handle,
            Err(error) => {
                // What a stream has been given before the failure goes on, and `keep` with it.
                if let Some(event) = event {
                    lane.uses.add(&Arc::new(event), Some(keep));
                }
                if matches!(error, SendError::Lost(_)) {
                    self.release();
                }
                return Err(error);
            }
        };
        let event = match (event, progress) {
            (Some(event), _) => event,
            (None, Some(progress)) => {
                let cancelled = || handle.is_done().is_err();
                // SAFETY: as above.
                let copied =
                    unsafe { fill_by_host(lane, stream, &spans, total, first, &progress, &cancelled, scratch) };
                match copied {
                    Ok(event) => event,
                    Err(error) => {
                        // The header has left: the link's thread loses the link, and we return its error.
                        progress.failed.store(true, Ordering::Release);
                        handle.wait(&Wait::forever())?;
                        return Err(reject(RejectedKind::Device, error.to_string()));
                    }
                }
            }
            (None, None) => return Err(reject(RejectedKind::Device, "slots without stream operations".to_owned())),
        };
        let event = Arc::new(event);
        lane.uses.add(&event, Some(keep));
        self.report.count(path);
        Ok(CudaSent { event, handle })
    }

    /// Which way a message of `device` goes. Offers slots when it is first asked.
    fn path(&mut self, queue: &SendQueue, device: &Arc<Device>) -> DevicePath {
        if matches!(self.slots, Lending::Untried) {
            self.slots = match lend(queue, device, self.options) {
                Ok((lane, page)) => Lending::Offered(lane, page),
                Err(reason) => {
                    self.report.no_slots = Some(reason);
                    Lending::No
                }
            };
        }
        let Lending::Offered(lane, page) = &self.slots else { return DevicePath::Chunks };
        match page.state() {
            State::Accepted if lane.ring.device.ordinal() == device.ordinal() => DevicePath::Slots,
            State::Refused => {
                self.report.no_slots = Some(page.reason());
                if let Lending::Offered(lane, page) = std::mem::replace(&mut self.slots, Lending::No) {
                    retire(Retired { ring: lane.ring, uses: lane.uses, end: End::Lender(page), last: lane.next });
                }
                DevicePath::Chunks
            }
            _ => DevicePath::Chunks,
        }
    }

    /// Ends what our streams wait for, when nobody will take anything any more.
    fn release(&self) {
        if let Lending::Offered(lane, page) = &self.slots {
            End::Lender(page.clone()).release(&lane.ring, lane.next);
        }
    }
}

/// What of the tensors cannot be sent.
fn check(device: &Device, tensors: &[DeviceTensor<'_>], stream: Stream) -> Result<(), (RejectedKind, String)> {
    for DeviceTensor { spec, address, bytes } in tensors {
        if tensor_bytes(spec.dtype, spec.shape) != Some(*bytes) {
            let reason = format!(
                "tensor `{}` of shape {:?} and {} does not have {bytes} bytes",
                spec.name, spec.shape, spec.dtype
            );
            return Err((RejectedKind::Mismatch, reason));
        }
        if *bytes > 0 && !device.owns(*address) {
            let reason =
                format!("tensor `{}` at {address:#x} is not in memory of CUDA device {}", spec.name, device.ordinal());
            return Err((RejectedKind::Device, reason));
        }
    }
    match device.is_capturing(stream) {
        Ok(false) => Ok(()),
        Ok(true) => Err((RejectedKind::Device, "the stream is being captured into a graph".to_owned())),
        Err(error) => Err((RejectedKind::Device, error.to_string())),
    }
}

/// The staging memory for a device.
fn staged<'a>(
    all: &'a mut Vec<(i32, Staged)>,
    device: &Arc<Device>,
    operations: bool,
) -> Result<&'a mut Staged, CudaError> {
    let at = match all.iter().position(|(ordinal, _)| *ordinal == device.ordinal()) {
        Some(at) => at,
        None => {
            sweep();
            let lane = Lane::new(staging_ring(device)?, operations)?;
            all.push((device.ordinal(), Staged { lane, progress: Arc::default() }));
            all.len() - 1
        }
    };
    Ok(&mut all[at].1)
}

/// Allocates slots and offers them to the peer, or says why not.
fn lend(queue: &SendQueue, device: &Arc<Device>, options: Options) -> Result<(Lane, Page), String> {
    let shared =
        queue.shared_page().ok_or_else(|| "the ends are not on one host, or payloads are verified".to_owned())?;
    if !options.slots {
        return Err("switched off".to_owned());
    }
    if !(options.stream_operations && device.has_stream_operations()) {
        return Err("the device's streams cannot wait for words".to_owned());
    }
    sweep();
    let page = Page(shared.clone());
    let offer = || -> Result<Lane, CudaError> {
        let memory = DeviceMemory::new(device, DEVICE_SLOT * SLOTS as usize)?;
        let offer = Offer { process: Process::own(), address: memory.address, handle: memory.handle()? };
        // SAFETY: the page is whole mapped pages, for as long as `keep` lives.
        let words = unsafe { Pinned::register(device, shared.host, PAGE, shared.keep)? };
        // SAFETY: the page's words are zeroed at first, and the other end uses them as these; slots as allocated.
        let ring = unsafe { Ring::new(device, words, WORDS_AT, Slots::Own(memory), DEVICE_SLOT) };
        let lane = Lane::new(ring, true)?;
        page.offer(&offer);
        Ok(lane)
    };
    let lane = offer().map_err(|error| error.to_string())?;
    Ok((lane, page))
}

/// Gives a stream all of a payload to put into the ring, and returns the event after it.
///
/// # Safety
/// As [`Device::enqueue`], until the event.
unsafe fn fill(
    lane: &Lane,
    stream: Stream,
    spans: &[(u64, u64)],
    total: u64,
    first: u32,
    operations: &mut Vec<Operation>,
) -> Result<Event, CudaError> {
    let (ring, slot) = (&lane.ring, lane.ring.slot_bytes() as u64);
    operations.clear();
    for i in 0..ring.chunks(total) {
        let start = u64::from(i) * slot;
        ring.fill(first.wrapping_add(i), pieces(spans, start, total.min(start + slot)), operations);
    }
    // SAFETY: by contract.
    unsafe { ring.device.enqueue(stream, operations)? };
    Event::after(&ring.device, stream)
}

/// The same where streams cannot wait: the host does, for the link's thread to take chunks out.
///
/// # Safety
/// As `fill`.
#[expect(clippy::too_many_arguments, reason = "as `fill`, and what it shares with the link's thread")]
unsafe fn fill_by_host(
    lane: &Lane,
    stream: Stream,
    spans: &[(u64, u64)],
    total: u64,
    first: u32,
    progress: &Progress,
    is_over: &dyn Fn() -> bool,
    operations: &mut Vec<Operation>,
) -> Result<Event, CudaError> {
    let (ring, slot) = (&lane.ring, lane.ring.slot_bytes() as u64);
    for i in 0..ring.chunks(total) {
        let (chunk, start) = (first.wrapping_add(i), u64::from(i) * slot);
        let backoff = crate::backoff::Backoff::default();
        while !ring.is_free(chunk) {
            if is_over() {
                return Event::after(&ring.device, stream);
            }
            backoff.pause();
        }
        operations.clear();
        ring.copy_in(chunk, pieces(spans, start, total.min(start + slot)), operations);
        // SAFETY: by contract.
        unsafe { ring.device.enqueue(stream, operations)? };
        lane.copies[(chunk % SLOTS) as usize].record(stream)?;
        progress.enqueued.store(chunk.wrapping_add(1), Ordering::Release);
    }
    Event::after(&ring.device, stream)
}

/// A staged payload on its way to the link.
struct StagedSource {
    ring: Arc<Ring>,
    /// Where streams cannot write words.
    progress: Option<Arc<Progress>>,
    events: Vec<Arc<Event>>,
    next: u32,
    left: u64,
}

impl StagedSource {
    fn is_full(&self) -> Result<bool, String> {
        let Some(progress) = &self.progress else { return Ok(self.ring.is_full(self.next)) };
        if progress.failed.load(Ordering::Acquire) {
            return Err("the device refused to copy the payload".to_owned());
        }
        let enqueued = progress.enqueued.load(Ordering::Acquire).wrapping_sub(self.next.wrapping_add(1)).cast_signed();
        if enqueued < 0 {
            return Ok(false);
        }
        self.events[(self.next % SLOTS) as usize].is_done().map_err(|error| error.to_string())
    }
}

impl Source for StagedSource {
    fn ready(&mut self) -> Result<Option<&[u8]>, String> {
        if !self.is_full()? {
            return Ok(None);
        }
        let Some(slot) = self.ring.slot_host(self.next) else {
            return Err("the slots are not in host memory".to_owned());
        };
        let bytes = self.left.min(CHUNK as u64) as usize;
        // SAFETY: the slot is at least this long, lives as long as the ring, and is ours until `taken` frees it: the
        // device writes it again only after that.
        Ok(Some(unsafe { std::slice::from_raw_parts(slot.as_ptr(), bytes) }))
    }

    fn taken(&mut self) {
        self.ring.set_free(self.next);
        self.next = self.next.wrapping_add(1);
        self.left = self.left.saturating_sub(CHUNK as u64);
    }
}

impl Drop for StagedSource {
    /// What is left when the link is lost is taken out by nobody, so that the stream that puts it in does not wait for ever.
    fn drop(&mut self) {
        for _ in 0..self.ring.chunks(self.left) {
            self.taken();
        }
    }
}

impl Drop for CudaSender {
    fn drop(&mut self) {
        self.release();
        for (_, Staged { lane, progress }) in self.staged.drain(..) {
            progress.failed.store(true, Ordering::Release);
            retire(Retired { ring: lane.ring, uses: lane.uses, end: End::Private, last: lane.next });
        }
        if let Lending::Offered(lane, page) = std::mem::replace(&mut self.slots, Lending::No) {
            retire(Retired { ring: lane.ring, uses: lane.uses, end: End::Lender(page), last: lane.next });
        }
    }
}

impl fmt::Debug for CudaSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaSender").field("report", &self.report).finish_non_exhaustive()
    }
}

/// One message in device memory that has been accepted.
pub struct CudaSent {
    event: Arc<Event>,
    handle: SendHandle,
}

impl CudaSent {
    /// Makes `stream` wait until the tensors have been read, without a wait of the host: what it does after may write them.
    ///
    /// # Safety
    /// `stream` must be a stream of this process, or 0.
    pub unsafe fn hold(&self, stream: Stream) -> Result<(), CudaError> {
        self.event.hold(stream)
    }

    /// Whether the tensors have been read. An error: the link is lost.
    pub fn is_done(&self) -> Result<bool, SendError> {
        // A context that cannot be asked is broken, and reads nothing any more.
        let read = self.event.is_done().unwrap_or(true);
        if !read {
            self.handle.is_done()?;
        }
        Ok(read)
    }

    /// Waits, with the host, until the tensors have been read. False: the wait ended before that.
    pub fn wait(&self, wait: &Wait<'_>) -> Result<bool, SendError> {
        let backoff = crate::backoff::Backoff::default();
        while !self.is_done()? {
            if wait.slice().is_err() {
                return Ok(false);
            }
            backoff.pause();
        }
        Ok(true)
    }
}

impl fmt::Debug for CudaSent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaSent").field("handle", &self.handle).finish_non_exhaustive()
    }
}
