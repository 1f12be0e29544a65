//! A reliable connection: queue pair, completion queue, registered memory.
//!
//! An [`Endpoint`] is `Prepared` (RECVs may be posted: they must be there before the peer can send) and then
//! `Connected` (everything may be posted); what is out of order does not compile. Nothing here allocates after set-up.

use crate::{
    cm::{Channel, MAX_PRIVATE, Request, resolve},
    error::{VerbsError, check},
    ffi::{
        self, Functions, Opaque, ibv_comp_channel, ibv_cq, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, ibv_send_wr,
        ibv_sge, ibv_wc, rdma_cm_id, rdma_conn_param,
    },
    region::{Access, Region},
};
use rustix::io::Errno;
use std::{
    ffi::CStr,
    fmt,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
    ptr,
    time::Instant,
};

/// Work requests of one posting call.
pub const MAX_BATCH: usize = 16;

/// Sizes of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Sends, writes and reads in progress.
    pub sends: u32,
    /// RECVs posted.
    pub recvs: u32,
    /// Bytes that are asked to be sent inline; the device may grant fewer, or none.
    pub inline: u32,
}

/// A registered region of one endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionId(usize);

/// A range of a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// The region.
    pub region: RegionId,
    /// Its first byte's place in the region.
    pub offset: usize,
    /// Its bytes.
    pub len: usize,
}

/// Memory of the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Remote {
    /// Device address.
    pub address: u64,
    /// Its key.
    pub rkey: u32,
}

/// A work request of the send queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Work {
    /// What to do.
    pub operation: Operation,
    /// From where, or for a READ to where. Sent inline when the device takes that many bytes inline.
    pub local: Range,
    /// Whether its success is reported too (a failure always is).
    pub signaled: bool,
    /// Comes back in the completion.
    pub id: u64,
}

/// What a work request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Fills the peer's next RECV.
    Send,
    /// Writes to the peer's memory; the peer is not told.
    Write(Remote),
    /// Reads the peer's memory.
    Read(Remote),
}

/// A finished work request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Completion {
    /// The request's id.
    pub id: u64,
    /// Whether it was a RECV. (Says nothing of a failed request.)
    pub is_recv: bool,
    /// Bytes received.
    pub len: usize,
    /// `ibv_wc_status`; 0 is success.
    pub status: i32,
}

impl Completion {
    /// `IBV_WC_WR_FLUSH_ERR`: not done because the connection had ended.
    pub const FLUSHED: i32 = 5;
}

/// What was posted and taken, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Posted {
    /// Work requests of both queues.
    pub work_requests: u64,
    /// Posting calls.
    pub doorbells: u64,
    /// Completions.
    pub completions: u64,
}

/// State of an [`Endpoint`]: not connected yet.
#[derive(Debug)]
pub enum Prepared {}
/// State of an [`Endpoint`]: connected (or no more).
#[derive(Debug)]
pub enum Connected {}

/// One end of a reliable connection.
///
/// A send before the connection is there does not compile:
/// ```compile_fail
/// use rayless_verbs::{Endpoint, Prepared, Work};
/// fn early(endpoint: &mut Endpoint<Prepared>, work: Work) {
///     endpoint.post(&[work]).unwrap();
/// }
/// ```
/// Nor does the use of the prepared endpoint after it was connected:
/// ```compile_fail
/// use rayless_verbs::{Endpoint, Prepared};
/// use std::time::Instant;
/// fn twice(endpoint: Endpoint<Prepared>, deadline: Instant) {
///     let connected = endpoint.connect(&[], deadline);
///     let again = endpoint.connect(&[], deadline);
/// }
/// ```
/// Nor is it shared between threads without a lock, for a queue pair is one thread's at a time:
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<rayless_verbs::Endpoint<rayless_verbs::Connected>>();
/// ```
pub struct Endpoint<State> {
    core: Core,
    state: PhantomData<State>,
}

struct Core {
    channel: Channel,
    id: *mut rdma_cm_id,
    pd: *mut Opaque,
    events: *mut ibv_comp_channel,
    cq: *mut ibv_cq,
    has_qp: bool,
    regions: Vec<Region>,
    inline: u32,
    posted: Posted,
    ended: Option<&'static str>,
}

// SAFETY: the objects belong to no thread; `Core` has no method by which two threads could use them at once (it is not Sync).
unsafe impl Send for Core {}

impl Endpoint<Prepared> {
    /// Finds the device that reaches `to` (from the address `from`, if given) and makes a queue pair on it.
    pub fn to(to: SocketAddr, from: Option<IpAddr>, sizes: Sizes, deadline: Instant) -> Result<Self, VerbsError> {
        let (channel, id) = resolve(to, from, deadline)?;
        Self::prepare(channel, id, sizes)
    }

    /// Makes a queue pair for a peer that asked. The request is refused when that fails.
    pub fn for_request(request: Request, sizes: Sizes) -> Result<Self, VerbsError> {
        let (channel, id) = request.into_parts();
        Self::prepare(channel, id, sizes)
    }

    fn prepare(channel: Channel, id: *mut rdma_cm_id, sizes: Sizes) -> Result<Self, VerbsError> {
        // From here on `Core::drop` gives back what there is.
        let mut core = Core {
            channel,
            id,
            pd: ptr::null_mut(),
            events: ptr::null_mut(),
            cq: ptr::null_mut(),
            has_qp: false,
            regions: Vec::new(),
            inline: 0,
            posted: Posted::default(),
            ended: None,
        };
        core.make_queues(sizes)?;
        Ok(Self { core, state: PhantomData })
    }

    /// Connects to the peer, which gets `private` (at most 56 bytes) and answers with the returned bytes (perhaps
    /// padded with zeros).
    pub fn connect(self, private: &[u8], deadline: Instant) -> Result<(Endpoint<Connected>, Vec<u8>), VerbsError> {
        let mut param = self.core.connection(private)?;
        // SAFETY: the id is ours with a queue pair; the parameters and private data live across the call.
        check("rdma_connect", unsafe { (self.functions().rdma_connect)(self.core.id, &mut param) })?;
        let event = self.core.channel.expect(ffi::EVENT_ESTABLISHED, "connecting", deadline)?;
        let answer = event.private().to_vec();
        Ok((Endpoint { core: self.core, state: PhantomData }, answer))
    }

    /// Accepts the peer, which gets `private` (at most 56 bytes).
    pub fn accept(self, private: &[u8], deadline: Instant) -> Result<Endpoint<Connected>, VerbsError> {
        let mut param = self.core.connection(private)?;
        // SAFETY: as in `connect`.
        check("rdma_accept", unsafe { (self.functions().rdma_accept)(self.core.id, &mut param) })?;
        self.core.channel.expect(ffi::EVENT_ESTABLISHED, "accepting", deadline)?;
        Ok(Endpoint { core: self.core, state: PhantomData })
    }
}

impl<State> Endpoint<State> {
    fn functions(&self) -> &'static Functions {
        self.core.channel.functions
    }

    /// The device's name, as in /sys/class/infiniband.
    pub fn device(&self) -> String {
        // SAFETY: the id is bound to a device, whose context and name live as long as it.
        unsafe {
            let name = (self.functions().ibv_get_device_name)((*(*self.core.id).verbs).device);
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    /// Bytes that the device takes inline; perhaps 0.
    pub const fn max_inline(&self) -> usize {
        self.core.inline as usize
    }

    /// Allocates and registers zeroed host memory, which lives as long as the endpoint.
    pub fn allocate(&mut self, len: usize, access: Access) -> Result<RegionId, VerbsError> {
        // SAFETY: the domain is ours and is freed after all regions.
        let region = unsafe { Region::allocate(self.functions(), self.core.pd, len, access) }?;
        Ok(self.core.keep(region))
    }

    /// Registers memory that is not ours: a GPU's, where the device takes its addresses (nvidia_peermem).
    ///
    /// # Safety
    /// `base..base + len` must stay valid until the endpoint is dropped.
    pub unsafe fn register(&mut self, base: u64, len: usize, access: Access) -> Result<RegionId, VerbsError> {
        // SAFETY: as in `allocate`, and by contract.
        let region = unsafe { Region::register(self.functions(), self.core.pd, base, len, access) }?;
        Ok(self.core.keep(region))
    }

    /// Registers a part of a dma-buf, where the device has that. Its addresses count from 0.
    pub fn register_dmabuf(
        &mut self,
        dmabuf: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<RegionId, VerbsError> {
        // SAFETY: as in `allocate`.
        let region = unsafe { Region::register_dmabuf(self.functions(), self.core.pd, dmabuf, offset, len, access) }?;
        Ok(self.core.keep(region))
    }

    /// What a peer needs to write to or read from a region.
    pub fn remote(&self, region: RegionId) -> Remote {
        let region = &self.core.regions[region.0];
        Remote { address: region.base(), rkey: region.rkey() }
    }

    /// Bytes of a region.
    pub fn region_len(&self, region: RegionId) -> usize {
        self.core.regions[region.0].len()
    }

    /// Copies into a region of host memory. Bytes that the device is sending at the time would go out mixed.
    pub fn copy_in(&mut self, region: RegionId, offset: usize, bytes: &[u8]) -> Result<(), VerbsError> {
        self.core.regions[region.0].copy_in(offset, bytes)
    }

    /// Copies out of a region of host memory.
    pub fn copy_out(&self, region: RegionId, offset: usize, out: &mut [u8]) -> Result<(), VerbsError> {
        self.core.regions[region.0].copy_out(offset, out)
    }

    /// Posts RECVs, each with an id, in order, with one call (at most [`MAX_BATCH`]).
    pub fn post_recvs(&mut self, recvs: &[(Range, u64)]) -> Result<(), VerbsError> {
        self.core.post_recvs(recvs)
    }

    /// What was posted and taken.
    pub const fn posted(&self) -> Posted {
        self.core.posted
    }
}

impl Endpoint<Connected> {
    /// Posts work, in order, with one call (at most [`MAX_BATCH`]) and so one doorbell.
    pub fn post(&mut self, work: &[Work]) -> Result<(), VerbsError> {
        self.core.post(work)
    }

    /// Takes finished requests; gives how many.
    pub fn poll(&mut self, out: &mut [Completion; MAX_BATCH]) -> Result<usize, VerbsError> {
        self.core.poll(out)
    }

    /// Makes the next completion raise the descriptor of [`Endpoint::completion_fd`]. Poll once more after it: one that
    /// came before does not.
    pub fn arm(&mut self) -> Result<(), VerbsError> {
        self.core.arm()
    }

    /// Readable when an armed completion queue got a completion.
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel owns the descriptor and outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw((*self.core.events).fd) }
    }

    /// Readable when there is news of the connection, for [`Endpoint::ended`].
    pub fn connection_fd(&self) -> BorrowedFd<'_> {
        self.core.channel.fd()
    }

    /// Takes what made `completion_fd` readable.
    pub fn acknowledge(&mut self) {
        self.core.acknowledge();
    }

    /// Whether and how the connection has ended.
    pub fn ended(&mut self) -> Result<Option<&'static str>, VerbsError> {
        while let Some(event) = self.core.channel.next()? {
            self.core.ended = match event.kind {
                ffi::EVENT_DISCONNECTED | ffi::EVENT_TIMEWAIT_EXIT => Some("the connection was closed"),
                ffi::EVENT_DEVICE_REMOVAL => Some("the RDMA device was removed"),
                _ => self.core.ended,
            };
        }
        Ok(self.core.ended)
    }

    /// The meaning of a completion's status.
    pub fn status_text(&self, status: i32) -> String {
        // SAFETY: the function returns a static C string for every number.
        unsafe { CStr::from_ptr((self.functions().ibv_wc_status_str)(status)) }.to_string_lossy().into_owned()
    }

    /// Ends the connection: what is still posted on either side is flushed.
    pub fn disconnect(&mut self) {
        // SAFETY: the id is ours. A connection that has ended makes no difference.
        unsafe { (self.functions().rdma_disconnect)(self.core.id) };
    }
}

impl Core {
    fn make_queues(&mut self, sizes: Sizes) -> Result<(), VerbsError> {
        let functions = self.channel.functions;
        // SAFETY: the id is bound to a device (resolved, or asked by a peer), so its context is there.
        let context = unsafe { (*self.id).verbs };
        if context.is_null() {
            return Err(VerbsError::Misuse { what: "the connection is bound to no RDMA device".to_owned() });
        }
        // SAFETY: the context is alive as long as the id.
        unsafe {
            self.pd = (functions.ibv_alloc_pd)(context);
            if self.pd.is_null() {
                return Err(VerbsError::last("ibv_alloc_pd"));
            }
            self.events = (functions.ibv_create_comp_channel)(context);
            if self.events.is_null() {
                return Err(VerbsError::last("ibv_create_comp_channel"));
            }
            let depth = i32::try_from(sizes.sends + sizes.recvs).unwrap_or(i32::MAX);
            self.cq = (functions.ibv_create_cq)(context, depth, ptr::null_mut(), self.events, 0);
            if self.cq.is_null() {
                return Err(VerbsError::last("ibv_create_cq"));
            }
        }
        let fd = self.completion_fd();
        rustix::io::ioctl_fionbio(fd, true).map_err(|errno| VerbsError::Call { call: "ioctl(FIONBIO)", errno })?;
        // What the device grants inline is found by asking: some refuse the queue pair, some grant less.
        let mut refused = None;
        for inline in [sizes.inline, 32.min(sizes.inline), 0] {
            let mut attributes = ibv_qp_init_attr {
                qp_context: ptr::null_mut(),
                send_cq: self.cq,
                recv_cq: self.cq,
                srq: ptr::null_mut(),
                cap: ibv_qp_cap {
                    max_send_wr: sizes.sends,
                    max_recv_wr: sizes.recvs,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: inline,
                },
                qp_type: ffi::IBV_QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: id, domain and queues are alive and of one device; the attributes live across the call.
            if unsafe { (functions.rdma_create_qp)(self.id, self.pd, &mut attributes) } == 0 {
                self.has_qp = true;
                self.inline = attributes.cap.max_inline_data;
                return Ok(());
            }
            refused = Some(VerbsError::last("rdma_create_qp"));
        }
        Err(refused.unwrap_or_else(|| VerbsError::returned("rdma_create_qp", libc::EINVAL)))
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel owns the descriptor and outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw((*self.events).fd) }
    }

    fn connection(&self, private: &[u8]) -> Result<rdma_conn_param, VerbsError> {
        let Some(len) = u8::try_from(private.len()).ok().filter(|len| usize::from(*len) <= MAX_PRIVATE) else {
            let what = format!("private data of {} bytes; the limit is {MAX_PRIVATE}", private.len());
            return Err(VerbsError::Misuse { what });
        };
        Ok(rdma_conn_param {
            private_data: private.as_ptr().cast(),
            private_data_len: len,
            responder_resources: 1,
            initiator_depth: 1,
            flow_control: 0,
            // 7: the most; for receiver-not-ready it means for ever, but RECVs are there before any send.
            retry_count: 7,
            rnr_retry_count: 7,
            srq: 0,
            qp_num: 0,
        })
    }

    fn keep(&mut self, region: Region) -> RegionId {
        self.regions.push(region);
        RegionId(self.regions.len() - 1)
    }

    fn sge(&self, range: Range) -> Result<ibv_sge, VerbsError> {
        let region =
            self.regions.get(range.region.0).ok_or_else(|| VerbsError::Misuse { what: "an unknown region".into() })?;
        let length =
            u32::try_from(range.len).map_err(|_| VerbsError::Misuse { what: "4 GiB in one request".into() })?;
        Ok(ibv_sge { addr: region.address(range.offset, range.len)?, length, lkey: region.lkey() })
    }

    fn post_recvs(&mut self, recvs: &[(Range, u64)]) -> Result<(), VerbsError> {
        check_batch(recvs.len())?;
        let mut sges = [ibv_sge::default(); MAX_BATCH];
        let empty = ibv_recv_wr { wr_id: 0, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 1 };
        let mut requests = [empty; MAX_BATCH];
        for (at, (range, id)) in recvs.iter().enumerate() {
            sges[at] = self.sge(*range)?;
            requests[at].wr_id = *id;
        }
        for at in (0..recvs.len()).rev() {
            requests[at].sg_list = &raw mut sges[at];
            requests[at].next = if at + 1 < recvs.len() { &raw mut requests[at + 1] } else { ptr::null_mut() };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; C's inline `ibv_post_recv` makes this very call. The requests and their lists live
        // across it (the provider copies them), and every range lies in a region that outlives the queue pair.
        let result = unsafe {
            let qp = (*self.id).qp;
            let Some(post) = (*(*qp).context).ops.post_recv else {
                return Err(VerbsError::returned("ibv_post_recv", libc::EOPNOTSUPP));
            };
            post(qp, requests.as_mut_ptr(), &mut bad)
        };
        if result != 0 {
            return Err(VerbsError::returned("ibv_post_recv", result));
        }
        self.posted.work_requests += recvs.len() as u64;
        self.posted.doorbells += 1;
        Ok(())
    }

    fn post(&mut self, work: &[Work]) -> Result<(), VerbsError> {
        check_batch(work.len())?;
        let mut sges = [ibv_sge::default(); MAX_BATCH];
        let empty = ibv_send_wr {
            wr_id: 0,
            next: ptr::null_mut(),
            sg_list: ptr::null_mut(),
            num_sge: 1,
            opcode: 0,
            send_flags: 0,
            imm_data: 0,
            remote_addr: 0,
            rkey: 0,
            rest: [0; 19],
        };
        let mut requests = [empty; MAX_BATCH];
        for (at, Work { operation, local, signaled, id }) in work.iter().enumerate() {
            sges[at] = self.sge(*local)?;
            let request = &mut requests[at];
            request.wr_id = *id;
            request.send_flags = if *signaled { ffi::IBV_SEND_SIGNALED } else { 0 };
            let may_inline = match operation {
                Operation::Send => {
                    request.opcode = ffi::IBV_WR_SEND;
                    true
                }
                Operation::Write(remote) => {
                    request.opcode = ffi::IBV_WR_RDMA_WRITE;
                    (request.remote_addr, request.rkey) = (remote.address, remote.rkey);
                    true
                }
                Operation::Read(remote) => {
                    request.opcode = ffi::IBV_WR_RDMA_READ;
                    (request.remote_addr, request.rkey) = (remote.address, remote.rkey);
                    false
                }
            };
            if may_inline && local.len <= self.inline as usize {
                request.send_flags |= ffi::IBV_SEND_INLINE;
            }
        }
        for at in (0..work.len()).rev() {
            requests[at].sg_list = &raw mut sges[at];
            requests[at].next = if at + 1 < work.len() { &raw mut requests[at + 1] } else { ptr::null_mut() };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post_recvs`; inline bytes are read during the call.
        let result = unsafe {
            let qp = (*self.id).qp;
            let Some(post) = (*(*qp).context).ops.post_send else {
                return Err(VerbsError::returned("ibv_post_send", libc::EOPNOTSUPP));
            };
            post(qp, requests.as_mut_ptr(), &mut bad)
        };
        if result != 0 {
            return Err(VerbsError::returned("ibv_post_send", result));
        }
        self.posted.work_requests += work.len() as u64;
        self.posted.doorbells += 1;
        Ok(())
    }

    fn poll(&mut self, out: &mut [Completion; MAX_BATCH]) -> Result<usize, VerbsError> {
        let mut raw = [ibv_wc::default(); MAX_BATCH];
        // SAFETY: the queue is alive; C's inline `ibv_poll_cq` makes this very call; `raw` has room for what is asked.
        let taken = unsafe {
            let Some(poll) = (*(*self.cq).context).ops.poll_cq else {
                return Err(VerbsError::returned("ibv_poll_cq", libc::EOPNOTSUPP));
            };
            poll(self.cq, MAX_BATCH as i32, raw.as_mut_ptr())
        };
        let Ok(taken) = usize::try_from(taken) else {
            return Err(VerbsError::returned("ibv_poll_cq", taken));
        };
        for (to, wc) in out.iter_mut().zip(&raw[..taken]) {
            *to = Completion {
                id: wc.wr_id,
                is_recv: wc.opcode & ffi::IBV_WC_RECV != 0,
                len: wc.byte_len as usize,
                status: wc.status,
            };
        }
        self.posted.completions += taken as u64;
        Ok(taken)
    }

    fn arm(&self) -> Result<(), VerbsError> {
        // SAFETY: the queue is alive; C's inline `ibv_req_notify_cq` makes this very call.
        let result = unsafe {
            let Some(arm) = (*(*self.cq).context).ops.req_notify_cq else {
                return Err(VerbsError::returned("ibv_req_notify_cq", libc::EOPNOTSUPP));
            };
            arm(self.cq, 0)
        };
        if result == 0 { Ok(()) } else { Err(VerbsError::returned("ibv_req_notify_cq", result)) }
    }

    fn acknowledge(&self) {
        let functions = self.channel.functions;
        loop {
            let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the channel is alive and does not block; both are places for the result. Every event taken is
            // acknowledged, without which destroying the queue would wait for ever.
            unsafe {
                if (functions.ibv_get_cq_event)(self.events, &mut cq, &mut context) != 0 {
                    return;
                }
                (functions.ibv_ack_cq_events)(cq, 1);
            }
        }
    }
}

fn check_batch(len: usize) -> Result<(), VerbsError> {
    if (1..=MAX_BATCH).contains(&len) {
        return Ok(());
    }
    Err(VerbsError::Misuse { what: format!("{len} requests in one call; 1 to {MAX_BATCH} can be posted") })
}

impl Drop for Core {
    fn drop(&mut self) {
        let functions = self.channel.functions;
        // SAFETY: each object is ours and destroyed once, users before what they use: the queue pair, then the queue
        // and the memory that it could touch, then the domain and the id; the channel's own drop comes last.
        unsafe {
            if self.has_qp {
                (functions.rdma_destroy_qp)(self.id);
            }
            if !self.cq.is_null() {
                self.acknowledge();
                (functions.ibv_destroy_cq)(self.cq);
            }
            if !self.events.is_null() {
                (functions.ibv_destroy_comp_channel)(self.events);
            }
            for region in self.regions.drain(..) {
                region.free(functions);
            }
            if !self.pd.is_null() {
                (functions.ibv_dealloc_pd)(self.pd);
            }
            (functions.rdma_destroy_id)(self.id);
        }
    }
}

/// Whether an error of `post` means that the connection has ended, not that the request was wrong.
pub fn is_connection_error(error: &VerbsError) -> bool {
    matches!(error, VerbsError::Call { errno: Errno::NOTCONN | Errno::CONNRESET | Errno::PIPE, .. })
}

impl<State> fmt::Debug for Endpoint<State> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("inline", &self.core.inline)
            .field("posted", &self.core.posted)
            .finish_non_exhaustive()
    }
}
