//! A worker's death as soon as it is certain, while the kernel still takes the process down.
//!
//! A thread per worker waits for its [`RobustMutex`] and then asks `/proc` whether the process dies, and of what. What is not certain is left
//! to the pidfd, which tells of every death some time later. These threads start nothing: a worker must be a child of the main thread. They are
//! also the ones who read `/proc`: who looks at a process just then may have to free its memory.

use crate::{proc, robust::RobustMutex};
use std::{
    fs, io, os::unix::process::ExitStatusExt, path::Path, process::ExitStatus, sync::Arc, thread, time::Duration,
};

/// `PF_EXITING` of the kernel's `sched.h`.
const EXITING: u32 = 0x4;
/// Looks at the other threads of a process whose main thread ended: from taking the signal that ends them to being marked so is a moment.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);
/// Bytes of stack.
const STACK: usize = 128 << 10;

/// Of a worker being watched; dropped, the watch ends.
pub(super) struct Watch(Arc<RobustMutex>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

/// Calls `tell` from another thread if process `pid`, a child not yet reaped, is found to die; not later than it is reaped.
pub(super) fn watch(mutex: RobustMutex, pid: u32, tell: impl FnOnce(ExitStatus) + Send + 'static) -> io::Result<Watch> {
    let mutex = Arc::new(mutex);
    let watched = Arc::clone(&mutex);
    let body = move || {
        if watched.wait_for_end_of(pid)
            && let Some(status) = status_of_dying(pid)
        {
            tell(status);
        }
    };
    thread::Builder::new().name("rayless-dying".into()).stack_size(STACK).spawn(body)?;
    Ok(Watch(mutex))
}

/// How process `pid` ends, of which the main thread has ended or is about to; `None` where the process lives on, ends in order, or does not
/// let itself be looked at.
fn status_of_dying(pid: u32) -> Option<ExitStatus> {
    for _ in 0..LOOKS {
        let main = Thread::read(Path::new(&format!("/proc/{pid}/stat")))?;
        if !main.exiting {
            // It runs another program now.
            return None;
        }
        let status = ExitStatus::from_raw(main.exit_code);
        let certain = match (status.code(), status.signal()) {
            // Zero also is what the kernel says to those who may not know.
            (Some(0), _) | (None, None) => return None,
            // The status of a stop, of a process that lives.
            (_, Some(libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU)) => return None,
            // Kills all threads or none.
            (_, Some(libc::SIGKILL)) => true,
            _ => others_end(pid),
        };
        if certain {
            return Some(status);
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    None
}

/// Whether all threads but the first end, too: `exit_group` and a deadly signal send SIGKILL to each of them.
fn others_end(pid: u32) -> bool {
    for (_, folder) in proc::threads(pid).filter(|(id, _)| *id != pid) {
        if is_being_killed(&fs::read_to_string(folder.join("status")).unwrap_or_default()) {
            return true;
        }
        // Gone already where it cannot be read.
        if Thread::read(&folder.join("stat")).is_some_and(|thread| !thread.exiting) {
            return false;
        }
    }
    true
}

/// Whether a thread's `status` has SIGKILL among the signals on their way to it.
fn is_being_killed(status: &str) -> bool {
    proc::has_signal(status, "SigPnd", libc::SIGKILL)
}

/// What a `stat` file says of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    exiting: bool,
    /// As `wait` gives it.
    exit_code: i32,
}

impl Thread {
    fn read(path: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(path).ok()?)
    }

    /// Of `pid (name) state …`: the 9th field and the 52nd.
    fn parse(stat: &str) -> Option<Self> {
        let (_, mut fields) = proc::name_and_fields(stat)?;
        let flags: u32 = fields.nth(6)?.parse().ok()?;
        let exit_code = fields.nth(42)?.parse().ok()?;
        Some(Self { exiting: flags & EXITING != 0, exit_code })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    use std::process::{Child, Command};

    /// Runs in a shell to its end, which is not reaped.
    fn dead(script: &str) -> Child {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        waitid(WaitId::Pid(Pid::from_child(&child)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
        child
    }

    #[test]
    fn what_a_process_dies_of_is_known_before_it_is_reaped() {
        for script in ["exit 3", "kill -KILL $$", "kill -TERM $$"] {
            let mut child = dead(script);
            let told = status_of_dying(child.id());
            assert_eq!(told, Some(child.wait().unwrap()), "{script}");
        }
    }

    #[test]
    fn an_orderly_end_is_left_to_the_pidfd() {
        let mut child = dead("exit 0");
        let told = status_of_dying(child.id());
        child.wait().unwrap();
        assert_eq!(told, None);
    }

    #[test]
    fn who_lives_does_not_die() {
        assert_eq!(status_of_dying(std::process::id()), None);
        assert!(!others_end(std::process::id()), "this thread is another than the first");
    }

    #[test]
    fn the_kernels_words_are_read_over_any_name() {
        let fields = (3..=52).map(|field| match field {
            9 => "4194564".to_owned(),
            52 => "9".to_owned(),
            other => other.to_string(),
        });
        let stat = format!("7 (a) b) {}\n", fields.collect::<Vec<_>>().join(" "));
        assert_eq!(Thread::parse(&stat), Some(Thread { exiting: true, exit_code: 9 }));
        assert_eq!(Thread::parse("7 (short) S 1 2 3"), None);
        assert!(is_being_killed("Threads:\t2\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
        assert!(!is_being_killed("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n"));
    }
}
