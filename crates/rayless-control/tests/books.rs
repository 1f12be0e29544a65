//! Whatever the order of events, no resource is given twice and none leaks.
//!
//! Unlike the storms this is not a network that behaves: messages that nodes once sent come in any order, again, late,
//! on sessions long closed, or never. After every single event the head's books are recounted per node, resource and device (`Head::audit`);
//! in the end every node comes back empty, and everything must be free.

use proptest::prelude::*;
use rayless_control::{
    Head, SessionId,
    head::{Effect, HeadConfig, Input},
    liveness::Transition,
};
use rayless_proto::{
    ids::{ClusterId, GroupId, Incarnation, NodeId, PlacementGroupId, Term},
    resources::{CPU, GPU, Quantity, Resources, Strategy},
    v1::{
        control::{
            GpuInfo, GroupSpec, HeldGroup, HeldPlacementGroup, NodeInfo, RankAllocation, Requester, ToHead, ToNode,
            WorkerState,
        },
        link::LinkSettings,
        rdma::RdmaInventory,
        status::{GroupState, NodeState},
    },
};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

const NODES: usize = 3;
const GPUS: u32 = 4;

/// What a keeper was started with: name, world size, driver's node, ranks, whose request.
type Started = (String, u32, NodeId, Vec<RankAllocation>, Option<Requester>);

/// What is really on a node.
#[derive(Default)]
struct Truth {
    incarnation: u64,
    session: Option<SessionId>,
    keepers: BTreeMap<GroupId, Started>,
    bundles: BTreeMap<PlacementGroupId, HeldPlacementGroup>,
    requests: u64,
}

struct Table {
    head: Head,
    now: Instant,
    nodes: Vec<Truth>,
    sessions: u64,
    /// Everything that any node ever sent and that has not been lost.
    post: Vec<(SessionId, ToHead)>,
    groups: Vec<GroupId>,
    bundles: Vec<PlacementGroupId>,
    state: Option<Vec<u8>>,
}

fn id(node: usize) -> NodeId {
    NodeId([u8::try_from(node).unwrap_or(0); 32])
}

fn config() -> HeadConfig {
    HeadConfig {
        node: id(0),
        term: Term(0),
        heads: Vec::new(),
        cluster: ClusterId([1; 16]),
        seed: 42,
        dead_after: Duration::from_secs(3),
        unix_us: 0,
    }
}

fn info(node: usize, incarnation: u64) -> NodeInfo {
    let gpu = |index| GpuInfo { index, uuid: format!("{node}-{index}"), name: "x".into(), memory_bytes: 0 };
    NodeInfo {
        id: id(node),
        incarnation: Incarnation(incarnation),
        name: format!("n{node}"),
        address: format!("10.0.0.{node}"),
        port: 6379,
        interface: String::new(),
        host_id: String::new(),
        resources: Resources::new().with(GPU, Quantity::whole(GPUS.into())).with(CPU, Quantity::whole(8)),
        gpus: (0..GPUS).map(gpu).collect(),
        versions: Vec::new(),
        node_env: Vec::new(),
        links: LinkSettings::default(),
        rdma: RdmaInventory::default(),
    }
}

impl Table {
    fn new() -> Self {
        let now = Instant::now();
        let mut nodes: Vec<Truth> = Vec::new();
        nodes.resize_with(NODES, Truth::default);
        let head = Head::new(config(), now);
        let (post, groups, bundles) = (Vec::new(), Vec::new(), Vec::new());
        Self { head, now, nodes, sessions: 0, post, groups, bundles, state: None }
    }

    fn give(&mut self, input: Input) -> Result<(), String> {
        self.head.handle(self.now, input);
        self.head.audit()?;
        while let Some(effect) = self.head.poll_effect() {
            match effect {
                Effect::Send { session, to, message } => self.receive(session, to, message),
                Effect::SaveState(bytes) => self.state = Some(bytes),
                _ => {}
            }
        }
        Ok(())
    }

    /// A node takes a message, if it comes on its present session.
    fn receive(&mut self, session: SessionId, to: NodeId, message: ToNode) {
        let node = usize::from(to.0[0]);
        let truth = &mut self.nodes[node];
        if truth.session != Some(session) {
            return;
        }
        let answer = match message {
            ToNode::StartKeeper { group, name, world_size, driver_node, ranks, requester } => {
                truth.keepers.entry(group).or_insert((name, world_size, driver_node, ranks, requester));
                self.groups.push(group);
                ToHead::KeeperReady { group }
            }
            ToNode::StopKeeper { group, .. } => {
                truth.keepers.remove(&group);
                ToHead::GroupEnded { group, cause: String::new() }
            }
            ToNode::HoldPlacementGroup(held) => {
                self.bundles.push(held.id);
                truth.bundles.insert(held.id, held);
                return;
            }
            ToNode::DropPlacementGroup(id) => {
                truth.bundles.remove(&id);
                return;
            }
            _ => return,
        };
        self.post.push((session, answer));
    }

    fn send(&mut self, node: usize, message: ToHead) {
        if let Some(session) = self.nodes[node].session {
            self.post.push((session, message));
        }
    }

    fn open(&mut self, node: usize) -> Result<SessionId, String> {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        self.nodes[node].session = Some(session);
        self.give(Input::SessionOpened { session, node: id(node), address: String::new() })?;
        Ok(session)
    }

    fn join(&mut self, node: usize) -> ToHead {
        let truth = &self.nodes[node];
        let held = truth.keepers.iter().map(|(group, (name, world_size, driver_node, ranks, requester))| HeldGroup {
            group: *group,
            name: name.clone(),
            world_size: *world_size,
            driver_node: *driver_node,
            ranks: ranks.clone(),
            pids: vec![7; ranks.len()],
            states: vec![WorkerState::Ready; ranks.len()],
            links: Vec::new(),
            // Of every other group the driver has not come.
            launch: requester.filter(|r| r.request % 2 == 0),
        });
        ToHead::Join {
            info: info(node, truth.incarnation),
            head_address: String::new(),
            seen: None,
            held: held.collect(),
            ended: Vec::new(),
            asks: (0..8).collect(),
            told: (8..16).collect(),
            held_placement_groups: truth.bundles.values().cloned().collect(),
        }
    }

    fn act(&mut self, (what, node, x, y): (u8, u8, u8, u8)) -> Result<(), String> {
        let node = usize::from(node) % NODES;
        let (x, y) = (usize::from(x), usize::from(y));
        let some_group = || (!self.groups.is_empty()).then(|| self.groups[x % self.groups.len()]);
        match what % 24 {
            0 | 1 => {
                let session = self.open(node)?;
                let join = self.join(node);
                // Mostly at once; sometimes it lingers.
                if y % 8 == 0 {
                    self.post.push((session, join));
                } else {
                    self.give(Input::Message { session, message: join })?;
                }
            }
            2 => {
                // A new life; its keepers survive the daemon or not.
                self.nodes[node].incarnation += 1;
                self.nodes[node].bundles.clear();
                if x % 2 == 0 {
                    self.nodes[node].keepers.clear();
                }
                let session = self.open(node)?;
                let message = self.join(node);
                self.give(Input::Message { session, message })?;
            }
            3..=9 if !self.post.is_empty() => {
                // Any message of any age; it may come again later.
                let at = if y % 3 == 0 { x % self.post.len() } else { self.post.len() - 1 };
                let (session, message) = self.post[at].clone();
                if y % 5 != 0 {
                    self.post.remove(at);
                }
                self.give(Input::Message { session, message })?;
            }
            10 if !self.post.is_empty() => {
                let at = x % self.post.len();
                self.post.remove(at);
            }
            11 => {
                if let Some(session) = self.nodes[node].session.take() {
                    self.give(Input::SessionClosed { session })?;
                }
            }
            12 => {
                let transition = [Transition::Suspect, Transition::Alive, Transition::Dead][x % 3];
                let incarnation = Incarnation(self.nodes[node].incarnation);
                self.give(Input::Liveness { node: id(node), incarnation, transition })?;
            }
            13 => {
                self.now += Duration::from_millis((x * y * 2) as u64);
                self.give(Input::Timer)?;
            }
            14..=17 => {
                self.nodes[node].requests += 1;
                let quarters = [0, 1, 2, 3, 4, 8][y % 6];
                let bundle = Resources::new()
                    .with(GPU, Quantity::from_raw(quarters * Quantity::SCALE / 4))
                    .with(CPU, Quantity::from_raw(Quantity::SCALE / 2));
                let strategy = [Strategy::Pack, Strategy::Spread, Strategy::StrictPack, Strategy::StrictSpread][x % 4];
                let (bundles, request) = (vec![bundle; 1 + x % 5], self.nodes[node].requests);
                let wait_ms = if y % 4 == 0 { 0 } else { 30_000 };
                let message = if what % 24 == 17 {
                    ToHead::CreatePlacementGroup { request, name: "p".into(), bundles, strategy, wait_ms }
                } else {
                    let within = (y % 3 == 0 && !self.bundles.is_empty()).then(|| self.bundles[x % self.bundles.len()]);
                    let spec = GroupSpec {
                        name: "g".into(),
                        bundles,
                        strategy,
                        driver_node: id(node),
                        driver_pid: 1,
                        wait_ms,
                        placement_group: within,
                        driver_versions: Vec::new(),
                    };
                    ToHead::CreateGroup { request, spec }
                };
                self.send(node, message);
            }
            18 => {
                let request = x as u64 % (self.nodes[node].requests + 1);
                self.send(node, ToHead::CancelRequest { request });
            }
            19 => {
                self.nodes[node].requests += 1;
                let (request, group) = (self.nodes[node].requests, some_group());
                if group.is_some() || x % 16 == 0 {
                    self.send(node, ToHead::StopGroup { request, group });
                }
            }
            20 => {
                if let Some(group) = some_group() {
                    self.nodes[node].keepers.remove(&group);
                    self.send(node, ToHead::GroupEnded { group, cause: "a rank died".into() });
                }
            }
            21 => {
                if let Some(group) = some_group() {
                    let state = [WorkerState::Ready, WorkerState::Busy, WorkerState::Dead][y % 3];
                    self.send(node, ToHead::WorkerChanged { group, rank: y as u32 % 5, pid: 9, state });
                }
            }
            22 => match x % 4 {
                0 => self.send(node, ToHead::Leave),
                1 if !self.bundles.is_empty() => {
                    self.nodes[node].requests += 1;
                    let (request, id) = (self.nodes[node].requests, self.bundles[y % self.bundles.len()]);
                    self.send(node, ToHead::RemovePlacementGroup { request, id });
                }
                _ => self.send(node, ToHead::GpuDraining { gpus: vec![(x as u32 % GPUS, y % 2 == 0)] }),
            },
            23 => {
                // The head is started again: from its file, an older one it may be, or from nothing.
                let saved = self.state.clone().filter(|_| x % 3 > 0);
                self.head = match saved {
                    Some(bytes) => Head::restore(config(), &bytes, self.now).map_err(|e| e.to_string())?,
                    None => Head::new(
                        HeadConfig { seed: u64::from(what) + x as u64 * 977 + y as u64, ..config() },
                        self.now,
                    ),
                };
                self.head.audit()?;
                self.sessions += 1000;
                self.post.clear();
                for truth in &mut self.nodes {
                    truth.session = None;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Everybody comes back as a new life with nothing on it: what is held then?
    fn everyone_empty(&mut self) -> Result<(), String> {
        for node in 0..NODES {
            self.nodes[node].incarnation += 1;
            self.nodes[node].keepers.clear();
            self.nodes[node].bundles.clear();
            let session = self.open(node)?;
            let message = self.join(node);
            self.give(Input::Message { session, message })?;
        }
        self.nodes[0].requests += 1;
        let session = self.nodes[0].session.ok_or("no session")?;
        let message = ToHead::StopGroup { request: self.nodes[0].requests, group: None };
        self.give(Input::Message { session, message })?;
        while let Some((session, message)) = self.post.pop() {
            if matches!(message, ToHead::GroupEnded { .. } | ToHead::KeeperReady { .. }) {
                self.give(Input::Message { session, message })?;
            }
        }
        let status = self.head.status(self.now);
        for node in &status.nodes {
            if node.state != NodeState::Alive || node.available != node.resources {
                return Err(format!("{} is {}, free {:?}", node.name, node.state.name(), node.available));
            }
        }
        let live = status.groups.iter().find(|g| matches!(g.state, GroupState::Starting | GroupState::Running));
        live.map_or(Ok(()), |g| Err(format!("group {:?} is left", g.id)))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn the_books_are_right_whatever_happens(acts in prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..120)) {
        let mut table = Table::new();
        for act in acts {
            if let Err(broken) = table.act(act) {
                return Err(TestCaseError::fail(format!("after {act:?}: {broken}")));
            }
        }
        table.everyone_empty().map_err(TestCaseError::fail)?;
    }

    #[test]
    fn a_damaged_state_file_is_refused(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut table = Table::new();
        for node in 0..NODES {
            let session = table.open(node).map_err(TestCaseError::fail)?;
            let message = table.join(node);
            table.give(Input::Message { session, message }).map_err(TestCaseError::fail)?;
        }
        table.now += Duration::from_secs(1);
        table.give(Input::Timer).map_err(TestCaseError::fail)?;
        let mut bytes = table.state.clone().unwrap_or_default();
        prop_assert!(Head::restore(config(), &bytes, table.now).is_ok());
        let at = at.index(bytes.len());
        prop_assert!(Head::restore(config(), &bytes[..at], table.now).is_err());
        bytes[at] ^= flip;
        prop_assert!(Head::restore(config(), &bytes, table.now).is_err());
    }
}
