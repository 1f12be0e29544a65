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
    #[error("{waiting_for}: the connection manager reported {event} ({}){}", meaning(event, *status), event_advice(event, *status))]
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
    #[error(
        "{waiting_for}: nothing within the time given; is the peer up, and do firewalls and switches let RDMA through (RoCE: UDP 4791, iWARP: the TCP port)?"
    )]
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

/// What a person can do about a refused call. Every error has something: most come with a line of the driver's in the kernel's log.
fn advice(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        ("ibv_reg_mr" | "ibv_create_cq" | "rdma_create_qp" | "ibv_alloc_pd", Errno::NOMEM) => {
            "; the memlock limit may be too small: `ulimit -l unlimited`, docker `--ulimit memlock=-1`"
        }
        ("rdma_create_event_channel", Errno::NODEV | Errno::NOENT | Errno::ACCESS) => {
            "; /dev/infiniband/rdma_cm is missing or closed to this process: load rdma_ucm, docker `--device=/dev/infiniband`"
        }
        ("rdma_resolve_addr" | "rdma_bind_addr", Errno::NODEV | Errno::ADDRNOTAVAIL | Errno::NOENT) => {
            "; no RDMA device has this address"
        }
        ("rdma_bind_addr" | "rdma_listen", Errno::ADDRINUSE) => {
            "; another program listens on this port: choose other ports with --rdma-ports"
        }
        ("rdma_resolve_addr" | "rdma_resolve_route" | "rdma_connect", Errno::HOSTUNREACH | Errno::NETUNREACH) => {
            "; no route leads from this device to the peer: check `ip route get` for its address"
        }
        ("rdma_connect", Errno::CONNREFUSED) => "; nobody listens there: has the peer's process ended?",
        ("ibv_reg_dmabuf_mr", Errno::OPNOTSUPP) => {
            "; this device or its library takes no dma-buf: GPU memory goes through host memory instead"
        }
        ("ibv_reg_mr", Errno::FAULT) => {
            "; the device does not take this memory's addresses (a GPU's need nvidia_peermem or dma-buf)"
        }
        (_, Errno::ACCESS | Errno::PERM) => {
            "; this process may not: /dev/infiniband must be open to it, docker `--device=/dev/infiniband --cap-add=IPC_LOCK`"
        }
        (_, Errno::MFILE | Errno::NFILE) => "; too many open files: `ulimit -n 65536`",
        (_, Errno::NOMEM | Errno::NOSPC) => {
            "; the device is out of queues or memory: end other users of it (`rdma resource`)"
        }
        (_, Errno::NOTCONN | Errno::CONNRESET | Errno::PIPE) => "; the connection has ended: see the peer's log",
        _ => "; the kernel's log may say more: `dmesg`",
    }
}

/// The status of an event in words.
fn meaning(event: &str, status: i32) -> String {
    match status.checked_neg().filter(|errno| (1..4096).contains(errno)) {
        Some(errno) => Errno::from_raw_os_error(errno).to_string(),
        // IB's reject reasons; 8 is "invalid service id".
        None if event == REJECTED && status == NO_SERVICE => "nobody listens there".to_owned(),
        None => format!("status {status}"),
    }
}

const REJECTED: &str = "RDMA_CM_EVENT_REJECTED";
const NO_SERVICE: i32 = 8;

fn event_advice(event: &str, status: i32) -> &'static str {
    match (event, status) {
        (REJECTED, NO_SERVICE) => "; has the peer's process ended?",
        (REJECTED, _) => "; see the peer's log",
        ("RDMA_CM_EVENT_ADDR_ERROR" | "RDMA_CM_EVENT_ROUTE_ERROR", _) => {
            "; no way leads from this device to the peer's address: check `rdma link` and `ip route get` at both ends"
        }
        ("RDMA_CM_EVENT_UNREACHABLE" | "RDMA_CM_EVENT_CONNECT_ERROR", _) => {
            "; the peer does not answer: is it up, and do firewalls and switches let RDMA through (RoCE: UDP 4791, iWARP: the TCP port)?"
        }
        ("RDMA_CM_EVENT_DEVICE_REMOVAL", _) => "; the device was removed or its driver unloaded: `rdma link`",
        _ => "; see the peer's log, and this kernel's: `dmesg`",
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

#[cfg(test)]
mod tests {
    use super::*;

    fn call(call: &'static str, errno: Errno) -> String {
        VerbsError::Call { call, errno }.to_string()
    }

    #[test]
    fn an_error_names_the_call_the_errno_and_what_to_do() {
        let text = call("ibv_reg_mr", Errno::NOMEM);
        assert!(text.starts_with("ibv_reg_mr: Cannot allocate memory"), "{text}");
        assert!(text.ends_with("docker `--ulimit memlock=-1`"), "{text}");
        assert!(call("rdma_bind_addr", Errno::ADDRNOTAVAIL).ends_with("no RDMA device has this address"));
        assert!(call("rdma_listen", Errno::ADDRINUSE).ends_with("--rdma-ports"));
        // Whatever the call and the errno, something is said after the cause.
        for name in ["ibv_post_send", "rdma_migrate_id", "poll"] {
            for errno in 1..134 {
                let text = call(name, Errno::from_raw_os_error(errno));
                let (cause, advice) = text.split_once("; ").unwrap();
                assert!(cause.starts_with(&format!("{name}: ")) && advice.len() > 10, "{text}");
            }
        }
    }

    #[test]
    fn an_event_is_told_in_words() {
        let event = |event: &str, status| {
            VerbsError::Event { waiting_for: "connecting", event: event.to_owned(), status }.to_string()
        };
        assert_eq!(
            event(REJECTED, 8),
            "connecting: the connection manager reported RDMA_CM_EVENT_REJECTED (nobody listens there); has the peer's process ended?"
        );
        let text = event("RDMA_CM_EVENT_UNREACHABLE", -110);
        assert!(text.contains("(Connection timed out") && text.contains("UDP 4791"), "{text}");
        assert!(event("RDMA_CM_EVENT_WHATEVER", 77).contains("(status 77); see "));
    }
}
