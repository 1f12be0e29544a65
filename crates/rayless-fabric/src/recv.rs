//! The receiving end of a link.

use crate::{
    config::LinkConfig,
    error::{Lost, LostKind, RecvError, Rejected, RejectedKind, TransportError},
    fork::{OfOneProcess, not_here},
    header::{DevicePath, HEADER, Header, Kind},
    name::LinkName,
    probe::{Phase, Probe},
    scatter::ScatterMut,
    send::CHUNK,
    spin::Spin,
    tensor::{MAX_SCHEMA, ReceivedSchemas, Schema},
    transport::{Counters, Inbound, Level, SharedPage},
    wait::{Cancel, Stop, Wait},
};
use std::{fmt, sync::Arc};

/// What a message announces about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announced {
    /// Messages received before this one.
    pub sequence: u64,
    /// The sender's step.
    pub tag: u64,
    /// The tensors' forms and the sender's extra bytes.
    pub schema: Arc<Schema>,
    /// How the payload travels when it was in a GPU's memory at the sender; `None`: it was in host memory.
    pub device: Option<DevicePath>,
}

/// The receiving end of a link.
pub struct RecvLink {
    name: LinkName,
    transport: OfOneProcess<Box<dyn Inbound>>,
    max_message: u64,
    verify: bool,
    spin: Spin,
    cancel: Cancel,
    probe: Arc<Probe>,
    schemas: ReceivedSchemas,
    /// Header, and then description, of the message that is coming in.
    head: [u8; HEADER],
    schema: Vec<u8>,
    filled: usize,
    sequence: u64,
    state: State,
}

enum State {
    /// Reading a header.
    Header,
    /// Reading the description behind it.
    Schema(Header),
    /// The payload is due.
    Payload(Header, Arc<Schema>),
    /// A device message's payload is due, all but what came in chunks so far.
    Device {
        header: Header,
        schema: Arc<Schema>,
        path: DevicePath,
        chunks: Chunks,
    },
    Closed,
    Lost(Lost),
}

/// How far the chunks of a device message have come.
#[derive(Clone, Copy)]
struct Chunks {
    /// Bytes that have not come, and the number of the next chunk.
    left: u64,
    number: u64,
    /// The header of the chunk in progress, and what of its body has come.
    current: Option<(Header, u64)>,
    trailer: [u8; 4],
}

impl Chunks {
    const fn new(left: u64) -> Self {
        Self { left, number: 0, current: None, trailer: [0; 4] }
    }
}

impl RecvLink {
    pub(crate) fn new(name: LinkName, transport: Box<dyn Inbound>, config: &LinkConfig) -> Self {
        Self {
            name,
            max_message: config.max_message,
            verify: config.verify,
            spin: Spin::new(config.spin),
            cancel: Cancel::new(transport.waker()),
            probe: Arc::new(Probe::new(name, transport.level())),
            transport: OfOneProcess::new(transport.descriptors(), transport),
            schemas: ReceivedSchemas::default(),
            head: [0; HEADER],
            schema: Vec::new(),
            filled: 0,
            sequence: 0,
            state: State::Header,
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

    /// How the transport works where it has several ways: `cma`, or `ring` and perhaps why, for shared memory.
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

    /// Waits for the next message's announcement; its payload stays where it is until [`RecvLink::recv_payload`].
    /// Asked again before that, it returns the same announcement, so nothing is lost with a call that was stopped.
    ///
    /// `step`: the step that the caller is at. A message of another one means that the two ranks are at
    /// different points of their program: the link is lost, and no tensor is handed out.
    pub fn recv_header(&mut self, step: Option<u64>, wait: &Wait<'_>) -> Result<Announced, RecvError> {
        if matches!(self.state, State::Header | State::Schema(_)) {
            self.probe.enter(Phase::AwaitingHeader);
            self.pump(wait, Self::advance_header)?;
        }
        let (header, schema, device) = match &self.state {
            State::Payload(header, schema) => (*header, Arc::clone(schema), None),
            State::Device { header, schema, path, .. } => (*header, Arc::clone(schema), Some(*path)),
            State::Lost(lost) => return Err(lost.clone().into()),
            State::Header | State::Schema(_) | State::Closed => {
                return Err(RecvError::Closed { link: self.name, messages: self.sequence });
            }
        };
        if let Some(step) = step.filter(|step| *step != header.tag) {
            let cause = format!(
                "rank {} is at step {step}, but rank {} sent step {}",
                self.name.to, self.name.from, header.tag
            );
            return Err(self.lose(TransportError { kind: LostKind::Crossed, cause }));
        }
        Ok(Announced { sequence: header.sequence, tag: header.tag, schema, device })
    }

    /// Reads the announced payload into `parts`, one per tensor and of its size.
    ///
    /// A wait that ends before the first byte was taken gives [`RecvError::Stopped`], and the payload is still there; in
    /// the middle of a payload it gives [`RecvError::Lost`].
    pub fn recv_payload(&mut self, parts: &mut [&mut [u8]], wait: &Wait<'_>) -> Result<(), RecvError> {
        let header = self.check_parts(parts)?;
        self.probe.enter(Phase::AwaitingPayload);
        if matches!(self.state, State::Device { .. }) {
            return self.recv_chunks(parts, wait);
        }
        let mut trailer = [0u8; 4];
        let mut filled = 0u64;
        let tail: &mut [u8] = if header.checksum { &mut trailer } else { &mut [] };
        let mut body = ScatterMut::with_tail(parts, tail);
        let len = body.len();
        let stopped =
            self.pump(wait, |link| link.transport.read_body(&mut body, &mut filled).map_err(|e| link.lose(e)));
        match stopped {
            Ok(()) => {}
            Err(RecvError::Stopped { stop, .. }) if filled > 0 => {
                let cause = format!("receiving {stop} after {filled} of {len} bytes");
                return Err(self.lose(TransportError { kind: LostKind::Abandoned, cause }));
            }
            Err(error) => return Err(error),
        }
        if header.checksum {
            let mut crc = crc32fast::Hasher::new();
            parts.iter().for_each(|part| crc.update(part));
            let (sent, found) = (u32::from_le_bytes(trailer), crc.finalize());
            if sent != found {
                let cause = format!("the payload's checksum is {found:08x}, but {sent:08x} was sent");
                return Err(self.lose(TransportError { kind: LostKind::Corrupt, cause }));
            }
        }
        self.complete(header.payload);
        Ok(())
    }

    /// Reads the next chunk of the announced device message to the front of `into`, which has room for
    /// [`CHUNK`](crate::CHUNK) bytes or all that are left. `Ok(None)`: there are no more. A wait that ends gives
    /// [`RecvError::Stopped`], also in the middle of the chunk; call again with the same buffer.
    pub(crate) fn recv_chunk(&mut self, into: &mut [u8], wait: &Wait<'_>) -> Result<Option<usize>, RecvError> {
        let State::Device { header: message, path: DevicePath::Chunks, chunks, .. } = &self.state else {
            return match &self.state {
                // The last chunk ended the message.
                State::Header | State::Schema(_) | State::Payload(..) | State::Device { .. } => Ok(None),
                State::Closed => Err(RecvError::Closed { link: self.name, messages: self.sequence }),
                State::Lost(lost) => Err(lost.clone().into()),
            };
        };
        let (payload, left, number) = (message.payload, chunks.left, chunks.number);
        if left == 0 {
            self.complete(payload);
            return Ok(None);
        }
        let header = match chunks.current {
            Some((header, _)) => header,
            None => {
                self.pump(wait, |link| {
                    link.transport.read_head(&mut link.head, &mut link.filled).map_err(|e| link.lose(e))
                })?;
                self.filled = 0;
                let header = self.check_chunk(left, number).map_err(|e| self.lose(e))?;
                self.chunks(|chunks| chunks.current = Some((header, 0)));
                header
            }
        };
        let len = header.payload as usize;
        let Some(into) = into.get_mut(..len) else {
            let reason = format!("a chunk of {len} bytes, but its buffer has {}", into.len());
            return Err(Rejected { link: self.name, kind: RejectedKind::Mismatch, reason }.into());
        };
        self.read_chunk(header, into, wait)?;
        if left == header.payload {
            self.complete(payload);
        } else {
            self.chunks(|chunks| *chunks = Chunks { number: number + 1, ..Chunks::new(left - header.payload) });
        }
        Ok(Some(len))
    }

    /// An error once this end's calls were cancelled while a payload was coming in: the link is lost.
    pub(crate) fn check_cancelled(&mut self) -> Result<(), RecvError> {
        if !self.cancel.is_set() {
            return Ok(());
        }
        let cause = "receiving was cancelled in the middle of a payload".to_owned();
        Err(self.lose(TransportError { kind: LostKind::Abandoned, cause }))
    }

    /// The announced device message's payload came through slots: it is whole for this link.
    pub(crate) fn taken_through_slots(&mut self) -> Result<(), RecvError> {
        match &self.state {
            State::Device { header, path: DevicePath::Slots, .. } => {
                let payload = header.payload;
                self.complete(payload);
                Ok(())
            }
            State::Closed => Err(RecvError::Closed { link: self.name, messages: self.sequence }),
            State::Lost(lost) => Err(lost.clone().into()),
            _ => {
                let reason = "no message through slots was announced".to_owned();
                Err(Rejected { link: self.name, kind: RejectedKind::OutOfTurn, reason }.into())
            }
        }
    }

    /// The body of a chunk, and its checksum.
    fn read_chunk(&mut self, header: Header, into: &mut [u8], wait: &Wait<'_>) -> Result<(), RecvError> {
        let State::Device { chunks: Chunks { current: Some((_, mut filled)), mut trailer, .. }, .. } = self.state
        else {
            return Ok(());
        };
        let tail: &mut [u8] = if header.checksum { &mut trailer } else { &mut [] };
        let mut parts = [&mut *into];
        let mut body = ScatterMut::with_tail(&mut parts, tail);
        let read = self.pump(wait, |link| link.transport.read_body(&mut body, &mut filled).map_err(|e| link.lose(e)));
        // What has come stays counted, so that a call that was stopped can be made again.
        self.chunks(|chunks| {
            chunks.current = Some((header, filled));
            chunks.trailer = trailer;
        });
        read?;
        let (sent, found) = (u32::from_le_bytes(trailer), if header.checksum { crc32fast::hash(into) } else { 0 });
        if header.checksum && sent != found {
            let cause = format!("a chunk's checksum is {found:08x}, but {sent:08x} was sent");
            return Err(self.lose(TransportError { kind: LostKind::Corrupt, cause }));
        }
        Ok(())
    }

    /// A device message's chunks into host memory.
    fn recv_chunks(&mut self, parts: &mut [&mut [u8]], wait: &Wait<'_>) -> Result<(), RecvError> {
        let mut chunk = vec![0u8; CHUNK];
        let mut at = 0u64;
        loop {
            match self.recv_chunk(&mut chunk, wait) {
                Ok(None) => return Ok(()),
                Ok(Some(len)) => {
                    let mut from = &chunk[..len];
                    ScatterMut::new(parts).walk(at, len as u64, |slice| {
                        let (now, later) = from.split_at(slice.len());
                        slice.copy_from_slice(now);
                        from = later;
                        true
                    });
                    at += len as u64;
                }
                Err(RecvError::Stopped { stop, .. }) if at > 0 || self.is_inside_a_chunk() => {
                    let cause = format!("receiving {stop} after {at} bytes and part of a chunk");
                    return Err(self.lose(TransportError { kind: LostKind::Abandoned, cause }));
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn is_inside_a_chunk(&self) -> bool {
        let State::Device { chunks, .. } = &self.state else { return false };
        chunks.current.is_some_and(|(_, filled)| filled > 0)
    }

    fn chunks(&mut self, change: impl FnOnce(&mut Chunks)) {
        if let State::Device { chunks, .. } = &mut self.state {
            change(chunks);
        }
    }

    fn check_chunk(&self, left: u64, number: u64) -> Result<Header, TransportError> {
        let corrupt = |cause: &str| Err(TransportError { kind: LostKind::Corrupt, cause: cause.to_owned() });
        let Some(header) = Header::decode(&self.head) else {
            return corrupt("the bytes where a chunk's header belongs are none");
        };
        let fits = header.kind == Kind::Chunk && header.sequence == self.sequence && header.tag == number;
        if !fits {
            let cause = format!("{header:?} came where chunk {number} of message {} belongs", self.sequence);
            return Err(TransportError { kind: LostKind::Crossed, cause });
        }
        if header.payload == 0 || header.payload > left.min(CHUNK as u64) || header.schema != 0 {
            return corrupt("a chunk's size makes no sense");
        }
        if header.checksum != self.verify {
            return corrupt("one end verifies checksums and the other does not");
        }
        Ok(header)
    }

    /// Receives a whole message into memory of its own: for tools and tests. The hot path brings its own buffers.
    pub fn recv(&mut self, step: Option<u64>, wait: &Wait<'_>) -> Result<(Announced, Vec<Vec<u8>>), RecvError> {
        let announced = self.recv_header(step, wait)?;
        let mut tensors: Vec<Vec<u8>> = announced.schema.tensors.iter().map(|t| vec![0; t.bytes as usize]).collect();
        let mut parts: Vec<&mut [u8]> = tensors.iter_mut().map(Vec::as_mut_slice).collect();
        self.recv_payload(&mut parts, wait)?;
        Ok((announced, tensors))
    }

    /// Closes this end: the sender's next call fails. Dropping does the same.
    pub fn close(&mut self) {
        if !matches!(self.state, State::Closed | State::Lost(_)) {
            self.transport.shut(|transport| transport.close("the receiver closed its end"));
            self.state = State::Closed;
            self.probe.enter(Phase::Closed);
        }
    }

    /// The page for GPUs, unless payloads have to be looked at on their way.
    pub(crate) fn shared_page(&self) -> Option<SharedPage> {
        if self.verify { None } else { self.transport.shared_page() }
    }

    /// Gives the link up.
    pub(crate) fn abandon(&mut self, kind: LostKind, cause: String) -> RecvError {
        self.lose(TransportError { kind, cause })
    }

    fn check_parts(&self, parts: &[&mut [u8]]) -> Result<Header, RecvError> {
        let rejected = |kind, reason| Err(Rejected { link: self.name, kind, reason }.into());
        let (header, schema) = match &self.state {
            State::Payload(header, schema) | State::Device { header, schema, path: DevicePath::Chunks, .. } => {
                (*header, schema)
            }
            State::Device { path: DevicePath::Slots, .. } => {
                let reason = "the payload is in GPU memory that both processes share; receive it with CUDA".to_owned();
                return rejected(RejectedKind::OutOfTurn, reason);
            }
            State::Closed => return Err(RecvError::Closed { link: self.name, messages: self.sequence }),
            State::Lost(lost) => return Err(lost.clone().into()),
            State::Header | State::Schema(_) => {
                return rejected(RejectedKind::OutOfTurn, "a payload was asked for before its header".to_owned());
            }
        };
        if parts.len() != schema.tensors.len() {
            let reason =
                format!("the message has {} tensors, but {} buffers were given", schema.tensors.len(), parts.len());
            return rejected(RejectedKind::Mismatch, reason);
        }
        for (part, tensor) in parts.iter().zip(&schema.tensors) {
            if part.len() as u64 != tensor.bytes {
                let reason =
                    format!("tensor `{}` has {} bytes, but its buffer has {}", tensor.name, tensor.bytes, part.len());
                return rejected(RejectedKind::Mismatch, reason);
            }
        }
        Ok(header)
    }

    /// Runs `advance` until it says true, with a bounded spin and then sleeps in between.
    fn pump(
        &mut self,
        wait: &Wait<'_>,
        mut advance: impl FnMut(&mut Self) -> Result<bool, RecvError>,
    ) -> Result<(), RecvError> {
        if !self.transport.is_here() {
            return Err(self.lose(not_here()));
        }
        if advance(self)? {
            return Ok(());
        }
        let mut spin_until = if wait.is_poll() { None } else { self.spin.begin() };
        loop {
            if !self.spin.again(&mut spin_until) {
                match wait.next_slice(&self.cancel) {
                    Ok(slice) => self.transport.wait(slice).map_err(|e| self.lose(e))?,
                    Err(stop) => return Err(self.stopped(stop)),
                }
            }
            if advance(self)? {
                self.spin.came();
                return Ok(());
            }
        }
    }

    /// Reads on in header and description. True: they are whole, or the sender said goodbye.
    fn advance_header(&mut self) -> Result<bool, RecvError> {
        if matches!(self.state, State::Header) {
            let whole = self.transport.read_head(&mut self.head, &mut self.filled).map_err(|e| self.lose(e))?;
            if !whole {
                return Ok(false);
            }
            self.filled = 0;
            let header = self.check_header().map_err(|e| self.lose(e))?;
            if header.kind == Kind::Goodbye {
                self.transport.shut(|transport| transport.close(""));
                self.state = State::Closed;
                self.probe.enter(Phase::Closed);
                return Ok(true);
            }
            if header.schema == 0 {
                let Some(schema) = self.schemas.get(header.slot) else {
                    let cause = format!("the header refers to description {}, which was never sent", header.slot);
                    return Err(self.lose(TransportError { kind: LostKind::Corrupt, cause }));
                };
                return self.announce(header, schema);
            }
            self.schema.resize(header.schema as usize, 0);
            self.state = State::Schema(header);
        }
        let State::Schema(header) = self.state else { return Ok(true) };
        if !self.transport.read_head(&mut self.schema, &mut self.filled).map_err(|e| self.lose(e))? {
            return Ok(false);
        }
        self.filled = 0;
        let schema =
            Schema::decode(&self.schema).map(Arc::new).filter(|s| self.schemas.keep(header.slot, Arc::clone(s)));
        let Some(schema) = schema else {
            return Err(self.lose(TransportError {
                kind: LostKind::Corrupt,
                cause: format!("the description of message {} cannot be read", header.sequence),
            }));
        };
        self.announce(header, schema)
    }

    fn check_header(&self) -> Result<Header, TransportError> {
        let corrupt = |cause| Err(TransportError { kind: LostKind::Corrupt, cause });
        let Some(header) = Header::decode(&self.head) else {
            return corrupt("the bytes where a header belongs are none".to_owned());
        };
        if header.sequence != self.sequence {
            let cause = format!("message {} came where message {} belongs", header.sequence, self.sequence);
            return Err(TransportError { kind: LostKind::Crossed, cause });
        }
        if header.kind == Kind::Chunk {
            return corrupt("a chunk without its message's header".to_owned());
        }
        if header.payload > self.max_message {
            return corrupt(format!("a payload of {} bytes is over the limit of {}", header.payload, self.max_message));
        }
        if header.schema as usize > MAX_SCHEMA {
            return corrupt(format!("a description of {} bytes is over the limit of {MAX_SCHEMA}", header.schema));
        }
        if header.kind == Kind::Data && header.checksum != self.verify {
            return corrupt("one end verifies checksums and the other does not".to_owned());
        }
        Ok(header)
    }

    fn announce(&mut self, header: Header, schema: Arc<Schema>) -> Result<bool, RecvError> {
        if schema.payload_bytes() != header.payload {
            let cause =
                format!("a payload of {} bytes for tensors of {} bytes", header.payload, schema.payload_bytes());
            return Err(self.lose(TransportError { kind: LostKind::Corrupt, cause }));
        }
        self.state = match header.kind {
            Kind::Device(path) => State::Device { header, schema, path, chunks: Chunks::new(header.payload) },
            _ => State::Payload(header, schema),
        };
        self.probe.enter(Phase::HeaderReceived);
        Ok(true)
    }

    fn complete(&mut self, payload: u64) {
        self.sequence += 1;
        self.state = State::Header;
        self.probe.moved(payload);
        self.probe.enter(Phase::Idle);
    }

    fn stopped(&mut self, stop: Stop) -> RecvError {
        RecvError::Stopped { link: self.name, sequence: self.sequence, stop }
    }

    fn lose(&mut self, error: TransportError) -> RecvError {
        let lost = Lost { link: self.name, sequence: self.sequence, kind: error.kind, cause: error.cause };
        self.transport.shut(|transport| transport.close(&lost.to_string()));
        self.state = State::Lost(lost.clone());
        self.probe.lose(&lost.cause);
        lost.into()
    }
}

impl Drop for RecvLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for RecvLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvLink").field("name", &self.name).field("probe", &self.probe).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canned::Canned;
    use rayless_proto::ids::GroupId;
    use std::time::Duration;

    const HEADER_OF_FOUR: Header =
        Header { kind: Kind::Data, sequence: 0, tag: 0, payload: 4, slot: 0, schema: 15, checksum: false };

    fn schema() -> Vec<u8> {
        use crate::{
            dtype::{DType, DTypeSet},
            tensor::{PeerLimits, TensorSpec, encode},
        };
        let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &[4], strides: None };
        let limits = PeerLimits { dtypes: DTypeSet::ALL, max_message: 4 };
        let mut out = Vec::new();
        encode(link(&[]).name, limits, [(spec, None)].into_iter(), b"", &mut out).unwrap();
        out
    }

    fn link(bytes: &[u8]) -> RecvLink {
        let name = LinkName { group: GroupId([1; 8]), from: 0, to: 1, channel: 0 };
        let config = LinkConfig { max_message: 100, spin: Duration::ZERO, ..LinkConfig::default() };
        RecvLink::new(name, Box::new(Canned::new(bytes.to_vec())), &config)
    }

    /// What a receiver makes of a good message and then these bytes.
    fn after_a_good_one(bytes: &[u8]) -> Result<(Announced, Vec<Vec<u8>>), RecvError> {
        let mut all = [HEADER_OF_FOUR.encode().as_slice(), &schema(), b"good"].concat();
        all.extend_from_slice(bytes);
        let mut link = link(&all);
        let (announced, tensors) = link.recv(Some(0), &Wait::forever()).unwrap();
        assert_eq!((announced.sequence, tensors), (0, vec![b"good".to_vec()]));
        link.recv(None, &Wait::forever())
    }

    #[track_caller]
    fn lost(outcome: Result<(Announced, Vec<Vec<u8>>), RecvError>, kind: LostKind, cause: &str) {
        match outcome {
            Err(RecvError::Lost(lost)) => assert_eq!((lost.kind, lost.cause.as_str()), (kind, cause)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_known_description_need_not_come_again() {
        let second = Header { sequence: 1, schema: 0, ..HEADER_OF_FOUR };
        let (announced, tensors) = after_a_good_one(&[&second.encode(), b"more".as_slice()].concat()).unwrap();
        assert_eq!((announced.sequence, tensors[0].as_slice()), (1, b"more".as_slice()));
    }

    #[test]
    fn a_wrong_sequence_number_is_never_a_tensor() {
        for sequence in [0, 2, u64::MAX] {
            let wrong = Header { sequence, schema: 0, ..HEADER_OF_FOUR };
            let cause = format!("message {sequence} came where message 1 belongs");
            lost(after_a_good_one(&[&wrong.encode(), b"more".as_slice()].concat()), LostKind::Crossed, &cause);
        }
    }

    #[test]
    fn headers_that_contradict_what_is_known_are_corrupt() {
        let next = Header { sequence: 1, schema: 0, ..HEADER_OF_FOUR };
        for (header, cause) in [
            (Header { slot: 1, ..next }, "the header refers to description 1, which was never sent"),
            (Header { slot: 9999, ..next }, "the header refers to description 9999, which was never sent"),
            (Header { payload: 5, ..next }, "a payload of 5 bytes for tensors of 4 bytes"),
            (Header { payload: 101, ..next }, "a payload of 101 bytes is over the limit of 100"),
            (Header { schema: 1 << 20, ..next }, "a description of 1048576 bytes is over the limit of 65536"),
            (Header { checksum: true, ..next }, "one end verifies checksums and the other does not"),
        ] {
            lost(after_a_good_one(&header.encode()), LostKind::Corrupt, cause);
        }
        lost(after_a_good_one(&[7; HEADER]), LostKind::Corrupt, "the bytes where a header belongs are none");
        let described = Header { schema: 3, ..next };
        let bytes = [described.encode().as_slice(), &[0xff; 3]].concat();
        lost(after_a_good_one(&bytes), LostKind::Corrupt, "the description of message 1 cannot be read");
    }

    #[test]
    fn a_stream_that_ends_inside_a_message_is_lost_wherever_it_ends() {
        let second = [HEADER_OF_FOUR.encode().as_slice(), &schema(), b"more"].concat();
        let second = [&Header { sequence: 1, ..HEADER_OF_FOUR }.encode(), &second[HEADER..]].concat();
        for cut in 0..second.len() {
            lost(after_a_good_one(&second[..cut]), LostKind::PeerGone, "no more bytes");
        }
        assert!(after_a_good_one(&second).is_ok());
    }

    #[test]
    fn a_changed_byte_of_payload_is_found_by_the_checksum() {
        let header = Header { checksum: true, ..HEADER_OF_FOUR };
        for byte in 0..4 {
            let mut bytes = [header.encode().as_slice(), &schema(), b"good"].concat();
            bytes.extend_from_slice(&crc32fast::hash(b"good").to_le_bytes());
            let at = bytes.len() - 8 + byte;
            bytes[at] ^= 1;
            let mut link = link(&bytes);
            link.verify = true;
            match link.recv(None, &Wait::forever()) {
                Err(RecvError::Lost(lost)) => assert_eq!(lost.kind, LostKind::Corrupt),
                other => panic!("{other:?}"),
            }
        }
    }
}
