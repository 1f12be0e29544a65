//! Registered memory. A region belongs to its endpoint and is freed after the queue pair is gone, so no device
//! ever touches memory that was given back.

use crate::{
    error::VerbsError,
    ffi::{Functions, Opaque, ibv_mr},
};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
};

const PAGE: usize = 4096;

/// What the peer may do with a region; the device itself may always read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing: the source of sends and writes.
    Source,
    /// Nothing: where RECVs put messages.
    Receive,
    /// Write into it. (Also what a READ needs at its sink on iWARP.)
    RemoteWrite,
    /// Read from it.
    RemoteRead,
    /// Write into it and read from it.
    RemoteReadWrite,
}

impl Access {
    const fn flags(self) -> i32 {
        const LOCAL_WRITE: i32 = 1;
        const REMOTE_WRITE: i32 = 2;
        const REMOTE_READ: i32 = 4;
        match self {
            Self::Source => 0,
            Self::Receive => LOCAL_WRITE,
            Self::RemoteWrite => LOCAL_WRITE | REMOTE_WRITE,
            Self::RemoteRead => REMOTE_READ,
            Self::RemoteReadWrite => LOCAL_WRITE | REMOTE_WRITE | REMOTE_READ,
        }
    }
}

pub(crate) struct Region {
    base: u64,
    len: usize,
    mr: *mut ibv_mr,
    /// Memory of ours; `None`: somebody else's, which the CPU may not even be able to touch.
    owned: Option<(NonNull<u8>, Layout)>,
}

impl Region {
    /// Allocates zeroed pages and registers them.
    ///
    /// # Safety
    /// `pd` must be a protection domain of these functions' library, alive until `free`.
    pub(crate) unsafe fn allocate(
        functions: &Functions,
        pd: *mut Opaque,
        len: usize,
        access: Access,
    ) -> Result<Self, VerbsError> {
        let misuse = || VerbsError::Misuse { what: format!("a region of {len} bytes") };
        if len == 0 {
            return Err(misuse());
        }
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| misuse())?;
        // SAFETY: the layout's size is not zero.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) })
            .ok_or_else(|| VerbsError::returned("allocating memory", libc::ENOMEM))?;
        // SAFETY: the memory is ours, of this length, and stays until `free`, which deregisters first; `pd` by contract.
        let mr = unsafe { (functions.ibv_reg_mr)(pd, memory.as_ptr().cast(), len, access.flags()) };
        if mr.is_null() {
            let error = VerbsError::last("ibv_reg_mr");
            // SAFETY: allocated above with this layout, and nobody knows of it.
            unsafe { dealloc(memory.as_ptr(), layout) };
            return Err(error);
        }
        Ok(Self { base: memory.as_ptr() as u64, len, mr, owned: Some((memory, layout)) })
    }

    /// Registers memory of somebody else: a GPU's, where the device takes its addresses.
    ///
    /// # Safety
    /// As for `allocate`; and `base..base + len` must stay valid until `free`.
    pub(crate) unsafe fn register(
        functions: &Functions,
        pd: *mut Opaque,
        base: u64,
        len: usize,
        access: Access,
    ) -> Result<Self, VerbsError> {
        // SAFETY: by contract.
        let mr = unsafe { (functions.ibv_reg_mr)(pd, ptr::without_provenance_mut(base as usize), len, access.flags()) };
        if mr.is_null() {
            return Err(VerbsError::last("ibv_reg_mr"));
        }
        Ok(Self { base, len, mr, owned: None })
    }

    /// Registers a dma-buf.
    ///
    /// # Safety
    /// `pd` as for `allocate`.
    pub(crate) unsafe fn register_dmabuf(
        functions: &Functions,
        pd: *mut Opaque,
        dmabuf: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        access: Access,
    ) -> Result<Self, VerbsError> {
        use std::os::fd::AsRawFd;
        const CALL: &str = "ibv_reg_dmabuf_mr";
        let register = functions.ibv_reg_dmabuf_mr.ok_or_else(|| VerbsError::returned(CALL, libc::EOPNOTSUPP))?;
        // SAFETY: `pd` by contract; the kernel takes its own reference of the dma-buf.
        let mr = unsafe { register(pd, offset, len, 0, dmabuf.as_raw_fd(), access.flags()) };
        if mr.is_null() {
            return Err(VerbsError::last(CALL));
        }
        Ok(Self { base: 0, len, mr, owned: None })
    }

    /// Deregisters and frees.
    ///
    /// # Safety
    /// No queue pair that was given an address in this region may exist any more.
    pub(crate) unsafe fn free(self, functions: &Functions) {
        // SAFETY: registered by this library and not freed before (`free` consumes).
        let busy = unsafe { (functions.ibv_dereg_mr)(self.mr) };
        if let (Some((memory, layout)), 0) = (self.owned, busy) {
            // SAFETY: allocated with this layout; the device has let go of it. (If it has not, leaking is the safe end.)
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
    }

    pub(crate) const fn base(&self) -> u64 {
        self.base
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: the MR lives until `free`.
        unsafe { (*self.mr).lkey }
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: the MR lives until `free`.
        unsafe { (*self.mr).rkey }
    }

    /// The device address of a range that lies in the region.
    pub(crate) fn address(&self, offset: usize, len: usize) -> Result<u64, VerbsError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            let what = format!("{len} bytes at {offset} of a region of {} bytes", self.len);
            return Err(VerbsError::Misuse { what });
        }
        Ok(self.base + offset as u64)
    }

    /// Copies into the region. The device may be using other ranges of it: no reference is made.
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), VerbsError> {
        self.address(offset, bytes.len())?;
        let (memory, _) = self.host()?;
        // SAFETY: the range lies in our allocation (checked above); `bytes` is other memory, for nobody has a
        // reference into the region.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), memory.as_ptr().add(offset), bytes.len()) };
        Ok(())
    }

    /// Copies out of the region.
    pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) -> Result<(), VerbsError> {
        self.address(offset, out.len())?;
        let (memory, _) = self.host()?;
        // SAFETY: as in `copy_in`, with source and destination swapped.
        unsafe { ptr::copy_nonoverlapping(memory.as_ptr().add(offset), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn host(&self) -> Result<(NonNull<u8>, Layout), VerbsError> {
        self.owned
            .ok_or_else(|| VerbsError::Misuse { what: "copying to or from a region that is not host memory".into() })
    }
}
