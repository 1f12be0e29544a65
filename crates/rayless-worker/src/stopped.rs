//! Whether a process is stopped: a silence that needs no second guess.

use crate::proc;
use std::fs;

/// Whether the kernel holds process `pid` stopped (SIGSTOP and its like). `false` where it is gone, or only late.
pub fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = proc::name_and_fields(&stat).and_then(|(_, mut fields)| fields.next());
    state == Some("T")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, Signal, kill_process};
    use std::{process::Command, thread};

    #[test]
    fn a_stopped_process_is_told_from_a_sleeping_one() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        assert!(!is_stopped(pid));
        kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
        while !is_stopped(pid) {
            thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_stopped(pid));
    }
}
