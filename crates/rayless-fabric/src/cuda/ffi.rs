//! The part of `cuda.h` that is used, by hand.
//!
//! A table of our own, and not a generated one, so that building needs nothing of CUDA. The driver keeps this ABI: a
//! function whose parameters change gets a new symbol (`_v2`), and the one named here stays. All symbols are there since
//! CUDA 11.7; sizes are asserted below. Handles are opaque pointers, device addresses are 64-bit numbers.

use libc::{c_char, c_int, c_uint, c_void, size_t};
use std::ffi::CStr;

pub(super) type Status = c_int;
pub(super) type DeviceHandle = c_int;
pub(super) type Address = u64;

/// An object of the driver that is only passed back.
#[repr(C)]
pub(super) struct Opaque {
    _private: [u8; 0],
}

pub(super) type Context = *mut Opaque;
pub(super) type StreamHandle = *mut Opaque;
pub(super) type EventHandle = *mut Opaque;

/// `CUipcMemHandle`: names an allocation to another process of the host. Passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct IpcHandle(pub(super) [u8; 64]);

/// `CUuuid`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Uuid(pub(super) [u8; 16]);

const _: () = {
    assert!(size_of::<IpcHandle>() == 64 && align_of::<IpcHandle>() == 1);
    assert!(size_of::<Uuid>() == 16);
    assert!(size_of::<size_t>() == 8 && size_of::<c_uint>() == 4);
};

/// Declares the table, and how it is filled.
macro_rules! functions {
    ($($field:ident = $symbol:literal : fn($($argument:ty),*);)*) => {
        /// The driver's functions. Each returns a [`Status`]: 0, or an error's number.
        #[allow(clippy::struct_field_names, reason = "C's names")]
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Functions {
            /// Looks up every function; an error names the one that is missing.
            ///
            /// # Safety
            /// `find` must return null, or the address of the function of that name in the CUDA driver library, which must
            /// stay loaded for as long as the table is used.
            pub(super) unsafe fn look_up(find: impl Fn(&CStr) -> *mut c_void) -> Result<Self, &'static str> {
                Ok(Self {
                    $($field: {
                        const NAME: &CStr = match CStr::from_bytes_with_nul(concat!($symbol, "\0").as_bytes()) {
                            Ok(name) => name,
                            Err(_) => c"",
                        };
                        let found = find(NAME);
                        if found.is_null() {
                            return Err($symbol);
                        }
                        // SAFETY: by contract this is the function that `cuda.h` declares with these arguments; function
                        // pointers and data pointers are the same size wherever dlsym exists.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> Status>(found)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    error_name = "cuGetErrorName": fn(Status, *mut *const c_char);
    error_string = "cuGetErrorString": fn(Status, *mut *const c_char);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut DeviceHandle, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, DeviceHandle);
    device_uuid = "cuDeviceGetUuid": fn(*mut Uuid, DeviceHandle);
    primary_retain = "cuDevicePrimaryCtxRetain": fn(*mut Context, DeviceHandle);
    primary_release = "cuDevicePrimaryCtxRelease_v2": fn(DeviceHandle);
    context_push = "cuCtxPushCurrent_v2": fn(Context);
    context_pop = "cuCtxPopCurrent_v2": fn(*mut Context);
    pointer_attribute = "cuPointerGetAttribute": fn(*mut c_void, c_int, Address);
    mem_alloc = "cuMemAlloc_v2": fn(*mut Address, size_t);
    mem_free = "cuMemFree_v2": fn(Address);
    host_alloc = "cuMemHostAlloc": fn(*mut *mut c_void, size_t, c_uint);
    host_free = "cuMemFreeHost": fn(*mut c_void);
    host_register = "cuMemHostRegister_v2": fn(*mut c_void, size_t, c_uint);
    host_unregister = "cuMemHostUnregister": fn(*mut c_void);
    host_device_pointer = "cuMemHostGetDevicePointer_v2": fn(*mut Address, *mut c_void, c_uint);
    memcpy_async = "cuMemcpyAsync": fn(Address, Address, size_t, StreamHandle);
    memset_async = "cuMemsetD8Async": fn(Address, u8, size_t, StreamHandle);
    ipc_handle = "cuIpcGetMemHandle": fn(*mut IpcHandle, Address);
    ipc_open = "cuIpcOpenMemHandle_v2": fn(*mut Address, IpcHandle, c_uint);
    ipc_close = "cuIpcCloseMemHandle": fn(Address);
    stream_create = "cuStreamCreate": fn(*mut StreamHandle, c_uint);
    stream_destroy = "cuStreamDestroy_v2": fn(StreamHandle);
    stream_is_capturing = "cuStreamIsCapturing": fn(StreamHandle, *mut c_int);
    stream_wait_event = "cuStreamWaitEvent": fn(StreamHandle, EventHandle, c_uint);
    stream_wait_value = "cuStreamWaitValue32_v2": fn(StreamHandle, Address, u32, c_uint);
    stream_write_value = "cuStreamWriteValue32_v2": fn(StreamHandle, Address, u32, c_uint);
    event_create = "cuEventCreate": fn(*mut EventHandle, c_uint);
    event_destroy = "cuEventDestroy_v2": fn(EventHandle);
    event_record = "cuEventRecord": fn(EventHandle, StreamHandle);
    event_query = "cuEventQuery": fn(EventHandle);
}

pub(super) const SUCCESS: Status = 0;
pub(super) const ERROR_INVALID_VALUE: Status = 1;
pub(super) const ERROR_NO_DEVICE: Status = 100;
pub(super) const ERROR_NOT_READY: Status = 600;

pub(super) const HOST_ALLOC_PORTABLE: c_uint = 1;
pub(super) const HOST_ALLOC_DEVICEMAP: c_uint = 2;
pub(super) const HOST_REGISTER_PORTABLE: c_uint = 1;
pub(super) const HOST_REGISTER_DEVICEMAP: c_uint = 2;
pub(super) const IPC_LAZY_ENABLE_PEER_ACCESS: c_uint = 1;
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
/// The stream goes on when `(int)(*address - value) >= 0`: the order of a counter that wraps.
pub(super) const WAIT_VALUE_GEQ: c_uint = 0;

pub(super) const ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: c_int = 122;
pub(super) const POINTER_MEMORY_TYPE: c_int = 2;
pub(super) const POINTER_DEVICE_ORDINAL: c_int = 9;
pub(super) const MEMORY_TYPE_DEVICE: c_uint = 2;
