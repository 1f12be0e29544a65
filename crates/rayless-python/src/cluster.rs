//! Questions to the local daemon. Each opens a connection of its own: they are rare, and a restarted daemon needs no care.

use crate::errors;
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyDict, PyList},
};
use rayless_proto::ids::GroupId;
use rayless_worker::client::{ClientError, LocalClient};
use serde_json::{Value, json};
use std::path::PathBuf;

/// What the daemon of `run_dir` is.
#[pyfunction]
pub(crate) fn identify(py: Python<'_>, run_dir: PathBuf) -> PyResult<Bound<'_, PyAny>> {
    let identity = ask(py, run_dir, LocalClient::identify)?;
    let value = json!({
        "node": identity.node.to_string(),
        "name": identity.name,
        "address": identity.address,
        "pid": identity.pid,
        "build": identity.build,
        "is_head": identity.is_head,
        "head_address": identity.head_address,
        "joined": identity.joined,
        "waiting_for": identity.waiting_for,
        "dead_after_ms": identity.dead_after_ms,
        "host_id": identity.host_id,
    });
    to_python(py, &value)
}

/// The state of the cluster.
#[pyfunction]
pub(crate) fn status(py: Python<'_>, run_dir: PathBuf) -> PyResult<Bound<'_, PyAny>> {
    let report = ask(py, run_dir, LocalClient::status)?;
    to_python(py, &report.to_json())
}

/// Ends a group of the cluster, or all of them.
#[pyfunction]
#[pyo3(signature = (run_dir, group))]
pub(crate) fn stop_group(py: Python<'_>, run_dir: PathBuf, group: Option<&str>) -> PyResult<()> {
    let group: Option<GroupId> = group
        .map(str::parse)
        .transpose()
        .map_err(|error: rayless_proto::ids::ParseIdError| PyValueError::new_err(error.to_string()))?;
    ask(py, run_dir, |client| client.stop_group(group))
}

fn ask<T: Send>(
    py: Python<'_>,
    run_dir: PathBuf,
    question: impl FnOnce(&mut LocalClient) -> Result<T, ClientError> + Send,
) -> PyResult<T> {
    py.detach(|| question(&mut LocalClient::connect(&run_dir)?)).map_err(|error| errors::client(py, error))
}

pub(crate) fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(value) => value.into_pyobject(py)?.to_owned().into_any(),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(whole), _) => whole.into_pyobject(py)?.into_any(),
            (None, Some(whole)) => whole.into_pyobject(py)?.into_any(),
            (None, None) => number.as_f64().into_pyobject(py)?.into_any(),
        },
        Value::String(text) => text.into_pyobject(py)?.into_any(),
        Value::Array(values) => {
            let list = PyList::empty(py);
            for value in values {
                list.append(to_python(py, value)?)?;
            }
            list.into_any()
        }
        Value::Object(fields) => {
            let dict = PyDict::new(py);
            for (name, value) in fields {
                dict.set_item(name, to_python(py, value)?)?;
            }
            dict.into_any()
        }
    })
}
