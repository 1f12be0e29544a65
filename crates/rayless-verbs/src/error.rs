//! Errors: which call, what the system said, what to do about it.

use crate::load::LoadError;
use rustix::io::Errno;

/// A verbs or connection manager call failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VerbsError {
    /// The libraries are not there.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The system refused a call.
    #[error("{call}: {errno}{}", advice(call, *errno))]
    Call {
        /// The C function.
        call: &'static str,
        /// What it said.
        errno: Errno,
    },
    /// The connection manager reported another event than the one waited for.
    #[error("{waiting_for}: the connection manager reported {event} (status {status})")]
    Event {
        /// What was waited for.
        waiting_for: &'static str,
        /// The event's C name.
        event: String,
        /// Its status: a negative errno, or a transport's reject code.
        status: i32,
    },
    /// The peer refused the connection.
    #[error("the peer refused: {reason}")]
    Refused {
        /// The private data of its refusal, as text.
        reason: String,
    },
    /// The deadline passed.
    #[error("{waiting_for}: nothing within the time given")]
    TimedOut {
        /// What was waited for.
        waiting_for: &'static str,
    },
    /// A range that does not lie in its region, or another argument that no device would take.
    #[error("{what}")]
    Misuse {
        /// The argument and its limit.
        what: String,
    },
}

/// What a person can do about the errors that people run into.
fn advice(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        ("ibv_reg_mr" | "ibv_create_cq" | "rdma_create_qp", Errno::NOMEM) => {
            "; the memlock limit may be too small: `ulimit -l unlimited`, docker `--ulimit memlock=-1`"
        }
        ("rdma_create_event_channel", Errno::NODEV | Errno::NOENT | Errno::ACCESS) => {
            "; /dev/infiniband/rdma_cm is missing or closed to this process: load rdma_ucm, docker `--device=/dev/infiniband`"
        }
        ("rdma_resolve_addr" | "rdma_bind_addr", Errno::NODEV | Errno::ADDRNOTAVAIL | Errno::NOENT) => {
            "; no RDMA device has this address"
        }
        _ => "",
    }
}

impl VerbsError {
    /// The calling thread's errno, as the error of `call`.
    pub(crate) fn last(call: &'static str) -> Self {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Self::Call { call, errno: Errno::from_raw_os_error(errno) }
    }

    /// For calls that return an errno. Providers differ: some return it negated, some -1 with errno set.
    pub(crate) fn returned(call: &'static str, result: i32) -> Self {
        if result == -1 {
            return Self::last(call);
        }
        let errno = result.checked_abs().filter(|errno| (1..4096).contains(errno)).unwrap_or(libc::EIO);
        Self::Call { call, errno: Errno::from_raw_os_error(errno) }
    }
}

/// 0, or -1 with errno set (librdmacm's convention).
pub(crate) fn check(call: &'static str, result: i32) -> Result<(), VerbsError> {
    if result == 0 { Ok(()) } else { Err(VerbsError::last(call)) }
}
