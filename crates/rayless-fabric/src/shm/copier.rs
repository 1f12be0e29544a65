//! Copies out of another process's memory (`process_vm_readv`), by the caller and one helping thread.
//!
//! The kernel copies page by page, which takes a core longer than a plain copy; while a payload comes, the sender's core has
//! nothing to do but wait, so two threads here share the work. The helper is started with the first
//! payload that is worth it. Where it comes late (a busy machine) the caller has done its part as well.

use rustix::io::Errno;
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

/// Bytes that a thread copies at a time: few enough that both end at about the same time, enough that the call's own cost is lost in it.
pub(super) const CHUNK: u64 = 512 << 10;

/// One call's worth.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    /// Where to, in this process.
    to: *mut u8,
    /// Where from, in the other.
    from: u64,
    len: usize,
}

// SAFETY: an address. Who reads or writes there is decided by `Copier::run`, which alone makes use of it.
unsafe impl Send for Chunk {}

impl Chunk {
    pub(super) const fn new(to: &mut [u8], from: u64) -> Self {
        Self { to: to.as_mut_ptr(), from, len: to.len() }
    }
}

/// See the module.
pub(super) struct Copier {
    shared: Arc<Shared>,
    /// The next call's chunks; empty between two calls.
    list: Vec<Chunk>,
    helper: Option<JoinHandle<()>>,
    /// Not even tried again.
    alone: bool,
}

struct Shared {
    pid: libc::pid_t,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Chunks that nobody has begun, the first one last.
    left: Vec<Chunk>,
    /// Threads in the middle of one.
    busy: usize,
    failed: Option<Errno>,
    closing: bool,
}

impl Copier {
    /// Copies from the process `pid`.
    pub(super) fn new(pid: libc::pid_t) -> Self {
        // With one core a helper would only take turns.
        let alone = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
        let shared = Shared { pid, state: Mutex::default(), changed: Condvar::new() };
        Self { shared: Arc::new(shared), list: Vec::new(), helper: None, alone }
    }

    /// The list of what the next `run` copies.
    pub(super) const fn list(&mut self) -> &mut Vec<Chunk> {
        &mut self.list
    }

    /// Copies what is listed, and empties the list. After an error some chunks are copied and some are not.
    ///
    /// # Safety
    /// The memory that the chunks are copied to is the caller's to write for the whole of the call.
    pub(super) unsafe fn run(&mut self) -> Result<(), Errno> {
        // Taken from its end.
        self.list.reverse();
        let mut state = self.shared.lock();
        state.failed = None;
        state.left.append(&mut self.list);
        let help = state.left.len() > 1;
        drop(state);
        if help {
            self.wake_helper();
        }
        while self.shared.copy_one() {}
        // What the helper is in the middle of belongs to this call, whose caller's memory it writes.
        let mut state = self.shared.lock();
        while state.busy > 0 {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.map_or(Ok(()), Err)
    }

    fn wake_helper(&mut self) {
        if self.helper.is_none() && !self.alone {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name("rl-link-copy".to_owned());
            // Without it the caller copies everything.
            self.helper = builder.spawn(move || shared.help()).ok();
            self.alone = self.helper.is_none();
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(helper) = self.helper.take() {
            // It has nothing to copy outside of `run`, so it ends at once. A panic there has been reported by its own hook.
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn help(&self) {
        loop {
            while self.copy_one() {}
            let mut state = self.lock();
            while state.left.is_empty() && !state.closing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return;
            }
        }
    }

    /// False: there was nothing to do.
    fn copy_one(&self) -> bool {
        let mut state = self.lock();
        let Some(chunk) = state.left.pop() else { return false };
        state.busy += 1;
        drop(state);
        // SAFETY: chunks are in the list only while `run` has not returned, and it does not return while one is being copied:
        // until then the memory is its caller's, and each chunk is popped by one thread only.
        let copied = unsafe { copy(self.pid, &chunk) };
        let mut state = self.lock();
        state.busy -= 1;
        if let Err(errno) = copied {
            state.failed.get_or_insert(errno);
            state.left.clear();
        }
        if state.busy == 0 && state.left.is_empty() {
            self.changed.notify_all();
        }
        true
    }
}

/// Copies one chunk.
///
/// # Safety
/// The chunk's `to` is `len` bytes that are the caller's to write.
unsafe fn copy(pid: libc::pid_t, chunk: &Chunk) -> Result<(), Errno> {
    let mut done = 0;
    while done < chunk.len {
        let left = chunk.len - done;
        // SAFETY: within the chunk.
        let to = libc::iovec { iov_base: unsafe { chunk.to.add(done) }.cast(), iov_len: left };
        let from = libc::iovec { iov_base: (chunk.from as usize + done) as *mut libc::c_void, iov_len: left };
        // SAFETY: the kernel writes at most `left` bytes to `to`, the caller's memory; `from` is an address of the
        // other process, which the kernel checks there.
        match unsafe { libc::process_vm_readv(pid, &raw const to, 1, &raw const from, 1, 0) } {
            0 => return Err(Errno::FAULT),
            copied => match usize::try_from(copied) {
                Ok(copied) => done += copied,
                Err(_) => return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
            },
        }
    }
    Ok(())
}
