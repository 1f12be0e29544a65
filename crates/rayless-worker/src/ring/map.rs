//! Mapped shared memory: the one place with raw pointers into it.
//!
//! Other processes write to the same pages at any time, so nothing here ever hands out a slice: words are atomics, bytes are
//! copied in and out. What was copied out is checked by the caller like anything from outside.

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64},
};

/// The mapping of a whole sealed memfd.
#[derive(Debug)]
pub(crate) struct Map {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to no thread, and all access goes through atomics or copies of bytes that the protocol of the ring
// gives to one side at a time.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

/// The size can never change again: a mapping that was valid once cannot fault later because someone cut the file short.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

impl Map {
    /// A new memfd of `length` zero bytes, sealed in size, and its mapping.
    pub(crate) fn create(name: &str, length: usize) -> io::Result<(OwnedFd, Self)> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, length as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SEALS)?;
        let map = Self::of_fd(&fd, length)?;
        Ok((fd, map))
    }

    /// Maps a memfd that another process made; refused where its size is not sealed.
    pub(crate) fn open(fd: impl AsFd) -> io::Result<Self> {
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SEALS) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "shared memory of unsealed size"));
        }
        let length = usize::try_from(rustix::fs::fstat(&fd)?.st_size)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Self::of_fd(fd, length)
    }

    fn of_fd(fd: impl AsFd, length: usize) -> io::Result<Self> {
        if length == 0 || !length.is_multiple_of(4096) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "shared memory of odd size"));
        }
        // SAFETY: a fresh mapping at an address that the kernel chooses; it aliases nothing of ours.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { start, length })
    }

    /// Bytes mapped.
    pub(crate) const fn len(&self) -> usize {
        self.length
    }

    /// The pointer at `at`, of which `length` bytes are mapped.
    ///
    /// # Panics
    /// Outside of the mapping. Offsets come from our own copy of the layout, never from shared memory.
    pub(crate) fn at(&self, at: usize, length: usize) -> NonNull<u8> {
        assert!(at.checked_add(length).is_some_and(|end| end <= self.length), "offset outside of the ring");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.add(at) }
    }

    /// The 32-bit word at `at`, a multiple of 4.
    pub(crate) fn word32(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4), "misaligned offset");
        // SAFETY: mapped for the life of `self`, aligned (the mapping starts on a page), and every process uses this word as an atomic.
        unsafe { AtomicU32::from_ptr(self.at(at, 4).as_ptr().cast()) }
    }

    /// The 64-bit word at `at`, a multiple of 8.
    pub(crate) fn word64(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8), "misaligned offset");
        // SAFETY: as in `word32`.
        unsafe { AtomicU64::from_ptr(self.at(at, 8).as_ptr().cast()) }
    }

    /// Copies `bytes` to `at`. The caller's protocol gives it that range alone.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        let to = self.at(at, bytes.len());
        // SAFETY: in bounds; `bytes` is private memory, so the two cannot overlap. Other processes read the range only after the
        // position that publishes it (a release store).
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) }
    }

    /// Copies the bytes at `at` to `out`. A peer that breaks the protocol can change them meanwhile: the copy is then garbage, no
    /// more, since it is of plain bytes and only the copy is looked at.
    pub(crate) fn read(&self, at: usize, out: &mut [u8]) {
        let from = self.at(at, out.len());
        // SAFETY: in bounds; `out` is private memory, so the two cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) }
    }

    /// Appends the `length` bytes at `at` to `out`, without first zeroing the room for them.
    pub(crate) fn append(&self, at: usize, length: usize, out: &mut Vec<u8>) {
        let from = self.at(at, length);
        out.reserve(length);
        let before = out.len();
        // SAFETY: the source is in bounds; `reserve` made the room behind `before`; all `length` bytes of it are written
        // before the length says so.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr().add(before), length);
            out.set_len(before + length);
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the exact range that `of_fd` made; no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
