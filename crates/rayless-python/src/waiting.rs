//! Waiting on a link: without the GIL, with a look at signals.

use pyo3::{exceptions::PyValueError, prelude::*};
use rayless_fabric::Wait;
use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

/// How often a wait looks at signals. Each look takes the GIL, which another thread may hold for milliseconds.
const LOOK: Duration = Duration::from_millis(50);

/// Runs `run` without the GIL, for at most `timeout` seconds (`None`: as long as it takes; 0: what can be done at once).
/// Fails with what a signal handler raised, Ctrl-C for example.
pub(crate) fn waiting<R: Send>(
    py: Python<'_>,
    timeout: Option<f64>,
    run: impl FnOnce(&Wait<'_>) -> R + Send,
) -> PyResult<R> {
    let wait = match timeout {
        None => None,
        Some(seconds) => Some(duration(seconds)?),
    };
    interruptible(py, |check| {
        let wait = match wait {
            None => Wait::forever(),
            Some(Duration::ZERO) => Wait::poll(),
            Some(duration) => Wait::at_most(duration),
        };
        run(&wait.with_check(check))
    })
}

/// Runs `run` without the GIL; it asks its argument now and then whether to give up. Fails with what a signal handler raised.
pub(crate) fn interruptible<R: Send>(py: Python<'_>, run: impl FnOnce(&dyn Fn() -> bool) -> R + Send) -> PyResult<R> {
    let (done, raised) = py.detach(|| {
        let looked = Cell::new(Instant::now());
        let raised = RefCell::new(None);
        let check = || {
            if looked.get().elapsed() < LOOK {
                return raised.borrow().is_some();
            }
            looked.set(Instant::now());
            let error = Python::attach(|py| py.check_signals()).err();
            if error.is_some() {
                *raised.borrow_mut() = error;
            }
            raised.borrow().is_some()
        };
        let done = run(&check);
        (done, raised.take())
    });
    raised.map_or(Ok(done), Err)
}

pub(crate) fn duration(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| {
        PyValueError::new_err(format!("timeout={seconds} is no time to wait\nhint: give seconds, 0 for none, or None"))
    })
}
