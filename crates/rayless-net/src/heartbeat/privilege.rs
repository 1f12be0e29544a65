//! What keeps the thread on time on a busy host. Neither is needed; each is reported.

use crate::os;
use rustix::{
    mm::{MlockAllFlags, mlockall},
    process::{Resource, getrlimit},
    thread::CapabilitySet,
};

/// What the system allowed; `Err` says why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Privileges {
    /// Memory stays in RAM, so that no heartbeat waits for a disk.
    pub memory_locked: Result<(), String>,
    /// The thread runs ahead of every ordinary process (SCHED_RR, priority 1).
    pub real_time: Result<(), String>,
}

/// Asks for both. Memory is locked for the whole process (only what it touches), priority is the calling thread's.
pub(super) fn acquire() -> Privileges {
    // Locked memory can be unmapped, but not emptied (MADV_DONTNEED), which is how a thread's heap shrinks: it never would.
    os::give_large_memory_back();
    Privileges {
        memory_locked: lock_memory(),
        real_time: os::run_in_real_time().map_err(|error| format!("real-time priority: {error}")),
    }
}

fn lock_memory() -> Result<(), String> {
    // Under a limit, memory asked for later could be refused because of the lock: worse than a page that is swapped out.
    let is_unlimited = getrlimit(Resource::Memlock).current.is_none();
    let may = || rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if !is_unlimited && !may() {
        return Err("memory is not locked: `ulimit -l` is not `unlimited`".to_owned());
    }
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        .map_err(|error| format!("memory is not locked: {error}"))
}
