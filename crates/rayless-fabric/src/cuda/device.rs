//! Devices, streams, events and memory: the driver's objects, each freed with its owner.
//!
//! Every call is made with the device's *primary* context current, which is the one that torch uses, and the caller's
//! context is put back after it. The primary context is retained for as long as anything here of the device lives.

use super::{
    error::{CudaError, check},
    ffi::{self, Address, Context, DeviceHandle, EventHandle, Functions, IpcHandle, StreamHandle},
    load::{LoadError, functions},
};
use std::{
    ffi::c_void,
    fmt,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Why a device cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is no driver.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// There is no such device.
    #[error("there is no CUDA device {ordinal}; this process sees {count}")]
    NoSuchDevice {
        /// The device asked for.
        ordinal: i32,
        /// Devices that this process sees (`CUDA_VISIBLE_DEVICES` counts).
        count: i32,
    },
    /// The driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Devices that this process sees.
pub fn device_count() -> Result<i32, DeviceError> {
    let functions = functions()?;
    let mut count = 0;
    // SAFETY: the place is ours.
    match unsafe { (functions.device_count)(&raw mut count) } {
        ffi::ERROR_NO_DEVICE => Ok(0),
        status => {
            check(functions, "cuDeviceGetCount", status)?;
            Ok(count)
        }
    }
}

/// A device of this process, with its primary context.
pub struct Device {
    functions: &'static Functions,
    ordinal: i32,
    handle: DeviceHandle,
    context: Context,
    uuid: [u8; 16],
    stream_operations: bool,
}

// SAFETY: the context is the driver's, which takes calls from any thread; nothing here is bound to one.
unsafe impl Send for Device {}
// SAFETY: as above; the fields do not change.
unsafe impl Sync for Device {}

impl Device {
    /// The device of this ordinal (torch's index); one object per device while any of its users lives.
    pub fn open(ordinal: i32) -> Result<Arc<Self>, DeviceError> {
        static OPEN: Mutex<Vec<(i32, Weak<Device>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, device)| device.strong_count() > 0);
        let found = open.iter().find(|(other, _)| *other == ordinal).and_then(|(_, device)| device.upgrade());
        if let Some(device) = found {
            return Ok(device);
        }
        let device = Arc::new(Self::new(ordinal)?);
        open.push((ordinal, Arc::downgrade(&device)));
        Ok(device)
    }

    fn new(ordinal: i32) -> Result<Self, DeviceError> {
        let functions = functions()?;
        let count = device_count()?;
        if !(0..count).contains(&ordinal) {
            return Err(DeviceError::NoSuchDevice { ordinal, count });
        }
        let (mut handle, mut uuid, mut operations) = (0, ffi::Uuid([0; 16]), 0);
        let mut context = ptr::null_mut();
        // SAFETY: the places are ours; the ordinal is one of a device.
        unsafe {
            check(functions, "cuDeviceGet", (functions.device_get)(&raw mut handle, ordinal))?;
            check(functions, "cuDeviceGetUuid", (functions.device_uuid)(&raw mut uuid, handle))?;
            let attribute = ffi::ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS;
            let status = (functions.device_attribute)(&raw mut operations, attribute, handle);
            // A driver that does not know the question does not have the operations.
            if status != ffi::ERROR_INVALID_VALUE {
                check(functions, "cuDeviceGetAttribute", status)?;
            }
            check(functions, "cuDevicePrimaryCtxRetain", (functions.primary_retain)(&raw mut context, handle))?;
        }
        Ok(Self { functions, ordinal, handle, context, uuid: uuid.0, stream_operations: operations != 0 })
    }

    /// Its ordinal in this process.
    pub const fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// The same in every process.
    pub const fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Whether its streams can wait for, and write, words in memory.
    pub const fn has_stream_operations(&self) -> bool {
        self.stream_operations
    }

    /// Runs a driver call with the primary context current.
    fn call(&self, name: &'static str, call: impl FnOnce(&Functions) -> ffi::Status) -> Result<(), CudaError> {
        let functions = self.functions;
        // SAFETY: the context is retained while `self` lives.
        check(functions, "cuCtxPushCurrent", unsafe { (functions.context_push)(self.context) })?;
        let outcome = check(functions, name, call(functions));
        let mut popped = ptr::null_mut();
        // SAFETY: the place is ours; this takes off what was pushed above.
        let put_back = check(functions, "cuCtxPopCurrent", unsafe { (functions.context_pop)(&raw mut popped) });
        outcome.and(put_back)
    }

    /// Whether an address lies in memory of this device.
    pub(super) fn owns(&self, address: u64) -> bool {
        let (mut kind, mut ordinal) = (0u32, -1i32);
        let functions = self.functions;
        // SAFETY: the places are ours and of the attributes' types; any address may be asked about.
        unsafe {
            let kind_known = (functions.pointer_attribute)((&raw mut kind).cast(), ffi::POINTER_MEMORY_TYPE, address);
            let place = (&raw mut ordinal).cast::<c_void>();
            let ordinal_known = (functions.pointer_attribute)(place, ffi::POINTER_DEVICE_ORDINAL, address);
            kind_known == ffi::SUCCESS && ordinal_known == ffi::SUCCESS
        }
        .then_some((kind, ordinal))
            == Some((ffi::MEMORY_TYPE_DEVICE, self.ordinal))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained in `new`. At the end of the process the driver may be gone already; it then says so.
        unsafe { (self.functions.primary_release)(self.handle) };
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.ordinal).finish()
    }
}

/// A stream: the caller's, known by its number (`torch.cuda.Stream.cuda_stream`), or one of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream(pub(super) StreamHandle);

// SAFETY: the driver takes a stream from any thread.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream of the caller's.
    ///
    /// # Safety
    /// The number must be that of a stream of the device that it is used with, or 0, for as long as it is used.
    pub const unsafe fn from_raw(number: usize) -> Self {
        Self(ptr::without_provenance_mut(number))
    }
}

/// A stream of ours, destroyed with this.
pub(super) struct OwnStream {
    device: Arc<Device>,
    pub(super) stream: Stream,
}

impl OwnStream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let mut handle = ptr::null_mut();
        let place = &raw mut handle;
        // SAFETY: the place is ours.
        let create = |f: &Functions| unsafe { (f.stream_create)(place, ffi::STREAM_NON_BLOCKING) };
        device.call("cuStreamCreate", create)?;
        Ok(Self { device: Arc::clone(device), stream: Stream(handle) })
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: made in `new`. The driver lets what is in the stream finish and does not wait for it.
        let destroy = |f: &Functions| unsafe { (f.stream_destroy)(self.stream.0) };
        // Nothing can be done about an error here.
        let _ = self.device.call("cuStreamDestroy", destroy);
    }
}

/// A point in a stream's work.
pub(super) struct Event {
    device: Arc<Device>,
    handle: EventHandle,
}

// SAFETY: the driver takes an event from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let mut handle = ptr::null_mut();
        let place = &raw mut handle;
        // SAFETY: the place is ours.
        let create = |f: &Functions| unsafe { (f.event_create)(place, ffi::EVENT_DISABLE_TIMING) };
        device.call("cuEventCreate", create)?;
        Ok(Self { device: Arc::clone(device), handle })
    }

    /// A new event after what `stream` has been given so far.
    pub(super) fn after(device: &Arc<Device>, stream: Stream) -> Result<Self, CudaError> {
        let event = Self::new(device)?;
        event.record(stream)?;
        Ok(event)
    }

    pub(super) fn record(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: event and stream are of this device and alive.
        let record = |f: &Functions| unsafe { (f.event_record)(self.handle, stream.0) };
        self.device.call("cuEventRecord", record)
    }

    /// Whether the stream has come past it.
    pub(super) fn is_done(&self) -> Result<bool, CudaError> {
        let done = std::cell::Cell::new(true);
        let query = |f: &Functions| {
            // SAFETY: the event is alive.
            let status = unsafe { (f.event_query)(self.handle) };
            done.set(status != ffi::ERROR_NOT_READY);
            if done.get() { status } else { ffi::SUCCESS }
        };
        self.device.call("cuEventQuery", query)?;
        Ok(done.get())
    }

    /// Makes `stream` wait for it, without a wait of the host.
    pub(super) fn hold(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: event and stream are alive; flags must be 0.
        let wait = |f: &Functions| unsafe { (f.stream_wait_event)(stream.0, self.handle, 0) };
        self.device.call("cuStreamWaitEvent", wait)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`; one that has not happened yet is freed by the driver when it has.
        let destroy = |f: &Functions| unsafe { (f.event_destroy)(self.handle) };
        // Nothing can be done about an error here.
        let _ = self.device.call("cuEventDestroy", destroy);
    }
}

/// One operation for a stream.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    /// Copies between device and pinned addresses.
    Copy { to: Address, from: Address, bytes: usize },
    /// Waits until the word is at least `value`, as a counter that wraps.
    WaitFor { word: Address, value: u32 },
    /// Writes the word, after all before it is visible to everybody.
    Write { word: Address, value: u32 },
    /// Fills memory.
    Fill { at: Address, byte: u8, bytes: usize },
}

impl Device {
    /// Gives a stream operations, in order.
    ///
    /// # Safety
    /// The stream must be alive, and all memory that the operations name must stay so until they are done.
    pub(super) unsafe fn enqueue(&self, stream: Stream, operations: &[Operation]) -> Result<(), CudaError> {
        let functions = self.functions;
        // SAFETY: the context is retained while `self` lives.
        check(functions, "cuCtxPushCurrent", unsafe { (functions.context_push)(self.context) })?;
        let outcome = operations.iter().try_for_each(|operation| {
            // SAFETY: by contract.
            let (name, status) = unsafe {
                match *operation {
                    Operation::Copy { to, from, bytes } => {
                        ("cuMemcpyAsync", (functions.memcpy_async)(to, from, bytes, stream.0))
                    }
                    Operation::WaitFor { word, value } => {
                        let status = (functions.stream_wait_value)(stream.0, word, value, ffi::WAIT_VALUE_GEQ);
                        ("cuStreamWaitValue32", status)
                    }
                    Operation::Write { word, value } => {
                        ("cuStreamWriteValue32", (functions.stream_write_value)(stream.0, word, value, 0))
                    }
                    Operation::Fill { at, byte, bytes } => {
                        ("cuMemsetD8Async", (functions.memset_async)(at, byte, bytes, stream.0))
                    }
                }
            };
            check(functions, name, status)
        });
        let mut popped = ptr::null_mut();
        // SAFETY: the place is ours; this takes off what was pushed above.
        let put_back = check(functions, "cuCtxPopCurrent", unsafe { (functions.context_pop)(&raw mut popped) });
        outcome.and(put_back)
    }

    /// Whether a graph is being captured from the stream: what is given to it then runs later, or never.
    pub(super) fn is_capturing(&self, stream: Stream) -> Result<bool, CudaError> {
        let mut status = 0;
        let place = &raw mut status;
        // SAFETY: the place is ours, the stream alive.
        let ask = |f: &Functions| unsafe { (f.stream_is_capturing)(stream.0, place) };
        self.call("cuStreamIsCapturing", ask)?;
        Ok(status != 0)
    }
}

/// Device memory of ours.
pub(super) struct DeviceMemory {
    device: Arc<Device>,
    pub(super) address: Address,
}

impl DeviceMemory {
    pub(super) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let mut address = 0;
        let place = &raw mut address;
        // SAFETY: the place is ours.
        let allocate = |f: &Functions| unsafe { (f.mem_alloc)(place, bytes) };
        device.call("cuMemAlloc", allocate)?;
        Ok(Self { device: Arc::clone(device), address })
    }

    /// What names it to other processes of this host.
    pub(super) fn handle(&self) -> Result<[u8; 64], CudaError> {
        let mut handle = IpcHandle([0; 64]);
        let place = &raw mut handle;
        // SAFETY: the place is ours, the address that of an allocation.
        let get = |f: &Functions| unsafe { (f.ipc_handle)(place, self.address) };
        self.device.call("cuIpcGetMemHandle", get)?;
        Ok(handle.0)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; whoever owned this has seen to it that nothing uses it any more.
        let free = |f: &Functions| unsafe { (f.mem_free)(self.address) };
        // Nothing can be done about an error here.
        let _ = self.device.call("cuMemFree", free);
    }
}

/// Another process's device memory, mapped into ours.
pub(super) struct PeerMemory {
    device: Arc<Device>,
    pub(super) address: Address,
}

impl PeerMemory {
    pub(super) fn open(device: &Arc<Device>, handle: [u8; 64]) -> Result<Self, CudaError> {
        let mut address = 0;
        let place = &raw mut address;
        // SAFETY: the place is ours; a handle that names nothing is refused.
        let open = |f: &Functions| unsafe { (f.ipc_open)(place, IpcHandle(handle), ffi::IPC_LAZY_ENABLE_PEER_ACCESS) };
        device.call("cuIpcOpenMemHandle", open)?;
        Ok(Self { device: Arc::clone(device), address })
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `open`; whoever owned this has seen to it that no stream uses it any more.
        let close = |f: &Functions| unsafe { (f.ipc_close)(self.address) };
        // Nothing can be done about an error here.
        let _ = self.device.call("cuIpcCloseMemHandle", close);
    }
}

/// Pinned host memory that every device can reach: allocated, or registered for as long as this lives.
pub(super) struct Pinned {
    device: Arc<Device>,
    pub(super) host: NonNull<u8>,
    pub(super) address: Address,
    /// Holds registered memory; `None`: it is the driver's.
    registered: Option<Arc<dyn Send + Sync>>,
}

// SAFETY: memory is bound to no thread; those who touch it agree on who does by the words of a ring.
unsafe impl Send for Pinned {}
// SAFETY: as above; this gives out addresses only.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed memory.
    pub(super) fn allocate(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let mut host = ptr::null_mut();
        let place = &raw mut host;
        let flags = ffi::HOST_ALLOC_PORTABLE | ffi::HOST_ALLOC_DEVICEMAP;
        // SAFETY: the place is ours.
        let allocate = |f: &Functions| unsafe { (f.host_alloc)(place, bytes, flags) };
        device.call("cuMemHostAlloc", allocate)?;
        let Some(memory) = NonNull::new(host.cast::<u8>()) else {
            return Err(CudaError::new(device.functions, "cuMemHostAlloc", ffi::ERROR_INVALID_VALUE));
        };
        // SAFETY: just allocated, of this size, and known to nobody else.
        unsafe { memory.as_ptr().write_bytes(0, bytes) };
        let mut pinned = Self { device: Arc::clone(device), host: memory, address: 0, registered: None };
        pinned.find_address()?;
        Ok(pinned)
    }

    /// Registers memory that `keep` holds.
    ///
    /// # Safety
    /// `host..host + bytes` must be whole mapped pages for as long as `keep` lives.
    pub(super) unsafe fn register(
        device: &Arc<Device>,
        host: NonNull<u8>,
        bytes: usize,
        keep: Arc<dyn Send + Sync>,
    ) -> Result<Self, CudaError> {
        let flags = ffi::HOST_REGISTER_PORTABLE | ffi::HOST_REGISTER_DEVICEMAP;
        // SAFETY: by contract.
        let register = |f: &Functions| unsafe { (f.host_register)(host.as_ptr().cast(), bytes, flags) };
        device.call("cuMemHostRegister", register)?;
        let mut pinned = Self { device: Arc::clone(device), host, address: 0, registered: Some(keep) };
        pinned.find_address()?;
        Ok(pinned)
    }

    /// Where the device sees it.
    fn find_address(&mut self) -> Result<(), CudaError> {
        let mut address = 0;
        let place = &raw mut address;
        // SAFETY: the place is ours, the memory pinned and mapped for devices; flags must be 0.
        let get = |f: &Functions| unsafe { (f.host_device_pointer)(place, self.host.as_ptr().cast(), 0) };
        self.device.call("cuMemHostGetDevicePointer", get)?;
        self.address = address;
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let host = self.host.as_ptr().cast();
        let registered = self.registered.is_some();
        let free = |f: &Functions| {
            // SAFETY: allocated or registered by this object; whoever owned it has seen to it that no stream uses it.
            unsafe { if registered { (f.host_unregister)(host) } else { (f.host_free)(host) } }
        };
        // Nothing can be done about an error here.
        let _ = self.device.call("freeing pinned memory", free);
    }
}
