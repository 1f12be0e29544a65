//! What the driver refused.

use super::ffi::{self, Functions, Status};
use std::ffi::CStr;

/// A call that the driver refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call}: {name} ({text})")]
pub struct CudaError {
    /// The driver's function.
    pub call: &'static str,
    /// The error's number.
    pub status: i32,
    /// Its name, as in `cuda.h`.
    pub name: String,
    /// What the driver says about it.
    pub text: String,
}

impl CudaError {
    pub(super) fn new(functions: &Functions, call: &'static str, status: Status) -> Self {
        let words = |ask: unsafe extern "C" fn(Status, *mut *const libc::c_char) -> Status| {
            let mut text = std::ptr::null();
            // SAFETY: the place is ours; the driver stores a pointer to a constant string in it, or null.
            let known = unsafe { ask(status, &raw mut text) } == ffi::SUCCESS && !text.is_null();
            // SAFETY: such a string is never freed.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        Self {
            call,
            status,
            name: words(functions.error_name).unwrap_or_else(|| format!("error {status}")),
            text: words(functions.error_string).unwrap_or_else(|| "unknown to this driver".to_owned()),
        }
    }
}

/// Turns a status into a result.
pub(super) fn check(functions: &Functions, call: &'static str, status: Status) -> Result<(), CudaError> {
    if status == ffi::SUCCESS { Ok(()) } else { Err(CudaError::new(functions, call, status)) }
}
