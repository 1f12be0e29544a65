//! The keepers of this node: started, watched, told, found again.
//!
//! A task per keeper owns its handle and carries news both ways. What a keeper holds is kept here, to be told to the head
//! at each join.

use super::{
    drain::{self, Used},
    event::{Event, Events},
};
use crate::run_dir::RunDir;
use rayless_proto::{
    ids::{GroupId, NodeId, Rank},
    limits::REAP_TIMEOUT,
    v1::{
        control::{HeldGroup, RankAllocation, Requester, WorkerState},
        keeper::KeeperConfig,
        local::LeafBundle,
        status::NodeState,
    },
};
use rayless_worker::{
    keeper::{self, HandOver, KeeperHandle},
    stopped::is_stopped,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::Instant,
};
use tokio::sync::mpsc;

/// One keeper as the daemon sees it.
#[derive(Debug)]
pub(crate) struct Keeper {
    /// What it holds, as last told.
    pub(crate) held: HeldGroup,
    /// Its task; `None` while it starts.
    link: Option<Link>,
    /// The identity that it is to have when it is up, where that changed meanwhile.
    leaf: Option<LeafBundle>,
    /// The stop asked for, with its cause.
    pub(crate) stopping: Option<String>,
    /// How it ended, by its own word.
    pub(crate) ended: Option<String>,
    /// GPU memory before it.
    pub(crate) used: Used,
    /// Its process was stopped when last looked at, as told to the head.
    stopped: bool,
    /// Ranks whose ready/busy state changed since the last report, and when that was.
    changed: BTreeSet<Rank>,
    reported: Option<Instant>,
}

#[derive(Debug)]
struct Link {
    commands: mpsc::UnboundedSender<Command>,
    hand_over: HandOver,
    socket: PathBuf,
    pid: u32,
}

#[derive(Debug)]
enum Command {
    Stop(String),
    Verdict(NodeId, NodeState),
    Identify(LeafBundle),
}

impl Keeper {
    /// One that is being started.
    pub(crate) fn starting(held: HeldGroup) -> Self {
        Self {
            held,
            link: None,
            leaf: None,
            stopping: None,
            ended: None,
            used: Used::new(),
            stopped: false,
            changed: BTreeSet::new(),
            reported: None,
        }
    }

    /// It takes sessions from here on; `events` gets what it says.
    pub(crate) fn attach(&mut self, mut handle: KeeperHandle, events: Events) {
        let group = self.held.group;
        let (commands, mut queue) = mpsc::unbounded_channel();
        self.link =
            Some(Link { commands, hand_over: handle.hand_over(), socket: handle.socket().clone(), pid: handle.pid() });
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    said = handle.next() => match said {
                        Some(message) => {
                            if events.send(Event::KeeperSaid { group, message }).await.is_err() {
                                return;
                            }
                        }
                        None => {
                            let _ = events.send(Event::KeeperGone { group }).await;
                            return;
                        }
                    },
                    command = queue.recv() => match command {
                        Some(Command::Stop(cause)) => handle.stop(&cause),
                        Some(Command::Verdict(node, state)) => handle.verdict(node, state),
                        Some(Command::Identify(leaf)) => handle.identify(leaf),
                        // The daemon ends and leaves the keeper alone.
                        None => return,
                    },
                }
            }
        });
        if let Some(leaf) = self.leaf.take() {
            self.command(Command::Identify(leaf));
        }
        if let Some(cause) = self.stopping.clone() {
            self.command(Command::Stop(cause));
        }
    }

    /// Whether its process was stopped or went on since the last look: what it is now.
    pub(crate) fn stopped_changed(&mut self) -> Option<bool> {
        let now = self.link.as_ref().is_some_and(|link| is_stopped(link.pid));
        (std::mem::replace(&mut self.stopped, now) != now).then_some(now)
    }

    /// Whether it is stopped, as last seen.
    pub(crate) const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether it takes sessions.
    pub(crate) const fn is_up(&self) -> bool {
        self.link.is_some()
    }

    /// Tells it to end; one that still starts is told as soon as it is up.
    pub(crate) fn stop(&mut self, cause: &str) {
        if self.stopping.is_none() {
            self.stopping = Some(cause.to_owned());
            self.command(Command::Stop(cause.to_owned()));
        }
    }

    /// Tells it what the head holds a node for.
    pub(crate) fn verdict(&self, node: NodeId, state: NodeState) {
        self.command(Command::Verdict(node, state));
    }

    /// Gives it another identity for sessions to come.
    pub(crate) fn identify(&mut self, leaf: LeafBundle) {
        match &self.link {
            Some(_) => self.command(Command::Identify(leaf)),
            None => self.leaf = Some(leaf),
        }
    }

    fn command(&self, command: Command) {
        if let Some(link) = &self.link {
            let _ = link.commands.send(command);
        }
    }

    /// The way for a TCP session, once it is up.
    pub(crate) fn hand_over(&self) -> Option<HandOver> {
        self.link.as_ref().map(|link| link.hand_over.clone())
    }

    /// Its socket, once it is up.
    pub(crate) fn socket(&self) -> Option<&PathBuf> {
        self.link.as_ref().map(|link| &link.socket)
    }

    /// Notes a worker's new state. Whether to tell the head at once: starts, deaths and the first readiness are news, the
    /// change between ready and busy is told once a second by [`Self::take_changed`].
    pub(crate) fn worker_changed(&mut self, rank: Rank, pid: u32, state: WorkerState) -> bool {
        let Some(at) = self.held.ranks.iter().position(|known| known.rank == rank) else { return false };
        // No worker is started before the driver has come.
        self.held.launch = None;
        let before = self.held.states.get(at).copied();
        if let (Some(known_pid), Some(known_state)) = (self.held.pids.get_mut(at), self.held.states.get_mut(at)) {
            *known_pid = pid;
            *known_state = state;
        }
        let steady = |state| matches!(state, WorkerState::Ready | WorkerState::Busy);
        if before.is_some_and(steady) && steady(state) {
            self.changed.insert(rank);
            return false;
        }
        true
    }

    /// Ready/busy changes that are due to be told, if `period` has passed since the last ones.
    pub(crate) fn take_changed(&mut self, now: Instant, period: std::time::Duration) -> Vec<(Rank, u32, WorkerState)> {
        if self.changed.is_empty() || self.reported.is_some_and(|last| now < last + period) {
            return Vec::new();
        }
        self.reported = Some(now);
        let changed = std::mem::take(&mut self.changed);
        let with_pid_and_state = self.held.ranks.iter().zip(&self.held.pids).zip(&self.held.states);
        with_pid_and_state
            .filter(|((rank, _), _)| changed.contains(&rank.rank))
            .map(|((rank, pid), state)| (rank.rank, *pid, *state))
            .collect()
    }

    /// When [`Self::take_changed`] will have something.
    pub(crate) fn next_report(&self, period: std::time::Duration) -> Option<Instant> {
        if self.changed.is_empty() { None } else { self.reported.map(|last| last + period) }
    }

    /// Indices of its GPUs.
    pub(crate) fn gpus(&self) -> BTreeSet<u32> {
        self.held.ranks.iter().flat_map(|rank| rank.allocation.gpus.iter().map(|share| share.index)).collect()
    }
}

/// A group's part as it is before its keeper has said anything.
pub(crate) fn held_before_start(
    group: GroupId,
    name: String,
    world_size: u32,
    driver_node: NodeId,
    ranks: Vec<RankAllocation>,
    launch: Option<Requester>,
) -> HeldGroup {
    let pids = vec![0; ranks.len()];
    let states = vec![WorkerState::Starting; ranks.len()];
    HeldGroup { group, name, world_size, driver_node, ranks, pids, states, links: Vec::new(), launch }
}

/// Starts a keeper in the background: [`Event::KeeperStarted`] tells how it went. `measured`: GPUs whose memory is
/// taken down before.
pub(crate) fn start(exe: PathBuf, config: KeeperConfig, measured: Vec<u32>, run: RunDir, events: Events) {
    let group = config.group;
    tokio::spawn(async move {
        let used = if measured.is_empty() { Used::new() } else { drain::measure(measured).await };
        if !used.is_empty()
            && let Err(error) = drain::save(&used_file(&run, group), &used)
        {
            tracing::warn!(%group, %error, "cannot note the GPUs' memory; a restarted daemon will not wait for it");
        }
        let started = keeper::spawn(&exe, &config).await.map(Box::new).map_err(|error| error.to_string());
        let _ = events.send(Event::KeeperStarted { group, started, used }).await;
    });
}

/// The keepers that an earlier daemon left, with what they hold. Sockets behind which nobody listens are removed.
pub(crate) async fn find(run: &RunDir, node: NodeId, events: &Events) -> BTreeMap<GroupId, Keeper> {
    let mut found = BTreeMap::new();
    for group in run.groups_with_keeper() {
        match keeper::adopt(&run.keeper_socket(group)).await {
            Ok(handle) => {
                let mut keeper = Keeper::starting(handle.held().clone());
                keeper.used = drain::load(&used_file(run, group));
                keeper.attach(handle, events.clone());
                found.insert(group, keeper);
            }
            Err(error) => {
                tracing::info!(%group, %error, "a keeper of an earlier daemon is gone");
                forget(run, group);
                sweep(group, node, Vec::new(), Used::new(), events.clone());
            }
        }
    }
    found
}

/// Ends what the workers of a killed keeper of this node had started: [`Event::Swept`] tells when it is gone.
pub(crate) fn sweep(group: GroupId, node: NodeId, workers: Vec<u32>, used: Used, events: Events) {
    tokio::spawn(async move {
        let workers: Vec<u32> = workers.into_iter().filter(|pid| *pid != 0).collect();
        let found = keeper::clear_orphans(group, node, &workers, Instant::now() + REAP_TIMEOUT).await;
        if found > 0 {
            tracing::warn!(%group, found, "ended what the workers of a killed keeper had started");
        }
        let _ = events.send(Event::Swept { group, used }).await;
    });
}

/// Removes the files of a keeper that is gone. Its logs stay.
pub(crate) fn forget(run: &RunDir, group: GroupId) {
    for path in [run.keeper_socket(group), run.keeper_pid(group), used_file(run, group)] {
        let _ = fs::remove_file(path);
    }
}

/// Kills the process of a keeper that does not end by itself; its workers die with it (PDEATHSIG).
pub(crate) fn kill(run: &RunDir, group: GroupId) {
    let pid = fs::read_to_string(run.keeper_pid(group)).ok().and_then(|text| text.trim().parse::<i32>().ok());
    let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return };
    // The file may be a dead keeper's and its number another process's by now.
    let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    if command.split(|byte| *byte == 0).any(|word| word == b"keeper") {
        tracing::warn!(%group, pid = pid.as_raw_nonzero(), "killing a keeper that did not end in time");
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

fn used_file(run: &RunDir, group: GroupId) -> PathBuf {
    run.keepers().join(format!("{group}.gpus"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::resources::Allocation;
    use std::time::Duration;

    #[test]
    fn ready_and_busy_are_told_once_a_second_and_the_rest_at_once() {
        let rank = |rank| RankAllocation { rank, allocation: Allocation::default(), placement_group: None };
        let held = held_before_start(GroupId([1; 8]), String::new(), 2, NodeId([1; 32]), vec![rank(4), rank(7)], None);
        let mut keeper = Keeper::starting(held);
        let now = Instant::now();
        let second = Duration::from_secs(1);
        assert!(keeper.worker_changed(7, 99, WorkerState::Starting));
        assert!(keeper.worker_changed(7, 99, WorkerState::Ready));
        assert!(!keeper.worker_changed(7, 99, WorkerState::Busy));
        assert_eq!(keeper.take_changed(now, second), [(7, 99, WorkerState::Busy)]);
        assert!(!keeper.worker_changed(7, 99, WorkerState::Ready));
        assert!(keeper.take_changed(now + second / 2, second).is_empty());
        assert_eq!(keeper.next_report(second), Some(now + second));
        assert_eq!(keeper.take_changed(now + second, second), [(7, 99, WorkerState::Ready)]);
        assert!(keeper.worker_changed(7, 99, WorkerState::Dead));
        assert!(!keeper.worker_changed(5, 99, WorkerState::Dead));
    }
}
