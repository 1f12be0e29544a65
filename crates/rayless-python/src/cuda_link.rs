//! Tensors in GPU memory over links, for Python: who waits for a payload is a stream, not the host.
//!
//! What `rayless.fabric` promises of addresses holds here too (see [`crate::link`]): they belong to tensors that `keep` holds, and
//! a stream's number is that of a live stream of the device named.

#![allow(unsafe_code)]

use crate::{
    errors,
    link::{Tensor, lock},
    waiting::waiting,
};
use pyo3::{prelude::*, types::PyDict};
use rayless_fabric::{
    self as fabric, Extra, LinkName, RecvQueue, SendQueue,
    cuda::{CudaError, CudaReceived, CudaReceiver, CudaReport, CudaSender, CudaSent, DeviceTensor, Options, Stream},
};
use std::sync::{Mutex, OnceLock};

/// Which ways a GPU's payload may take: `RAYLESS_GPU_HOP`, for measuring and for finding faults.
fn options() -> Options {
    static OPTIONS: OnceLock<Options> = OnceLock::new();
    *OPTIONS.get_or_init(|| match std::env::var("RAYLESS_GPU_HOP").as_deref() {
        Ok("staged") => Options { slots: false, ..Options::default() },
        Ok("host") => Options { slots: false, stream_operations: false },
        _ => Options::default(),
    })
}

pub(crate) fn sender() -> Mutex<CudaSender> {
    Mutex::new(CudaSender::new(options()))
}

pub(crate) fn receiver() -> Mutex<CudaReceiver> {
    Mutex::new(CudaReceiver::new(options()))
}

/// After its queue was closed: lets go what streams and the peer are done with.
pub(crate) fn close_sender(sender: &Mutex<CudaSender>) {
    let old = std::mem::replace(&mut *lock(sender), CudaSender::new(options()));
    drop(old);
}

/// After its queue was closed: lets go the streams that wait.
pub(crate) fn close_receiver(receiver: &Mutex<CudaReceiver>) {
    let old = std::mem::replace(&mut *lock(receiver), CudaReceiver::new(options()));
    drop(old);
}

/// Where and when a message is computed, or wanted.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) stream: usize,
    pub(crate) device: i32,
}

impl Place {
    fn stream(self) -> Stream {
        // SAFETY: the caller's promise (see the top).
        unsafe { Stream::from_raw(self.stream) }
    }
}

pub(crate) fn isend(
    py: Python<'_>,
    (queue, sender): (&Mutex<SendQueue>, &Mutex<CudaSender>),
    tensors: &[Tensor],
    extra: Extra<'_>,
    place: Place,
    keep: Py<PyAny>,
) -> PyResult<CudaSendHandle> {
    let sent = py.detach(|| {
        let tensors: Vec<DeviceTensor<'_>> = tensors
            .iter()
            .map(|tensor| DeviceTensor {
                spec: tensor.spec(),
                address: tensor.span.address as u64,
                bytes: tensor.span.len as u64,
            })
            .collect();
        let (mut queue, mut sender) = (lock(queue), lock(sender));
        let link = queue.name();
        // SAFETY: the caller's promises (see the top).
        let sent = unsafe { sender.isend(&mut queue, &tensors, extra, place.device, place.stream(), Box::new(keep)) };
        sent.map(|inner| CudaSendHandle { inner, link })
    });
    sent.map_err(|error| errors::link_send(py, error))
}

pub(crate) fn recv(
    py: Python<'_>,
    (queue, receiver): (&Mutex<RecvQueue>, &Mutex<CudaReceiver>),
    buffers: &[(u64, u64)],
    place: Place,
    keep: Py<PyAny>,
    timeout: Option<f64>,
) -> PyResult<CudaRecvHandle> {
    let received = waiting(py, timeout, |wait| {
        let (mut queue, mut receiver) = (lock(queue), lock(receiver));
        let link = queue.name();
        // SAFETY: the caller's promises (see the top).
        let received =
            unsafe { receiver.recv(&mut queue, buffers, place.device, place.stream(), Box::new(keep), wait) };
        received.map(|inner| CudaRecvHandle { inner, link })
    })?;
    received.map_err(|error| errors::link_recv(py, error))
}

pub(crate) fn recv_ahead(
    py: Python<'_>,
    (queue, receiver): (&Mutex<RecvQueue>, &Mutex<CudaReceiver>),
    buffers: &[(u64, u64)],
    place: Place,
    keep: Py<PyAny>,
) -> PyResult<Option<CudaRecvHandle>> {
    let received = py.detach(|| {
        let (queue, mut receiver) = (lock(queue), lock(receiver));
        let link = queue.name();
        // SAFETY: the caller's promises (see the top).
        let received = unsafe { receiver.recv_ahead(&queue, buffers, place.device, place.stream(), Box::new(keep)) };
        received.map(|ahead| ahead.map(|inner| CudaRecvHandle { inner, link }))
    });
    received.map_err(|error| errors::link_recv(py, error))
}

pub(crate) fn confirm(
    py: Python<'_>,
    (queue, receiver): (&Mutex<RecvQueue>, &Mutex<CudaReceiver>),
    step: Option<u64>,
    timeout: Option<f64>,
) -> PyResult<()> {
    waiting(py, timeout, |wait| {
        let (mut queue, mut receiver) = (lock(queue), lock(receiver));
        receiver.confirm(&mut queue, step, wait)
    })?
    .map_err(|error| errors::link_recv(py, error))
}

/// How payloads have travelled; `None` when there were none.
pub(crate) fn report<'py>(py: Python<'py>, report: &CudaReport) -> PyResult<Option<Bound<'py, PyDict>>> {
    let Some(path) = report.path else { return Ok(None) };
    let fields = PyDict::new(py);
    let name = match path {
        fabric::DevicePath::Slots => "slots",
        fabric::DevicePath::Chunks => "staged",
    };
    fields.set_item("path", name)?;
    fields.set_item("through_slots", report.through_slots)?;
    fields.set_item("staged", report.staged)?;
    fields.set_item("no_slots", report.no_slots.as_deref())?;
    fields.set_item("host_waits", report.host_waits)?;
    Ok(Some(fields))
}

fn refused(py: Python<'_>, link: LinkName, error: &CudaError) -> PyErr {
    let text = format!("{link}: {error}\nhint: the CUDA context is broken or the stream is not one of this process");
    errors::link(py, "LinkError", &text, link, Some("device"))
}

/// One message of GPU tensors that has been accepted.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct CudaSendHandle {
    inner: CudaSent,
    link: LinkName,
}

#[pymethods]
impl CudaSendHandle {
    fn is_completed(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.is_done()).map_err(|error| errors::link_send(py, error))
    }

    fn wait_stream(&self, py: Python<'_>, stream: usize) -> PyResult<()> {
        // SAFETY: the caller's promise (see the top).
        let held = py.detach(|| unsafe { self.inner.hold(Stream::from_raw(stream)) });
        held.map_err(|error| refused(py, self.link, &error))
    }

    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<()> {
        match waiting(py, timeout, |wait| self.inner.wait(wait))? {
            Ok(true) => Ok(()),
            Ok(false) => Err(errors::link_send_unfinished(py, self.link, timeout)),
            Err(error) => Err(errors::link_send(py, error)),
        }
    }
}

/// A payload that is coming into GPU memory.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct CudaRecvHandle {
    inner: CudaReceived,
    link: LinkName,
}

#[pymethods]
impl CudaRecvHandle {
    fn is_completed(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.is_done()).map_err(|error| refused(py, self.link, &error))
    }

    fn wait_stream(&self, py: Python<'_>, stream: usize) -> PyResult<()> {
        // SAFETY: the caller's promise (see the top).
        let held = py.detach(|| unsafe { self.inner.hold(Stream::from_raw(stream)) });
        held.map_err(|error| refused(py, self.link, &error))
    }
}
