//! The system calls that have no safe wrapper in the crates used here. All unsafe code of this crate is in this file.
#![allow(unsafe_code)]

use rustix::fd::{AsRawFd as _, OwnedFd};
use std::{
    ffi::CStr,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
};
use tokio::io::unix::AsyncFd;

/// One address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawAddress {
    pub(crate) interface: String,
    pub(crate) address: IpAddr,
    pub(crate) is_up: bool,
    pub(crate) is_loopback: bool,
}

/// Every IP address of every interface, in the kernel's order.
pub(crate) fn addresses() -> io::Result<Vec<RawAddress>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `list` is a valid place for the result; it is freed below, once.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut out = Vec::new();
    let mut next = list;
    while !next.is_null() {
        // SAFETY: not null, and part of a list that getifaddrs made and that is not yet freed.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        if entry.ifa_addr.is_null() || entry.ifa_name.is_null() {
            continue;
        }
        // SAFETY: not null; every sockaddr starts with its family.
        let address = match i32::from(unsafe { (*entry.ifa_addr).sa_family }) {
            libc::AF_INET => {
                // SAFETY: with this family it is a sockaddr_in; read_unaligned asks for no alignment.
                let socket = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(socket.sin_addr.s_addr)))
            }
            libc::AF_INET6 => {
                // SAFETY: with this family it is a sockaddr_in6; read_unaligned asks for no alignment.
                let socket = unsafe { entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
                IpAddr::V6(Ipv6Addr::from(socket.sin6_addr.s6_addr))
            }
            _ => continue,
        };
        // SAFETY: not null, a C string that lives as long as the list.
        let interface = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy().into_owned();
        let has = |flag: i32| entry.ifa_flags & flag as u32 != 0;
        out.push(RawAddress { interface, address, is_up: has(libc::IFF_UP), is_loopback: has(libc::IFF_LOOPBACK) });
    }
    // SAFETY: the list from above; nothing borrowed from it is left.
    unsafe { libc::freeifaddrs(list) };
    Ok(out)
}

/// Has tokio wait for a timer of the kernel's.
pub(crate) fn register_timer(timer: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives, and it lives in the AsyncFd.
    unsafe { AsyncFd::register(timer) }.map_err(io::Error::from)
}

/// Has the kernel hand out every datagram by itself, and not several of one sender put together.
pub(crate) fn keep_datagrams_apart(socket: &UdpSocket) -> io::Result<()> {
    let off: libc::c_int = 0;
    let length = size_of_val(&off) as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as `socket` is borrowed; `length` bytes at `off` are read during the call only.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_GRO, (&raw const off).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Pieces of memory from this size on are mappings of their own. It is where glibc begins, too.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;

/// Has the allocator give every large piece of memory back to the kernel as soon as it is free. Left to itself it keeps all those that are
/// not larger than the largest that it has seen come back.
pub(crate) fn give_large_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: changes where later allocations come from; allocator and call are safe in any thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives the calling thread the lowest real-time priority: ahead of every ordinary process, behind every other
/// real-time one. Its children are ordinary again.
pub(crate) fn run_in_real_time() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread; the parameters are read during the call only.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
