//! What each failure is in Python: the types of `rayless.exceptions`, which is loaded only when something fails.

use pyo3::{call::PyCallArgs, exceptions::PyValueError, prelude::*};
use rayless_fabric::{LinkName, LostKind, RecvError, Rejected, RejectedKind, SendError, Stop};
use rayless_proto::v1::control::{NeedHave, Refusal, RefusalKind};
use rayless_worker::{
    client::ClientError,
    driver::{GroupFailure, StartError},
    host::HostError,
    links::{LinkError, LinkFault},
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
        StartError::Versions { .. } | StartError::Wish(_) => exception(py, "RefusedError", (error.to_string(),)),
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

/// An instance of `rayless.exceptions.<name>`, one of the family of `LinkError`. `kind`: what exactly, where a caller may ask.
pub(crate) fn link(py: Python<'_>, name: &str, text: &str, link: LinkName, kind: Option<&str>) -> PyErr {
    exception(py, name, (text, link.to_string(), link.from, link.to, kind))
}

/// A link that was not opened. `kind` tells what is wrong in a word or two.
pub(crate) fn link_unavailable(py: Python<'_>, error: &LinkError) -> PyErr {
    let kind = match &*error.fault {
        LinkFault::Caller(_) => "caller",
        LinkFault::TimedOut { .. } => "timed out",
        LinkFault::Interrupted => "interrupted",
        LinkFault::NoTransport { .. } => "no transport",
        LinkFault::Refused(_) => "refused",
        LinkFault::Over(_) => "over",
    };
    let name = match &*error.fault {
        LinkFault::Caller(_) => "LinkRejectedError",
        _ => "LinkUnavailableError",
    };
    link(py, name, &error.to_string(), error.link, Some(kind))
}

pub(crate) fn link_send(py: Python<'_>, error: SendError) -> PyErr {
    match &error {
        SendError::Rejected(rejected) => link_rejected(py, rejected),
        SendError::Stopped { link: name, stop, .. } => stopped_link(py, &error.to_string(), *name, *stop),
        SendError::Closed { link: name } => closed_link(py, &error.to_string(), *name),
        SendError::Lost(lost) => lost_link(py, &error.to_string(), lost.link, lost.kind, lost.link.to),
    }
}

pub(crate) fn link_recv(py: Python<'_>, error: RecvError) -> PyErr {
    match &error {
        RecvError::Rejected(rejected) => link_rejected(py, rejected),
        RecvError::Stopped { link: name, stop, .. } => stopped_link(py, &error.to_string(), *name, *stop),
        RecvError::Closed { link: name, .. } => closed_link(py, &error.to_string(), *name),
        RecvError::Lost(lost) => lost_link(py, &error.to_string(), lost.link, lost.kind, lost.link.from),
    }
}

pub(crate) fn link_rejected(py: Python<'_>, rejected: &Rejected) -> PyErr {
    let (kind, hint) = match rejected.kind {
        RejectedKind::NotContiguous => ("not contiguous", "give `tensor.contiguous()`"),
        RejectedKind::DType => ("dtype", "convert it to a dtype that both ends take"),
        RejectedKind::TooLarge => ("too large", "send it in several messages"),
        RejectedKind::Mismatch => ("mismatch", "give buffers of the shapes that the header announced"),
        RejectedKind::OutOfTurn => ("out of turn", "finish the message before first"),
    };
    link(py, "LinkRejectedError", &format!("{rejected}\nhint: {hint}"), rejected.link, Some(kind))
}

/// A message that was accepted and did not leave in time.
pub(crate) fn link_send_unfinished(py: Python<'_>, name: LinkName, timeout: Option<f64>) -> PyErr {
    let after = timeout.map_or_else(String::new, |seconds| format!(" within {seconds} s"));
    let text = format!(
        "{name}: a message has not left{after}\nhint: it is still on its way; wait again, or look at what rank {} does",
        name.to
    );
    link(py, "LinkTimeoutError", &text, name, None)
}

fn stopped_link(py: Python<'_>, text: &str, name: LinkName, stop: Stop) -> PyErr {
    match stop {
        Stop::TimedOut => {
            let text = format!("{text}\nhint: nothing is lost; call again, or look at what the other rank does");
            link(py, "LinkTimeoutError", &text, name, None)
        }
        // A signal's exception was raised instead, so this end was closed by another thread.
        Stop::Cancelled => closed_link(py, text, name),
    }
}

fn closed_link(py: Python<'_>, text: &str, name: LinkName) -> PyErr {
    let text = format!("{text}\nhint: a closed link is not opened again; take another channel");
    link(py, "LinkClosedError", &text, name, None)
}

fn lost_link(py: Python<'_>, text: &str, name: LinkName, kind: LostKind, peer: u32) -> PyErr {
    let (kind, hint) = match kind {
        LostKind::PeerGone => ("peer gone", format!("look at the last output of rank {peer}")),
        LostKind::PeerReported => ("peer reported", format!("look at the log of rank {peer}")),
        LostKind::Crossed => {
            ("crossed", "the ranks ran different calls; look for an exception in the log of either".to_owned())
        }
        LostKind::Corrupt => {
            ("corrupt", "this is a fault of rayless or of the network; run with --verify-links".to_owned())
        }
        LostKind::Abandoned => ("abandoned", "a call was stopped in the middle of a message".to_owned()),
        LostKind::System => ("system", "see the cause; `rayless status` shows the link's device".to_owned()),
    };
    link(py, "LinkLostError", &format!("{text}\nhint: {hint}"), name, Some(kind))
}
