//! Messages whose payload becomes ready, and is taken, piece by piece: what a GPU's hop is made of, with threads in the place
//! of the GPUs. (With a GPU: `cuda.rs`.)
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests too")]

use rayless_fabric::{
    Acceptor, CHUNK, DType, DevicePath, DevicePayload, Extra, LinkConfig, LinkName, Lost, LostKind, OwnedTensor,
    RecvError, RecvQueue, SendError, SendQueue, Sink, Source, TensorRef, TensorSpec, Ticket, Wait, greet_tcp,
    greet_unix, shm, tcp,
};
use rayless_proto::ids::GroupId;
use std::{
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    sync::{
        Arc, Condvar, Mutex,
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    time::Duration,
};

const TICKET: Ticket = Ticket([9; 32]);
const NAME: LinkName = LinkName { group: GroupId([2; 8]), from: 3, to: 4, channel: 5 };
const LONG: Duration = Duration::from_secs(120);

fn long() -> Wait<'static> {
    Wait::at_most(LONG)
}

fn acceptor(config: &LinkConfig) -> Acceptor {
    let mut acceptor = Acceptor::default();
    acceptor.expect(NAME, TICKET, config.clone());
    acceptor
}

fn over_tcp(config: &LinkConfig) -> (SendQueue, RecvQueue) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let streams: Vec<_> = (0..3).map(|_| TcpStream::connect(listener.local_addr().unwrap()).unwrap()).collect();
    std::thread::scope(|scope| {
        let tx = scope.spawn(|| tcp::connect(streams, NAME, TICKET, config).unwrap());
        let mut acceptor = acceptor(config);
        loop {
            if let Some(rx) = acceptor.admit(greet_tcp(listener.accept().unwrap().0, LONG).unwrap()).unwrap() {
                return (SendQueue::new(tx.join().unwrap()), RecvQueue::new(rx));
            }
        }
    })
}

fn over_shm(config: &LinkConfig) -> (SendQueue, RecvQueue) {
    let (one, other) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let tx = scope.spawn(|| shm::connect(one, NAME, TICKET, config).unwrap());
        let rx = acceptor(config).admit(greet_unix(other, LONG).unwrap()).unwrap().unwrap();
        (SendQueue::new(tx.join().unwrap()), RecvQueue::new(rx))
    })
}

/// Both transports, with and without checksums.
fn everywhere(run: impl Fn(SendQueue, RecvQueue)) {
    for verify in [false, true] {
        let config = LinkConfig { verify, ..LinkConfig::default() };
        let (tx, rx) = over_shm(&config);
        run(tx, rx);
        let (tx, rx) = over_tcp(&config);
        run(tx, rx);
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
}

fn spec(shape: &[u64; 1]) -> TensorSpec<'_> {
    TensorSpec { name: "hidden_states", dtype: DType::U8, shape, strides: None }
}

/// Has a piece once the test has let it.
struct Gated {
    bytes: Vec<u8>,
    at: usize,
    let_go: Receiver<()>,
    piece: bool,
    fails: bool,
}

impl Gated {
    fn new(bytes: Vec<u8>) -> (Self, Sender<()>) {
        let (go, let_go) = channel();
        (Self { bytes, at: 0, let_go, piece: false, fails: false }, go)
    }
}

impl Source for Gated {
    fn ready(&mut self) -> Result<Option<&[u8]>, String> {
        if !self.piece {
            match self.let_go.try_recv() {
                Ok(()) => self.piece = true,
                Err(TryRecvError::Empty) => return Ok(None),
                // Nobody holds it back any more.
                Err(TryRecvError::Disconnected) if self.fails => return Err("the device fell off the bus".to_owned()),
                Err(TryRecvError::Disconnected) => self.piece = true,
            }
        }
        let end = self.bytes.len().min(self.at + CHUNK);
        Ok(Some(&self.bytes[self.at..end]))
    }

    fn taken(&mut self) {
        self.piece = false;
        self.at = self.bytes.len().min(self.at + CHUNK);
    }
}

/// What a sink has been given, for the test to wait for.
#[derive(Default)]
struct Got {
    state: Mutex<(Vec<u8>, Option<Lost>)>,
    changed: Condvar,
}

impl Got {
    fn wait_until(&self, done: impl Fn(&(Vec<u8>, Option<Lost>)) -> bool) -> (Vec<u8>, Option<Lost>) {
        let state = self.state.lock().unwrap();
        let (state, timeout) = self.changed.wait_timeout_while(state, LONG, |state| !done(state)).unwrap();
        assert!(!timeout.timed_out());
        state.clone()
    }
}

struct Collect {
    room: Vec<u8>,
    got: Arc<Got>,
}

impl Collect {
    fn new() -> (Box<Self>, Arc<Got>) {
        let got = Arc::<Got>::default();
        (Box::new(Self { room: vec![0; CHUNK], got: Arc::clone(&got) }), got)
    }
}

impl Sink for Collect {
    fn room(&mut self) -> Result<Option<&mut [u8]>, String> {
        Ok(Some(&mut self.room))
    }

    fn filled(&mut self, bytes: usize) -> Result<(), String> {
        self.got.state.lock().unwrap().0.extend_from_slice(&self.room[..bytes]);
        self.got.changed.notify_all();
        Ok(())
    }

    fn lost(&mut self, lost: &Lost) {
        self.got.state.lock().unwrap().1 = Some(lost.clone());
        self.got.changed.notify_all();
    }
}

fn isend(tx: &mut SendQueue, tag: u64, source: Gated) -> rayless_fabric::SendHandle {
    let shape = [source.bytes.len() as u64];
    let payload = || Ok(DevicePayload::Chunks(Box::new(source)));
    tx.isend_device(&[spec(&shape)], Extra { tag, bytes: b"x" }, DevicePath::Chunks, payload).unwrap()
}

#[test]
fn a_header_arrives_before_its_payload_is_ready_and_the_payload_follows_as_it_becomes_so() {
    everywhere(|mut tx, mut rx| {
        let data = pattern(2 * CHUNK + 77, 1);
        let (source, go) = Gated::new(data.clone());
        let handle = isend(&mut tx, 7, source);
        let announced = rx.recv_header(Some(7), &long()).unwrap();
        assert_eq!(announced.device, Some(DevicePath::Chunks));
        assert_eq!(
            (announced.schema.payload_bytes(), announced.schema.extra.as_slice()),
            (data.len() as u64, &b"x"[..])
        );
        let (sink, got) = Collect::new();
        rx.irecv_chunks(sink).unwrap();
        assert!(!handle.is_done().unwrap());
        for end in [CHUNK, 2 * CHUNK, data.len()] {
            assert!(got.state.lock().unwrap().0.len() < end);
            go.send(()).unwrap();
            assert!(got.wait_until(|(bytes, _)| bytes.len() >= end).0 == data[..end]);
        }
        assert!(handle.wait(&long()).unwrap());
        assert_eq!((rx.probe().bytes(), tx.probe().messages()), (data.len() as u64, 1));
    });
}

#[test]
fn host_and_device_messages_keep_the_order_in_which_they_were_sent() {
    everywhere(|mut tx, mut rx| {
        let shape = [5u64];
        let host = [TensorRef { spec: spec(&shape), data: b"host!" }];
        let own = || {
            vec![OwnedTensor {
                name: "hidden_states".to_owned(),
                dtype: DType::U8,
                shape: vec![5],
                data: Box::new(b"host!"),
            }]
        };
        let (first, go_first) = Gated::new(pattern(CHUNK + 1, 2));
        isend(&mut tx, 0, first);
        tx.isend(&host, Extra { tag: 1, bytes: &[] }, own).unwrap();
        let (second, go_second) = Gated::new(pattern(100, 3));
        isend(&mut tx, 2, second);
        let slots = || Ok(DevicePayload::Slots);
        tx.isend_device(&[spec(&shape)], Extra { tag: 3, bytes: &[] }, DevicePath::Slots, slots).unwrap();
        let last = tx.isend(&host, Extra { tag: 4, bytes: &[] }, own).unwrap();
        // The last may become ready first; it still waits its turn.
        drop(go_second);
        drop(go_first);

        rx.recv_header(Some(0), &long()).unwrap();
        let (sink, got) = Collect::new();
        rx.irecv_chunks(sink).unwrap();
        let mut bytes = [0; 5];
        let announced = rx.recv_header(Some(1), &long()).unwrap();
        assert_eq!(announced.device, None);
        rx.recv_payload(&mut [&mut bytes], &long()).unwrap();
        assert_eq!(&bytes, b"host!");
        assert!(got.wait_until(|(bytes, _)| bytes.len() > CHUNK).0 == pattern(CHUNK + 1, 2));
        // A device message may also be taken into host memory.
        rx.recv_header(Some(2), &long()).unwrap();
        let mut bytes = vec![0; 100];
        rx.recv_payload(&mut [&mut bytes], &long()).unwrap();
        assert!(bytes == pattern(100, 3));
        assert_eq!(rx.recv_header(Some(3), &long()).unwrap().device, Some(DevicePath::Slots));
        let refused = rx.recv_payload(&mut [&mut [0; 5]], &long());
        assert!(matches!(refused, Err(RecvError::Rejected(_))), "{refused:?}");
        rx.taken_through_slots().unwrap();
        rx.recv_header(Some(4), &long()).unwrap();
        rx.recv_payload(&mut [&mut [0; 5]], &long()).unwrap();
        assert!(last.wait(&long()).unwrap());
        assert!(tx.close(&long()).unwrap());
        assert!(matches!(rx.recv_header(None, &long()), Err(RecvError::Closed { messages: 5, .. })));
    });
}

#[test]
fn a_payload_in_many_pieces_is_taken_into_host_tensors_whole() {
    everywhere(|mut tx, mut rx| {
        let data = pattern(5 * CHUNK + 3, 4);
        let shapes = [[2 * CHUNK as u64 + 1], [0], [3 * CHUNK as u64 + 2]];
        let specs: Vec<_> = shapes.iter().map(spec).collect();
        let (source, _) = Gated::new(data.clone());
        let payload = || Ok(DevicePayload::Chunks(Box::new(source)));
        tx.isend_device(&specs, Extra::default(), DevicePath::Chunks, payload).unwrap();
        rx.recv_header(None, &long()).unwrap();
        let (mut one, mut other) = (vec![0; 2 * CHUNK + 1], vec![0; 3 * CHUNK + 2]);
        rx.recv_payload(&mut [&mut one, &mut [], &mut other], &long()).unwrap();
        assert!(data == [one, other].concat());
    });
}

#[test]
fn a_message_without_a_byte_of_payload_is_whole_with_its_header() {
    everywhere(|mut tx, mut rx| {
        for tag in 0..3 {
            let (source, _hold) = Gated::new(Vec::new());
            assert!(isend(&mut tx, tag, source).wait(&long()).unwrap());
            rx.recv_header(Some(tag), &long()).unwrap();
            let (sink, got) = Collect::new();
            rx.irecv_chunks(sink).unwrap();
            assert!(got.state.lock().unwrap().0.is_empty());
        }
    });
}

#[test]
fn a_payload_that_cannot_be_computed_loses_the_link_at_both_ends_with_the_cause() {
    everywhere(|mut tx, mut rx| {
        let (mut source, go) = Gated::new(pattern(3 * CHUNK, 5));
        source.fails = true;
        let handle = isend(&mut tx, 1, source);
        rx.recv_header(None, &long()).unwrap();
        let (sink, got) = Collect::new();
        rx.irecv_chunks(sink).unwrap();
        go.send(()).unwrap();
        got.wait_until(|(bytes, _)| bytes.len() == CHUNK);
        drop(go);
        let Err(SendError::Lost(lost)) = handle.wait(&long()) else { panic!("the handle was done") };
        assert_eq!((lost.kind, lost.cause.as_str()), (LostKind::System, "the device fell off the bus"));
        let (bytes, lost) = got.wait_until(|(_, lost)| lost.is_some());
        assert_eq!((bytes.len(), lost.unwrap().kind), (CHUNK, LostKind::PeerGone));
        assert!(matches!(rx.recv_header(None, &long()), Err(RecvError::Lost(_))));
        assert!(matches!(tx.isend(&[], Extra::default(), Vec::new), Err(SendError::Lost(_))));
    });
}

#[test]
fn mistakes_cost_nothing_but_the_call() {
    everywhere(|mut tx, mut rx| {
        let strided = TensorSpec { strides: Some(&[2]), ..spec(&[9]) };
        let never = || panic!("a rejected message asked for its payload");
        let rejected = tx.isend_device(&[strided], Extra::default(), DevicePath::Chunks, never);
        assert!(matches!(rejected, Err(SendError::Rejected(_))));
        assert!(matches!(rx.taken_through_slots(), Err(RecvError::Rejected(_))));
        let (source, _) = Gated::new(pattern(10, 6));
        isend(&mut tx, 0, source);
        rx.recv_header(None, &long()).unwrap();
        let wrong = rx.recv_payload(&mut [&mut [0; 9]], &long());
        assert!(matches!(wrong, Err(RecvError::Rejected(_))));
        assert!(matches!(rx.taken_through_slots(), Err(RecvError::Rejected(_))));
        rx.recv_payload(&mut [&mut [0; 10]], &long()).unwrap();
    });
}

#[test]
fn closing_either_end_in_the_middle_ends_both() {
    everywhere(|mut tx, mut rx| {
        let (source, _hold) = Gated::new(pattern(10, 7));
        isend(&mut tx, 0, source);
        rx.recv_header(None, &long()).unwrap();
        let (sink, got) = Collect::new();
        rx.irecv_chunks(sink).unwrap();
        drop(tx);
        assert!(got.wait_until(|(_, lost)| lost.is_some()).0.is_empty());
        rx.close();
    });
    everywhere(|mut tx, mut rx| {
        let (source, go) = Gated::new(pattern(40 * CHUNK, 8));
        let handle = isend(&mut tx, 0, source);
        rx.recv_header(None, &long()).unwrap();
        let (sink, _) = Collect::new();
        rx.irecv_chunks(sink).unwrap();
        rx.close();
        drop(go);
        assert!(matches!(handle.wait(&long()), Err(SendError::Lost(_))));
    });
}
