//! Sends that do not wait: what `isend` needs.
//!
//! A message that the transport takes at once leaves in the caller's thread, which costs nothing more than
//! `SendLink::send`. Only what does not fit is handed, with everything behind it, to the queue's thread, which is
//! started when first needed and sleeps while there is nothing to do.

use crate::{
    dtype::DType,
    error::{LostKind, SendError, TransportError},
    name::LinkName,
    probe::Probe,
    send::{SendLink, with_parts},
    tensor::{Extra, PeerLimits, TensorRef, TensorSpec, encode},
    transport::Counters,
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

/// The sending end of a link, with a queue in front.
pub struct SendQueue {
    shared: Arc<Shared>,
    name: LinkName,
    limits: PeerLimits,
    cancel: Cancel,
    probe: Arc<Probe>,
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
    tensors: Vec<OwnedTensor>,
    tag: u64,
    extra: Vec<u8>,
    /// Part of it may have left in the caller's thread.
    begun: bool,
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
            limits: link.limits(),
            cancel: link.canceller(),
            probe: link.probe(),
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
        self.shared.lock().link.as_ref().map(SendLink::counters)
    }

    /// Messages that have been accepted and have not left yet.
    pub fn pending(&self) -> u64 {
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
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let name = format!("rl-link-{}", self.name.to);
            match (std::thread::Builder::new().name(name).spawn(move || shared.run()), &mut state.link) {
                (Ok(thread), _) => self.thread = Some(thread),
                // The thread is started with the first message that needs it, so the link is here.
                (Err(error), Some(link)) => {
                    let error = link.abandon(TransportError::system("starting the link's thread", error));
                    state.failed = Some(error.clone());
                    return Err(error);
                }
                (Err(_), None) => return Err(SendError::Closed { link: self.name }),
            }
        }
        state.jobs.push_back(Job { tensors: own(), tag: extra.tag, extra: extra.bytes.to_vec(), begun });
        state.accepted += 1;
        let number = state.accepted - 1;
        drop(guard);
        self.shared.changed.notify_all();
        Ok(self.handle(number))
    }

    /// Sends a message in the caller's thread and returns when its buffers may be reused, behind what is in the queue.
    ///
    /// A wait that ends before the first byte has left gives [`SendError::Stopped`], and the link stays usable.
    pub fn send(&mut self, tensors: &[TensorRef<'_>], extra: Extra<'_>, wait: &Wait<'_>) -> Result<(), SendError> {
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
        SendHandle { shared: Arc::clone(&self.shared), number }
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
            let (Some(mut link), Some(job)) = (state.link.take(), state.jobs.pop_front()) else { return };
            drop(state);
            let sent = job.send(&mut link);
            let mut state = self.lock();
            state.link = Some(link);
            match sent {
                Ok(()) => state.left += 1,
                Err(error) => {
                    state.failed = Some(error);
                    state.jobs.clear();
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }
}

impl Job {
    fn send(&self, link: &mut SendLink) -> Result<(), SendError> {
        let tensors: Vec<TensorRef<'_>> =
            self.tensors.iter().map(|t| TensorRef { spec: t.spec(), data: (*t.data).as_ref() }).collect();
        if !self.begun {
            link.begin(&tensors, Extra { tag: self.tag, bytes: &self.extra })?;
        }
        with_parts(&tensors, |parts| link.finish(parts, &Wait::forever()))
    }
}

/// One accepted message.
pub struct SendHandle {
    shared: Arc<Shared>,
    number: u64,
}

impl SendHandle {
    /// Whether the message has left, so that its tensors may be written again.
    pub fn is_done(&self) -> Result<bool, SendError> {
        let state = self.shared.lock();
        self.outcome(&state)
    }

    /// Waits until the message has left. Gives false when the wait ended before that; the message is still on
    /// its way.
    pub fn wait(&self, wait: &Wait<'_>) -> Result<bool, SendError> {
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
        self.cancel.cancel();
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by its own hook.
            let _ = thread.join();
        }
        let mut state = self.shared.lock();
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
