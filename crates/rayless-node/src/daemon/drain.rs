//! GPU memory before and after a group: a GPU counts as free again when its used memory is back (DESIGN, teardown).
//!
//! Runs on threads of its own, which live only while something is measured: NVML calls block.

use super::event::{Event, Events};
use crate::inventory::gpu::{self, Used};
use rayless_proto::{
    ids::GroupId,
    limits::{GPU_DRAIN_SLACK, GPU_DRAIN_TIMEOUT},
};
use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Between two looks while the memory should come back any moment, and after that.
const LOOK_SOON: Duration = Duration::from_millis(250);
const LOOK_LATER: Duration = Duration::from_secs(2);

/// Used memory of `gpus` now; empty where NVML does not tell.
pub(crate) async fn measure(gpus: Vec<u32>) -> Used {
    let (tx, rx) = oneshot::channel();
    let spawned = thread::Builder::new().name("nvml".to_owned()).spawn(move || {
        let _ = tx.send(used(&gpus));
    });
    match spawned {
        Ok(_) => rx.await.unwrap_or_default(),
        Err(_) => Used::new(),
    }
}

/// Watches until the memory of all GPUs in `before` is back: one [`Event::Draining`] where it is not so at once, one
/// [`Event::Drained`] in any case.
pub(crate) fn watch(group: GroupId, before: Used, events: Events) {
    let fallback = events.clone();
    let spawned = thread::Builder::new().name("drain".to_owned()).spawn(move || {
        let start = Instant::now();
        let gpus: Vec<u32> = before.keys().copied().collect();
        let (mut told, mut warned) = (false, false);
        loop {
            let full: Vec<u32> = not_back(&before, &used(&gpus));
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

fn used(gpus: &[u32]) -> Used {
    gpu::probe().used_bytes.into_iter().filter(|(index, _)| gpus.contains(index)).collect()
}

/// GPUs that use more than before. One that NVML no longer shows cannot be waited for.
fn not_back(before: &Used, now: &Used) -> Vec<u32> {
    let over = |index: &u32, was: u64| now.get(index).is_some_and(|is| *is > was.saturating_add(GPU_DRAIN_SLACK));
    before.iter().filter(|(index, was)| over(index, **was)).map(|(index, _)| *index).collect()
}

/// Keeps `used` beside the keeper's socket, for a daemon that re-adopts it.
///
/// # Errors
/// Those of the file system.
pub(crate) fn save(path: &Path, used: &Used) -> io::Result<()> {
    let text: String = used.iter().map(|(index, bytes)| format!("{index} {bytes}\n")).collect();
    crate::run_dir::write_atomically(path, text.as_bytes())
}

/// What an earlier daemon kept; empty where it kept nothing.
pub(crate) fn load(path: &Path) -> Used {
    let read = |line: &str| {
        let (index, bytes) = line.split_once(' ')?;
        Some((index.parse().ok()?, bytes.parse().ok()?))
    };
    fs::read_to_string(path).unwrap_or_default().lines().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_means_within_64_mib_of_before() {
        let before = Used::from([(0, 1 << 30), (1, 0), (2, 5)]);
        let now = Used::from([(0, (1 << 30) + GPU_DRAIN_SLACK), (1, GPU_DRAIN_SLACK + 1)]);
        assert_eq!(not_back(&before, &now), [1]);
    }

    #[test]
    fn is_kept_for_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("used");
        let used = Used::from([(0, 7), (3, 1 << 40)]);
        save(&path, &used).unwrap();
        assert_eq!(load(&path), used);
        assert_eq!(load(&dir.path().join("none")), Used::new());
    }
}
