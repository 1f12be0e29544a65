//! GPU memory before and after a group: a GPU counts as free again when its used memory is back (DESIGN, teardown).
//!
//! What other processes hold does not count, so that groups, and clusters, can share a GPU by fractions, and an MPS server
//! that came up with the first of them can stay: NVML tells which process holds how much. Where it does not (a
//! container with pids of its own), nothing can be told apart and the sum decides.
//!
//! Runs on threads of its own, which live only while something is measured: NVML calls block.

use super::event::{Event, Events};
use crate::inventory::gpu::{self, Memory};
use rayless_proto::{
    ids::GroupId,
    limits::{GPU_DRAIN_SLACK, GPU_DRAIN_SLACK_PER_PROCESS, GPU_DRAIN_TIMEOUT},
};
use rayless_worker::keeper;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Between two looks while the memory should come back any moment, and after that.
const LOOK_SOON: Duration = Duration::from_millis(250);
const LOOK_LATER: Duration = Duration::from_secs(2);

/// Memory by GPU index.
pub(crate) type Used = BTreeMap<u32, Share>;

/// What of a GPU's memory is in use, and how much of that other processes than one group's are known to hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Share {
    used_bytes: u64,
    others: Option<Others>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Others {
    bytes: u64,
    processes: u64,
}

impl Share {
    /// `is_others`: whether this process is alive and none of the group's.
    fn new(memory: &Memory, is_others: impl Fn(u32) -> bool) -> Self {
        let others = memory.processes.as_ref().map(|list| {
            let theirs = || list.iter().filter(|(pid, _)| is_others(**pid)).map(|(_, bytes)| *bytes);
            Others { bytes: theirs().sum(), processes: theirs().count().try_into().unwrap_or(u64::MAX) }
        });
        Self { used_bytes: memory.used_bytes, others }
    }

    /// Whether `now` shows no more than this, which was taken before the group.
    fn is_back(self, now: Self) -> bool {
        let (own_before, own_now, slack) = match (self.others, now.others) {
            (Some(before), Some(after)) => {
                // A process's memory as NVML tells it is not all that its context takes.
                let newcomers = after.processes.saturating_sub(before.processes);
                (
                    i128::from(self.used_bytes) - i128::from(before.bytes),
                    i128::from(now.used_bytes) - i128::from(after.bytes),
                    i128::from(GPU_DRAIN_SLACK) + i128::from(GPU_DRAIN_SLACK_PER_PROCESS) * i128::from(newcomers),
                )
            }
            _ => (i128::from(self.used_bytes), i128::from(now.used_bytes), i128::from(GPU_DRAIN_SLACK)),
        };
        own_now <= own_before + slack
    }
}

/// Memory of `gpus` now, before a group is there; empty where NVML does not tell.
pub(crate) async fn measure(gpus: Vec<u32>) -> Used {
    let (tx, rx) = oneshot::channel();
    let spawned = thread::Builder::new().name("nvml".to_owned()).spawn(move || {
        let _ = tx.send(look(&gpus, uses_a_gpu));
    });
    match spawned {
        Ok(_) => rx.await.unwrap_or_default(),
        Err(_) => Used::new(),
    }
}

/// What is to be watched once a group is over: where its memory cannot be told apart, a GPU that other groups of this node still
/// hold says nothing about it.
pub(crate) fn worth_watching(before: Used, still_held: &BTreeSet<u32>) -> Used {
    before.into_iter().filter(|(index, share)| share.others.is_some() || !still_held.contains(index)).collect()
}

/// Watches until the memory of all GPUs in `before` is back: one [`Event::Draining`] where it is not so at once, one
/// [`Event::Drained`] in any case.
pub(crate) fn watch(group: GroupId, before: Used, events: Events) {
    let is_others = move |pid| uses_a_gpu(pid) && !keeper::is_of_group(pid, group);
    watch_by(group, before, events, move |gpus| look(gpus, is_others));
}

fn watch_by(group: GroupId, before: Used, events: Events, look: impl Fn(&[u32]) -> Used + Send + 'static) {
    let fallback = events.clone();
    let spawned = thread::Builder::new().name("drain".to_owned()).spawn(move || {
        let start = Instant::now();
        let gpus: Vec<u32> = before.keys().copied().collect();
        let (mut told, mut warned) = (false, false);
        loop {
            let full: Vec<u32> = not_back(&before, &look(&gpus));
            if full.is_empty() {
                let _ = events.blocking_send(Event::Drained { group });
                return;
            }
            if !told {
                told = true;
                if events.blocking_send(Event::Draining { group, gpus: full.clone() }).is_err() {
                    return;
                }
            }
            let late = start.elapsed() > GPU_DRAIN_TIMEOUT;
            if late && !std::mem::replace(&mut warned, true) {
                tracing::warn!(%group, gpus = ?full, "GPU memory is not back {} s after the group's end", start.elapsed().as_secs());
            }
            thread::sleep(if late { LOOK_LATER } else { LOOK_SOON });
            if events.is_closed() {
                return;
            }
        }
    });
    if spawned.is_err() {
        // No thread to be had: better a GPU given out too soon than never again.
        let _ = fallback.try_send(Event::Drained { group });
    }
}

fn look(gpus: &[u32], is_others: impl Fn(u32) -> bool) -> Used {
    gpu::memory(gpus).iter().map(|(index, memory)| (*index, Share::new(memory, &is_others))).collect()
}

/// Whether this is a process that has a GPU open. Drivers of before 2023 tell a container the pids of its host, which are nobody's or
/// another program's there.
fn uses_a_gpu(pid: u32) -> bool {
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(entries) => entries.flatten().any(|entry| {
            fs::read_link(entry.path())
                .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"/dev/nvidia"))
        }),
        // Another user's.
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    }
}

/// GPUs that use more than before. One that NVML no longer shows cannot be waited for.
fn not_back(before: &Used, now: &Used) -> Vec<u32> {
    let is_over = |index: &u32, was: Share| now.get(index).is_some_and(|is| !was.is_back(*is));
    before.iter().filter(|(index, was)| is_over(index, **was)).map(|(index, _)| *index).collect()
}

/// Keeps `used` beside the keeper's socket, for a daemon that re-adopts it: a line a GPU, its index and used bytes, then, where known,
/// bytes and number of the processes that held them.
///
/// # Errors
/// Those of the file system.
pub(crate) fn save(path: &Path, used: &Used) -> io::Result<()> {
    let line = |(index, share): (&u32, &Share)| match share.others {
        None => format!("{index} {}\n", share.used_bytes),
        Some(others) => format!("{index} {} {} {}\n", share.used_bytes, others.bytes, others.processes),
    };
    let text: String = used.iter().map(line).collect();
    crate::run_dir::write_atomically(path, text.as_bytes())
}

/// What an earlier daemon kept; empty where it kept nothing.
pub(crate) fn load(path: &Path) -> Used {
    let read = |line: &str| {
        let numbers: Vec<u64> = line.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
        let (index, used_bytes, others) = match numbers[..] {
            [index, used] => (index, used, None),
            [index, used, bytes, processes] => (index, used, Some(Others { bytes, processes })),
            _ => return None,
        };
        Some((u32::try_from(index).ok()?, Share { used_bytes, others }))
    };
    fs::read_to_string(path).unwrap_or_default().lines().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::sync::mpsc;

    const GIB: u64 = 1 << 30;
    const GROUP: GroupId = GroupId([7; 8]);

    /// NVML's answer for one GPU; `None`: no list of processes.
    fn memory(used_bytes: u64, processes: Option<&[(u32, u64)]>) -> Memory {
        Memory { used_bytes, processes: processes.map(|list| list.iter().copied().collect()) }
    }

    /// Pids from 100 on are other groups' and live.
    fn share(used_bytes: u64, processes: Option<&[(u32, u64)]>) -> Share {
        Share::new(&memory(used_bytes, processes), |pid| pid >= 100)
    }

    fn gpu(share: Share) -> Used {
        Used::from([(0, share)])
    }

    #[test]
    fn without_a_list_of_processes_back_means_within_64_mib_of_before() {
        let sums = |sums: [u64; 3]| Used::from_iter((0..).zip(sums.map(|sum| share(sum, None))));
        let mut now = sums([GIB + GPU_DRAIN_SLACK, GPU_DRAIN_SLACK + 1, 0]);
        now.remove(&2);
        assert_eq!(not_back(&sums([GIB, 0, 5]), &now), [1]);
        // A list on one side alone tells nothing apart.
        assert!(!share(0, None).is_back(share(GIB, Some(&[(100, GIB)]))));
        assert!(!share(0, Some(&[])).is_back(share(GIB, None)));
        assert!(share(GIB, Some(&[(100, GIB)])).is_back(share(GIB, None)));
    }

    #[test]
    fn what_others_took_meanwhile_does_not_hold_a_gpu_back() {
        let before = share(2 * GIB, Some(&[(100, 2 * GIB)]));
        // One that was there grew, another came, and the MPS server, whose context takes more than NVML tells.
        let processes = Some(&[(100, 4 * GIB), (101, 5 * GIB), (102, 66 << 20)][..]);
        let most = 9 * GIB + (66 << 20) + GPU_DRAIN_SLACK + 2 * GPU_DRAIN_SLACK_PER_PROCESS;
        assert!(before.is_back(share(most, processes)));
        assert!(!before.is_back(share(most + 1, processes)));
    }

    #[test]
    fn what_the_group_left_holds_it_back_also_beside_others() {
        let before = share(2 * GIB, Some(&[(100, 2 * GIB)]));
        // A process of the group's own, or one that is dead and not yet cleared away, is not among the others.
        assert!(!before.is_back(share(3 * GIB, Some(&[(9, GIB), (100, 2 * GIB)]))));
        // Memory that no process owns.
        assert!(!before.is_back(share(3 * GIB, Some(&[(100, 2 * GIB)]))));
        // The others left while the group's stayed: the sum would hide it.
        assert!(!before.is_back(share(GIB, Some(&[(9, GIB)]))));
        assert!(before.is_back(share(0, Some(&[]))));
    }

    #[test]
    fn a_gpu_held_by_others_is_watched_where_they_can_be_told_apart() {
        let before = Used::from([(0, share(0, None)), (1, share(0, Some(&[]))), (2, share(0, None))]);
        let watched = worth_watching(before, &BTreeSet::from([0, 1]));
        assert_eq!(watched.into_keys().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn draining_is_told_once_and_ends_when_the_groups_memory_is_back() {
        // The group's process is there at two looks; another group takes memory at the third.
        let left = share(3 * GIB, Some(&[(9, GIB), (100, 2 * GIB)]));
        let gone = share(6 * GIB, Some(&[(100, 6 * GIB)]));
        let answers = Mutex::new(vec![gone, left, left]);
        let (tx, mut rx) = mpsc::channel(8);
        watch_by(GROUP, gpu(share(2 * GIB, Some(&[(100, 2 * GIB)]))), tx, move |gpus| {
            assert_eq!(gpus, [0]);
            gpu(answers.lock().unwrap().pop().unwrap())
        });
        assert!(matches!(rx.blocking_recv(), Some(Event::Draining { group: GROUP, gpus }) if gpus == [0]));
        assert!(matches!(rx.blocking_recv(), Some(Event::Drained { group: GROUP })));
        assert!(rx.blocking_recv().is_none());
    }

    #[test]
    fn memory_that_is_back_at_once_is_never_called_draining() {
        let (tx, mut rx) = mpsc::channel(8);
        watch_by(GROUP, gpu(share(GIB, None)), tx, |_| gpu(share(GIB, None)));
        assert!(matches!(rx.blocking_recv(), Some(Event::Drained { group: GROUP })));
    }

    #[test]
    fn a_process_without_a_gpu_holds_none() {
        assert!(!uses_a_gpu(0));
        let mut idle = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found = uses_a_gpu(idle.id());
        idle.kill().unwrap();
        idle.wait().unwrap();
        assert!(!found);
    }

    #[test]
    fn is_kept_for_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("used");
        let used = Used::from([(0, share(7, None)), (3, share(1 << 40, Some(&[(100, 6), (101, 5)])))]);
        save(&path, &used).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "0 7\n3 1099511627776 11 2\n");
        assert_eq!(load(&path), used);
        assert_eq!(load(&dir.path().join("none")), Used::new());
    }
}
