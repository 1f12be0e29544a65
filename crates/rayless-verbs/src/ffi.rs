//! The part of `infiniband/verbs.h` and `rdma/rdma_cma.h` that is used, by hand.
//!
//! A bindings file of our own, and not a generated one, so that building needs neither libclang nor cmake nor RDMA
//! headers. Both libraries keep this ABI since 2008 (symbol versions IBVERBS_1.1 and RDMACM_1.0); sizes and offsets
//! were taken from the C compiler on x86-64 and are asserted below. Objects that the libraries allocate are
//! declared only up to the last field that is read.
#![allow(non_camel_case_types, missing_docs, reason = "C's names, documented in C's manual pages")]

use libc::{c_char, c_int, c_uint, c_void, sockaddr};

/// An object that is only passed back.
#[repr(C)]
pub(crate) struct Opaque {
    _private: [u8; 0],
}

pub(crate) type poll_cq = unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int;
pub(crate) type req_notify_cq = unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int;
pub(crate) type post_send = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;
pub(crate) type post_recv = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;

/// The operations that C's inline functions call; a slot of another operation is a plain pointer.
#[repr(C)]
pub(crate) struct ibv_context_ops {
    _before_poll: [*mut c_void; 11],
    pub(crate) poll_cq: Option<poll_cq>,
    pub(crate) req_notify_cq: Option<req_notify_cq>,
    _before_post: [*mut c_void; 11],
    _also_before_post: [*mut c_void; 1],
    pub(crate) post_send: Option<post_send>,
    pub(crate) post_recv: Option<post_recv>,
}

#[repr(C)]
pub(crate) struct ibv_context {
    pub(crate) device: *mut Opaque,
    pub(crate) ops: ibv_context_ops,
}

#[repr(C)]
pub(crate) struct ibv_qp {
    pub(crate) context: *mut ibv_context,
}

#[repr(C)]
pub(crate) struct ibv_cq {
    pub(crate) context: *mut ibv_context,
}

#[repr(C)]
pub(crate) struct ibv_mr {
    _context: *mut ibv_context,
    _pd: *mut Opaque,
    _addr: *mut c_void,
    _length: usize,
    _handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

#[repr(C)]
pub(crate) struct ibv_comp_channel {
    _context: *mut ibv_context,
    pub(crate) fd: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_int,
    pub(crate) opcode: c_int,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    _imm_data: u32,
    _qp_num: u32,
    _src_qp: u32,
    _wc_flags: c_uint,
    _pkey_index: u16,
    _slid: u16,
    _sl: u8,
    _dlid_path_bits: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_send_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut Self,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_int,
    pub(crate) send_flags: c_uint,
    pub(crate) imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    /// The rest of the unions, of which no operation here uses anything.
    pub(crate) rest: [u32; 19],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_recv_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut Self,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_qp_cap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

#[repr(C)]
pub(crate) struct ibv_qp_init_attr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut Opaque,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) qp_type: c_int,
    pub(crate) sq_sig_all: c_int,
}

#[repr(C)]
pub(crate) struct rdma_event_channel {
    pub(crate) fd: c_int,
}

#[repr(C)]
pub(crate) struct rdma_cm_id {
    pub(crate) verbs: *mut ibv_context,
    _channel: *mut rdma_event_channel,
    _context: *mut c_void,
    pub(crate) qp: *mut ibv_qp,
}

#[repr(C)]
pub(crate) struct rdma_conn_param {
    pub(crate) private_data: *const c_void,
    pub(crate) private_data_len: u8,
    pub(crate) responder_resources: u8,
    pub(crate) initiator_depth: u8,
    pub(crate) flow_control: u8,
    pub(crate) retry_count: u8,
    pub(crate) rnr_retry_count: u8,
    pub(crate) srq: u8,
    pub(crate) qp_num: u32,
}

#[repr(C)]
pub(crate) struct rdma_cm_event {
    pub(crate) id: *mut rdma_cm_id,
    _listen_id: *mut rdma_cm_id,
    pub(crate) event: c_int,
    pub(crate) status: c_int,
    /// The larger half of the union (`ud`) is never read: only connected ids are made here.
    pub(crate) conn: rdma_conn_param,
}

const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(offset_of!(ibv_context, ops) == 8);
    assert!(offset_of!(ibv_context, ops.poll_cq) == 96);
    assert!(offset_of!(ibv_context, ops.req_notify_cq) == 104);
    assert!(offset_of!(ibv_context, ops.post_send) == 208);
    assert!(offset_of!(ibv_context, ops.post_recv) == 216);
    assert!(offset_of!(ibv_mr, lkey) == 36 && offset_of!(ibv_mr, rkey) == 40);
    assert!(offset_of!(ibv_comp_channel, fd) == 8);
    assert!(size_of::<ibv_wc>() == 48 && offset_of!(ibv_wc, byte_len) == 20);
    assert!(size_of::<ibv_sge>() == 16 && size_of::<ibv_recv_wr>() == 32);
    assert!(size_of::<ibv_send_wr>() == 128);
    assert!(offset_of!(ibv_send_wr, send_flags) == 32);
    assert!(offset_of!(ibv_send_wr, remote_addr) == 40 && offset_of!(ibv_send_wr, rkey) == 48);
    assert!(size_of::<ibv_qp_init_attr>() == 64 && offset_of!(ibv_qp_init_attr, cap) == 32);
    assert!(offset_of!(ibv_qp_init_attr, qp_type) == 52 && offset_of!(ibv_qp_init_attr, sq_sig_all) == 56);
    assert!(offset_of!(rdma_cm_id, verbs) == 0 && offset_of!(rdma_cm_id, qp) == 24);
    assert!(size_of::<rdma_conn_param>() == 24 && offset_of!(rdma_conn_param, qp_num) == 16);
    assert!(offset_of!(rdma_cm_event, event) == 16 && offset_of!(rdma_cm_event, status) == 20);
    assert!(offset_of!(rdma_cm_event, conn) == 24);
};

pub(crate) const RDMA_PS_TCP: c_int = 0x0106;
pub(crate) const IBV_QPT_RC: c_int = 2;
pub(crate) const IBV_WR_RDMA_WRITE: c_int = 0;
pub(crate) const IBV_WR_SEND: c_int = 2;
pub(crate) const IBV_WR_RDMA_READ: c_int = 4;
pub(crate) const IBV_SEND_SIGNALED: c_uint = 2;
pub(crate) const IBV_SEND_INLINE: c_uint = 8;
pub(crate) const IBV_WC_RECV: c_int = 128;

pub(crate) const EVENT_ADDR_RESOLVED: c_int = 0;
pub(crate) const EVENT_ROUTE_RESOLVED: c_int = 2;
pub(crate) const EVENT_CONNECT_REQUEST: c_int = 4;
pub(crate) const EVENT_REJECTED: c_int = 8;
pub(crate) const EVENT_ESTABLISHED: c_int = 9;
pub(crate) const EVENT_DISCONNECTED: c_int = 10;
pub(crate) const EVENT_DEVICE_REMOVAL: c_int = 11;
pub(crate) const EVENT_TIMEWAIT_EXIT: c_int = 15;

/// Declares the functions that are looked up at run time.
macro_rules! functions {
    ($($library:ident { $(fn $name:ident($($arg:ty),*) $(-> $ret:ty)?;)* })*) => {
        /// The libraries' functions.
        pub(crate) struct Functions {
            $($(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*)*
            /// In libibverbs since rdma-core 34.
            pub(crate) ibv_reg_dmabuf_mr:
                Option<unsafe extern "C" fn(*mut Opaque, u64, usize, u64, c_int, c_int) -> *mut ibv_mr>,
        }

        impl Functions {
            /// Looks each function up: `(library, name)` of the first that is missing otherwise.
            ///
            /// # Safety
            /// `find(library, name)` must give the address of the C function of that name, or null.
            pub(crate) unsafe fn look_up(
                find: impl Fn(&'static str, &std::ffi::CStr) -> *mut c_void,
            ) -> Result<Self, (&'static str, &'static str)> {
                $($(
                    // A C string literal of the function's name.
                    let name = std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes());
                    let address = name.map_or(std::ptr::null_mut(), |name| find(stringify!($library), name));
                    if address.is_null() {
                        return Err((stringify!($library), stringify!($name)));
                    }
                    // SAFETY: by this function's contract the address is that of the C function, whose type is declared here.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(address)
                    };
                )*)*
                let address = find("ibverbs", c"ibv_reg_dmabuf_mr");
                let ibv_reg_dmabuf_mr = (!address.is_null()).then(|| {
                    // SAFETY: as above.
                    unsafe {
                        std::mem::transmute::<
                            *mut c_void,
                            unsafe extern "C" fn(*mut Opaque, u64, usize, u64, c_int, c_int) -> *mut ibv_mr,
                        >(address)
                    }
                });
                Ok(Self { $($($name,)*)* ibv_reg_dmabuf_mr })
            }
        }
    };
}

functions! {
    ibverbs {
        fn ibv_get_device_name(*mut Opaque) -> *const c_char;
        fn ibv_alloc_pd(*mut ibv_context) -> *mut Opaque;
        fn ibv_dealloc_pd(*mut Opaque) -> c_int;
        fn ibv_reg_mr(*mut Opaque, *mut c_void, usize, c_int) -> *mut ibv_mr;
        fn ibv_dereg_mr(*mut ibv_mr) -> c_int;
        fn ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
        fn ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
        fn ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
        fn ibv_destroy_cq(*mut ibv_cq) -> c_int;
        fn ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
        fn ibv_ack_cq_events(*mut ibv_cq, c_uint);
        fn ibv_wc_status_str(c_int) -> *const c_char;
    }
    rdmacm {
        fn rdma_create_event_channel() -> *mut rdma_event_channel;
        fn rdma_destroy_event_channel(*mut rdma_event_channel);
        fn rdma_create_id(*mut rdma_event_channel, *mut *mut rdma_cm_id, *mut c_void, c_int) -> c_int;
        fn rdma_destroy_id(*mut rdma_cm_id) -> c_int;
        fn rdma_bind_addr(*mut rdma_cm_id, *mut sockaddr) -> c_int;
        fn rdma_listen(*mut rdma_cm_id, c_int) -> c_int;
        fn rdma_resolve_addr(*mut rdma_cm_id, *mut sockaddr, *mut sockaddr, c_int) -> c_int;
        fn rdma_resolve_route(*mut rdma_cm_id, c_int) -> c_int;
        fn rdma_create_qp(*mut rdma_cm_id, *mut Opaque, *mut ibv_qp_init_attr) -> c_int;
        fn rdma_destroy_qp(*mut rdma_cm_id);
        fn rdma_connect(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        fn rdma_accept(*mut rdma_cm_id, *mut rdma_conn_param) -> c_int;
        fn rdma_reject(*mut rdma_cm_id, *const c_void, u8) -> c_int;
        fn rdma_disconnect(*mut rdma_cm_id) -> c_int;
        fn rdma_migrate_id(*mut rdma_cm_id, *mut rdma_event_channel) -> c_int;
        fn rdma_get_cm_event(*mut rdma_event_channel, *mut *mut rdma_cm_event) -> c_int;
        fn rdma_ack_cm_event(*mut rdma_cm_event) -> c_int;
        fn rdma_get_src_port(*mut rdma_cm_id) -> u16;
        fn rdma_event_str(c_int) -> *const c_char;
    }
}
