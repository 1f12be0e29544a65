//! What each failure is in Python: the types of `rayless.exceptions`, which is loaded only when something fails.

use pyo3::{call::PyCallArgs, exceptions::PyValueError, prelude::*};
use rayless_proto::v1::control::{NeedHave, Refusal, RefusalKind};
use rayless_worker::{
    client::ClientError,
    driver::{GroupFailure, StartError},
    host::HostError,
};

/// An instance of `rayless.exceptions.<name>`; where even that cannot be made, the error that came of trying.
pub(crate) fn exception<'py, A: PyCallArgs<'py>>(py: Python<'py>, name: &str, arguments: A) -> PyErr {
    let made = py.import("rayless.exceptions").and_then(|module| module.getattr(name)?.call1(arguments));
    made.map_or_else(|error| error, PyErr::from_value)
}

pub(crate) fn client(py: Python<'_>, error: ClientError) -> PyErr {
    match error {
        ClientError::Refused { refusal, table } => refused(py, &refusal, table.as_ref()),
        ClientError::NoDaemon { .. } | ClientError::Lost { .. } | ClientError::Io(_) => {
            exception(py, "ClusterNotFoundError", (error.to_string(),))
        }
    }
}

fn refused(py: Python<'_>, refusal: &Refusal, table: Option<&NeedHave>) -> PyErr {
    let mut text = refusal.cause.clone();
    if !refusal.hint.is_empty() {
        text.push_str(&format!("\nhint: {}", refusal.hint));
    }
    if let Some(table) = table {
        let shown = table.to_string();
        // Its first line is the cause, which is said already.
        text.push_str(&format!("\n{}", shown.strip_prefix(&format!("{}\n", refusal.cause)).unwrap_or(&shown)));
    }
    match refusal.kind {
        RefusalKind::Policy => exception(py, "RefusedError", (text,)),
        RefusalKind::Resources => exception(py, "PlacementError", (text,)),
        RefusalKind::NoHead => exception(py, "ClusterNotFoundError", (text,)),
        RefusalKind::Invalid | RefusalKind::Failed => exception(py, "LaunchError", (text,)),
    }
}

pub(crate) fn start(py: Python<'_>, error: StartError) -> PyErr {
    match error {
        StartError::Client(error) => client(py, error),
        StartError::Failed(GroupFailure::Ended { cause }) => exception(py, "LaunchError", (cause,)),
        StartError::Failed(failure) => group(py, &failure),
        StartError::Versions { .. } => exception(py, "RefusedError", (error.to_string(),)),
        StartError::Unreachable { .. } | StartError::TimedOut { .. } | StartError::GivenUp | StartError::Io(_) => {
            exception(py, "LaunchError", (error.to_string(),))
        }
    }
}

/// Why a group is over.
pub(crate) fn group(py: Python<'_>, failure: &GroupFailure) -> PyErr {
    match failure {
        GroupFailure::WorkerDied { rank, node, cause, tail } => {
            let mut text = cause.clone();
            if !tail.is_empty() {
                text.push_str(&format!("\nhint: the last output of rank {rank}:\n{tail}"));
            }
            exception(py, "WorkerDiedError", (text, *rank, node.as_str()))
        }
        GroupFailure::NodeDied { name, cause, .. } => {
            exception(py, "NodeDiedError", (cause.as_str(), py.None(), name.as_str()))
        }
        GroupFailure::Stuck { ranks, cause, stacks } => {
            let mut text = cause.clone();
            if !stacks.is_empty() {
                text.push_str(&format!("\nhint: where they were (all of it is in the ranks' logs):\n{stacks}"));
            }
            exception(py, "StepDeadlineError", (text, ranks.clone()))
        }
        GroupFailure::Ended { cause } => exception(py, "ActorDiedError", (cause.as_str(),)),
    }
}

/// A call to a group that was stopped.
pub(crate) fn stopped(py: Python<'_>) -> PyErr {
    exception(py, "ActorDiedError", ("the group was stopped\nhint: start a new one",))
}

/// A group used in a process that did not start it.
pub(crate) fn not_ours(py: Python<'_>, owner: u32) -> PyErr {
    let text = format!(
        "this group belongs to process {owner}, and this is process {}\nhint: a forked child starts groups of its own",
        std::process::id()
    );
    exception(py, "RayError", (text,))
}

pub(crate) fn host(py: Python<'_>, error: HostError) -> PyErr {
    match error {
        HostError::TooLarge(_) => PyValueError::new_err(error.to_string()),
        HostError::NotAWorker(_) | HostError::KeeperGone | HostError::Broken(_) => {
            exception(py, "RaySystemError", (error.to_string(),))
        }
    }
}
