//! Memory of Python objects as slices. The stable ABI of Python 3.10 has no buffer protocol, so tensors come as an address and a
//! size, with the object that keeps them alive; `rayless.fabric` takes both from the tensor itself.
#![allow(unsafe_code)]

use pyo3::{Py, PyAny};
use std::sync::Arc;

/// `len` bytes at `address`.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub(crate) address: usize,
    pub(crate) len: usize,
}

impl Span {
    /// The bytes, to read.
    ///
    /// # Safety
    /// The memory is allocated, and nobody writes to it, for as long as the slice is used.
    pub(crate) const unsafe fn bytes<'a>(self) -> &'a [u8] {
        if self.len == 0 {
            return &[]; // an empty tensor's address is null
        }
        // SAFETY: the caller's promise; any byte is a valid `u8`, and a length in memory fits in `isize`.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.len) }
    }

    /// The bytes, to write.
    ///
    /// # Safety
    /// The memory is allocated, and nobody else uses it, for as long as the slice is used.
    pub(crate) const unsafe fn bytes_mut<'a>(self) -> &'a mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: the caller's promise, as above.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.len) }
    }
}

/// Bytes that a Python object owns, held by holding the object.
pub(crate) struct Kept {
    span: Span,
    _keep: Arc<Py<PyAny>>,
}

impl Kept {
    /// # Safety
    /// `keep` keeps the memory allocated, and nobody writes to it before `Kept` is dropped.
    pub(crate) const unsafe fn new(span: Span, keep: Arc<Py<PyAny>>) -> Self {
        Self { span, _keep: keep }
    }
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: promised to `new` for as long as `self` lives.
        unsafe { self.span.bytes() }
    }
}
