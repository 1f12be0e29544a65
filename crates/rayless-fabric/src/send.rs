//! The sending end of a link.

use crate::{
    config::LinkConfig,
    error::{Lost, LostKind, Rejected, RejectedKind, SendError, TransportError},
    fork::{OfOneProcess, not_here},
    header::{DevicePath, Header, Kind},
    name::LinkName,
    probe::{Phase, Probe},
    scatter::Scatter,
    spin::Spin,
    tensor::{Extra, PeerLimits, SentSchemas, Slot, TensorRef, TensorSpec, encode},
    transport::{Counters, Cursor, Level, Outbound, SharedPage},
    wait::{Cancel, Stop, Wait},
};
use std::{fmt, sync::Arc, time::Duration};

/// Bytes of the largest chunk of a device message's payload.
pub const CHUNK: usize = 1 << 20;

/// Tensors whose slices are listed on the stack; messages of more allocate one list.
const INLINE_PARTS: usize = 16;

/// What an orderly close gives a receiver whose window is full.
const GOODBYE: Duration = Duration::from_secs(5);

/// The sending end of a link. Messages leave in the order of the calls.
pub struct SendLink {
    name: LinkName,
    transport: OfOneProcess<Box<dyn Outbound>>,
    limits: PeerLimits,
    verify: bool,
    spin: Spin,
    cancel: Cancel,
    probe: Arc<Probe>,
    schemas: SentSchemas,
    /// The description of the message in progress.
    schema: Vec<u8>,
    /// Header and description of the message in progress.
    head: Vec<u8>,
    cursor: Cursor,
    sequence: u64,
    state: State,
}

enum State {
    Idle,
    /// A message has begun: `begin` was called and `advance` has not returned true.
    Begun {
        payload: u64,
        slot: Slot,
        kind: Kind,
    },
    /// Header sent by `send_header`; the payload is owed.
    Owing {
        payload: u64,
    },
    /// Header of a device message sent; its chunks are owed from number `chunk` on.
    Chunks {
        payload: u64,
        left: u64,
        chunk: u64,
    },
    Closed,
    Lost(Lost),
}

impl SendLink {
    pub(crate) fn new(name: LinkName, transport: Box<dyn Outbound>, limits: PeerLimits, config: &LinkConfig) -> Self {
        Self {
            name,
            limits,
            verify: config.verify,
            spin: Spin::new(config.spin),
            cancel: Cancel::new(transport.waker()),
            probe: Arc::new(Probe::new(name, transport.level())),
            transport: OfOneProcess::new(transport.descriptors(), transport),
            schemas: SentSchemas::default(),
            schema: Vec::new(),
            head: Vec::new(),
            cursor: Cursor::default(),
            sequence: 0,
            state: State::Idle,
        }
    }

    /// The link's name.
    pub const fn name(&self) -> LinkName {
        self.name
    }

    /// The transport.
    pub fn level(&self) -> Level {
        self.transport.level()
    }

    /// The RDMA device in use.
    pub fn device(&self) -> Option<&str> {
        self.transport.device()
    }

    /// How the transport works where it has several ways: `cma` or `ring`, for shared memory.
    pub fn mode(&self) -> Option<&str> {
        self.transport.mode()
    }

    /// A view for other threads.
    pub fn probe(&self) -> Arc<Probe> {
        Arc::clone(&self.probe)
    }

    /// Cancels this end's calls from other threads.
    pub fn canceller(&self) -> Cancel {
        self.cancel.clone()
    }

    /// What the transport has counted.
    pub fn counters(&self) -> Counters {
        self.transport.counters()
    }

    /// Sends a message and returns when its buffers may be reused.
    ///
    /// A wait that ends before the first byte has left gives [`SendError::Stopped`], and the link stays usable; in the
    /// middle of a message it gives [`SendError::Lost`].
    pub fn send(&mut self, tensors: &[TensorRef<'_>], extra: Extra<'_>, wait: &Wait<'_>) -> Result<(), SendError> {
        self.begin(tensors, extra)?;
        with_parts(tensors, |parts| self.finish(parts, wait))
    }

    /// Sends a message's header now; its payload is owed through [`SendLink::send_payload`] before anything else can
    /// be sent. For payloads that are still being computed: the receiver makes room meanwhile.
    pub fn send_header<'a>(
        &mut self,
        specs: impl ExactSizeIterator<Item = TensorSpec<'a>>,
        extra: Extra<'_>,
        wait: &Wait<'_>,
    ) -> Result<(), SendError> {
        let payload = self.begin_specs(Kind::Data, specs.map(|spec| (spec, None)), extra)?;
        self.pump(&Scatter::EMPTY, wait)?;
        if self.body_len(payload) == 0 {
            self.complete(payload);
        } else {
            self.state = State::Owing { payload };
            self.probe.enter(Phase::HeaderSent);
        }
        Ok(())
    }

    /// Sends the payload of the header sent before: the tensors' bytes, in its order. (A message without a
    /// byte of payload is whole with its header, and `parts` empty of bytes is then accepted.)
    pub fn send_payload(&mut self, parts: &[&[u8]], wait: &Wait<'_>) -> Result<(), SendError> {
        let given: u64 = parts.iter().map(|part| part.len() as u64).sum();
        match &self.state {
            State::Owing { payload } if *payload == given => {}
            State::Idle if given == 0 => return Ok(()),
            State::Owing { payload } => {
                let reason = format!("the header promised {payload} bytes of payload, but {given} were given");
                return Err(self.rejected(RejectedKind::Mismatch, reason));
            }
            _ => {
                self.usable()?;
                let reason = format!("a payload of {given} bytes without its header");
                return Err(self.rejected(RejectedKind::OutOfTurn, reason));
            }
        }
        self.finish(parts, wait)
    }

    /// Encodes the header of a message whose payload lies in a GPU's memory; `advance` with no parts sends it.
    /// Over [`DevicePath::Slots`] the message is then whole for this link; over [`DevicePath::Chunks`] the payload is owed
    /// through [`SendLink::send_chunk`] before anything else can be sent.
    pub(crate) fn begin_device<'a>(
        &mut self,
        specs: impl ExactSizeIterator<Item = TensorSpec<'a>>,
        extra: Extra<'_>,
        path: DevicePath,
    ) -> Result<u64, SendError> {
        self.begin_specs(Kind::Device(path), specs.map(|spec| (spec, None)), extra)
    }

    /// Sends the next bytes, at most [`CHUNK`] of them, of the device message announced before. A wait that ends
    /// before their first byte has left gives [`SendError::Stopped`]; the call can then be made again.
    pub(crate) fn send_chunk(&mut self, bytes: &[u8], wait: &Wait<'_>) -> Result<(), SendError> {
        let State::Chunks { payload, left, chunk } = self.state else {
            self.usable()?;
            return Err(self.rejected(RejectedKind::OutOfTurn, "a chunk without its header".to_owned()));
        };
        let len = bytes.len() as u64;
        if len > left || bytes.len() > CHUNK {
            let reason = format!("a chunk of {len} bytes where {left} are owed and {CHUNK} is the limit");
            return Err(self.rejected(RejectedKind::Mismatch, reason));
        }
        let header = Header {
            kind: Kind::Chunk,
            sequence: self.sequence,
            tag: chunk,
            payload: len,
            slot: 0,
            schema: 0,
            checksum: self.verify,
        };
        self.head.clear();
        self.head.extend_from_slice(&header.encode());
        self.cursor = Cursor::default();
        let checksum = self.checksum(&[bytes]);
        let parts = [bytes];
        let body = Scatter::with_tail(&parts, checksum.as_ref().map_or(&[], |c| c.as_slice()));
        self.pump(&body, wait)?;
        if left == len {
            self.complete(payload);
        } else {
            self.state = State::Chunks { payload, left: left - len, chunk: chunk + 1 };
        }
        Ok(())
    }

    /// Whether chunks of a device message are still owed.
    pub(crate) const fn owes_chunks(&self) -> bool {
        matches!(self.state, State::Chunks { .. })
    }

    /// An error once this end's calls were cancelled: a message is under way, so the link is lost.
    pub(crate) fn check_cancelled(&mut self) -> Result<(), SendError> {
        if !self.cancel.is_set() {
            return Ok(());
        }
        let cause = "sending was cancelled before the payload was ready".to_owned();
        Err(self.lose(TransportError { kind: LostKind::Abandoned, cause }))
    }

    /// Closes this end after a whole message: the receiver reads what was sent and then gets `Closed`. With a
    /// message in progress the receiver gets `Lost` instead. Dropping does the same. Blocks for up to 5 s while the
    /// receiver's window is full, and over RDMA until what was sent is in its memory; not after [`Cancel::cancel`].
    pub fn close(&mut self) {
        let whole = match self.state {
            State::Closed => return,
            _ if !self.transport.is_here() => false,
            State::Idle => self.say_goodbye(),
            State::Begun { .. } | State::Owing { .. } | State::Chunks { .. } | State::Lost(_) => false,
        };
        self.transport.shut(|transport| transport.close(whole));
        if !matches!(self.state, State::Lost(_)) {
            self.state = State::Closed;
            self.probe.enter(Phase::Closed);
        }
    }

    /// The page for GPUs, unless payloads have to be looked at on their way.
    pub(crate) fn shared_page(&self) -> Option<SharedPage> {
        if self.verify { None } else { self.transport.shared_page() }
    }

    pub(crate) const fn limits(&self) -> PeerLimits {
        self.limits
    }

    /// Gives the link up.
    pub(crate) fn abandon(&mut self, error: TransportError) -> SendError {
        self.lose(error)
    }

    /// Encodes a message; nothing is sent yet.
    pub(crate) fn begin(&mut self, tensors: &[TensorRef<'_>], extra: Extra<'_>) -> Result<u64, SendError> {
        self.begin_specs(Kind::Data, tensors.iter().map(|t| (t.spec, Some(t.data.len() as u64))), extra)
    }

    /// Moves what can be moved without waiting of the message that `begin` encoded. True: it has left.
    pub(crate) fn advance(&mut self, parts: &[&[u8]]) -> Result<bool, SendError> {
        let State::Begun { payload, kind, .. } = self.state else { return Ok(true) };
        if kind == Kind::Data && self.transport.lends(self.body_len(payload)) {
            // The caller may have its tensors elsewhere by the next call, and what is lent must stay where it is.
            return self.write(&Scatter::EMPTY).map(|_| false);
        }
        let checksum = self.checksum_of(kind, parts);
        let body = Scatter::with_tail(parts, checksum.as_ref().map_or(&[], |c| c.as_slice()));
        let done = self.write(&body)?;
        if done {
            self.left(kind, payload);
        }
        Ok(done)
    }

    /// Waits until the message in progress has left.
    pub(crate) fn finish(&mut self, parts: &[&[u8]], wait: &Wait<'_>) -> Result<(), SendError> {
        let (payload, kind) = match self.state {
            State::Begun { payload, kind, .. } => (payload, kind),
            State::Owing { payload } => (payload, Kind::Data),
            State::Idle | State::Chunks { .. } | State::Closed | State::Lost(_) => return self.usable(),
        };
        let checksum = self.checksum_of(kind, parts);
        let body = Scatter::with_tail(parts, checksum.as_ref().map_or(&[], |c| c.as_slice()));
        self.pump(&body, wait)?;
        self.left(kind, payload);
        Ok(())
    }

    fn begin_specs<'a>(
        &mut self,
        kind: Kind,
        specs: impl ExactSizeIterator<Item = (TensorSpec<'a>, Option<u64>)>,
        extra: Extra<'_>,
    ) -> Result<u64, SendError> {
        self.usable()?;
        if let State::Owing { payload } | State::Begun { payload, .. } | State::Chunks { payload, .. } = self.state {
            let reason = format!("the message before still owes its payload of {payload} bytes");
            return Err(self.rejected(RejectedKind::OutOfTurn, reason));
        }
        let payload = encode(self.name, self.limits, specs, extra.bytes, &mut self.schema)?;
        let slot = self.schemas.place(&self.schema);
        let header = Header {
            kind,
            sequence: self.sequence,
            tag: extra.tag,
            payload,
            slot: slot.number,
            schema: if slot.is_new { self.schema.len() as u32 } else { 0 },
            checksum: self.verify && kind == Kind::Data,
        };
        self.head.clear();
        self.head.extend_from_slice(&header.encode());
        if slot.is_new {
            self.head.extend_from_slice(&self.schema);
        }
        self.cursor = Cursor::default();
        self.state = State::Begun { payload, slot, kind };
        self.probe.enter(Phase::Sending);
        Ok(payload)
    }

    fn pump(&mut self, body: &Scatter<'_>, wait: &Wait<'_>) -> Result<(), SendError> {
        if self.write(body)? {
            return Ok(());
        }
        let guarded = OrLose(self);
        let link = &mut *guarded.0;
        let mut spin_until = if wait.is_poll() { None } else { link.spin.begin() };
        loop {
            if !link.spin.again(&mut spin_until) {
                match wait.next_slice(&link.cancel) {
                    Ok(slice) => link.transport.wait(slice).map_err(|e| link.lose(e))?,
                    Err(stop) => return Err(link.stopped(stop, body)),
                }
            }
            if link.write(body)? {
                link.spin.came();
                return Ok(());
            }
        }
    }

    fn write(&mut self, body: &Scatter<'_>) -> Result<bool, SendError> {
        if !self.transport.is_here() {
            return Err(self.lose(not_here()));
        }
        self.transport.write(&self.head, body, &mut self.cursor).map_err(|e| self.lose(e))
    }

    fn stopped(&mut self, stop: Stop, body: &Scatter<'_>) -> SendError {
        match self.state {
            State::Begun { slot, .. } if self.cursor.is_at_start() => {
                self.schemas.forget(slot);
                self.state = State::Idle;
                self.probe.enter(Phase::Idle);
                SendError::Stopped { link: self.name, sequence: self.sequence, stop }
            }
            // The header has left and all of the payload is still here: the call can be made again.
            State::Owing { .. } if self.cursor.body == 0 && !self.cursor.lent => {
                SendError::Stopped { link: self.name, sequence: self.sequence, stop }
            }
            State::Chunks { .. } if self.cursor.is_at_start() => {
                SendError::Stopped { link: self.name, sequence: self.sequence, stop }
            }
            _ => {
                let cause = format!(
                    "sending {stop} after {} of {} bytes",
                    self.cursor.head as u64 + self.cursor.body,
                    self.head.len() as u64 + body.len()
                );
                self.lose(TransportError { kind: LostKind::Abandoned, cause })
            }
        }
    }

    /// What `begin` encoded has left.
    fn left(&mut self, kind: Kind, payload: u64) {
        if kind == Kind::Device(DevicePath::Chunks) && payload > 0 {
            self.state = State::Chunks { payload, left: payload, chunk: 0 };
            self.probe.enter(Phase::HeaderSent);
        } else {
            self.complete(payload);
        }
    }

    fn complete(&mut self, payload: u64) {
        self.sequence += 1;
        self.state = State::Idle;
        self.probe.moved(payload);
        self.probe.enter(Phase::Idle);
    }

    const fn body_len(&self, payload: u64) -> u64 {
        if self.verify { payload + 4 } else { payload }
    }

    /// The checksum behind a body; the header of a device message has no body.
    fn checksum_of(&self, kind: Kind, parts: &[&[u8]]) -> Option<[u8; 4]> {
        if kind == Kind::Data { self.checksum(parts) } else { None }
    }

    fn checksum(&self, parts: &[&[u8]]) -> Option<[u8; 4]> {
        self.verify.then(|| {
            let mut crc = crc32fast::Hasher::new();
            parts.iter().for_each(|part| crc.update(part));
            crc.finalize().to_le_bytes()
        })
    }

    fn usable(&self) -> Result<(), SendError> {
        match &self.state {
            State::Closed => Err(SendError::Closed { link: self.name }),
            State::Lost(lost) => Err(lost.clone().into()),
            State::Idle | State::Begun { .. } | State::Owing { .. } | State::Chunks { .. } => Ok(()),
        }
    }

    fn rejected(&self, kind: RejectedKind, reason: String) -> SendError {
        Rejected { link: self.name, kind, reason }.into()
    }

    fn lose(&mut self, error: TransportError) -> SendError {
        let lost = Lost { link: self.name, sequence: self.sequence, kind: error.kind, cause: error.cause };
        self.transport.shut(|transport| transport.close(false));
        self.state = State::Lost(lost.clone());
        self.probe.lose(&lost.cause);
        lost.into()
    }

    /// The last header. A receiver that is full to the brim gets a little time to make room for it; if it does not,
    /// it learns of the end by the end of the stream.
    fn say_goodbye(&mut self) -> bool {
        let header = Header {
            kind: Kind::Goodbye,
            sequence: self.sequence,
            tag: 0,
            payload: 0,
            slot: 0,
            schema: 0,
            checksum: false,
        };
        let (head, wait, mut cursor) = (header.encode(), Wait::at_most(GOODBYE), Cursor::default());
        loop {
            match self.transport.write(&head, &Scatter::EMPTY, &mut cursor) {
                Ok(true) => return true,
                Err(_) => return false,
                Ok(false) => {}
            }
            let Ok(slice) = wait.next_slice(&self.cancel) else { return false };
            if self.transport.wait(slice).is_err() {
                return false;
            }
        }
    }
}

/// The caller's check runs in the middle of a message. Should it panic, what is lent has to be taken back before the
/// tensors go.
struct OrLose<'a>(&'a mut SendLink);

impl Drop for OrLose<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cause = "sending panicked in the middle of a message".to_owned();
            self.0.lose(TransportError { kind: LostKind::Abandoned, cause });
        }
    }
}

/// Lists the tensors' slices, on the stack when they are few.
pub(crate) fn with_parts<R>(tensors: &[TensorRef<'_>], run: impl FnOnce(&[&[u8]]) -> R) -> R {
    let mut inline: [&[u8]; INLINE_PARTS] = [&[]; INLINE_PARTS];
    if let Some(parts) = inline.get_mut(..tensors.len()) {
        parts.iter_mut().zip(tensors).for_each(|(part, tensor)| *part = tensor.data);
        return run(parts);
    }
    run(&tensors.iter().map(|tensor| tensor.data).collect::<Vec<_>>())
}

impl Drop for SendLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for SendLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendLink").field("name", &self.name).field("probe", &self.probe).finish_non_exhaustive()
    }
}
