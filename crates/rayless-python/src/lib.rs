//! The native module `rayless._rayless`: the driver's and the worker's side of [`rayless_worker`] for Python, and the links of [`rayless_fabric`].
//!
//! Read [`group`] (a call goes down and its replies come up), [`start`] (how a group comes to be), [`worker`] (the loop of a
//! worker), [`link`] (tensors between workers) and [`errors`] (what each failure is in Python). `python/rayless/_rayless.pyi` is the interface as Python sees it.
//!
//! Two rules: whatever waits, waits without the GIL; and no lock of this crate is held while Python code runs.
// Only for the memory of tensors: see `memory` and `link`.
#![deny(unsafe_code)]

use pyo3::prelude::*;

mod cluster;
mod errors;
mod group;
mod link;
mod link_pair;
mod memory;
mod start;
mod waiting;
mod worker;

#[pymodule]
mod _rayless {
    #[pymodule_export]
    use crate::{
        cluster::{identify, status, stop_group},
        group::{Call, Group},
        link::{Announced, RecvLink, SendHandle, SendLink},
        link_pair::link_pair,
        start::start_group,
        worker::Worker,
    };
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
