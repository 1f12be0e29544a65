//! What a worker that makes no progress is doing: its Python stacks, and what the kernel has its threads wait for.
//!
//! Python's `faulthandler` writes them from within a signal handler, in C: it needs neither the GIL nor a Python thread that still runs, so
//! that a rank inside a collective, a driver call or an endless loop of an extension is seen, too. The handler writes into a pipe of its
//! own (not stderr, where the program's own lines would come in between). The kernel restarts most system calls that it interrupts; of the
//! others (sleeps, polls) Python and the usual libraries look at the clock again.

use crate::proc;
use rustix::process::{Signal, pidfd_send_signal};
use std::{
    fmt::Write as _,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};
use tokio::{
    net::unix::pipe,
    sync::Mutex,
    time::{Instant, timeout_at},
};

/// Tells a worker the descriptor and the signal: `fd,number`.
pub(super) const STACKS_VARIABLE: &str = "RAYLESS_STACKS";
/// Linux never sends it, no library waits for it, and Python leaves it alone.
pub(super) const STACKS_SIGNAL: Signal = Signal::STKFLT;

/// From the signal to the last byte. A thread that is not scheduled for so long is news enough.
const LONGEST: Duration = Duration::from_secs(2);
/// A pause this long after the first byte is the end: nothing marks it.
const QUIET: Duration = Duration::from_millis(150);
/// Threads of which the kernel is asked.
const THREADS: usize = 64;

/// One worker's way to its stacks.
pub(super) struct Stacks {
    pid: u32,
    /// One at a time: two would read each other's.
    pipe: Mutex<pipe::Receiver>,
}

impl Stacks {
    pub(super) fn new(pid: u32, fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { pid, pipe: Mutex::new(pipe::Receiver::from_owned_fd(fd)?) })
    }

    /// The stacks of all its threads, at most `limit` bytes; within about two seconds.
    pub(super) async fn take(&self, pidfd: impl AsFd, limit: usize) -> String {
        let pipe = self.pipe.lock().await;
        let mut text = Vec::new();
        let mut part = [0; 4096];
        // Of an earlier time, where it came too late for it.
        while pipe.try_read(&mut part).is_ok_and(|count| count > 0) {}
        if catches(self.pid) && pidfd_send_signal(pidfd, STACKS_SIGNAL).is_ok() {
            let end = Instant::now() + LONGEST;
            let mut until = end;
            while timeout_at(until, pipe.readable()).await.is_ok_and(|ready| ready.is_ok()) {
                match pipe.try_read(&mut part) {
                    Ok(0) => break,
                    // Read on past the limit: a full pipe would hold the worker in its handler.
                    Ok(count) => text.extend_from_slice(&part[..count.min(limit.saturating_sub(text.len()))]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
                until = end.min(Instant::now() + QUIET);
                if Instant::now() >= end {
                    break;
                }
            }
        }
        let mut text = String::from_utf8_lossy(&text).into_owned();
        if text.is_empty() {
            text.push_str("(no Python stacks: it is not Python, has not come so far, or is stopped)\n");
        }
        let seen = kernel_view(self.pid);
        if text.len() + seen.len() <= limit {
            text.push_str(&seen);
        }
        text
    }
}

/// Whether the process has a handler for the signal: without one it would die of it.
fn catches(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    proc::has_signal(&status, "SigCgt", STACKS_SIGNAL.as_raw())
}

/// `kernel: thread 123 (python3) sleeps in futex_wait_queue`, a line per thread.
fn kernel_view(pid: u32) -> String {
    let mut text = String::new();
    for (id, folder) in proc::threads(pid).take(THREADS) {
        let stat = fs::read_to_string(folder.join("stat")).unwrap_or_default();
        let Some((name, mut fields)) = proc::name_and_fields(&stat) else { continue };
        let state = match fields.next() {
            Some("R") => "runs",
            Some("S") => "sleeps",
            Some("D") => "waits without being killable",
            Some("T" | "t") => "is stopped",
            Some("Z" | "X") => "has ended",
            _ => "is there",
        };
        let place = fs::read_to_string(folder.join("wchan")).unwrap_or_default();
        let place = if place.is_empty() || place == "0" { String::new() } else { format!(" in {place}") };
        let _ = writeln!(text, "kernel: thread {id} ({name}) {state}{place}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_this_thread_and_its_signals() {
        let seen = kernel_view(std::process::id());
        assert!(seen.contains("kernel: thread "), "{seen}");
        assert!(!catches(std::process::id()));
    }
}
