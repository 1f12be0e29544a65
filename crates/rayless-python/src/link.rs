//! Links for Python: both ends, with tensors given as addresses.
//!
//! `rayless.fabric` is what people use; it takes the addresses from tensors. What is promised of them there is what makes the
//! `unsafe` blocks here sound: an address and size belong to a tensor that lives, and is neither written (sending) nor used by
//! anyone else (receiving), until the call has returned, or, for `isend`, until the handle is done; `keep` is held until then.

#![allow(unsafe_code)]

use crate::{
    cuda_link::{self, CudaRecvHandle, CudaSendHandle, Place},
    errors,
    memory::{Kept, Span},
    waiting::waiting,
};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict, PyTuple},
};
use rayless_fabric::{
    self as fabric, Cancel, DType, Extra, LinkName, OwnedTensor, Probe, RecvQueue, Rejected, RejectedKind, Schema,
    SendQueue, TensorRef, TensorSpec,
    cuda::{CudaReceiver, CudaSender},
    transport::Counters,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A tensor of the caller: name, dtype (torch's name without `torch.`), shape, address, bytes.
type Given = (String, String, Vec<u64>, usize, usize);

/// What a closing end gives to messages that have not left, in seconds.
const GOODBYE: f64 = 5.0;

/// The sending end.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct SendLink {
    queue: Mutex<SendQueue>,
    cuda: Mutex<CudaSender>,
    probe: Arc<Probe>,
    cancel: Cancel,
    device: Option<String>,
    mode: Option<String>,
}

impl SendLink {
    pub(crate) fn new(link: fabric::SendLink) -> Self {
        let device = link.device().map(str::to_owned);
        let mode = link.mode().map(str::to_owned);
        let queue = SendQueue::new(link);
        Self {
            probe: queue.probe(),
            cancel: queue.canceller(),
            device,
            mode,
            queue: Mutex::new(queue),
            cuda: cuda_link::sender(),
        }
    }

    /// The queue, for one call. Never with the GIL held: who holds it may be waiting for the peer.
    pub(crate) fn lock(&self) -> MutexGuard<'_, SendQueue> {
        lock(&self.queue)
    }

    pub(crate) fn name(&self) -> LinkName {
        self.probe.name()
    }
}

/// A tensor of the caller, understood.
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) span: Span,
}

impl Tensor {
    pub(crate) const fn spec(&self) -> TensorSpec<'_> {
        TensorSpec { name: self.name.as_str(), dtype: self.dtype, shape: self.shape.as_slice(), strides: None }
    }
}

/// The caller's tensors, or the one that no link can carry.
pub(crate) fn tensors(py: Python<'_>, link: LinkName, given: Vec<Given>) -> PyResult<Vec<Tensor>> {
    given
        .into_iter()
        .map(|(name, dtype, shape, address, len)| {
            let dtype = dtype.parse().map_err(|error: fabric::UnknownDType| {
                let reason = format!("tensor `{name}`: {error}");
                errors::link_rejected(py, &Rejected { link, kind: RejectedKind::DType, reason })
            })?;
            Ok(Tensor { name, dtype, shape, span: Span { address, len } })
        })
        .collect()
}

/// # Safety
/// As [`Span::bytes`], for every tensor.
unsafe fn references(tensors: &[Tensor]) -> Vec<TensorRef<'_>> {
    // SAFETY: the caller's promise.
    tensors.iter().map(|tensor| TensorRef { spec: tensor.spec(), data: unsafe { tensor.span.bytes() } }).collect()
}

#[pymethods]
impl SendLink {
    #[getter(from_rank)]
    fn sending_rank(&self) -> u32 {
        self.name().from
    }

    #[getter(to_rank)]
    fn receiving_rank(&self) -> u32 {
        self.name().to
    }

    #[getter]
    fn channel(&self) -> u16 {
        self.name().channel
    }

    #[pyo3(signature = (tensors, extra=None, tag=0, timeout=None))]
    fn send(
        &self,
        py: Python<'_>,
        tensors: Vec<Given>,
        extra: Option<&[u8]>,
        tag: u64,
        timeout: Option<f64>,
    ) -> PyResult<()> {
        let tensors = self::tensors(py, self.name(), tensors)?;
        let extra = Extra { tag, bytes: extra.unwrap_or_default() };
        waiting(py, timeout, |wait| {
            // SAFETY: the tensors outlive this call, which ends with the last look at them.
            let tensors = unsafe { references(&tensors) };
            self.lock().send(&tensors, extra, wait)
        })?
        .map_err(|error| errors::link_send(py, error))
    }

    #[pyo3(signature = (tensors, extra=None, tag=0, keep=None))]
    fn isend(
        &self,
        py: Python<'_>,
        tensors: Vec<Given>,
        extra: Option<&[u8]>,
        tag: u64,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<SendHandle> {
        let tensors = self::tensors(py, self.name(), tensors)?;
        let extra = Extra { tag, bytes: extra.unwrap_or_default() };
        let keep = Arc::new(keep.unwrap_or_else(|| py.None()));
        py.detach(|| {
            // SAFETY: `keep` holds the tensors, and is held until this call ends, or by the queue until the message has left.
            let references = unsafe { references(&tensors) };
            let own = || tensors.iter().map(|tensor| owned(tensor, &keep)).collect();
            self.lock().isend(&references, extra, own)
        })
        .map(|inner| SendHandle { inner, link: self.name() })
        .map_err(|error| errors::link_send(py, error))
    }

    #[pyo3(signature = (tensors, extra, tag, stream, device, keep))]
    #[expect(clippy::too_many_arguments, reason = "a message, and where and when it is computed")]
    fn isend_cuda(
        &self,
        py: Python<'_>,
        tensors: Vec<Given>,
        extra: Option<&[u8]>,
        tag: u64,
        stream: usize,
        device: i32,
        keep: Py<PyAny>,
    ) -> PyResult<CudaSendHandle> {
        let tensors = self::tensors(py, self.name(), tensors)?;
        let extra = Extra { tag, bytes: extra.unwrap_or_default() };
        cuda_link::isend(py, (&self.queue, &self.cuda), &tensors, extra, Place { stream, device }, keep)
    }

    /// Messages that have been accepted and have not left.
    fn pending(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.lock().pending())
    }

    #[pyo3(signature = (timeout=GOODBYE))]
    fn close(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let closed = waiting(py, Some(timeout), |wait| self.lock().close(wait))?;
        let closed = match closed {
            Ok(true) => Ok(()),
            Ok(false) => {
                // What is in the queue is given up: the receiver learns that the link is lost.
                self.cancel.cancel();
                py.detach(|| self.lock().close(&fabric::Wait::forever())).map(drop).or(Ok(()))
            }
            // Closed before, or lost: either way there is nothing left to close.
            Err(_) => Ok(()),
        };
        py.detach(|| cuda_link::close_sender(&self.cuda));
        closed
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let fields = report(py, &self.probe, self.device.as_deref(), self.mode.as_deref())?;
        let gpu = py.detach(|| lock(&self.cuda).report().clone());
        fields.set_item("gpu", cuda_link::report(py, &gpu)?)?;
        Ok(fields)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counted = py.detach(|| self.lock().counters());
        counters(py, counted)
    }

    fn __repr__(&self) -> String {
        format!("<SendLink {} over {}: {}>", self.name(), self.probe.level(), self.probe.phase())
    }
}

fn owned(tensor: &Tensor, keep: &Arc<Py<PyAny>>) -> OwnedTensor {
    OwnedTensor {
        name: tensor.name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
        // SAFETY: `keep` holds the tensors, and the caller leaves them alone until the handle is done (see the top).
        data: Box::new(unsafe { Kept::new(tensor.span, Arc::clone(keep)) }),
    }
}

/// One accepted message.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct SendHandle {
    inner: fabric::SendHandle,
    link: LinkName,
}

#[pymethods]
impl SendHandle {
    fn is_completed(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.is_done()).map_err(|error| errors::link_send(py, error))
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

/// The receiving end.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct RecvLink {
    // Dropped in this order: the queue's thread fills what the other holds.
    queue: Mutex<RecvQueue>,
    cuda: Mutex<CudaReceiver>,
    probe: Arc<Probe>,
    cancel: Cancel,
    device: Option<String>,
    mode: Option<String>,
    /// The last description as Python has it: steps of equal form share it.
    known: Mutex<Option<Known>>,
}

struct Known {
    schema: Arc<Schema>,
    extra: Py<PyBytes>,
    tensors: Py<PyTuple>,
}

impl RecvLink {
    pub(crate) fn new(link: fabric::RecvLink) -> Self {
        Self {
            probe: link.probe(),
            cancel: link.canceller(),
            device: link.device().map(str::to_owned),
            mode: link.mode().map(str::to_owned),
            queue: Mutex::new(RecvQueue::new(link)),
            cuda: cuda_link::receiver(),
            known: Mutex::new(None),
        }
    }

    /// The link, for one call. Never with the GIL held: who holds it may be waiting for the peer.
    pub(crate) fn lock(&self) -> MutexGuard<'_, RecvQueue> {
        lock(&self.queue)
    }

    pub(crate) fn name(&self) -> LinkName {
        self.probe.name()
    }

    /// Making Python objects may run Python code, so no lock is held meanwhile.
    fn described(&self, py: Python<'_>, schema: Arc<Schema>) -> PyResult<(Py<PyBytes>, Py<PyTuple>)> {
        let same = |known: &&Known| Arc::ptr_eq(&known.schema, &schema);
        let found = lock(&self.known)
            .as_ref()
            .filter(same)
            .map(|known| (known.extra.clone_ref(py), known.tensors.clone_ref(py)));
        if let Some(found) = found {
            return Ok(found);
        }
        let tensors = schema.tensors.iter().map(|tensor| {
            let shape = PyTuple::new(py, &tensor.shape)?;
            (tensor.name.as_str(), tensor.dtype.name(), shape).into_pyobject(py)
        });
        let tensors = PyTuple::new(py, tensors.collect::<PyResult<Vec<_>>>()?)?.unbind();
        let extra = PyBytes::new(py, &schema.extra).unbind();
        let known = Known { schema, extra: extra.clone_ref(py), tensors: tensors.clone_ref(py) };
        let before = lock(&self.known).replace(known);
        drop(before);
        Ok((extra, tensors))
    }
}

#[pymethods]
impl RecvLink {
    #[getter(from_rank)]
    fn sending_rank(&self) -> u32 {
        self.name().from
    }

    #[getter(to_rank)]
    fn receiving_rank(&self) -> u32 {
        self.name().to
    }

    #[getter]
    fn channel(&self) -> u16 {
        self.name().channel
    }

    #[pyo3(signature = (step=None, timeout=None))]
    fn recv_header(&self, py: Python<'_>, step: Option<u64>, timeout: Option<f64>) -> PyResult<Announced> {
        let announced = waiting(py, timeout, |wait| self.lock().recv_header(step, wait))?
            .map_err(|error| errors::link_recv(py, error))?;
        let (extra, tensors) = self.described(py, announced.schema)?;
        let (sequence, tag, device) = (announced.sequence, announced.tag, announced.device.is_some());
        Ok(Announced { sequence, tag, device, extra, tensors })
    }

    #[pyo3(signature = (buffers, timeout=None))]
    fn recv_payload(&self, py: Python<'_>, buffers: Vec<(usize, usize)>, timeout: Option<f64>) -> PyResult<()> {
        waiting(py, timeout, |wait| {
            // SAFETY: the buffers are the caller's alone and outlive this call.
            let mut parts: Vec<&mut [u8]> = buffers
                .iter()
                .map(|(address, len)| unsafe { Span { address: *address, len: *len }.bytes_mut() })
                .collect();
            self.lock().recv_payload(&mut parts, wait)
        })?
        .map_err(|error| errors::link_recv(py, error))
    }

    #[pyo3(signature = (buffers, stream, device, keep, timeout=None))]
    fn recv_cuda(
        &self,
        py: Python<'_>,
        buffers: Vec<(u64, u64)>,
        stream: usize,
        device: i32,
        keep: Py<PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<CudaRecvHandle> {
        cuda_link::recv(py, (&self.queue, &self.cuda), &buffers, Place { stream, device }, keep, timeout)
    }

    fn recv_cuda_ahead(
        &self,
        py: Python<'_>,
        buffers: Vec<(u64, u64)>,
        stream: usize,
        device: i32,
        keep: Py<PyAny>,
    ) -> PyResult<Option<CudaRecvHandle>> {
        cuda_link::recv_ahead(py, (&self.queue, &self.cuda), &buffers, Place { stream, device }, keep)
    }

    #[pyo3(signature = (step=None, timeout=None))]
    fn confirm_cuda(&self, py: Python<'_>, step: Option<u64>, timeout: Option<f64>) -> PyResult<()> {
        cuda_link::confirm(py, (&self.queue, &self.cuda), step, timeout)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            // Ends a call of another thread first, which holds the lock.
            self.cancel.cancel();
            self.lock().close();
            cuda_link::close_receiver(&self.cuda);
        });
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let fields = report(py, &self.probe, self.device.as_deref(), self.mode.as_deref())?;
        let gpu = py.detach(|| lock(&self.cuda).report().clone());
        fields.set_item("gpu", cuda_link::report(py, &gpu)?)?;
        Ok(fields)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counted = py.detach(|| self.lock().counters());
        counters(py, counted)
    }

    fn __repr__(&self) -> String {
        format!("<RecvLink {} over {}: {}>", self.name(), self.probe.level(), self.probe.phase())
    }
}

/// What a message says of itself.
#[pyclass(frozen, get_all, module = "rayless._rayless")]
pub(crate) struct Announced {
    sequence: u64,
    tag: u64,
    /// Whether the tensors are in GPU memory at the sender.
    device: bool,
    extra: Py<PyBytes>,
    tensors: Py<PyTuple>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a call has been passed on as an exception; the link itself knows what state it is in.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn report<'py>(
    py: Python<'py>,
    probe: &Probe,
    device: Option<&str>,
    mode: Option<&str>,
) -> PyResult<Bound<'py, PyDict>> {
    let name = probe.name();
    let fields = PyDict::new(py);
    fields.set_item("group", name.group.to_string())?;
    fields.set_item("from", name.from)?;
    fields.set_item("to", name.to)?;
    fields.set_item("channel", name.channel)?;
    fields.set_item("transport", probe.level().name())?;
    fields.set_item("mode", mode)?;
    fields.set_item("device", device)?;
    fields.set_item("phase", probe.phase().to_string())?;
    fields.set_item("messages", probe.messages())?;
    fields.set_item("bytes", probe.bytes())?;
    Ok(fields)
}

fn counters<'py>(py: Python<'py>, counted: Option<Counters>) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    let counted = counted.unwrap_or_default();
    fields.set_item("work_requests", counted.work_requests)?;
    fields.set_item("doorbells", counted.doorbells)?;
    fields.set_item("completions", counted.completions)?;
    fields.set_item("sleeps", counted.sleeps)?;
    Ok(fields)
}
