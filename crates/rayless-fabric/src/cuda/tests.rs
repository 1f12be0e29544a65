//! Tests on a real GPU. Without one each prints that it was skipped, and passes.
//!
//! A stream is held back by a *gate*: a word that it waits for and the test sets. That stands for kernels that take their time.

use super::{
    CudaReceiver, CudaReport, CudaSender, Device, DeviceTensor, LoadError, Options, Stream,
    device::{DeviceMemory, Event, Operation, OwnStream, Pinned},
    device_count, load, put_aside,
};
use crate::{
    Acceptor, DType, DevicePath, Extra, LinkConfig, LinkName, LostKind, RecvError, RecvQueue, RejectedKind, SendError,
    SendQueue, TensorSpec, Ticket, Wait, greet_tcp, greet_unix, shm, tcp,
};
use rayless_proto::ids::GroupId;
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

const TICKET: Ticket = Ticket([7; 32]);
const NAME: LinkName = LinkName { group: GroupId([4; 8]), from: 0, to: 1, channel: 0 };
const LONG: Duration = Duration::from_secs(60);
const CHILD: &str = "RAYLESS_CUDA_TEST_CHILD";
const STAND_IN: &str = "RAYLESS_CUDA_TEST_STAND_IN";

fn long() -> Wait<'static> {
    Wait::at_most(LONG)
}

/// The device, or nothing, said so. One test at a time: they count what is put aside.
fn gpu(ordinal: i32) -> Option<(Arc<Device>, std::sync::MutexGuard<'static, ()>)> {
    static ONE: Mutex<()> = Mutex::new(());
    match device_count() {
        Ok(count) if count > ordinal => {
            let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
            Some((Device::open(ordinal).unwrap(), guard))
        }
        Ok(count) => {
            println!("skipped: needs CUDA device {ordinal}; this process sees {count}");
            None
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn is_all(bytes: &[u8], byte: u8) -> bool {
    bytes == vec![byte; bytes.len()]
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what} did not come");
        std::thread::yield_now();
    }
}

fn acceptor() -> Acceptor {
    let mut acceptor = Acceptor::default();
    acceptor.expect(NAME, TICKET, LinkConfig::default());
    acceptor
}

fn over_shm() -> (SendQueue, RecvQueue) {
    let (one, other) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let tx = scope.spawn(|| shm::connect(one, NAME, TICKET, &LinkConfig::default()).unwrap());
        let rx = acceptor().admit(greet_unix(other, LONG).unwrap()).unwrap().unwrap();
        (SendQueue::new(tx.join().unwrap()), RecvQueue::new(rx))
    })
}

fn over_tcp() -> (SendQueue, RecvQueue) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let streams: Vec<_> = (0..2).map(|_| TcpStream::connect(listener.local_addr().unwrap()).unwrap()).collect();
    std::thread::scope(|scope| {
        let tx = scope.spawn(|| tcp::connect(streams, NAME, TICKET, &LinkConfig::default()).unwrap());
        let mut acceptor = acceptor();
        loop {
            if let Some(rx) = acceptor.admit(greet_tcp(listener.accept().unwrap().0, LONG).unwrap()).unwrap() {
                return (SendQueue::new(tx.join().unwrap()), RecvQueue::new(rx));
            }
        }
    })
}

/// A stream of the test's, with memory and a gate.
struct Side {
    device: Arc<Device>,
    own: OwnStream,
    gate: Pinned,
    gates: u32,
    memory: Arc<DeviceMemory>,
    /// Not freed while a gate may be shut: that would wait for it.
    host: Pinned,
    bytes: usize,
}

impl Side {
    fn new(device: &Arc<Device>, bytes: usize) -> Self {
        Self {
            device: Arc::clone(device),
            own: OwnStream::new(device).unwrap(),
            gate: Pinned::allocate(device, 4096).unwrap(),
            gates: 0,
            memory: Arc::new(DeviceMemory::new(device, bytes.max(1)).unwrap()),
            host: Pinned::allocate(device, bytes.max(1)).unwrap(),
            bytes,
        }
    }

    fn stream(&self) -> Stream {
        self.own.stream
    }

    fn run(&self, operations: &[Operation]) {
        // SAFETY: the stream and all memory of a test live until `settle` at its end.
        unsafe { self.device.enqueue(self.stream(), operations).unwrap() };
    }

    /// Holds the stream back from here on, until `open`.
    fn shut(&mut self) {
        self.gates += 1;
        self.run(&[Operation::WaitFor { word: self.gate.address, value: self.gates }]);
    }

    fn open(&self) {
        // SAFETY: the word lies in the gate's page.
        let word = unsafe { self.gate.host.cast::<std::sync::atomic::AtomicU32>().as_ref() };
        word.store(self.gates, Ordering::Release);
    }

    fn fill(&self, byte: u8) {
        self.run(&[Operation::Fill { at: self.memory.address, byte, bytes: self.bytes }]);
    }

    fn settle(&self) {
        let event = Event::after(&self.device, self.stream()).unwrap();
        until("the stream's end", || event.is_done().unwrap());
    }

    /// What is in memory once the stream has come here.
    fn look(&self) -> Vec<u8> {
        self.run(&[Operation::Copy { to: self.host.address, from: self.memory.address, bytes: self.bytes }]);
        self.settle();
        // SAFETY: so many bytes were allocated, and the copy is done.
        unsafe { std::slice::from_raw_parts(self.host.host.as_ptr(), self.bytes) }.to_vec()
    }

    /// Puts bytes there.
    fn put(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.bytes);
        // SAFETY: so many bytes were allocated.
        unsafe { self.host.host.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        self.run(&[Operation::Copy { to: self.memory.address, from: self.host.address, bytes: bytes.len() }]);
        self.settle();
    }

    fn keep(&self) -> Box<dyn Send> {
        Box::new(Arc::clone(&self.memory))
    }
}

/// Both ends of a link with their GPUs.
struct Hop {
    tx: SendQueue,
    rx: RecvQueue,
    sender: CudaSender,
    receiver: CudaReceiver,
    from: Side,
    to: Side,
    sent: u64,
}

impl Hop {
    fn new((tx, rx): (SendQueue, RecvQueue), options: Options, devices: [&Arc<Device>; 2], bytes: usize) -> Self {
        let (sender, receiver) = (CudaSender::new(options), CudaReceiver::new(options));
        Self { tx, rx, sender, receiver, from: Side::new(devices[0], bytes), to: Side::new(devices[1], bytes), sent: 0 }
    }

    /// The sender's memory as tensors of these sizes.
    fn isend(&mut self, sizes: &[u64]) -> Result<super::CudaSent, SendError> {
        let shapes: Vec<[u64; 1]> = sizes.iter().map(|size| [*size]).collect();
        let mut address = self.from.memory.address;
        let tensors: Vec<_> = shapes
            .iter()
            .map(|shape| {
                let spec = TensorSpec { name: "hidden_states", dtype: DType::U8, shape, strides: None };
                let tensor = DeviceTensor { spec, address, bytes: shape[0] };
                address += shape[0];
                tensor
            })
            .collect();
        let (extra, ordinal) = (Extra { tag: self.sent, bytes: &[] }, self.from.device.ordinal());
        self.sent += 1;
        let (stream, keep) = (self.from.stream(), self.from.keep());
        // SAFETY: the stream is this device's and lives as long as the memory, which is kept.
        unsafe { self.sender.isend(&mut self.tx, &tensors, extra, ordinal, stream, keep) }
    }

    fn recv(&mut self) -> Result<super::CudaReceived, RecvError> {
        let announced = self.rx.recv_header(None, &long())?;
        let mut address = self.to.memory.address;
        let buffers: Vec<_> = announced
            .schema
            .tensors
            .iter()
            .map(|tensor| {
                address += tensor.bytes;
                (address - tensor.bytes, tensor.bytes)
            })
            .collect();
        let (ordinal, stream, keep) = (self.to.device.ordinal(), self.to.stream(), self.to.keep());
        // SAFETY: as above.
        unsafe { self.receiver.recv(&mut self.rx, &buffers, ordinal, stream, keep, &long()) }
    }

    /// Into the receiver's memory as one tensor, before its header is there.
    fn recv_ahead(&mut self, size: usize) -> Option<super::CudaReceived> {
        let buffers = [(self.to.memory.address, size as u64)];
        let (ordinal, stream, keep) = (self.to.device.ordinal(), self.to.stream(), self.to.keep());
        // SAFETY: as above.
        unsafe { self.receiver.recv_ahead(&self.rx, &buffers, ordinal, stream, keep).unwrap() }
    }

    /// Sends until the peers have agreed on slots.
    fn agree_on_slots(&mut self) {
        for _ in 0..2 {
            self.isend(&[64]).unwrap();
            self.recv().unwrap();
        }
        assert_eq!(self.sender.report().path, Some(DevicePath::Slots), "{:?}", self.sender.report());
    }

    /// Ends the link in order; nothing is in use after that.
    fn end(mut self) -> (CudaReport, CudaReport) {
        let reports = (self.sender.report().clone(), self.receiver.report().clone());
        self.from.settle();
        self.to.settle();
        assert!(self.tx.close(&long()).unwrap());
        self.rx.close();
        drop(self.receiver);
        drop(self.sender);
        until("the rings' end", || put_aside() == 0);
        reports
    }
}

type Make = fn() -> (SendQueue, RecvQueue);

/// Every way that a payload can take: transport, slots, stream operations.
fn ways() -> Vec<(&'static str, Make, Options)> {
    let all = Options::default();
    let staged = Options { slots: false, ..all };
    let by_host = Options { stream_operations: false, ..all };
    vec![
        ("slots", over_shm, all),
        ("staged over shm", over_shm, staged),
        ("staged over tcp", over_tcp, staged),
        ("by the host over shm", over_shm, by_host),
        ("by the host over tcp", over_tcp, by_host),
    ]
}

#[test]
fn without_a_driver_the_error_says_what_to_install() {
    match load::functions() {
        Err(error @ LoadError::Missing { .. }) => {
            let text = error.to_string();
            assert!(text.starts_with("libcuda.so.1 cannot be loaded: "), "{text}");
            assert!(text.contains("it comes with the NVIDIA driver"), "{text}");
            assert!(Device::open(0).is_err());
        }
        Err(error) => println!("there is a driver that cannot be used: {error}"),
        Ok(_) => println!("skipped: there is a driver"),
    }
}

#[test]
fn a_function_that_the_driver_lacks_is_named() {
    let find = |name: &std::ffi::CStr| {
        if name == c"cuStreamWaitValue32_v2" { std::ptr::null_mut() } else { libc::getpid as *mut libc::c_void }
    };
    // SAFETY: the table is not made, for a function is missing, and nothing of it is called.
    let missing = unsafe { super::ffi::Functions::look_up(find) }.err();
    assert_eq!(missing, Some("cuStreamWaitValue32_v2"));
}

#[test]
fn every_size_arrives_whole_by_every_way() {
    let Some((device, _one)) = gpu(0) else { return };
    sizes(&device, &device);
}

#[test]
fn every_size_arrives_whole_between_two_gpus() {
    let Some((other, _one)) = gpu(1) else { return };
    sizes(&Device::open(0).unwrap(), &other);
}

/// So many on a GPU, and fewer over the stand-in, which copies with the CPU.
fn scaled(on_a_gpu: usize, over_the_stand_in: usize) -> usize {
    if std::env::var_os(STAND_IN).is_some() { over_the_stand_in } else { on_a_gpu }
}

fn sizes(from: &Arc<Device>, to: &Arc<Device>) {
    let largest = scaled(40 << 20, 18 << 20);
    let data: Vec<u8> = (0..largest as u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    for (way, make, options) in ways() {
        let mut hop = Hop::new(make(), options, [from, to], largest);
        hop.from.put(&data);
        let lists: [&[u64]; 12] = [
            &[14336, 14336],
            &[14336, 14336],
            &[],
            &[0],
            &[1],
            &[3, 0, 4097, 1],
            &[1 << 20],
            &[(1 << 20) + 1],
            &[(2 << 20) - 5, 7, 9],
            &[largest as u64],
            &[14336, 14336],
            &[largest as u64 / 2, 1, largest as u64 / 2 - 1],
        ];
        for (round, list) in lists.iter().enumerate() {
            // Where the host waits for room, it waits for the receiver, which is this very thread.
            if !options.stream_operations && list.iter().sum::<u64>() > 8 << 20 {
                continue;
            }
            hop.to.fill(0x55);
            let sent = hop.isend(list).unwrap();
            let received = hop.recv().unwrap();
            // SAFETY: the stream is the test's.
            unsafe { received.hold(hop.to.stream()).unwrap() };
            let bytes = list.iter().sum::<u64>() as usize;
            let got = hop.to.look();
            assert!(got[..bytes] == data[..bytes], "{way}, message {round} of {list:?}");
            assert!(is_all(&got[bytes..], 0x55), "{way}, message {round} wrote too far");
            assert!(received.is_done().unwrap() && sent.wait(&long()).unwrap());
        }
        let (sender, receiver) = hop.end();
        println!("{way}: {sender:?}");
        assert_eq!(sender.through_slots > 8, way == "slots", "{sender:?}");
        assert_eq!((sender.through_slots, sender.staged), (receiver.through_slots, receiver.staged));
        assert_eq!(sender.host_waits, !options.stream_operations);
    }
}

#[test]
fn the_header_comes_before_the_payload_and_no_value_is_read_before_it_has_arrived() {
    let Some((device, _one)) = gpu(0) else { return };
    for (way, make, options) in ways().into_iter().filter(|(.., options)| options.stream_operations) {
        for size in [28 << 10, 20 << 20] {
            let mut hop = Hop::new(make(), options, [&device, &device], size);
            for round in 0..6u8 {
                hop.to.fill(0xee);
                hop.from.shut();
                hop.from.fill(round);
                let sent = hop.isend(&[size as u64]).unwrap();
                // The header is here although the sender's stream is shut; taking the payload does not block this thread.
                let received = hop.recv().unwrap();
                // SAFETY: the stream is the test's.
                unsafe { received.hold(hop.to.stream()).unwrap() };
                assert!(!received.is_done().unwrap() && !sent.is_done().unwrap(), "{way}");
                hop.from.open();
                assert!(is_all(&hop.to.look(), round), "{way}, {size} bytes, round {round}");
                assert!(sent.wait(&long()).unwrap());
            }
            hop.end();
        }
    }
}

#[test]
fn a_message_received_ahead_of_its_header_holds_the_stream_and_not_the_host() {
    let Some((device, _one)) = gpu(0) else { return };
    let size = 28 << 10;
    for (way, make, options) in ways() {
        let mut hop = Hop::new(make(), options, [&device, &device], size);
        assert!(hop.recv_ahead(size).is_none(), "{way}: nobody knows yet how it will come");
        if way != "slots" {
            hop.isend(&[size as u64]).unwrap();
            hop.recv().unwrap();
            assert!(hop.recv_ahead(size).is_none(), "{way}: the host moves it");
            hop.end();
            continue;
        }
        hop.agree_on_slots();
        for round in 0..20u8 {
            hop.to.fill(0xee);
            let received = hop.recv_ahead(size).unwrap();
            // SAFETY: the stream is the test's.
            unsafe { received.hold(hop.to.stream()).unwrap() };
            assert!(!received.is_done().unwrap());
            let pending = hop.receiver.confirm(&mut hop.rx, None, &Wait::poll());
            assert!(matches!(pending, Err(RecvError::Stopped { .. })), "{pending:?}");
            hop.from.fill(round);
            hop.isend(&[size as u64]).unwrap();
            hop.receiver.confirm(&mut hop.rx, Some(hop.sent - 1), &long()).unwrap();
            assert!(is_all(&hop.to.look(), round), "round {round}");
            // Both kinds of receiving take turns on one ring.
            hop.from.fill(round + 100);
            hop.isend(&[size as u64]).unwrap();
            hop.recv().unwrap();
            assert!(is_all(&hop.to.look(), round + 100), "round {round}");
        }
        hop.end();
    }
}

#[test]
fn another_message_than_the_one_received_ahead_loses_the_link() {
    let Some((device, _one)) = gpu(0) else { return };
    let size = 28 << 10;
    for (bytes, step) in [(64, None), (size as u64, Some(77))] {
        let mut hop = Hop::new(over_shm(), Options::default(), [&device, &device], size);
        hop.agree_on_slots();
        hop.recv_ahead(size).unwrap();
        hop.isend(&[bytes]).unwrap();
        let unconfirmed = hop.recv();
        assert!(
            matches!(&unconfirmed, Err(RecvError::Rejected(rejected)) if rejected.kind == RejectedKind::OutOfTurn),
            "{unconfirmed:?}"
        );
        let error = hop.receiver.confirm(&mut hop.rx, step, &long()).unwrap_err();
        assert!(matches!(&error, RecvError::Lost(lost) if lost.kind == LostKind::Crossed), "{error}");
        hop.to.settle();
        hop.rx.close();
        drop(hop.receiver);
        drop(hop.tx);
        drop(hop.sender);
        until("the rings' end", || put_aside() == 0);
    }
}

#[test]
fn closing_frees_a_stream_that_waits_for_a_message_that_was_never_sent() {
    let Some((device, _one)) = gpu(0) else { return };
    let size = 28 << 10;
    let mut hop = Hop::new(over_shm(), Options::default(), [&device, &device], size);
    hop.agree_on_slots();
    let received = hop.recv_ahead(size).unwrap();
    drop(hop.tx);
    let lost = hop.receiver.confirm(&mut hop.rx, None, &long());
    assert!(lost.is_err() && !received.is_done().unwrap(), "{lost:?}");
    hop.rx.close();
    drop(hop.receiver);
    assert!(is_all(&hop.to.look(), 0xff));
    drop(hop.sender);
    until("the rings' end", || put_aside() == 0);
}

#[test]
fn a_buffer_that_is_written_again_after_the_hold_was_read_before() {
    let Some((device, _one)) = gpu(0) else { return };
    for (way, make, options) in ways() {
        for size in [28 << 10, 9 << 20] {
            let mut hop = Hop::new(make(), options, [&device, &device], size);
            let rounds = scaled(40, 10) as u8;
            // A thread per end, as in life: neither waits for the other but through the link.
            let (mut tx, mut sender) = (hop.tx, hop.sender);
            let from = hop.from;
            let sending = std::thread::spawn(move || {
                for round in 0..rounds {
                    from.fill(round);
                    let shape = [size as u64];
                    let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &shape, strides: None };
                    let tensor = DeviceTensor { spec, address: from.memory.address, bytes: size as u64 };
                    // SAFETY: stream and memory live to the end of the thread, which settles.
                    let sent = unsafe {
                        sender.isend(&mut tx, &[tensor], Extra::default(), 0, from.stream(), from.keep()).unwrap()
                    };
                    // SAFETY: the stream is the test's.
                    unsafe { sent.hold(from.stream()).unwrap() };
                }
                from.settle();
                assert!(tx.close(&long()).unwrap());
                (sender, from)
            });
            for round in 0..rounds {
                let buffers = [(hop.to.memory.address, size as u64)];
                hop.rx.recv_header(None, &long()).unwrap();
                let (stream, keep) = (hop.to.stream(), hop.to.keep());
                // SAFETY: as above.
                let received = unsafe { hop.receiver.recv(&mut hop.rx, &buffers, 0, stream, keep, &long()).unwrap() };
                // SAFETY: the stream is the test's.
                unsafe { received.hold(stream).unwrap() };
                assert!(is_all(&hop.to.look(), round), "{way}, {size} bytes, round {round}");
            }
            hop.rx.close();
            drop(hop.receiver);
            drop(sending.join().unwrap());
            until("the rings' end", || put_aside() == 0);
        }
    }
}

#[test]
fn closing_the_receiver_lets_its_stream_go_and_what_it_read_is_no_number() {
    let Some((device, _one)) = gpu(0) else { return };
    for (way, make, options) in ways().into_iter().filter(|(.., options)| options.stream_operations) {
        for size in [28 << 10, 20 << 20] {
            let mut hop = Hop::new(make(), options, [&device, &device], size);
            if way == "slots" {
                hop.agree_on_slots();
            }
            hop.to.fill(0x11);
            hop.to.settle();
            hop.from.shut();
            hop.isend(&[size as u64]).unwrap();
            let received = hop.recv().unwrap();
            // SAFETY: the stream is the test's.
            unsafe { received.hold(hop.to.stream()).unwrap() };
            // The link is closed, and still the stream waits.
            hop.rx.close();
            assert!(!received.is_done().unwrap(), "{way}");
            drop(hop.receiver);
            assert!(is_all(&hop.to.look(), 0xff), "{way}, {size} bytes");
            assert!(received.is_done().unwrap());
            hop.from.open();
            hop.from.settle();
            drop(hop.tx);
            drop(hop.sender);
            until("the rings' end", || put_aside() == 0);
        }
    }
}

#[test]
fn a_sender_that_is_closed_leaves_no_stream_waiting_for_room() {
    let Some((device, _one)) = gpu(0) else { return };
    for (way, make, options) in ways().into_iter().filter(|(.., options)| options.stream_operations) {
        println!("{way}");
        let size = 30 << 20; // more than all slots hold
        let mut hop = Hop::new(make(), options, [&device, &device], size);
        if way == "slots" {
            hop.agree_on_slots();
        }
        let sent = hop.isend(&[size as u64]).unwrap();
        // SAFETY: the stream is the test's.
        unsafe { sent.hold(hop.from.stream()).unwrap() };
        drop(hop.tx);
        drop(hop.sender);
        hop.from.settle();
        drop(hop.rx);
        drop(hop.receiver);
        until("the rings' end", || put_aside() == 0);
    }
}

#[test]
fn mistakes_are_found_before_anything_is_sent() {
    let Some((device, _one)) = gpu(0) else { return };
    let mut hop = Hop::new(over_shm(), Options::default(), [&device, &device], 4096);
    let kind = |result: Result<super::CudaSent, SendError>| match result {
        Err(SendError::Rejected(rejected)) => (rejected.kind, rejected.reason),
        other => panic!("{other:?}"),
    };
    let shape = [16u64];
    let spec = TensorSpec { name: "x", dtype: DType::F32, shape: &shape, strides: None };
    let host = Box::new([0u8; 64]);
    let (stream, ours) = (hop.from.stream(), hop.from.memory.address);
    for (address, bytes, ordinal, expected) in [
        (host.as_ptr() as u64, 64, 0, (RejectedKind::Device, "is not in memory of CUDA device 0")),
        (hop.from.gate.address, 64, 0, (RejectedKind::Device, "is not in memory of CUDA device 0")),
        (ours, 63, 0, (RejectedKind::Mismatch, "does not have 63 bytes")),
        (ours, 64, 99, (RejectedKind::Device, "there is no CUDA device 99")),
    ] {
        let tensor = DeviceTensor { spec, address, bytes };
        let keep = hop.from.keep();
        // SAFETY: nothing is sent.
        let result = unsafe { hop.sender.isend(&mut hop.tx, &[tensor], Extra::default(), ordinal, stream, keep) };
        let (found, reason) = kind(result);
        assert!(found == expected.0 && reason.contains(expected.1), "{found:?} {reason}");
    }
    hop.from.fill(3);
    hop.isend(&[64]).unwrap();
    hop.rx.recv_header(None, &long()).unwrap();
    for (address, bytes) in [(host.as_ptr() as u64, 64), (hop.to.memory.address, 65)] {
        let (stream, keep) = (hop.to.stream(), hop.to.keep());
        // SAFETY: nothing is received.
        let result = unsafe { hop.receiver.recv(&mut hop.rx, &[(address, bytes)], 0, stream, keep, &long()) };
        assert!(matches!(result, Err(RecvError::Rejected(_))), "{result:?}");
    }
    hop.recv().unwrap();
    assert!(hop.to.look()[..64].iter().all(|byte| *byte == 3));
    hop.end();
}

#[test]
fn hundreds_of_links_leave_nothing_behind() {
    let Some((device, _one)) = gpu(0) else { return };
    for round in 0..scaled(100, 20) {
        let (make, options) = if round % 2 == 0 {
            (over_shm as Make, Options::default())
        } else {
            (over_tcp as Make, Options::default())
        };
        let mut hop = Hop::new(make(), options, [&device, &device], 4096);
        for _ in 0..4 {
            hop.isend(&[4096]).unwrap();
            hop.recv().unwrap();
        }
        if round % 3 == 0 {
            drop(hop);
        } else {
            hop.end();
        }
    }
    until("the rings' end", || put_aside() == 0);
}

/// A sender in a process of its own; as a test, without the variable, it does nothing.
#[test]
fn child() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let device = Device::open(0).unwrap();
    let link = shm::connect(UnixStream::connect(path).unwrap(), NAME, TICKET, &LinkConfig::default()).unwrap();
    let (mut tx, mut sender) = (SendQueue::new(link), CudaSender::new(Options::default()));
    let mut from = Side::new(&device, 20 << 20);
    let mut line = String::new();
    // One line a message: its size, and `shut` if its payload never comes.
    while std::io::stdin().read_line(&mut line).unwrap() > 0 {
        let (size, shut) = (line.split_whitespace().next().unwrap().parse::<u64>().unwrap(), line.contains("shut"));
        line.clear();
        if shut {
            from.shut();
        }
        from.fill((size % 251) as u8);
        let shape = [size];
        let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &shape, strides: None };
        let tensor = DeviceTensor { spec, address: from.memory.address, bytes: size };
        // SAFETY: stream and memory live as long as the process.
        let sent =
            unsafe { sender.isend(&mut tx, &[tensor], Extra::default(), 0, from.stream(), from.keep()).unwrap() };
        // SAFETY: the stream is the test's.
        unsafe { sent.hold(from.stream()).unwrap() };
        println!("sent {:?}", sender.report().path);
    }
    from.settle();
    assert!(tx.close(&long()).unwrap());
    drop(sender);
    until("the receiver's end", || put_aside() == 0);
}

struct Peer {
    child: Child,
    rx: RecvQueue,
    receiver: CudaReceiver,
    to: Side,
}

impl Peer {
    fn new(device: &Arc<Device>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["cuda::tests::child", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let rx = acceptor().admit(greet_unix(listener.accept().unwrap().0, LONG).unwrap()).unwrap().unwrap();
        let (rx, receiver) = (RecvQueue::new(rx), CudaReceiver::new(Options::default()));
        Self { child, rx, receiver, to: Side::new(device, 20 << 20) }
    }

    fn send(&mut self, size: usize, shut: bool) {
        let line = format!("{size}{}\n", if shut { " shut" } else { "" });
        self.child.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
    }

    fn recv(&mut self, size: usize) -> Result<super::CudaReceived, RecvError> {
        self.rx.recv_header(None, &long())?;
        let (buffers, stream, keep) = ([(self.to.memory.address, size as u64)], self.to.stream(), self.to.keep());
        // SAFETY: stream and memory live to the end of the test, which settles.
        let received = unsafe { self.receiver.recv(&mut self.rx, &buffers, 0, stream, keep, &long())? };
        // SAFETY: the stream is the test's.
        unsafe { received.hold(stream).unwrap() };
        Ok(received)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn two_processes_share_slots_and_the_values_are_right() {
    let Some((device, _one)) = gpu(0) else { return };
    let mut peer = Peer::new(&device);
    for round in 0..scaled(200, 40) {
        let size = if round % 20 == 19 { 20 << 20 } else { 28 << 10 };
        let size = size - round;
        peer.send(size, false);
        peer.recv(size).unwrap();
        let got = peer.to.look();
        assert!(is_all(&got[..size], (size % 251) as u8), "round {round}");
    }
    let report = peer.receiver.report().clone();
    assert!(report.through_slots as usize >= scaled(198, 38), "{report:?}");
    drop(peer.child.stdin.take());
    assert!(matches!(peer.rx.recv_header(None, &long()), Err(RecvError::Closed { .. })));
    drop(std::mem::replace(&mut peer.receiver, CudaReceiver::new(Options::default())));
    let mut text = String::new();
    peer.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(peer.child.wait().unwrap().success(), "{text}");
    until("the rings' end", || put_aside() == 0);
}

#[test]
fn a_peer_killed_before_its_payload_came_leaves_a_stream_that_waits_and_close_frees_it() {
    let Some((device, _one)) = gpu(0) else { return };
    for size in [28 << 10, 20 << 20] {
        let mut peer = Peer::new(&device);
        for _ in 0..3 {
            peer.send(1000, false);
            peer.recv(1000).unwrap();
            peer.to.settle();
        }
        assert_eq!(peer.receiver.report().path, Some(DevicePath::Slots));
        peer.send(size, true);
        let received = peer.recv(size).unwrap();
        peer.child.kill().unwrap();
        peer.child.wait().unwrap();
        let lost = peer.rx.recv_header(None, &long());
        assert!(matches!(lost, Err(RecvError::Lost(_))), "{lost:?}");
        assert!(!received.is_done().unwrap());
        peer.rx.close();
        drop(std::mem::replace(&mut peer.receiver, CudaReceiver::new(Options::default())));
        assert!(is_all(&peer.to.look()[..size], 0xff));
        until("the rings' end", || put_aside() == 0);
    }
}

/// Runs the tests above over the stand-in for the driver, where there is no driver: in this binary, run again.
#[test]
fn the_same_holds_over_the_stand_in_for_the_driver() {
    if std::env::var_os(STAND_IN).is_some() || load::functions().is_ok() {
        println!("skipped: there is a driver");
        return;
    }
    let binary = std::env::current_exe().unwrap();
    let library = binary.parent().unwrap().with_file_name("examples").join("libstand_in_for_cuda.so");
    if !library.exists() {
        println!("skipped: {} was not built (`cargo test -p rayless-fabric` builds it)", library.display());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(library, folder.path().join("libcuda.so.1")).unwrap();
    let output = Command::new(binary)
        .args(["cuda::tests::", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env(STAND_IN, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("slots: CudaReport"), "{text}");
}
