//! A running group and its calls.

use crate::{cluster::to_python, errors};
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyBytes, PyDict, PyList},
};
use rayless_proto::v1::status::LinkStatus;
use rayless_worker::{
    client::LocalClient,
    driver::{self, Asked, CallError, GroupFailure, Reply},
};
use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Longest wait without a look at signals and at whether the call was given up. A reply ends it at once.
const SLICE: Duration = Duration::from_millis(250);

/// How long `stop` waits for the head to take the resources back.
const RELEASE: Duration = Duration::from_secs(2);

/// What wants to know of a group's failure.
pub(crate) enum Listeners {
    /// Not failed: these are called then.
    Waiting(Vec<Py<PyAny>>),
    /// Failed: whoever comes is told at once.
    Told(GroupFailure),
}

/// A running group.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct Group {
    inner: driver::WorkerGroup,
    listeners: Arc<Mutex<Listeners>>,
    /// The process that started it. Threads and sessions are not there in a forked child.
    owner: u32,
    run_dir: String,
    /// The head was asked to take the resources back.
    told: AtomicBool,
    pids: HashMap<u32, u32>,
    /// Of the local daemon.
    step_deadline: Duration,
}

impl Group {
    pub(crate) fn new(
        inner: driver::WorkerGroup,
        listeners: Arc<Mutex<Listeners>>,
        run_dir: String,
        step_deadline: Duration,
    ) -> Self {
        let pids = inner.pids().into_iter().collect();
        let told = AtomicBool::new(false);
        Self { inner, listeners, owner: std::process::id(), run_dir, told, pids, step_deadline }
    }

    /// Returns when the head has taken the group's resources back, so that who stops one group can start the next at
    /// once. Not an error where head or daemon are away: the group itself is gone by now.
    fn await_release(&self) {
        let _ = LocalClient::connect(Path::new(&self.run_dir))
            .and_then(|mut client| client.stop_group_within(self.inner.id(), RELEASE));
    }

    fn ours(&self, py: Python<'_>) -> PyResult<()> {
        if self.owner == std::process::id() { Ok(()) } else { Err(errors::not_ours(py, self.owner)) }
    }

    fn begin(
        &self,
        py: Python<'_>,
        method: &str,
        payload: &[u8],
        ranks: Option<Vec<u32>>,
        timeout: Option<f64>,
        deadline: Option<f64>,
    ) -> PyResult<driver::Call> {
        self.ours(py)?;
        let asked = ranks.map_or(Asked::All, Asked::Ranks);
        let payload: Arc<[u8]> = payload.into();
        let timeout = timeout.map(seconds).transpose()?;
        let deadline = deadline.map(seconds).transpose()?;
        py.detach(|| match deadline {
            Some(deadline) => self.inner.step(payload, &asked, timeout, deadline),
            None => self.inner.call(payload, &asked, timeout),
        })
        .map_err(|error| self.error(py, method, error))
    }

    /// What a call that came to nothing raises.
    fn error(&self, py: Python<'_>, method: &str, error: CallError) -> PyErr {
        match error {
            CallError::Raised { rank, payload, .. } => self.raised(py, rank, &payload).unwrap_or_else(|error| error),
            CallError::TimedOut { after, missing, .. } => {
                let made = py
                    .import("rayless.exceptions")
                    .and_then(|module| module.call_method1("timed_out", (method, after.as_secs_f64(), missing)));
                made.map_or_else(|error| error, PyErr::from_value)
            }
            CallError::TooManyInFlight { .. } => {
                errors::exception(py, "PendingCallsLimitExceeded", (error.to_string(),))
            }
            CallError::TooLarge(_) | CallError::NoSuchRank { .. } => PyValueError::new_err(error.to_string()),
            CallError::Failed(failure) => errors::group(py, &failure),
            CallError::Stopped => errors::stopped(py),
        }
    }

    fn raised(&self, py: Python<'_>, rank: u32, payload: &[u8]) -> PyResult<PyErr> {
        let node = self.inner.ranks().get(rank as usize).map_or("", |info| &info.node_name);
        let place = format!("{node}, pid {}", self.pids.get(&rank).copied().unwrap_or_default());
        let payload = PyBytes::new(py, payload);
        Ok(PyErr::from_value(py.import("rayless._replies")?.call_method1("raised", (rank, place, payload))?))
    }
}

#[pymethods]
impl Group {
    #[getter]
    fn id(&self) -> String {
        self.inner.id().to_string()
    }

    #[getter]
    fn run_dir(&self) -> &str {
        &self.run_dir
    }

    /// Seconds that a step may take by the word of this node's daemon; 0 for no limit.
    #[getter]
    fn step_deadline(&self) -> f64 {
        self.step_deadline.as_secs_f64()
    }

    fn ranks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for info in self.inner.ranks() {
            let node_env = PyDict::new(py);
            for env in &info.node_env {
                node_env.set_item(&env.name, &env.value)?;
            }
            let fields = PyDict::new(py);
            fields.set_item("rank", info.rank)?;
            fields.set_item("local_rank", info.local_rank)?;
            fields.set_item("node_id", info.node.to_string())?;
            fields.set_item("node_name", &info.node_name)?;
            fields.set_item("address", &info.address)?;
            fields.set_item("gpus", &info.gpus)?;
            fields.set_item("gpu_uuids", &info.gpu_uuids)?;
            fields.set_item("node_env", node_env)?;
            fields.set_item("pid", self.pids.get(&info.rank).copied().unwrap_or_default())?;
            list.append(fields)?;
        }
        Ok(list)
    }

    /// The entries that the group has in `links` of `rayless status --json`.
    fn links<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.ours(py)?;
        let links = py.detach(|| self.inner.links());
        to_python(py, &links.iter().map(LinkStatus::to_json).collect())
    }

    /// The way of a step: one crossing into Rust for a whole call.
    #[pyo3(signature = (method, payload, ranks, timeout, deadline=None, /))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        method: &str,
        payload: &[u8],
        ranks: Option<Vec<u32>>,
        timeout: Option<f64>,
        deadline: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let call = self.begin(py, method, payload, ranks, timeout, deadline)?;
        loop {
            match py.detach(|| call.wait_for(SLICE)) {
                Some(Ok(replies)) => return payloads(py, &replies),
                Some(Err(error)) => return Err(self.error(py, method, error)),
                None => py.check_signals()?,
            }
        }
    }

    #[pyo3(signature = (method, payload, ranks, timeout, deadline=None, /))]
    fn submit(
        slf: &Bound<'_, Self>,
        method: String,
        payload: &[u8],
        ranks: Option<Vec<u32>>,
        timeout: Option<f64>,
        deadline: Option<f64>,
    ) -> PyResult<Call> {
        let call = slf.get().begin(slf.py(), &method, payload, ranks, timeout, deadline)?;
        Ok(Call {
            shared: Arc::new(Shared { call, outcome: Mutex::new(None), abandoned: AtomicBool::new(false) }),
            group: slf.clone().unbind(),
            method,
        })
    }

    fn failure<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.inner.failure().map(|failure| errors::group(py, &failure).into_value(py).into_bound(py).into_any())
    }

    #[pyo3(signature = (callback, /))]
    fn on_failure(&self, py: Python<'_>, callback: Bound<'_, PyAny>) -> PyResult<()> {
        self.ours(py)?;
        let failure = match &mut *self.listeners.lock().unwrap_or_else(PoisonError::into_inner) {
            Listeners::Waiting(callbacks) => {
                callbacks.push(callback.unbind());
                return Ok(());
            }
            Listeners::Told(failure) => failure.clone(),
        };
        callback.call1((errors::group(py, &failure).into_value(py),)).map(|_| ())
    }

    fn stop(&self, py: Python<'_>) {
        if self.owner != std::process::id() {
            return;
        }
        py.detach(|| {
            self.inner.stop();
            // Of a group that failed, the head is told by its nodes, with the cause.
            if self.inner.failure().is_none() && !self.told.swap(true, Ordering::AcqRel) {
                self.await_release();
            }
        });
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.owner == std::process::id() {
            // The interpreter drops objects with the GIL held, and the end of a group takes a moment.
            Python::try_attach(|py| py.detach(|| self.inner.stop()));
        } else {
            // A forked child must not end its parent's group: one handle more than are ever dropped keeps it.
            std::mem::forget(self.inner.clone());
        }
    }
}

/// Tells the listeners that the group failed; runs on the group's own thread.
pub(crate) fn tell(listeners: &Mutex<Listeners>, failure: &GroupFailure) {
    let told = Listeners::Told(failure.clone());
    let before = std::mem::replace(&mut *listeners.lock().unwrap_or_else(PoisonError::into_inner), told);
    let Listeners::Waiting(callbacks) = before else { return };
    Python::try_attach(|py| {
        for callback in callbacks {
            let error = errors::group(py, failure).into_value(py);
            if let Err(raised) = callback.call1(py, (error,)) {
                raised.write_unraisable(py, Some(callback.bind(py)));
            }
        }
    });
}

struct Shared {
    call: driver::Call,
    /// Set by whoever first sees the end of the call; held while waiting, so that one thread at a time does.
    outcome: Mutex<Option<Result<Vec<Reply>, CallError>>>,
    abandoned: AtomicBool,
}

impl Shared {
    /// Whether the call is over, after `slice` at most.
    fn wait_for(&self, slice: Duration) -> bool {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if outcome.is_none() {
            *outcome = self.call.wait_for(slice);
        }
        outcome.is_some()
    }
}

/// A call under way.
#[pyclass(frozen, module = "rayless._rayless")]
pub(crate) struct Call {
    shared: Arc<Shared>,
    group: Py<Group>,
    method: String,
}

#[pymethods]
impl Call {
    #[pyo3(signature = (timeout, /))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        self.group.get().ours(py)?;
        let deadline = timeout.map(seconds).transpose()?.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            if self.shared.abandoned.load(Ordering::Acquire) {
                return Ok(true);
            }
            let left = deadline.map_or(SLICE, |deadline| deadline.saturating_duration_since(Instant::now()).min(SLICE));
            if py.detach(|| self.shared.wait_for(left)) {
                return Ok(true);
            }
            py.check_signals()?;
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
        }
    }

    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let group = self.group.get();
        group.ours(py)?;
        let outcome = py.detach(|| {
            let mut outcome = self.shared.outcome.lock().unwrap_or_else(PoisonError::into_inner);
            outcome.take().unwrap_or_else(|| self.shared.call.wait())
        });
        payloads(py, &outcome.map_err(|error| group.error(py, &self.method, error))?)
    }

    fn is_done(&self) -> bool {
        self.shared.call.is_done()
    }

    fn missing(&self) -> Vec<u32> {
        self.shared.call.missing()
    }

    fn abandon(&self) {
        self.shared.abandoned.store(true, Ordering::Release);
    }

    #[pyo3(signature = (callback, /))]
    fn on_done(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        self.group.get().ours(py)?;
        let told = Box::new(move || {
            Python::try_attach(|py| {
                if let Err(raised) = callback.call0(py) {
                    raised.write_unraisable(py, Some(callback.bind(py)));
                }
            });
        });
        py.detach(|| self.shared.call.on_done(told));
        Ok(())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.group.get().owner != std::process::id() {
            // Its locks may have been held by threads that a forked child does not have.
            std::mem::forget(Arc::clone(&self.shared));
        }
    }
}

fn payloads<'py>(py: Python<'py>, replies: &[Reply]) -> PyResult<Bound<'py, PyList>> {
    PyList::new(py, replies.iter().map(|reply| PyBytes::new(py, &reply.payload)))
}

/// A time that a caller gave.
pub(crate) fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err(format!("{value} is not a time\nhint: seconds, 0 or more")))
}
