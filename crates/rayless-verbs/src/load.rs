//! Loading the libraries, once per process, when first needed.

use crate::ffi::Functions;
use std::{
    ffi::{CStr, c_void},
    sync::OnceLock,
};

/// The RDMA libraries cannot be used in this process.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LoadError {
    /// A library is not installed, or one that it needs is not.
    #[error("{library} cannot be loaded: {cause}; Debian and Ubuntu: ibverbs-providers librdmacm1")]
    Missing {
        /// Its file name.
        library: &'static str,
        /// What the loader says.
        cause: String,
    },
    /// A library is too old or is another thing.
    #[error("lib{library} has no function {function}; rdma-core 20 or newer is needed")]
    Incomplete {
        /// Its name without `lib`.
        library: &'static str,
        /// What is missing.
        function: &'static str,
    },
}

/// The functions of libibverbs and librdmacm. The libraries stay loaded until the process ends.
pub(crate) fn functions() -> Result<&'static Functions, LoadError> {
    static FUNCTIONS: OnceLock<Result<Functions, LoadError>> = OnceLock::new();
    FUNCTIONS.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// Whether the libraries are there; no device is needed for that.
pub fn available() -> Result<(), LoadError> {
    functions().map(drop)
}

fn load() -> Result<Functions, LoadError> {
    let verbs = open("libibverbs.so.1", c"libibverbs.so.1")?;
    let cm = open("librdmacm.so.1", c"librdmacm.so.1")?;
    let find = |library: &'static str, name: &CStr| {
        let handle = if library == "ibverbs" { verbs } else { cm };
        // SAFETY: the handle came from dlopen and is never closed; the name is a C string.
        unsafe { libc::dlsym(handle, name.as_ptr()) }
    };
    // SAFETY: `find` looks the very name up in the library that C's headers declare it for.
    unsafe { Functions::look_up(find) }.map_err(|(library, function)| LoadError::Incomplete { library, function })
}

fn open(library: &'static str, name: &CStr) -> Result<*mut c_void, LoadError> {
    // SAFETY: the name is a C string. Loading runs the constructors of rdma-core, which register providers.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: dlerror gives a C string of this thread, or null.
    let cause = unsafe {
        let text = libc::dlerror();
        if text.is_null() { "unknown".to_owned() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(LoadError::Missing { library, cause })
}
