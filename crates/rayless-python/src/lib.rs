//! The native module `rayless._rayless`: the driver's and the worker's side of [`rayless_worker`] for Python.
//!
//! Read [`group`] (a call goes down and its replies come up), [`start`] (how a group comes to be), [`worker`] (the loop of a
//! worker) and [`errors`] (what each failure is in Python). `python/rayless/_rayless.pyi` is the interface as Python sees it.
//!
//! Two rules: whatever waits, waits without the GIL; and no lock of this crate is held while Python code runs.
#![forbid(unsafe_code)]

use pyo3::prelude::*;

mod cluster;
mod errors;
mod group;
mod start;
mod worker;

#[pymodule]
mod _rayless {
    #[pymodule_export]
    use crate::{
        cluster::{identify, status, stop_group},
        group::{Call, Group},
        start::start_group,
        worker::Worker,
    };
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
