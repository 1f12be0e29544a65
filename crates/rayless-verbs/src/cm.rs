//! The connection manager: listening, resolving, events with deadlines. rdma_cm is the only way that RoCE, iWARP and
//! eRDMA share.

use crate::{
    error::{VerbsError, check},
    ffi::{self, Functions, rdma_cm_event, rdma_cm_id, rdma_event_channel},
    load::functions,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{
    ffi::CStr,
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    ptr,
    time::{Duration, Instant},
};

/// Private data that every transport carries in both directions.
pub const MAX_PRIVATE: usize = 56;

/// An event channel that never blocks.
pub(crate) struct Channel {
    pub(crate) functions: &'static Functions,
    raw: *mut rdma_event_channel,
}

/// A copied event; the original has been acknowledged.
pub(crate) struct Event {
    pub(crate) kind: i32,
    pub(crate) status: i32,
    /// For a connection request the new id, which belongs to whoever takes the event.
    pub(crate) id: *mut rdma_cm_id,
    private: [u8; MAX_PRIVATE],
    private_len: usize,
}

impl Event {
    /// The peer's private data; some transports pad it with zeros.
    pub(crate) fn private(&self) -> &[u8] {
        &self.private[..self.private_len]
    }
}

impl Channel {
    pub(crate) fn open() -> Result<Self, VerbsError> {
        let functions = functions()?;
        // SAFETY: no argument.
        let raw = unsafe { (functions.rdma_create_event_channel)() };
        if raw.is_null() {
            return Err(VerbsError::last("rdma_create_event_channel"));
        }
        let channel = Self { functions, raw };
        rustix::io::ioctl_fionbio(channel.fd(), true)
            .map_err(|errno| VerbsError::Call { call: "ioctl(FIONBIO)", errno })?;
        Ok(channel)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel owns this descriptor and outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    pub(crate) const fn raw(&self) -> *mut rdma_event_channel {
        self.raw
    }

    pub(crate) fn create_id(&self) -> Result<*mut rdma_cm_id, VerbsError> {
        let mut id = ptr::null_mut();
        // SAFETY: the channel is alive, `id` is a place for the result.
        let result = unsafe { (self.functions.rdma_create_id)(self.raw, &mut id, ptr::null_mut(), ffi::RDMA_PS_TCP) };
        check("rdma_create_id", result)?;
        Ok(id)
    }

    /// The next event, if there is one.
    pub(crate) fn next(&self) -> Result<Option<Event>, VerbsError> {
        let mut raw: *mut rdma_cm_event = ptr::null_mut();
        // SAFETY: the channel is alive, `raw` is a place for the result.
        if unsafe { (self.functions.rdma_get_cm_event)(self.raw, &mut raw) } != 0 {
            return match VerbsError::last("rdma_get_cm_event") {
                VerbsError::Call { errno: Errno::AGAIN | Errno::INTR, .. } => Ok(None),
                error => Err(error),
            };
        }
        // SAFETY: a successful call gave an event that lives until it is acknowledged below.
        let event = unsafe { &*raw };
        let mut copy =
            Event { kind: event.event, status: event.status, id: event.id, private: [0; MAX_PRIVATE], private_len: 0 };
        let carries = [ffi::EVENT_CONNECT_REQUEST, ffi::EVENT_ESTABLISHED, ffi::EVENT_REJECTED].contains(&event.event);
        if carries && !event.conn.private_data.is_null() {
            copy.private_len = usize::from(event.conn.private_data_len).min(MAX_PRIVATE);
            // SAFETY: the event has that many bytes there; `private` has room for `MAX_PRIVATE`.
            unsafe {
                ptr::copy_nonoverlapping(event.conn.private_data.cast(), copy.private.as_mut_ptr(), copy.private_len);
            }
        }
        // SAFETY: `raw` is the event from above, acknowledged once. `event` is not used after this.
        unsafe { (self.functions.rdma_ack_cm_event)(raw) };
        Ok(Some(copy))
    }

    /// Waits for any event.
    pub(crate) fn wait(&self, waiting_for: &'static str, deadline: Instant) -> Result<Event, VerbsError> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VerbsError::TimedOut { waiting_for });
            }
            let fd = PollFd::from_borrowed_fd(self.fd(), PollFlags::IN);
            match poll(&mut [fd], Some(&timespec(left))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(VerbsError::Call { call: "poll", errno }),
            }
        }
    }

    /// Waits for one kind of event; another is an error.
    pub(crate) fn expect(&self, kind: i32, waiting_for: &'static str, deadline: Instant) -> Result<Event, VerbsError> {
        let event = self.wait(waiting_for, deadline)?;
        if event.kind == kind {
            return Ok(event);
        }
        if event.kind == ffi::EVENT_REJECTED {
            let text = event.private().split(|byte| *byte == 0).next().unwrap_or_default();
            let reason = String::from_utf8_lossy(text).into_owned();
            if !reason.is_empty() {
                return Err(VerbsError::Refused { reason });
            }
        }
        Err(VerbsError::Event { waiting_for, event: self.event_name(event.kind), status: event.status })
    }

    fn event_name(&self, kind: i32) -> String {
        // SAFETY: the function returns a static C string for every number.
        unsafe { CStr::from_ptr((self.functions.rdma_event_str)(kind)) }.to_string_lossy().into_owned()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every id of this channel has been destroyed or moved away by its owner, which holds the channel.
        unsafe { (self.functions.rdma_destroy_event_channel)(self.raw) };
    }
}

/// A socket address in C's form.
pub(crate) struct CAddress {
    storage: libc::sockaddr_storage,
}

impl CAddress {
    pub(crate) fn new(address: SocketAddr) -> Self {
        // SAFETY: all zeros is a valid sockaddr_storage.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        match address {
            SocketAddr::V4(v4) => {
                let sin = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                // SAFETY: a sockaddr_storage is large enough and aligned for every kind of address.
                unsafe { ptr::from_mut(&mut storage).cast::<libc::sockaddr_in>().write(sin) };
            }
            SocketAddr::V6(v6) => {
                let sin6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                // SAFETY: as above.
                unsafe { ptr::from_mut(&mut storage).cast::<libc::sockaddr_in6>().write(sin6) };
            }
        }
        Self { storage }
    }

    pub(crate) const fn as_ptr(&mut self) -> *mut libc::sockaddr {
        ptr::from_mut(&mut self.storage).cast()
    }
}

/// Listens for connections on an address of an RDMA device.
pub struct Listener {
    channel: Channel,
    id: *mut rdma_cm_id,
    address: SocketAddr,
}

// SAFETY: the id and channel are used by one thread at a time (`&mut self`, or calls that the library allows from any
// thread), and belong to no thread.
unsafe impl Send for Listener {}

/// A peer that asks to be connected.
pub struct Request {
    pub(crate) channel: Channel,
    pub(crate) id: *mut rdma_cm_id,
    event: Event,
}

// SAFETY: as for `Listener`.
unsafe impl Send for Request {}

impl Listener {
    /// Binds and listens. Port 0: the system picks one. On iWARP the port is a TCP port of the kernel's.
    pub fn bind(address: SocketAddr) -> Result<Self, VerbsError> {
        let channel = Channel::open()?;
        let id = channel.create_id()?;
        let mut listener = Self { channel, id, address };
        let mut c_address = CAddress::new(address);
        // SAFETY: the id is ours; the address lives across the call.
        check("rdma_bind_addr", unsafe { (listener.channel.functions.rdma_bind_addr)(id, c_address.as_ptr()) })?;
        // SAFETY: the id is ours.
        check("rdma_listen", unsafe { (listener.channel.functions.rdma_listen)(id, 128) })?;
        // SAFETY: the id is ours; the port comes in network order.
        let port = u16::from_be(unsafe { (listener.channel.functions.rdma_get_src_port)(id) });
        listener.address.set_port(port);
        Ok(listener)
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for a peer that asks to be connected.
    pub fn accept(&mut self, deadline: Instant) -> Result<Request, VerbsError> {
        const WAITING: &str = "waiting for a connection request";
        loop {
            let event = self.channel.wait(WAITING, deadline)?;
            if event.kind != ffi::EVENT_CONNECT_REQUEST {
                // News of an id that was given up before it was taken away from this channel.
                continue;
            }
            let channel = match Channel::open() {
                Ok(channel) => channel,
                Err(error) => {
                    // SAFETY: the id came with the event and is ours.
                    unsafe { (self.channel.functions.rdma_destroy_id)(event.id) };
                    return Err(error);
                }
            };
            let request = Request { id: event.id, event, channel };
            // SAFETY: both are alive, and the id's only event has been acknowledged, without which this would block.
            let moved = unsafe { (request.channel.functions.rdma_migrate_id)(request.id, request.channel.raw()) };
            check("rdma_migrate_id", moved)?;
            return Ok(request);
        }
    }

    /// Readable when `accept` may have something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // SAFETY: the id is ours; the channel is closed after it (field order does not matter: this runs first).
        unsafe { (self.channel.functions.rdma_destroy_id)(self.id) };
    }
}

impl Request {
    /// What the peer sent with its request, perhaps padded with zeros.
    pub fn private(&self) -> &[u8] {
        self.event.private()
    }

    /// Refuses, with a reason (cut at 56 bytes) that the peer gets as its error.
    pub fn reject(self, reason: &str) {
        let reason = &reason.as_bytes()[..reason.len().min(MAX_PRIVATE)];
        // SAFETY: the id is ours, the bytes live across the call. A peer that has gone makes no difference.
        unsafe { (self.channel.functions.rdma_reject)(self.id, reason.as_ptr().cast(), reason.len() as u8) };
    }

    /// Gives the id away.
    pub(crate) fn into_parts(self) -> (Channel, *mut rdma_cm_id) {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `this` is never dropped, so the channel is moved out exactly once.
        (unsafe { ptr::read(&this.channel) }, this.id)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // SAFETY: the id is ours and has no queue pair.
        unsafe { (self.channel.functions.rdma_destroy_id)(self.id) };
    }
}

/// One attempt at an address. A neighbour's answer can get lost, and the kernel then says nothing for as long as it was
/// given; a new attempt asks anew.
const ATTEMPT: Duration = Duration::from_secs(2);

/// Finds the device and route to `to`, from the address `from` if given.
pub(crate) fn resolve(
    to: SocketAddr,
    from: Option<IpAddr>,
    deadline: Instant,
) -> Result<(Channel, *mut rdma_cm_id), VerbsError> {
    loop {
        let attempt = deadline.min(Instant::now() + ATTEMPT);
        match resolve_once(to, from, attempt) {
            Err(error) if is_timeout(&error) && Instant::now() < deadline => {}
            Err(error) if is_timeout(&error) => return Err(VerbsError::TimedOut { waiting_for: RESOLVING }),
            other => return other,
        }
    }
}

const RESOLVING: &str = "resolving the peer's address";

fn is_timeout(error: &VerbsError) -> bool {
    match error {
        VerbsError::TimedOut { .. } => true,
        VerbsError::Event { waiting_for, status, .. } => *waiting_for == RESOLVING && *status == -libc::ETIMEDOUT,
        _ => false,
    }
}

fn resolve_once(
    to: SocketAddr,
    from: Option<IpAddr>,
    deadline: Instant,
) -> Result<(Channel, *mut rdma_cm_id), VerbsError> {
    let channel = Channel::open()?;
    let id = channel.create_id()?;
    let run = || {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        let mut to = CAddress::new(to);
        let mut from = from.map(|ip| CAddress::new(SocketAddr::new(ip, 0)));
        let from = from.as_mut().map_or(ptr::null_mut(), CAddress::as_ptr);
        // SAFETY: the id is ours; both addresses live across the call, and a null source means any.
        let result = unsafe { (channel.functions.rdma_resolve_addr)(id, from, to.as_ptr(), left) };
        check("rdma_resolve_addr", result)?;
        channel.expect(ffi::EVENT_ADDR_RESOLVED, RESOLVING, deadline)?;
        // SAFETY: the id is ours.
        check("rdma_resolve_route", unsafe { (channel.functions.rdma_resolve_route)(id, left) })?;
        channel.expect(ffi::EVENT_ROUTE_RESOLVED, "resolving the route", deadline)?;
        Ok(())
    };
    match run() {
        Ok(()) => Ok((channel, id)),
        Err(error) => {
            // SAFETY: the id is ours and has no queue pair.
            unsafe { (channel.functions.rdma_destroy_id)(id) };
            Err(error)
        }
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}
