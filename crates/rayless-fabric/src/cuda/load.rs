//! Loading the driver library, once per process, when first needed.

use super::{
    error::CudaError,
    ffi::{self, Functions},
};
use std::{
    ffi::{CStr, c_void},
    sync::OnceLock,
};

/// The CUDA driver cannot be used in this process.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LoadError {
    /// It is not installed.
    #[error("libcuda.so.1 cannot be loaded: {cause}; it comes with the NVIDIA driver (in a container: --gpus all)")]
    Missing {
        /// What the loader says.
        cause: String,
    },
    /// It is too old or is another thing.
    #[error("libcuda.so.1 has no function {function}; a driver for CUDA 11.7 or newer is needed")]
    Incomplete {
        /// What is missing.
        function: &'static str,
    },
    /// It does not start.
    #[error("the CUDA driver does not start: {cause}")]
    Init {
        /// What it says.
        cause: String,
    },
}

/// The driver's functions. The library stays loaded until the process ends.
pub(super) fn functions() -> Result<&'static Functions, LoadError> {
    static FUNCTIONS: OnceLock<Result<Functions, LoadError>> = OnceLock::new();
    FUNCTIONS.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<Functions, LoadError> {
    // SAFETY: the name is a C string. Loading runs the constructors of the driver library.
    let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err(LoadError::Missing { cause: loader_error() });
    }
    let find = |name: &CStr| -> *mut c_void {
        // SAFETY: the handle came from dlopen and is never closed; the name is a C string.
        unsafe { libc::dlsym(library, name.as_ptr()) }
    };
    // SAFETY: `find` looks the very name up in the driver library, which is never unloaded.
    let functions = unsafe { Functions::look_up(find) }.map_err(|function| LoadError::Incomplete { function })?;
    // SAFETY: may be called any number of times; flags must be 0.
    match unsafe { (functions.init)(0) } {
        ffi::SUCCESS => Ok(functions),
        status => Err(LoadError::Init { cause: CudaError::new(&functions, "cuInit", status).to_string() }),
    }
}

fn loader_error() -> String {
    // SAFETY: dlerror gives a C string of this thread, or null.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() { "unknown".to_owned() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}
