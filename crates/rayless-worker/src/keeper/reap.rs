//! What a dead worker leaves behind: its own children.
//!
//! The keeper is the reaper of its descendants, so whatever a worker started and left becomes the keeper's child; what is still in a worker's
//! session is its too. They get a moment to end by themselves (Python's resource tracker removes shared-memory files when its pipe
//! closes), then they are killed.

use crate::proc;
use rayless_proto::ids::{GroupId, NodeId};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, getpid, pidfd_open, pidfd_send_signal, waitpid};
use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

/// For what ends by itself once its worker is gone.
const MANNERS: Duration = Duration::from_secs(1);

/// Ends and reaps all that the workers left; `false` where something was still there at `deadline`. `workers` are the pids of all workers, which are
/// dead and reaped.
pub(super) async fn clear_leftovers(workers: &[u32], deadline: Instant) -> bool {
    let polite_until = Instant::now() + MANNERS;
    let mut pause = Duration::from_millis(5);
    loop {
        let left = leftovers(workers);
        if left.is_empty() {
            return true;
        }
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        if now >= polite_until {
            left.iter().for_each(|pid| kill(*pid));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Ends what a keeper left that was killed itself: its workers died with it (PDEATHSIG), but not what they had started. Each of those has the
/// group and the node in the environment that it was started with, or is of a worker's session. Two nodes may share a process table (two run
/// dirs of one host): the other node's part of the group is not ours to end. Returns how many there were; all are gone when it returns, or
/// `deadline` has passed.
pub async fn clear_orphans(group: GroupId, node: NodeId, workers: &[u32], deadline: Instant) -> usize {
    let part = [format!("RAYLESS_GROUP={group}"), format!("RAYLESS_NODE_ID={node}")];
    let mut seen = BTreeSet::new();
    let mut pause = Duration::from_millis(5);
    loop {
        let ours = |process: &Process| {
            process.state != 'Z'
                && process.pid != own_pid()
                && (workers.contains(&process.session) || was_started_with(process.pid, &part))
        };
        let left: Vec<u32> = processes().filter(ours).map(|process| process.pid).collect();
        if left.is_empty() || Instant::now() >= deadline {
            return seen.len();
        }
        left.iter().for_each(|pid| kill(*pid));
        seen.extend(left);
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Whether a process has the group in the environment that it was started with; `false` for other users' processes.
pub fn is_of_group(pid: u32, group: GroupId) -> bool {
    was_started_with(pid, &[format!("RAYLESS_GROUP={group}")])
}

/// Whether all of `entries` (`NAME=value`) are in the environment that a process was started with.
fn was_started_with(pid: u32, entries: &[String]) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let has = |entry: &String| environment.split(|byte| *byte == 0).any(|part| part == entry.as_bytes());
    entries.iter().all(has)
}

/// Reaps orphans that ended while the group runs, so that a worker that starts many programs does not fill the process table.
pub(super) fn reap_orphans(workers: &[u32]) {
    for process in processes().filter(|p| p.parent == own_pid() && p.state == 'Z' && !workers.contains(&p.pid)) {
        reap(process.pid);
    }
}

/// SIGKILL through a pidfd, after a second look: a pid alone may have a new owner by now.
fn kill(pid: u32) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) {
        let _ = pidfd_send_signal(&fd, Signal::KILL);
    }
}

fn reap(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

fn leftovers(workers: &[u32]) -> Vec<u32> {
    let me = own_pid();
    let mut left = Vec::new();
    for process in processes() {
        let ours = process.parent == me || workers.contains(&process.session);
        if !ours || process.pid == me {
            continue;
        }
        if process.state != 'Z' {
            left.push(process.pid);
        } else if process.parent == me {
            reap(process.pid);
        }
    }
    left
}

fn own_pid() -> u32 {
    u32::try_from(getpid().as_raw_nonzero().get()).unwrap_or(0)
}

struct Process {
    pid: u32,
    state: char,
    parent: u32,
    session: u32,
}

fn processes() -> impl Iterator<Item = Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        parse(pid, &fs::read_to_string(entry.path().join("stat")).ok()?)
    })
}

/// Of `pid (name) state ppid pgrp session …`.
fn parse(pid: u32, stat: &str) -> Option<Process> {
    let (_, mut fields) = proc::name_and_fields(stat)?;
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Process { pid, state, parent, session })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_brackets_is_read_over() {
        let process = parse(7, "7 (a) b) S 1) Z 12 34 56 0 -1").unwrap();
        assert_eq!((process.state, process.parent, process.session), ('Z', 12, 56));
        assert!(parse(7, "7 nonsense").is_none());
    }

    /// Two nodes of one process table hold parts of one group, and the keeper of the first was killed.
    #[tokio::test]
    async fn only_the_own_nodes_part_of_a_group_is_swept() {
        // Unique to this run: another may sweep at the same time.
        let group = GroupId(u64::from(own_pid()).to_le_bytes());
        let (ours, theirs) = (NodeId([1; 32]), NodeId([2; 32]));
        let start = |node: NodeId| {
            let mut command = std::process::Command::new("sleep");
            command.arg("1000").env("RAYLESS_GROUP", group.to_string()).env("RAYLESS_NODE_ID", node.to_string());
            command.spawn().unwrap()
        };
        let (mut orphan, mut stranger) = (start(ours), start(theirs));
        let found = clear_orphans(group, ours, &[], Instant::now() + Duration::from_secs(10)).await;
        let stranger_lives = stranger.try_wait().unwrap().is_none();
        for child in [&mut orphan, &mut stranger] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(found, 1);
        assert!(stranger_lives);
    }
}
