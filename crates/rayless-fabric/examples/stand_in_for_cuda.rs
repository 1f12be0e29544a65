//! A stand-in for the CUDA driver library, for tests on machines without a GPU: never shipped, and no measure of anything.
//!
//! Devices are host memory, streams are threads that work off their queues. What the tests are about is as with the real driver:
//! the order of a stream's work, waits for words in memory, events, memory shared between processes, and that freeing memory
//! waits for all streams of the process. Each operation takes a little, different, time.
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::missing_safety_doc,
    unsafe_op_in_unsafe_fn,
    missing_docs,
    unreachable_pub,
    reason = "the functions of cuda.h, with its rules for every pointer"
)]

use libc::{c_char, c_int, c_uint, c_void};
use std::{
    collections::{HashMap, VecDeque},
    ffi::CString,
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

const DEVICES: c_int = 2;
const OK: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_CONTEXT: c_int = 201;
const NOT_READY: c_int = 600;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy)]
struct Memory {
    bytes: usize,
    /// `None`: pinned.
    device: Option<c_int>,
    fd: c_int,
}

/// What is allocated, registered or mapped, by its address.
static MEMORY: Mutex<Option<HashMap<u64, Memory>>> = Mutex::new(None);
static STREAMS: Mutex<Vec<Arc<Stream>>> = Mutex::new(Vec::new());

thread_local! {
    static CONTEXTS: std::cell::RefCell<Vec<usize>> = const { std::cell::RefCell::new(Vec::new()) };
}

#[derive(Default)]
pub struct Stream {
    queue: Mutex<(VecDeque<Work>, bool, bool)>,
    changed: Condvar,
}

#[derive(Default)]
pub struct Event {
    recorded: AtomicU64,
    done: AtomicU64,
}

enum Work {
    Copy(u64, u64, usize),
    Fill(u64, u8, usize),
    Wait(u64, u32),
    Write(u64, u32),
    Record(Arc<Event>, u64),
    Hold(Arc<Event>, u64),
}

fn pause() {
    static SEED: AtomicU32 = AtomicU32::new(1);
    let seed = SEED.fetch_add(0x9e37_79b9, Ordering::Relaxed);
    match seed >> 30 {
        0 => std::thread::sleep(Duration::from_micros(u64::from(seed & 63))),
        1 => std::thread::yield_now(),
        _ => {}
    }
}

impl Stream {
    fn start() -> Arc<Self> {
        let stream = Arc::<Self>::default();
        lock(&STREAMS).push(Arc::clone(&stream));
        let own = Arc::clone(&stream);
        std::thread::spawn(move || own.run());
        stream
    }

    fn push(&self, work: Work) {
        lock(&self.queue).0.push_back(work);
        self.changed.notify_all();
    }

    fn run(&self) {
        loop {
            let mut queue = lock(&self.queue);
            queue.2 = false;
            self.changed.notify_all();
            while queue.0.is_empty() {
                if queue.1 {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(work) = queue.0.pop_front() else { continue };
            queue.2 = true;
            drop(queue);
            pause();
            unsafe { work.run() };
        }
    }

    fn drain(&self) {
        let mut queue = lock(&self.queue);
        while !queue.0.is_empty() || queue.2 {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Work {
    unsafe fn run(self) {
        match self {
            Self::Copy(to, from, bytes) => ptr::copy(from as *const u8, to as *mut u8, bytes),
            Self::Fill(at, byte, bytes) => ptr::write_bytes(at as *mut u8, byte, bytes),
            Self::Write(word, value) => (*(word as *const AtomicU32)).store(value, Ordering::SeqCst),
            Self::Wait(word, value) => {
                let word = &*(word as *const AtomicU32);
                while word.load(Ordering::SeqCst).wrapping_sub(value).cast_signed() < 0 {
                    std::thread::sleep(Duration::from_micros(20));
                }
            }
            Self::Record(event, number) => event.done.store(number, Ordering::SeqCst),
            Self::Hold(event, number) => {
                while event.done.load(Ordering::SeqCst) < number {
                    std::thread::sleep(Duration::from_micros(20));
                }
            }
        }
    }
}

/// As the driver does before it takes memory away.
fn drain_all() {
    let streams = lock(&STREAMS).clone();
    streams.iter().for_each(|stream| stream.drain());
}

unsafe fn stream(handle: *mut Stream) -> &'static Stream {
    static LEGACY: OnceLock<Arc<Stream>> = OnceLock::new();
    if handle.is_null() { LEGACY.get_or_init(Stream::start) } else { &*handle }
}

fn current() -> Option<c_int> {
    CONTEXTS.with_borrow(|contexts| contexts.last().map(|context| *context as c_int - 1))
}

fn remember(address: u64, memory: Memory) {
    lock(&MEMORY).get_or_insert_default().insert(address, memory);
}

fn forget(address: u64) -> Option<Memory> {
    lock(&MEMORY).get_or_insert_default().remove(&address)
}

unsafe fn map(fd: c_int, bytes: usize) -> u64 {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let address = libc::mmap(ptr::null_mut(), bytes, access, flags, fd, 0);
    if address == libc::MAP_FAILED { 0 } else { address as u64 }
}

unsafe fn allocate(bytes: usize, device: Option<c_int>) -> u64 {
    let fd = libc::memfd_create(c"stand-in".as_ptr(), libc::MFD_CLOEXEC);
    if libc::ftruncate(fd, bytes as i64) != 0 {
        return 0;
    }
    let address = map(fd, bytes);
    remember(address, Memory { bytes, device, fd });
    address
}

unsafe fn free(address: u64) -> c_int {
    drain_all();
    let Some(memory) = forget(address) else { return INVALID_VALUE };
    libc::munmap(address as *mut c_void, memory.bytes);
    libc::close(memory.fd);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: c_uint) -> c_int {
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(status: c_int, out: *mut *const c_char) -> c_int {
    out.write(CString::new(format!("STAND_IN_ERROR_{status}")).map_or(ptr::null(), |text| text.into_raw()));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_status: c_int, out: *mut *const c_char) -> c_int {
    out.write(c"an error of the stand-in".as_ptr());
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(out: *mut c_int) -> c_int {
    out.write(DEVICES);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(out: *mut c_int, ordinal: c_int) -> c_int {
    out.write(ordinal);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(out: *mut c_int, _attribute: c_int, _device: c_int) -> c_int {
    out.write(1);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid(out: *mut [u8; 16], device: c_int) -> c_int {
    out.write([device as u8; 16]);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(out: *mut usize, device: c_int) -> c_int {
    out.write(device as usize + 1);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPushCurrent_v2(context: usize) -> c_int {
    CONTEXTS.with_borrow_mut(|contexts| contexts.push(context));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(out: *mut usize) -> c_int {
    CONTEXTS.with_borrow_mut(|contexts| contexts.pop()).map_or(INVALID_CONTEXT, |context| {
        out.write(context);
        OK
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(out: *mut c_int, attribute: c_int, address: u64) -> c_int {
    let memory = lock(&MEMORY);
    let inside = |(base, memory): &(&u64, &Memory)| (**base..**base + memory.bytes as u64).contains(&address);
    let Some((_, memory)) = memory.as_ref().and_then(|all| all.iter().find(inside)) else { return INVALID_VALUE };
    out.write(match attribute {
        2 => {
            if memory.device.is_some() {
                2
            } else {
                1
            }
        }
        _ => memory.device.unwrap_or(0),
    });
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(out: *mut u64, bytes: usize) -> c_int {
    let Some(device) = current() else { return INVALID_CONTEXT };
    out.write(allocate(bytes, Some(device)));
    if *out == 0 { OUT_OF_MEMORY } else { OK }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    free(address)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(out: *mut u64, bytes: usize, _flags: c_uint) -> c_int {
    out.write(allocate(bytes, None));
    if *out == 0 { OUT_OF_MEMORY } else { OK }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: u64) -> c_int {
    free(address)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(address: u64, bytes: usize, _flags: c_uint) -> c_int {
    if !address.is_multiple_of(4096) || !bytes.is_multiple_of(4096) {
        return INVALID_VALUE;
    }
    remember(address, Memory { bytes, device: None, fd: -1 });
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(address: u64) -> c_int {
    drain_all();
    if forget(address).is_some() { OK } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(out: *mut u64, address: u64, _flags: c_uint) -> c_int {
    out.write(address);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, on: *mut Stream) -> c_int {
    stream(on).push(Work::Copy(to, from, bytes));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(at: u64, byte: u8, bytes: usize, on: *mut Stream) -> c_int {
    stream(on).push(Work::Fill(at, byte, bytes));
    OK
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Handle([u8; 64]);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcGetMemHandle(out: *mut Handle, address: u64) -> c_int {
    let Some(memory) = lock(&MEMORY).as_ref().and_then(|all| all.get(&address).copied()) else { return INVALID_VALUE };
    let mut handle = [0; 64];
    handle[..4].copy_from_slice(&std::process::id().to_le_bytes());
    handle[4..8].copy_from_slice(&memory.fd.to_le_bytes());
    handle[8..16].copy_from_slice(&(memory.bytes as u64).to_le_bytes());
    out.write(Handle(handle));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcOpenMemHandle_v2(out: *mut u64, handle: Handle, _flags: c_uint) -> c_int {
    let word = |at: usize| u32::from_le_bytes([handle.0[at], handle.0[at + 1], handle.0[at + 2], handle.0[at + 3]]);
    if word(0) == std::process::id() {
        return INVALID_CONTEXT;
    }
    let Ok(path) = CString::new(format!("/proc/{}/fd/{}", word(0), word(4))) else { return INVALID_VALUE };
    let fd = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
    if fd < 0 {
        return INVALID_VALUE;
    }
    let bytes = word(8) as usize;
    out.write(map(fd, bytes));
    remember(*out, Memory { bytes, device: current(), fd });
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcCloseMemHandle(address: u64) -> c_int {
    free(address)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(out: *mut *const Stream, _flags: c_uint) -> c_int {
    out.write(Arc::into_raw(Stream::start()));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(handle: *const Stream) -> c_int {
    let stream = Arc::from_raw(handle);
    lock(&stream.queue).1 = true;
    stream.changed.notify_all();
    lock(&STREAMS).retain(|other| !Arc::ptr_eq(other, &stream) || !lock(&other.queue).0.is_empty());
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_on: *mut Stream, out: *mut c_int) -> c_int {
    out.write(0);
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(on: *mut Stream, handle: *const Event, _flags: c_uint) -> c_int {
    Arc::increment_strong_count(handle);
    let event = Arc::from_raw(handle);
    let number = event.recorded.load(Ordering::SeqCst);
    stream(on).push(Work::Hold(event, number));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitValue32_v2(on: *mut Stream, word: u64, value: u32, _flags: c_uint) -> c_int {
    stream(on).push(Work::Wait(word, value));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWriteValue32_v2(on: *mut Stream, word: u64, value: u32, _flags: c_uint) -> c_int {
    stream(on).push(Work::Write(word, value));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(out: *mut *const Event, _flags: c_uint) -> c_int {
    out.write(Arc::into_raw(Arc::<Event>::default()));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(handle: *const Event) -> c_int {
    drop(Arc::from_raw(handle));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(handle: *const Event, on: *mut Stream) -> c_int {
    Arc::increment_strong_count(handle);
    let event = Arc::from_raw(handle);
    let number = event.recorded.fetch_add(1, Ordering::SeqCst) + 1;
    stream(on).push(Work::Record(event, number));
    OK
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(handle: *const Event) -> c_int {
    let event = &*handle;
    let done = event.done.load(Ordering::SeqCst) >= event.recorded.load(Ordering::SeqCst);
    if done { OK } else { NOT_READY }
}
