//! This process as a worker of a group.

use crate::{
    errors,
    link::{RecvLink, SendLink},
    waiting::{duration, interruptible},
};
use pyo3::{prelude::*, types::PyBytes};
use rayless_worker::host::{self, IncomingCall, Next};

/// What a keeper left for this process to take over.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct Worker {
    inner: host::Worker,
}

#[pymethods]
impl Worker {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let inner = py.detach(host::Worker::from_env).map_err(|error| errors::host(py, error))?;
        Ok(Self { inner })
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    #[getter]
    fn local_rank(&self) -> u32 {
        self.inner.local_rank()
    }

    #[getter]
    fn world_size(&self) -> u32 {
        self.inner.world_size()
    }

    fn boot<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.inner.boot())
    }

    #[pyo3(signature = (versions, /))]
    fn ready(&self, py: Python<'_>, versions: Vec<(String, String)>) -> PyResult<()> {
        py.detach(|| self.inner.ready(&versions)).map_err(|error| errors::host(py, error))
    }

    fn next_call<'py>(&self, py: Python<'py>) -> PyResult<Option<(u64, bool, Bound<'py, PyBytes>)>> {
        loop {
            match py.detach(|| self.inner.next_call(None)).map_err(|error| errors::host(py, error))? {
                Next::Call(IncomingCall { id, asked, payload }) => {
                    return Ok(Some((id, asked, PyBytes::new(py, &payload))));
                }
                Next::Closed => return Ok(None),
                Next::Nothing => py.check_signals()?,
            }
        }
    }

    #[pyo3(signature = (text, /))]
    fn doing(&self, text: &str) {
        self.inner.doing(text);
    }

    #[pyo3(signature = (call, raised, payload, /))]
    fn reply(&self, py: Python<'_>, call: u64, raised: bool, payload: &[u8]) -> PyResult<()> {
        py.detach(|| self.inner.reply(call, raised, payload)).map_err(|error| errors::host(py, error))
    }

    #[pyo3(signature = (to, channel=0, *, timeout))]
    fn send_link(&self, py: Python<'_>, to: u32, channel: u16, timeout: f64) -> PyResult<SendLink> {
        let within = duration(timeout)?;
        interruptible(py, |check| self.inner.links().send_link_unless(to, channel, within, check))?
            .map(SendLink::new)
            .map_err(|error| errors::link_unavailable(py, &error))
    }

    #[pyo3(signature = (from_rank, channel=0, *, timeout))]
    fn recv_link(&self, py: Python<'_>, from_rank: u32, channel: u16, timeout: f64) -> PyResult<RecvLink> {
        let within = duration(timeout)?;
        interruptible(py, |check| self.inner.links().recv_link_unless(from_rank, channel, within, check))?
            .map(RecvLink::new)
            .map_err(|error| errors::link_unavailable(py, &error))
    }
}
