//! Sends that do not wait: what `isend` needs.
//!
//! A message that the transport takes at once leaves in the caller's thread, which costs nothing more than
//! `SendLink::send`. Only what does not fit is handed, with everything behind it, to the queue's thread, which is
//! started when first needed and sleeps while there is nothing to do. A message whose payload is still being computed on a
//! GPU leaves in two halves: its header in the caller's thread, its payload by the queue's thread as a [`Source`] has it.

use crate::{
    backoff::Backoff,
    dtype::DType,
    error::{Lost, LostKind, SendError, TransportError},
    fork::Origin,
    header::DevicePath,
    name::LinkName,
    probe::Probe,
    send::{SendLink, with_parts},
    tensor::{Extra, PeerLimits, TensorRef, TensorSpec, encode},
    transport::{Counters, SharedPage},
    wait::{Cancel, Wait},
};
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

/// A tensor whose bytes stay valid and unchanged until it is dropped: what the queue holds on to.
pub struct OwnedTensor {
    /// Its key in the dict.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Elements along each dimension; the bytes are contiguous.
    pub shape: Vec<u64>,
    /// Its bytes, with whatever keeps them alive.
    pub data: Box<dyn AsRef<[u8]> + Send>,
}

impl OwnedTensor {
    fn spec(&self) -> TensorSpec<'_> {
        TensorSpec { name: &self.name, dtype: self.dtype, shape: &self.shape, strides: None }
    }
}

impl fmt::Debug for OwnedTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedTensor").field("spec", &self.spec()).finish_non_exhaustive()
    }
}

/// Where the payload of a device message comes from, piece by piece, as it becomes ready.
pub trait Source: Send {
    /// The next bytes, at most [`CHUNK`](crate::CHUNK) of them; `None`: they are not ready yet. Does not wait. The same bytes are given until
    /// [`Source::taken`]. An error (one line of cause) loses the link.
    fn ready(&mut self) -> Result<Option<&[u8]>, String>;

    /// The bytes given last have left, and their place may be used again.
    fn taken(&mut self);
}

/// A device message's payload, for [`SendQueue::isend_device`].
pub enum DevicePayload {
    /// As chunks on this link.
    Chunks(Box<dyn Source>),
    /// By a way of its own.
    Slots,
}

/// The sending end of a link, with a queue in front.
pub struct SendQueue {
    shared: Arc<Shared>,
    name: LinkName,
    origin: Origin,
    limits: PeerLimits,
    cancel: Cancel,
    probe: Arc<Probe>,
    page: Option<SharedPage>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// `None` while the thread is sending.
    link: Option<SendLink>,
    jobs: VecDeque<Job>,
    /// Messages accepted, and messages that have left: the handles of the second are done.
    accepted: u64,
    left: u64,
    failed: Option<SendError>,
    closing: bool,
    scratch: Vec<u8>,
}

struct Job {
    what: What,
    tag: u64,
    extra: Vec<u8>,
    /// Part of it may have left in the caller's thread.
    begun: bool,
}

enum What {
    Host(Vec<OwnedTensor>),
    Device { specs: Vec<OwnedSpec>, payload: DevicePayload },
}

struct OwnedSpec {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
}

impl OwnedSpec {
    fn new(spec: &TensorSpec<'_>) -> Self {
        Self { name: spec.name.to_owned(), dtype: spec.dtype, shape: spec.shape.to_vec() }
    }

    fn spec(&self) -> TensorSpec<'_> {
        TensorSpec { name: &self.name, dtype: self.dtype, shape: &self.shape, strides: None }
    }
}

impl DevicePayload {
    const fn path(&self) -> DevicePath {
        match self {
            Self::Chunks(_) => DevicePath::Chunks,
            Self::Slots => DevicePath::Slots,
        }
    }
}

impl SendQueue {
    /// Puts a queue in front of a link.
    pub fn new(link: SendLink) -> Self {
        let state = State {
            jobs: VecDeque::new(),
            accepted: 0,
            left: 0,
            failed: None,
            closing: false,
            scratch: Vec::new(),
            link: None,
        };
        Self {
            name: link.name(),
            origin: Origin::here(),
            limits: link.limits(),
            cancel: link.canceller(),
            probe: link.probe(),
            page: link.shared_page(),
            shared: Arc::new(Shared {
                state: Mutex::new(State { link: Some(link), ..state }),
                changed: Condvar::new(),
            }),
            thread: None,
        }
    }

    /// A view of the link for other threads.
    pub fn probe(&self) -> Arc<Probe> {
        Arc::clone(&self.probe)
    }

    /// Cancels the link's calls from other threads: what is in the queue is then given up, and the link lost.
    pub fn canceller(&self) -> Cancel {
        self.cancel.clone()
    }

    /// What the transport has counted; `None` while a message is on its way in the queue's thread.
    pub fn counters(&self) -> Option<Counters> {
        self.origin.check(self.name).ok()?;
        self.shared.lock().link.as_ref().map(SendLink::counters)
    }

    /// Messages that have been accepted and have not left yet.
    pub fn pending(&self) -> u64 {
        if !self.origin.is_here() {
            return 0;
        }
        let state = self.shared.lock();
        state.accepted - state.left
    }

    /// Sends a message without waiting. `own` is called when the message cannot leave at once: it gives the same
    /// tensors in a form that the queue can hold on to until the handle is done.
    pub fn isend(
        &mut self,
        tensors: &[TensorRef<'_>],
        extra: Extra<'_>,
        own: impl FnOnce() -> Vec<OwnedTensor>,
    ) -> Result<SendHandle, SendError> {
        self.origin.check(self.name)?;
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let mut begun = false;
        if let (Some(link), true) = (&mut state.link, state.jobs.is_empty()) {
            link.begin(tensors, extra)?;
            match with_parts(tensors, |parts| link.advance(parts)) {
                Ok(true) => {
                    state.accepted += 1;
                    state.left += 1;
                    return Ok(self.handle(state.left - 1));
                }
                Ok(false) => begun = true,
                Err(error) => {
                    state.failed = Some(error.clone());
                    return Err(error);
                }
            }
        } else {
            // The caller's mistakes are found now, not when the thread comes to this message.
            let specs = tensors.iter().map(|t| (t.spec, Some(t.data.len() as u64)));
            encode(self.name, self.limits, specs, extra.bytes, &mut state.scratch)?;
        }
        start_thread(&mut self.thread, &self.shared, self.name, state)?;
        let job = Job { what: What::Host(own()), tag: extra.tag, extra: extra.bytes.to_vec(), begun };
        state.jobs.push_back(job);
        state.accepted += 1;
        let number = state.accepted - 1;
        drop(guard);
        self.shared.changed.notify_all();
        Ok(self.handle(number))
    }

    /// Sends a message whose payload lies in a GPU's memory. Its header leaves now if the link is free. `payload` is
    /// asked, once the message has passed its checks and as its header leaves, to start the payload on its way by `path`; an
    /// error of it (one line of cause) loses the link, for the receiver may know the header already.
    pub fn isend_device(
        &mut self,
        specs: &[TensorSpec<'_>],
        extra: Extra<'_>,
        path: DevicePath,
        payload: impl FnOnce() -> Result<DevicePayload, String>,
    ) -> Result<SendHandle, SendError> {
        self.origin.check(self.name)?;
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let free = state.link.is_some() && state.jobs.is_empty();
        let mut left = false;
        match &mut state.link {
            Some(link) if free => {
                link.begin_device(specs.iter().copied(), extra, path)?;
                match link.advance(&[]) {
                    Ok(done) => left = done,
                    Err(error) => {
                        state.failed = Some(error.clone());
                        return Err(error);
                    }
                }
            }
            _ => {
                encode(self.name, self.limits, specs.iter().map(|s| (*s, None)), extra.bytes, &mut state.scratch)?;
            }
        }
        let payload = match payload() {
            Ok(payload) if payload.path() == path => payload,
            other => {
                let cause =
                    other.err().unwrap_or_else(|| "the payload took another way than its header says".to_owned());
                let error = self.give_up(state, cause);
                drop(guard);
                self.shared.changed.notify_all();
                return Err(error);
            }
        };
        if left && matches!(payload, DevicePayload::Slots) {
            state.accepted += 1;
            state.left += 1;
            return Ok(self.handle(state.left - 1));
        }
        start_thread(&mut self.thread, &self.shared, self.name, state)?;
        let specs = specs.iter().map(OwnedSpec::new).collect();
        let what = What::Device { specs, payload };
        state.jobs.push_back(Job { what, tag: extra.tag, extra: extra.bytes.to_vec(), begun: free });
        state.accepted += 1;
        let number = state.accepted - 1;
        drop(guard);
        self.shared.changed.notify_all();
        Ok(self.handle(number))
    }

    /// Loses the link for a cause found here. While the thread is sending it holds the link, and finds out by `cancel`.
    fn give_up(&self, state: &mut State, cause: String) -> SendError {
        let error = match &mut state.link {
            Some(link) => link.abandon(TransportError { kind: LostKind::System, cause }),
            None => {
                self.cancel.cancel();
                let lost = Lost { link: self.name, sequence: state.accepted, kind: LostKind::System, cause };
                lost.into()
            }
        };
        state.failed.get_or_insert(error).clone()
    }

    /// The page for GPUs, where both ends are on one host.
    pub(crate) fn shared_page(&self) -> Option<SharedPage> {
        self.page.clone()
    }

    /// The link's name.
    pub const fn name(&self) -> LinkName {
        self.name
    }

    /// Sends a message in the caller's thread and returns when its buffers may be reused, behind what is in the queue.
    ///
    /// A wait that ends before the first byte has left gives [`SendError::Stopped`], and the link stays usable.
    pub fn send(&mut self, tensors: &[TensorRef<'_>], extra: Extra<'_>, wait: &Wait<'_>) -> Result<(), SendError> {
        self.origin.check(self.name)?;
        let mut state = self.shared.lock();
        // The thread puts the link back before it counts a message as gone; no other message comes in meanwhile.
        while state.left < state.accepted && state.failed.is_none() {
            let slice = match wait.next_slice(&self.cancel) {
                Ok(slice) => slice,
                Err(stop) => return Err(SendError::Stopped { link: self.name, sequence: state.accepted, stop }),
            };
            let waited = self.shared.changed.wait_timeout(state, slice);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let Some(mut link) = state.link.take() else { return Err(SendError::Closed { link: self.name }) };
        // Handles of earlier messages are looked at meanwhile, so the state is not held.
        drop(state);
        let sent = link.send(tensors, extra, wait);
        let mut state = self.shared.lock();
        state.link = Some(link);
        match &sent {
            Ok(()) => {
                state.accepted += 1;
                state.left += 1;
            }
            Err(SendError::Rejected(_) | SendError::Stopped { .. }) => {}
            Err(error @ (SendError::Closed { .. } | SendError::Lost(_))) => state.failed = Some(error.clone()),
        }
        sent
    }

    /// Waits until everything has left, then closes the link in order. Gives false when the wait ended before that:
    /// the queue is then still open.
    pub fn close(&mut self, wait: &Wait<'_>) -> Result<bool, SendError> {
        self.origin.check(self.name)?;
        let last = self.shared.lock().accepted;
        if last > 0 && !self.handle(last - 1).wait(wait)? {
            return Ok(false);
        }
        let mut state = self.shared.lock();
        if let Some(link) = &mut state.link {
            link.close();
        }
        state.failed.get_or_insert(SendError::Closed { link: self.name });
        Ok(true)
    }

    fn handle(&self, number: u64) -> SendHandle {
        SendHandle { shared: Arc::clone(&self.shared), name: self.name, origin: self.origin, number }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut state = self.lock();
            while state.jobs.is_empty() && !state.closing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return;
            }
            let (Some(mut link), Some(mut job)) = (state.link.take(), state.jobs.pop_front()) else { return };
            drop(state);
            let sent = job.send(&mut link);
            let mut state = self.lock();
            state.link = Some(link);
            match sent {
                Ok(()) => state.left += 1,
                Err(error) => {
                    state.failed.get_or_insert(error);
                    state.jobs.clear();
                }
            }
            // Dropped before anybody learns that it is done: its tensors may then be written again.
            drop(job);
            drop(state);
            self.changed.notify_all();
        }
    }
}

impl Job {
    fn send(&mut self, link: &mut SendLink) -> Result<(), SendError> {
        let extra = Extra { tag: self.tag, bytes: &self.extra };
        match &mut self.what {
            What::Host(tensors) => {
                let tensors: Vec<TensorRef<'_>> =
                    tensors.iter().map(|t| TensorRef { spec: t.spec(), data: (*t.data).as_ref() }).collect();
                if !self.begun {
                    link.begin(&tensors, extra)?;
                }
                with_parts(&tensors, |parts| link.finish(parts, &Wait::forever()))
            }
            What::Device { specs, payload } => {
                if !self.begun {
                    link.begin_device(specs.iter().map(OwnedSpec::spec), extra, payload.path())?;
                }
                link.finish(&[], &Wait::forever())?;
                match payload {
                    DevicePayload::Chunks(source) => send_chunks(link, &mut **source),
                    DevicePayload::Slots => Ok(()),
                }
            }
        }
    }
}

/// Sends what `source` has, as it has it, until the announced payload is whole.
fn send_chunks(link: &mut SendLink, source: &mut dyn Source) -> Result<(), SendError> {
    let mut backoff = Backoff::default();
    while link.owes_chunks() {
        match source.ready() {
            Ok(Some(bytes)) => {
                link.send_chunk(bytes, &Wait::forever())?;
                source.taken();
                backoff = Backoff::default();
            }
            Ok(None) => {
                // Nobody wakes us when the GPU is done, so this looks; the look is at a word in memory.
                link.check_cancelled()?;
                backoff.pause();
            }
            Err(cause) => return Err(link.abandon(TransportError { kind: LostKind::System, cause })),
        }
    }
    Ok(())
}

/// Starts the queue's thread if it does not run yet.
fn start_thread(
    thread: &mut Option<JoinHandle<()>>,
    shared: &Arc<Shared>,
    name: LinkName,
    state: &mut State,
) -> Result<(), SendError> {
    if thread.is_some() {
        return Ok(());
    }
    let shared = Arc::clone(shared);
    let builder = std::thread::Builder::new().name(format!("rl-link-{}", name.to));
    match (builder.spawn(move || shared.run()), &mut state.link) {
        (Ok(started), _) => *thread = Some(started),
        // The thread is started with the first message that needs it, so the link is here.
        (Err(error), Some(link)) => {
            let error = link.abandon(TransportError::system("starting the link's thread", error));
            state.failed = Some(error.clone());
            return Err(error);
        }
        (Err(_), None) => return Err(SendError::Closed { link: name }),
    }
    Ok(())
}

/// One accepted message.
pub struct SendHandle {
    shared: Arc<Shared>,
    name: LinkName,
    origin: Origin,
    number: u64,
}

impl SendHandle {
    /// Whether the message has left, so that its tensors may be written again.
    pub fn is_done(&self) -> Result<bool, SendError> {
        self.origin.check(self.name)?;
        let state = self.shared.lock();
        self.outcome(&state)
    }

    /// Waits until the message has left. Gives false when the wait ended before that; the message is still on
    /// its way.
    pub fn wait(&self, wait: &Wait<'_>) -> Result<bool, SendError> {
        self.origin.check(self.name)?;
        let mut state = self.shared.lock();
        loop {
            if self.outcome(&state)? {
                return Ok(true);
            }
            // The link's own cancellation reaches the thread, which then reports the loss.
            let Ok(slice) = wait.slice() else { return Ok(false) };
            let waited = self.shared.changed.wait_timeout(state, slice);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn outcome(&self, state: &State) -> Result<bool, SendError> {
        match &state.failed {
            _ if state.left > self.number => Ok(true),
            Some(error) => Err(error.clone()),
            None => Ok(false),
        }
    }
}

impl fmt::Debug for SendHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendHandle").field("number", &self.number).finish_non_exhaustive()
    }
}

impl fmt::Debug for SendQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendQueue").field("probe", &self.probe).finish_non_exhaustive()
    }
}

impl Drop for SendQueue {
    /// Gives up what has not left yet; [`SendQueue::close`] first to wait for it.
    fn drop(&mut self) {
        if !self.origin.is_here() {
            // Its thread is not here either, and may have held the lock.
            std::mem::forget(self.thread.take());
            return;
        }
        self.cancel.cancel();
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its own hook.
            let _ = thread.join();
        }
        let mut state = self.shared.lock();
        // Handles may keep the state alive; the messages are let go here.
        state.jobs.clear();
        let given_up = state.accepted - state.left;
        // Handles may keep the state alive, so the link is closed here and not by the last of them.
        if let Some(mut link) = state.link.take() {
            let error = if given_up > 0 && state.failed.is_none() {
                let cause = format!("the queue was dropped with {given_up} messages in it");
                link.abandon(TransportError { kind: LostKind::Abandoned, cause })
            } else {
                link.close();
                SendError::Closed { link: self.name }
            };
            state.failed.get_or_insert(error);
        }
    }
}
