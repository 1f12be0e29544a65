//! The sender's half of one-copy payloads: says where a receiver finds the proof that it reads the right process, and
//! lets it read where the system asks for leave.

use super::memory::{NONCE, Words};
use rustix::fd::{AsFd, AsRawFd};
use std::{os::unix::fs::MetadataExt, sync::atomic::Ordering};

/// Keeps the nonce in memory of this process alone, and says where. The box stays for the life of the link.
pub(super) fn announce(words: &Words, nonce: [u64; NONCE], socket: impl AsFd) -> Box<[u64; NONCE]> {
    let secret = Box::new(nonce);
    permit(socket);
    words.sender_pid.store(std::process::id(), Ordering::Relaxed);
    words.pid_namespace.store(pid_namespace(), Ordering::Relaxed);
    // Read there by the kernel for the receiver.
    words.secret_at.store(secret.as_ptr().expose_provenance() as u64, Ordering::Release);
    secret
}

/// The number of the namespace in which this process has its id; 0: not known.
pub(super) fn pid_namespace() -> u64 {
    std::fs::metadata("/proc/self/ns/pid").map_or(0, |of| of.ino())
}

/// Under Yama's `ptrace_scope` 1 only a process's parents may read its memory, and one process that it names, with that one's descendants.
/// The one named is who made the other end of the socket: the keeper, whose descendants are this group's workers of this host. Under 2 and 3
/// nothing helps; under 0, and without Yama, nothing is needed.
fn permit(socket: impl AsFd) {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    if !scope.is_ok_and(|scope| scope.trim() == "1") {
        return;
    }
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: `peer` is a ucred and `len` its size; the descriptor is open. (rustix gives a pid that cannot be 0, which one of another
    // namespace is.)
    let got =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len) };
    if got == 0 && peer.pid > 0 {
        // SAFETY: no pointer is passed. An error means no leave, which the receiver finds out.
        unsafe { libc::prctl(libc::PR_SET_PTRACER, peer.pid as libc::c_ulong, 0, 0, 0) };
    }
}
