//! Receives that do not wait for the payload: what a GPU's stream needs, which waits by itself.
//!
//! A device message's payload is handed to a [`Sink`] as it comes: what is there already in the caller's thread, the rest
//! by the queue's thread, which is started when first needed. All else is [`RecvLink`] as it is.

use crate::{
    backoff::Backoff,
    error::{Lost, LostKind, RecvError},
    fork::Origin,
    name::LinkName,
    probe::Probe,
    recv::{Announced, RecvLink},
    transport::{Counters, Level, SharedPage},
    wait::{Cancel, Wait},
};
use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

/// Where the payload of a device message goes, piece by piece, as it comes.
pub trait Sink: Send {
    /// Room for the next bytes: at least [`CHUNK`](crate::CHUNK) of it. `None`: not yet. Does not wait, and gives the same room until
    /// [`Sink::filled`]. An error (one line of cause) loses the link.
    fn room(&mut self) -> Result<Option<&mut [u8]>, String>;

    /// So many bytes are in the room given last. An error (one line of cause) loses the link.
    fn filled(&mut self, bytes: usize) -> Result<(), String>;

    /// The rest will never come. What waits for it must go on waiting, or it would read what never arrived.
    fn lost(&mut self, lost: &Lost);
}

/// The receiving end of a link, with a thread for payloads that nobody waits for.
pub struct RecvQueue {
    shared: Arc<Shared>,
    name: LinkName,
    origin: Origin,
    level: Level,
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
    /// `None` while the thread is receiving.
    link: Option<RecvLink>,
    job: Option<Box<dyn Sink>>,
    closing: bool,
}

impl RecvQueue {
    /// Puts a thread at a link's disposal.
    pub fn new(link: RecvLink) -> Self {
        Self {
            name: link.name(),
            origin: Origin::here(),
            level: link.level(),
            cancel: link.canceller(),
            probe: link.probe(),
            page: link.shared_page(),
            shared: Arc::new(Shared {
                state: Mutex::new(State { link: Some(link), job: None, closing: false }),
                changed: Condvar::new(),
            }),
            thread: None,
        }
    }

    /// The link's name.
    pub const fn name(&self) -> LinkName {
        self.name
    }

    /// The page for GPUs, where both ends are on one host.
    pub(crate) fn shared_page(&self) -> Option<SharedPage> {
        self.page.clone()
    }

    /// The transport.
    pub const fn level(&self) -> Level {
        self.level
    }

    /// A view of the link for other threads.
    pub fn probe(&self) -> Arc<Probe> {
        Arc::clone(&self.probe)
    }

    /// Cancels this end's calls from other threads.
    pub fn canceller(&self) -> Cancel {
        self.cancel.clone()
    }

    /// What the transport has counted; `None` while a payload is coming in.
    pub fn counters(&self) -> Option<Counters> {
        self.origin.check(self.name).ok()?;
        self.shared.lock().link.as_ref().map(RecvLink::counters)
    }

    /// Runs `run` with the link, once the payload before has come. Waits for that within `wait`.
    pub fn with<R>(
        &mut self,
        wait: &Wait<'_>,
        run: impl FnOnce(&mut RecvLink) -> Result<R, RecvError>,
    ) -> Result<R, RecvError> {
        self.origin.check(self.name)?;
        let mut state = self.shared.lock();
        loop {
            // While the thread receives, it has the link; before it has taken the link there is its job.
            if state.job.is_none()
                && let Some(link) = &mut state.link
            {
                return run(link);
            }
            let slice = match wait.next_slice(&self.cancel) {
                Ok(slice) => slice,
                Err(stop) => {
                    return Err(RecvError::Stopped { link: self.name, sequence: self.probe.messages(), stop });
                }
            };
            let waited = self.shared.changed.wait_timeout(state, slice);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// [`RecvLink::recv_header`].
    pub fn recv_header(&mut self, step: Option<u64>, wait: &Wait<'_>) -> Result<Announced, RecvError> {
        self.with(wait, |link| link.recv_header(step, wait))
    }

    /// [`RecvLink::recv_payload`].
    pub fn recv_payload(&mut self, parts: &mut [&mut [u8]], wait: &Wait<'_>) -> Result<(), RecvError> {
        self.with(wait, |link| link.recv_payload(parts, wait))
    }

    /// Hands the announced device message's chunks to `sink` as they come. Returns at once; the next
    /// header can be had when all of them have come.
    pub fn irecv_chunks(&mut self, mut sink: Box<dyn Sink>) -> Result<(), RecvError> {
        let done = self.with(&Wait::poll(), |link| move_chunks(link, &mut *sink, true))?;
        if done {
            return Ok(());
        }
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name(format!("rl-link-{}", self.name.from));
            match (builder.spawn(move || shared.run()), &mut state.link) {
                (Ok(thread), _) => self.thread = Some(thread),
                (Err(error), Some(link)) => {
                    return Err(link.abandon(LostKind::System, format!("starting the link's thread: {error}")));
                }
                (Err(_), None) => return Err(RecvError::Closed { link: self.name, messages: self.probe.messages() }),
            }
        }
        state.job = Some(sink);
        drop(guard);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The announced device message's payload comes through slots; nothing more of it comes over the link.
    pub fn taken_through_slots(&mut self) -> Result<(), RecvError> {
        self.with(&Wait::poll(), RecvLink::taken_through_slots)
    }

    /// Closes this end: the sender's next call fails. Dropping does the same.
    pub fn close(&mut self) {
        if !self.origin.is_here() {
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
        if let Some(link) = &mut self.shared.lock().link {
            link.close();
        }
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
            while state.job.is_none() && !state.closing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let (Some(mut link), Some(mut sink)) = (state.link.take(), state.job.take()) else { return };
            drop(state);
            // What goes wrong stays with the link, and the next call returns it.
            let _ = move_chunks(&mut link, &mut *sink, false);
            drop(sink);
            self.lock().link = Some(link);
            self.changed.notify_all();
        }
    }
}

/// Moves chunks to the sink; with `poll` only those that are there. True: that was the last.
fn move_chunks(link: &mut RecvLink, sink: &mut dyn Sink, poll: bool) -> Result<bool, RecvError> {
    let wait = if poll { Wait::poll() } else { Wait::forever() };
    let mut backoff = Backoff::default();
    let mut advance = || loop {
        let room = match sink.room() {
            Ok(Some(room)) => room,
            Ok(None) if poll => return Ok(false),
            Ok(None) => {
                link.check_cancelled()?;
                backoff.pause();
                continue;
            }
            Err(cause) => return Err(link.abandon(LostKind::System, cause)),
        };
        backoff = Backoff::default();
        match link.recv_chunk(room, &wait) {
            Ok(Some(bytes)) => sink.filled(bytes).map_err(|cause| link.abandon(LostKind::Corrupt, cause))?,
            Ok(None) => return Ok(true),
            Err(RecvError::Stopped { .. }) if poll => return Ok(false),
            // Cancelled in the middle of a message.
            Err(RecvError::Stopped { stop, .. }) => {
                return Err(link.abandon(LostKind::Abandoned, format!("receiving a payload {stop}")));
            }
            Err(error) => return Err(error),
        }
    };
    let outcome = advance();
    if let Err(RecvError::Lost(lost)) = &outcome {
        sink.lost(lost);
    }
    outcome
}

impl fmt::Debug for RecvQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvQueue").field("probe", &self.probe).finish_non_exhaustive()
    }
}

impl Drop for RecvQueue {
    fn drop(&mut self) {
        self.close();
    }
}
