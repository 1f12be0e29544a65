//! The memory that both ends of a link map: a page of words, a page for GPUs, then the ring's bytes.
//!
//! Soundness in one place: the mapping lives as long as `Memory`, never moves, and cannot shrink under us (the
//! memfd is sealed). The words are atomics. The ring's bytes are copied in and out through raw pointers and never
//! referenced; the counters give each byte to one side at a time. A peer that breaks this protocol can only make us
//! copy bytes that mean nothing, which the layers above check: peers are processes of one group and one user.

use super::{
    bell::{ASLEEP, Bell},
    loan::Word,
};
use crate::{transport::SharedPage, wake::timespec};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, munmap},
    thread::futex,
};
use std::{
    ptr::{self, NonNull},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Bytes of the ring. Deep enough that on a busy machine, where the two ends take turns on a core, a turn moves much; a
/// smaller one stays in a nearer cache, which small messages gain less from than large ones lose.
pub(super) const RING: usize = 2 << 20;
const PAGE: usize = 4096;
/// Where the page for GPUs lies: whole pages of its own, since CUDA registers it.
const GPU_AT: usize = PAGE;
const RING_AT: usize = GPU_AT + crate::cuda::PAGE;
const SIZE: usize = RING_AT + RING;
const REASON: usize = 512;
/// Words of the nonce.
pub(super) const NONCE: usize = 4;

/// A futex word in shared memory.
#[repr(transparent)]
pub(super) struct FutexBell(AtomicU32);

impl Bell for FutexBell {
    fn swap(&self, to: u32) -> u32 {
        self.0.swap(to, Ordering::AcqRel)
    }

    fn sleep(&self, at_most: Duration) {
        // Every outcome (woken, changed, timed out, interrupted) makes the caller look again.
        let _ = futex::wait(&self.0, futex::Flags::empty(), ASLEEP, Some(&timespec(at_most)));
    }

    fn wake(&self) {
        // An error would mean a bad address, and the word is in our mapping.
        let _ = futex::wake(&self.0, futex::Flags::empty(), 1);
    }
}

/// The word of the loans.
#[repr(transparent)]
pub(super) struct Loans(AtomicU64);

impl Word for Loans {
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn store(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }

    fn replace(&self, from: u64, to: u64) -> bool {
        self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// Keeps what the two sides write in lines of their own (two: the prefetcher fetches pairs).
#[repr(C, align(128))]
pub(super) struct Apart<T>(pub(super) T);

/// The first page.
#[repr(C)]
pub(super) struct Words {
    /// Written by the sender before the memory is passed, echoed by the receiver into `proof`.
    pub(super) nonce: [AtomicU64; NONCE],
    pub(super) proof: [AtomicU64; NONCE],
    /// The sender's process id, and the namespace that it has it in.
    pub(super) sender_pid: AtomicU32,
    pub(super) pid_namespace: AtomicU64,
    /// Where the sender keeps the nonce in memory of its own; 0: it lends nothing.
    pub(super) secret_at: AtomicU64,
    /// 1 once the receiver has read it there: long payloads are lent.
    pub(super) one_copy: AtomicU32,
    /// Bytes ever written to the ring; moved by the sender.
    pub(super) tail: Apart<AtomicU64>,
    /// Bytes ever read from it; moved by the receiver.
    pub(super) head: Apart<AtomicU64>,
    /// What became of the newest loan.
    pub(super) loan: Apart<Loans>,
    /// The receiver sleeps here for bytes.
    pub(super) data: Apart<FutexBell>,
    /// The sender sleeps here for room, or for a loan to be taken.
    pub(super) room: Apart<FutexBell>,
    /// 1 once the sender will write no more.
    pub(super) sender_closed: Apart<AtomicU32>,
    /// 1 once the receiver will read no more; `reason` says why.
    pub(super) receiver_closed: Apart<AtomicU32>,
    reason_len: AtomicU32,
    reason: [AtomicU8; REASON],
}

const _: () = assert!(size_of::<Words>() <= PAGE);

/// A mapping of the shared memory.
pub(super) struct Memory {
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to no thread; its words are atomics, and its ring bytes are touched only by `copy_in` and
// `copy_out`, whose callers own the range by the counters.
unsafe impl Send for Memory {}
// SAFETY: as above; `&Memory` allows nothing more.
unsafe impl Sync for Memory {}

impl Memory {
    /// Makes the memory and seals its size.
    pub(super) fn create() -> Result<(Self, OwnedFd), Errno> {
        let fd = memfd_create("rayless-link", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, SIZE as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(fd.as_fd())?, fd))
    }

    /// Maps memory that came from the peer. Anything but a sealed memfd of the right size is refused (EINVAL):
    /// it could be cut under us, and touching it would kill the process.
    pub(super) fn open(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let sealed = fcntl_get_seals(fd)?.contains(SealFlags::SHRINK | SealFlags::GROW);
        if !sealed || fstat(fd)?.st_size != SIZE as i64 {
            return Err(Errno::INVAL);
        }
        Self::map(fd)
    }

    fn map(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe { mmap(ptr::null_mut(), SIZE, protection, MapFlags::SHARED | MapFlags::POPULATE, fd, 0)? };
        NonNull::new(base.cast()).map(|base| Self { base }).ok_or(Errno::NOMEM)
    }

    pub(super) fn words(&self) -> &Words {
        // SAFETY: the mapping is page-aligned, at least as large as `Words` (asserted above), zeroed or written only
        // as atomics, and lives as long as `self`. Every bit pattern is a valid atomic.
        unsafe { self.base.cast::<Words>().as_ref() }
    }

    /// Copies bytes into the ring at counter `at`. The range must be the sender's: `at + bytes.len() <= head + RING`.
    pub(super) fn copy_in(&self, at: u64, bytes: &[u8]) {
        let (start, first) = Self::split(at, bytes.len());
        // SAFETY: `start + first <= RING` and `bytes.len() - first <= start` or so small that it ends within the ring
        // (`split` and the assertion there), so both destinations lie in the mapping; `bytes` is private memory.
        unsafe {
            let ring = self.base.as_ptr().add(RING_AT);
            ptr::copy_nonoverlapping(bytes.as_ptr(), ring.add(start), first);
            ptr::copy_nonoverlapping(bytes.as_ptr().add(first), ring, bytes.len() - first);
        }
    }

    /// Copies bytes out of the ring from counter `at`. The range must be the receiver's: `at + out.len() <= tail`.
    pub(super) fn copy_out(&self, at: u64, out: &mut [u8]) {
        let (start, first) = Self::split(at, out.len());
        // SAFETY: as in `copy_in`, with source and destination swapped.
        unsafe {
            let ring = self.base.as_ptr().add(RING_AT);
            ptr::copy_nonoverlapping(ring.add(start), out.as_mut_ptr(), first);
            ptr::copy_nonoverlapping(ring, out.as_mut_ptr().add(first), out.len() - first);
        }
    }

    /// Where counter `at` lies in the ring, and how many of `len` bytes come before its end.
    fn split(at: u64, len: usize) -> (usize, usize) {
        assert!(len <= RING, "{len} bytes at once for a ring of {RING}");
        let start = (at % RING as u64) as usize;
        (start, len.min(RING - start))
    }

    /// The page for GPUs. Zeroed at first.
    pub(super) fn gpu_page(self: &Arc<Self>) -> SharedPage {
        // SAFETY: the page lies in the mapping, which `keep` holds.
        let host = unsafe { self.base.add(GPU_AT) };
        SharedPage { host, keep: Arc::<Self>::clone(self) }
    }

    /// The receiver's last words, for the sender.
    pub(super) fn set_reason(&self, reason: &[u8]) {
        let words = self.words();
        let len = reason.len().min(REASON);
        words.reason.iter().zip(&reason[..len]).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
        words.reason_len.store(len as u32, Ordering::Relaxed);
        words.receiver_closed.0.store(1, Ordering::Release);
    }

    /// The receiver's last words.
    pub(super) fn reason(&self) -> Vec<u8> {
        let words = self.words();
        let len = (words.reason_len.load(Ordering::Relaxed) as usize).min(REASON);
        words.reason[..len].iter().map(|byte| byte.load(Ordering::Relaxed)).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `base` and `SIZE` are those of the mapping that `map` made, and nothing refers into it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_through_one_mapping_are_read_through_another_across_the_rings_end() {
        let (one, fd) = Memory::create().unwrap();
        let other = Memory::open(fd.as_fd()).unwrap();
        let sent: Vec<u8> = (0..=255).cycle().take(RING).collect();
        for at in [0, 1, RING as u64 - 3, 7 * RING as u64 + 4097] {
            one.copy_in(at, &sent);
            let mut received = vec![0; RING];
            other.copy_out(at, &mut received);
            assert!(sent == received, "at {at}");
        }
        other.set_reason(b"because");
        assert_eq!(one.reason(), b"because");
    }

    #[test]
    fn memory_that_could_be_cut_is_refused() {
        let fd = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, SIZE as u64).unwrap();
        assert_eq!(Memory::open(fd.as_fd()).err(), Some(Errno::INVAL));
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        assert!(Memory::open(fd.as_fd()).is_ok());
        let small = memfd_create("small", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&small, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        assert_eq!(Memory::open(small.as_fd()).err(), Some(Errno::INVAL));
    }
}
