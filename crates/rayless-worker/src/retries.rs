//! How stubbornly TCP tries again on a lossy network.
//!
//! The kernel doubles its patience with each lost packet. Where a third of all packets is lost that leads to silences of ten seconds
//! and more on a connection whose both ends are well, and a session that is silent counts as dead. A step session sends little:
//! trying again five times a second costs nothing.

use rustix::net::sockopt;
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

/// From `linux/tcp.h`; Linux 6.15 and later.
const TCP_RTO_MAX_MS: libc::c_int = 44;
/// The least that the kernel takes.
const LONGEST_WAIT_MS: libc::c_int = 1000;

/// Makes this connection try again soon, however often it has tried.
///
/// # Errors
/// Not a TCP socket, or one that is gone.
pub(crate) fn keep_short(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    // As long as few packets are under way, the first six retries come at the same short distance (any kernel of today).
    sockopt::set_tcp_thin_linear_timeouts(socket, true)?;
    // Later ones too, where the kernel knows how; it is no fault where it does not.
    let value = LONGEST_WAIT_MS;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the option reads one int of that size.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_RTO_MAX_MS,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        keep_short(&socket).unwrap();
        assert!(sockopt::tcp_thin_linear_timeouts(&socket).unwrap());
    }
}
