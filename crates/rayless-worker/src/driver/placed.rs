//! From a placement to a running group.

use super::{
    CallError, Callbacks, GroupFailure, GroupOptions, PlacedParts, Progress, RankInfo, StartError, WorkerGroup,
    callbacks::CallbackThread,
    connect,
    core::{Core, End},
    peer::Peer,
    shared::Shared,
    stuck::Watch,
    versions,
};
use crate::{
    client::{ClientError, LocalClient, Unasked},
    links,
    session::plain_header,
};
use rayless_proto::{
    codec,
    ids::{GroupId, NodeId, Rank},
    limits::{REAP_TIMEOUT, STEP_DEADLINE, STUCK_AFTER},
    v1::{
        control::{GroupSpec, PlacedNode},
        link::{LaunchLinks, LinkNode, LinkTable},
        local::{ClientReply, ClientRequest},
        status::NodeState,
        step::{Kind, Launch},
    },
};
use ring::rand::{SecureRandom, SystemRandom};
use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

/// How often a start lets its caller look at signals.
const TICK: Duration = Duration::from_millis(100);

/// A group whose keepers wait for its driver.
#[derive(Debug)]
pub struct Placed {
    parts: PlacedParts,
    ranks: Arc<[RankInfo]>,
    client: Option<LocalClient>,
    stuck_after: Duration,
    step_deadline: Duration,
}

/// Asks the local daemon; see [`WorkerGroup::place`].
pub(super) fn place(
    options: GroupOptions,
    on_progress: &mut dyn FnMut(Option<Progress>) -> bool,
) -> Result<Placed, StartError> {
    let mut client = LocalClient::connect(&options.run_dir)?;
    let me = client.identify()?;
    let spec = GroupSpec {
        name: options.name,
        bundles: options.bundles,
        strategy: options.strategy,
        driver_node: me.node,
        driver_pid: std::process::id(),
        wait_ms: u64::try_from(options.wait.as_millis()).unwrap_or(u64::MAX),
        placement_group: options.placement_group,
        driver_versions: options.versions.clone(),
    };
    let answer = client.request_while(ClientRequest::CreateGroup(spec), Some(TICK), &mut |news| {
        on_progress(match news {
            Some(ClientReply::Waiting(table)) => Some(Progress::Waiting(table.clone())),
            Some(ClientReply::WaitingForHead(line)) => Some(Progress::WaitingForHead(line.clone())),
            _ => None,
        })
    })?;
    match answer {
        None => Err(StartError::GivenUp),
        Some(ClientReply::GroupPlaced { group, placements, nodes, local_keeper, leaf }) => {
            let parts = PlacedParts {
                group,
                placements,
                nodes,
                local_node: me.node,
                local_keeper: local_keeper.map(PathBuf::from),
                leaf,
                dead_after: Duration::from_millis(me.dead_after_ms),
                versions: options.versions,
            };
            let mut placed = Placed::new(parts, Some(client))?;
            placed.step_deadline = Duration::from_millis(me.step_deadline_ms);
            Ok(placed)
        }
        Some(_) => Err(ClientError::Lost { cause: "it gave an answer to another question".into() }.into()),
    }
}

impl Placed {
    /// A group placed by other means than the local daemon.
    ///
    /// # Errors
    /// Where the parts do not fit together.
    pub fn from_parts(parts: PlacedParts) -> Result<Self, StartError> {
        Self::new(parts, None)
    }

    fn new(parts: PlacedParts, client: Option<LocalClient>) -> Result<Self, StartError> {
        let nodes: BTreeMap<_, &PlacedNode> = parts.nodes.iter().map(|node| (node.id, node)).collect();
        let mut ranks = Vec::with_capacity(parts.placements.len());
        for (expected, placement) in (0..).zip(&parts.placements) {
            let node = nodes.get(&placement.node).filter(|_| placement.rank == expected);
            let Some(node) = node else {
                return Err(ClientError::Lost { cause: "its placement makes no sense".into() }.into());
            };
            ranks.push(RankInfo {
                rank: placement.rank,
                local_rank: placement.local_rank,
                node: node.id,
                node_name: node.name.clone(),
                address: node.address.clone(),
                gpus: placement.allocation.gpus.iter().map(|share| share.index).collect(),
                gpu_uuids: placement.gpu_uuids.clone(),
                node_env: node.node_env.clone(),
            });
        }
        Ok(Self { ranks: ranks.into(), parts, client, stuck_after: STUCK_AFTER, step_deadline: STEP_DEADLINE })
    }

    /// A call without progress for so long is looked into ([`Callbacks::on_stuck`]); zero: never. 10 s where this is not called.
    #[must_use]
    pub const fn with_stuck_after(mut self, stuck_after: Duration) -> Self {
        self.stuck_after = stuck_after;
        self
    }

    /// The deadline of a step that this node's daemon was told (`--step-deadline`); zero for none.
    pub const fn step_deadline(&self) -> Duration {
        self.step_deadline
    }

    /// Its id.
    pub const fn group(&self) -> GroupId {
        self.parts.group
    }

    /// Its ranks in ascending order.
    pub fn ranks(&self) -> &[RankInfo] {
        &self.ranks
    }

    /// Opens the sessions, starts the workers, and returns when every rank is ready and their versions agree. `timeout` bounds
    /// it from here on (loading code, not weights). `on_progress` runs on the calling thread; where it returns `false` the start is
    /// given up (it is called at least each 100 ms, with `None` where there is no news, so that signals can be looked at).
    ///
    /// # Errors
    /// [`StartError`]; whatever was started is ended.
    pub fn launch(
        mut self,
        launch: Launch,
        timeout: Duration,
        callbacks: Callbacks,
        on_progress: &mut dyn FnMut(Option<Progress>) -> bool,
    ) -> Result<WorkerGroup, StartError> {
        let until = Instant::now() + timeout;
        let mut opening = Opening::new(self.client.take(), self.parts.dead_after);
        let peers = self.open_peers(&launch, &mut |open| {
            if !on_progress(None) {
                return Err(StartError::GivenUp);
            }
            opening.look(open)
        })?;
        let callbacks = CallbackThread::start(callbacks)?;
        let Opening { client, unasked, .. } = opening;
        let (group, dead_after) = (self.parts.group, self.parts.dead_after);
        let mut core = Core::new(group, Arc::clone(&self.ranks), peers, callbacks, dead_after, client)?;
        core.watch = Watch::new(self.stuck_after);
        unasked.into_iter().for_each(|news| core.take_unasked(news));
        let (shared, pump) = Shared::start(core)?;
        // From here on dropping the group ends whatever was started.
        let group = WorkerGroup::new(self.parts.group, Arc::clone(&self.ranks), Arc::clone(&shared), pump);
        let result = wait_ready(&shared, &self.ranks, &self.parts.versions, (until, timeout), on_progress);
        match result {
            Ok(pids) => {
                group.set_pids(pids);
                Ok(group)
            }
            Err(error) => {
                shared.with(Core::stop);
                shared.wait_change(Instant::now() + REAP_TIMEOUT, |core| core.over);
                Err(error)
            }
        }
    }

    fn open_peers(
        &self,
        launch: &Launch,
        worth_it: &mut dyn FnMut(&[&PlacedNode]) -> Result<(), StartError>,
    ) -> Result<Vec<Peer>, StartError> {
        let mut by_node: BTreeMap<_, Vec<Rank>> = BTreeMap::new();
        for placement in &self.parts.placements {
            by_node.entry(placement.node).or_default().push(placement.rank);
        }
        let nodes: Vec<_> = self.parts.nodes.iter().filter(|node| by_node.contains_key(&node.id)).collect();
        let links = self.launch_links(launch)?;
        let sessions = connect::open_all(&self.parts, &nodes, worth_it)?;
        let mut peers = Vec::with_capacity(nodes.len());
        for (node, mut session) in nodes.into_iter().zip(sessions) {
            let ranks = by_node.remove(&node.id).unwrap_or_default();
            let own = launch.rank_env.iter().filter(|(rank, _)| ranks.contains(rank)).cloned().collect();
            let message = codec::encode(&Launch { rank_env: own, links: Some(links.clone()), ..launch.clone() });
            session.queue(plain_header(Kind::Launch), &[&message]);
            let address = format!("{}:{}", node.address, node.port);
            let local = node.id == self.parts.local_node && self.parts.local_keeper.is_some();
            peers.push(Peer::new(node.id, node.name.clone(), address, local, ranks, session));
        }
        Ok(peers)
    }
}

/// While the sessions are being opened: what the daemon says meanwhile of nodes that do not answer.
struct Opening {
    client: Option<LocalClient>,
    unasked: Vec<Unasked>,
    begun: Instant,
    dead_after: Duration,
}

impl Opening {
    fn new(client: Option<LocalClient>, dead_after: Duration) -> Self {
        Self { client, unasked: Vec::new(), begun: Instant::now(), dead_after }
    }

    /// Whether waiting for these nodes may still come to something: not for one that is dead for the head, and no longer than the
    /// limit of silence for one that nobody vouches for. On a bad network the others are tried for longer.
    fn look(&mut self, open: &[&PlacedNode]) -> Result<(), StartError> {
        match self.client.as_mut().map(LocalClient::take_unasked) {
            Some(Ok(news)) => self.unasked.extend(news),
            Some(Err(_)) => self.client = None,
            None => {}
        }
        for node in open {
            let address = format!("{}:{}", node.address, node.port);
            let verdict = self.unasked.iter().rev().find_map(|news| match news {
                Unasked::Verdict(verdict) if verdict.node == node.id => Some(verdict),
                _ => None,
            });
            match verdict.map(|verdict| verdict.state) {
                Some(NodeState::Alive) if self.client.is_some() => {}
                Some(NodeState::Dead | NodeState::Left) => {
                    let why = verdict.map(|verdict| verdict.cause.as_str()).unwrap_or_default();
                    let cause = format!("lost node {} ({address}): {why}", node.name);
                    return Err(GroupFailure::NodeDied { node: node.id, name: node.name.clone(), cause }.into());
                }
                _ if self.begun.elapsed() <= self.dead_after => {}
                _ => {
                    let cause = format!("no answer for {:.1} s", self.begun.elapsed().as_secs_f64());
                    return Err(StartError::Unreachable { name: node.name.clone(), address, cause });
                }
            }
        }
        Ok(())
    }
}

impl Placed {
    /// What the workers need for links to each other.
    fn launch_links(&self, launch: &Launch) -> Result<LaunchLinks, StartError> {
        let policy = links::wishes_of(&launch.env)?;
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).map_err(|_| io::Error::other("no random numbers from the system"))?;
        let place = |node: NodeId| self.parts.nodes.iter().position(|at| at.id == node).unwrap_or_default() as u32;
        let nodes = self.parts.nodes.iter().map(|node| LinkNode {
            id: node.id,
            name: node.name.clone(),
            address: node.address.clone(),
            port: node.port,
            host_id: node.host_id.clone(),
            has_rdma: node.has_rdma,
        });
        let table = LinkTable {
            secret,
            nodes: nodes.collect(),
            ranks: self.ranks.iter().map(|rank| place(rank.node)).collect(),
        };
        Ok(LaunchLinks { table, policy })
    }
}

fn wait_ready(
    shared: &Shared,
    ranks: &[RankInfo],
    driver: &[(String, String)],
    (until, timeout): (Instant, Duration),
    on_progress: &mut dyn FnMut(Option<Progress>) -> bool,
) -> Result<Vec<(Rank, u32)>, StartError> {
    loop {
        let (news, ready, end) = shared.with(|core| {
            let news: Vec<_> = core.starting.news.drain(..).collect();
            (news, core.starting.versions.clone(), core.end.clone())
        });
        let none = news.is_empty().then_some(None);
        for news in news.into_iter().map(Some).chain(none) {
            if !on_progress(news) {
                return Err(StartError::GivenUp);
            }
        }
        versions::check(ranks, driver, &ready)?;
        match end {
            Some(End::Failed(failure)) => return Err(failure.into()),
            Some(End::Stopped) => {
                return Err(GroupFailure::Ended { cause: CallError::Stopped.to_string() }.into());
            }
            None if ready.len() == ranks.len() => {
                return Ok(shared.with(|core| std::mem::take(&mut core.starting.pids)).into_iter().collect());
            }
            None => {}
        }
        let now = Instant::now();
        if now >= until {
            let missing = ranks.iter().map(|info| info.rank).filter(|rank| !ready.contains_key(rank)).collect();
            return Err(StartError::TimedOut { after: timeout, missing });
        }
        shared.wait_change((now + TICK).min(until), |core| !core.starting.news.is_empty() || core.end.is_some());
    }
}
