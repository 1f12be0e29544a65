//! What the stories cannot say: single messages by hand, ghosts, limits.

use rayless_control::{
    Head, SessionId,
    head::{Effect, HeadConfig, Input},
    liveness::Transition,
};
use rayless_proto::{
    ids::{ClusterId, Incarnation, NodeId, Term},
    limits::{MAX_ENDED_GROUPS, MAX_EVENTS, MAX_GONE_NODES, MAX_REPORT_PART, MAX_WAITING},
    resources::{GPU, Quantity, Resources, Strategy},
    v1::{
        control::{
            GpuInfo, GroupSpec, HeldGroup, NodeInfo, RefusalKind, ReportPart, Requester, ToHead, ToNode, WorkerState,
        },
        link::LinkSettings,
        rdma::RdmaInventory,
        status::NodeState,
    },
};
use std::time::{Duration, Instant};

struct Bench {
    head: Head,
    now: Instant,
    sent: Vec<(SessionId, ToNode)>,
    closed: Vec<SessionId>,
    told: usize,
    audits: bool,
}

fn id(node: u16) -> NodeId {
    let mut id = [9; 32];
    id[..2].copy_from_slice(&node.to_be_bytes());
    NodeId(id)
}

fn info(node: u16, incarnation: u64) -> NodeInfo {
    let gpu = |index| GpuInfo { index, uuid: index.to_string(), name: "x".into(), memory_bytes: 0 };
    NodeInfo {
        id: id(node),
        incarnation: Incarnation(incarnation),
        name: format!("n{node}"),
        address: "10.0.0.1".into(),
        port: 6379,
        interface: String::new(),
        host_id: String::new(),
        resources: Resources::new().with(GPU, Quantity::whole(2)),
        gpus: (0..2).map(gpu).collect(),
        versions: Vec::new(),
        node_env: Vec::new(),
        links: LinkSettings::default(),
        rdma: RdmaInventory::default(),
    }
}

fn join(info: NodeInfo) -> ToHead {
    ToHead::Join {
        info,
        head_address: String::new(),
        seen: None,
        held: Vec::new(),
        ended: Vec::new(),
        asks: Vec::new(),
        told: Vec::new(),
        held_placement_groups: Vec::new(),
    }
}

fn spec(gpus: u64, wait_ms: u64) -> GroupSpec {
    GroupSpec {
        name: "g".into(),
        bundles: vec![Resources::new().with(GPU, Quantity::whole(gpus))],
        strategy: Strategy::Pack,
        driver_node: id(0),
        driver_pid: 1,
        wait_ms,
        placement_group: None,
        driver_versions: Vec::new(),
    }
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        let config = HeadConfig {
            node: id(0),
            term: Term(0),
            heads: Vec::new(),
            cluster: ClusterId([1; 16]),
            seed: 3,
            dead_after: Duration::from_secs(3),
            unix_us: 1_000_000,
        };
        Self { head: Head::new(config, now), now, sent: Vec::new(), closed: Vec::new(), told: 0, audits: true }
    }

    fn give(&mut self, input: Input) {
        self.head.handle(self.now, input);
        assert!(!self.audits || self.head.audit() == Ok(()), "{:?}", self.head.audit());
        while let Some(effect) = self.head.poll_effect() {
            match effect {
                Effect::Send { session, message, .. } => self.sent.push((session, message)),
                Effect::Close { session } => self.closed.push(session),
                Effect::Notify(_) => self.told += 1,
                _ => {}
            }
        }
    }

    fn open(&mut self, session: u64, node: u16) -> SessionId {
        let session = SessionId(session);
        self.give(Input::SessionOpened { session, node: id(node), address: String::new() });
        session
    }

    fn say(&mut self, session: u64, message: ToHead) -> Vec<ToNode> {
        self.sent.clear();
        self.give(Input::Message { session: SessionId(session), message });
        self.sent.drain(..).map(|(_, message)| message).collect()
    }

    fn state(&self, node: u16) -> Option<NodeState> {
        self.head.status(self.now).nodes.iter().find(|n| n.id == id(node)).map(|n| n.state)
    }
}

#[test]
fn late_messages_of_an_earlier_session_are_dropped() {
    let mut b = Bench::new();
    b.open(1, 1);
    b.say(1, join(info(1, 1)));
    b.open(2, 1);
    let welcome = b.say(2, join(info(1, 1)));
    assert!(matches!(welcome[0], ToNode::Welcome { .. }));
    assert_eq!(b.closed, [SessionId(1)]);
    // Sent long ago, on the wire until now.
    assert!(b.say(1, ToHead::Leave).is_empty());
    assert_eq!(b.state(1), Some(NodeState::Alive));
    assert!(b.say(1, ToHead::CreateGroup { request: 1, spec: spec(1, 0) }).is_empty());
    b.say(1, ToHead::GpuDraining { gpus: vec![(0, true)] });
    assert_eq!(b.head.status(b.now).nodes[0].available.get(GPU), Quantity::whole(2));
    // Its end is no news either.
    b.give(Input::SessionClosed { session: SessionId(1) });
    assert!(!b.say(2, ToHead::Status { request: 9 }).is_empty());
}

#[test]
fn a_key_on_a_second_host_is_refused_while_the_first_one_lives() {
    let mut b = Bench::new();
    let on = |host: &str, life| NodeInfo { host_id: host.into(), ..info(1, life) };
    b.open(1, 1);
    b.say(1, join(on("x", 5)));
    let refused = |said: &[ToNode]| matches!(said, [ToNode::Refused(r)] if r.kind == RefusalKind::Policy && r.cause.contains("has the key of node n1"));
    // The same life, or an older one, cannot be in two places.
    for (session, life) in [(2, 5), (3, 4)] {
        b.open(session, 1);
        assert!(refused(&b.say(session, join(on("y", life)))));
    }
    // A newer one may be a container that was started again; the older one, if it lives, dials at once.
    b.open(4, 1);
    assert!(b.say(4, join(on("y", 6))).is_empty());
    assert_eq!(b.closed.last(), Some(&SessionId(4)));
    b.open(5, 1);
    assert!(matches!(b.say(5, join(on("x", 5)))[0], ToNode::Welcome { .. }));
    b.open(6, 1);
    assert!(refused(&b.say(6, join(on("y", 6)))));
    // Much later it is asked again.
    b.now += Duration::from_secs(120);
    b.open(7, 1);
    assert!(b.say(7, join(on("y", 6))).is_empty());
    b.now += Duration::from_secs(2);
    b.open(8, 1);
    assert!(
        matches!(b.say(8, join(on("y", 6)))[0], ToNode::Welcome { .. }),
        "nobody has said anything for two seconds"
    );
    // The head's own node is nobody else's.
    b.open(9, 0);
    b.say(9, join(NodeInfo { host_id: "x".into(), ..info(0, 1) }));
    b.open(10, 0);
    let said = b.say(10, join(NodeInfo { host_id: "y".into(), ..info(0, 9) }));
    assert!(matches!(&said[..], [ToNode::Refused(r)] if r.kind == RefusalKind::Policy));
}

#[test]
fn a_lower_life_is_a_ghost() {
    let mut b = Bench::new();
    b.open(1, 1);
    b.say(1, join(info(1, 5)));
    b.open(2, 1);
    let said = b.say(2, join(info(1, 4)));
    assert!(matches!(&said[..], [ToNode::Refused(r)] if r.kind == RefusalKind::Policy && r.cause.contains("life 4")));
    assert_eq!(b.closed, [SessionId(2)]);
    // Nor does its silence count.
    let silence = |incarnation| Input::Liveness { node: id(1), incarnation, transition: Transition::Dead };
    b.give(silence(Incarnation(4)));
    assert_eq!(b.state(1), Some(NodeState::Alive));
    b.give(silence(Incarnation(5)));
    assert_eq!(b.state(1), Some(NodeState::Dead));
    // The dead do not come back by a heartbeat.
    b.give(Input::Liveness { node: id(1), incarnation: Incarnation(5), transition: Transition::Alive });
    assert_eq!(b.state(1), Some(NodeState::Dead));
}

#[test]
fn a_closed_session_is_not_death_but_nothing_is_placed_meanwhile() {
    let mut b = Bench::new();
    b.open(1, 1);
    b.say(1, join(info(1, 1)));
    b.open(2, 2);
    b.say(2, join(info(2, 1)));
    b.give(Input::SessionClosed { session: SessionId(1) });
    assert_eq!(b.state(1), Some(NodeState::Alive));
    b.say(
        2,
        ToHead::CreateGroup {
            request: 1,
            spec: GroupSpec { bundles: vec![Resources::new().with(GPU, Quantity::ONE); 4], ..spec(1, 1000) },
        },
    );
    let waiting = b.head.status(b.now);
    assert!(waiting.groups.is_empty());
    b.open(3, 1);
    let said = b.say(3, join(info(1, 1)));
    assert!(said.iter().any(|m| matches!(m, ToNode::StartKeeper { .. })), "{said:?}");
}

#[test]
fn nobody_joins_under_anothers_id_or_with_nonsense() {
    let mut b = Bench::new();
    b.open(1, 1);
    assert!(matches!(&b.say(1, join(info(2, 1)))[..], [ToNode::Refused(r)] if r.cause.contains("not that of its key")));
    b.open(2, 1);
    let fewer = NodeInfo { gpus: Vec::new(), ..info(1, 1) };
    assert!(matches!(&b.say(2, join(fewer))[..], [ToNode::Refused(r)] if r.kind == RefusalKind::Invalid));
    b.open(3, 1);
    let nameless = NodeInfo { name: String::new(), ..info(1, 1) };
    assert!(matches!(&b.say(3, join(nameless))[..], [ToNode::Refused(_)]));
    // A message before any join.
    b.open(4, 1);
    assert!(b.say(4, ToHead::Status { request: 1 }).is_empty());
    assert!(b.head.status(b.now).nodes.is_empty());
}

#[test]
fn two_nodes_of_one_name_are_two_nodes() {
    let mut b = Bench::new();
    for node in [1, 2] {
        b.open(node.into(), node);
        b.say(node.into(), join(NodeInfo { name: "same".into(), ..info(node, 1) }));
    }
    let report = b.head.status(b.now);
    assert_eq!(report.nodes.len(), 2);
    assert!(report.nodes.iter().all(|n| n.name == "same" && n.state == NodeState::Alive));
}

#[test]
fn a_request_that_is_asked_again_is_answered_again() {
    let mut b = Bench::new();
    b.open(1, 1);
    b.say(1, join(info(1, 1)));
    let start = b.say(1, ToHead::CreateGroup { request: 1, spec: spec(2, 1000) });
    let ToNode::StartKeeper { group, .. } = start[0].clone() else { panic!("{start:?}") };
    assert!(b.say(1, ToHead::CreateGroup { request: 1, spec: spec(2, 1000) }).is_empty(), "still being placed");
    assert!(matches!(b.say(1, ToHead::KeeperReady { group })[..], [ToNode::GroupPlaced { request: 1, .. }]));
    assert!(matches!(b.say(1, ToHead::KeeperReady { group })[..], []));
    // On the same session the first answer is on its way; on the next one it may have been lost.
    assert!(matches!(b.say(1, ToHead::CreateGroup { request: 1, spec: spec(2, 1000) })[..], []));
    b.open(2, 1);
    let ToNode::StartKeeper { name, world_size, driver_node, ranks, .. } = start[0].clone() else { panic!() };
    let held = HeldGroup {
        group,
        name,
        world_size,
        driver_node,
        ranks,
        pids: vec![0],
        states: vec![WorkerState::Starting],
        links: Vec::new(),
        launch: None,
    };
    let mut again = join(info(1, 1));
    if let ToHead::Join { held: all, .. } = &mut again {
        all.push(held);
    }
    assert!(matches!(b.say(2, again)[..], [ToNode::Welcome { .. }]));
    let told = b.say(2, ToHead::CreateGroup { request: 1, spec: spec(2, 1000) });
    assert!(matches!(told[..], [ToNode::GroupPlaced { .. }]), "{told:?}");
    b.say(2, ToHead::GroupEnded { group, cause: "a rank died".into() });
    let again = b.say(2, ToHead::CreateGroup { request: 1, spec: spec(2, 1000) });
    assert!(matches!(&again[..], [ToNode::RequestRefused { refusal, .. }] if refusal.cause == "a rank died"));
    // A keeper that turns up after the end is told to go.
    let stray = b.say(2, ToHead::KeeperReady { group });
    assert!(matches!(&stray[..], [ToNode::StopKeeper { cause, .. }] if cause == "a rank died"));
}

#[test]
fn a_joining_node_hears_of_its_peers_and_a_leaving_one_takes_its_part_along() {
    let mut b = Bench::new();
    for node in [1, 2] {
        b.open(node.into(), node);
        b.say(node.into(), join(info(node, 1)));
    }
    let bundles = vec![Resources::new().with(GPU, Quantity::ONE); 4];
    b.sent.clear();
    let message = ToHead::CreateGroup { request: 1, spec: GroupSpec { bundles, driver_node: id(1), ..spec(1, 0) } };
    b.give(Input::Message { session: SessionId(1), message });
    let starts: Vec<_> = b.sent.drain(..).collect();
    let (session, ToNode::StartKeeper { group, name, world_size, driver_node, ranks, .. }) = starts[1].clone() else {
        panic!("{starts:?}")
    };
    for session in [1, 2] {
        b.say(session, ToHead::KeeperReady { group });
    }
    b.give(Input::Liveness { node: id(1), incarnation: Incarnation(1), transition: Transition::Suspect });
    assert_eq!(session, SessionId(2));
    b.open(3, 2);
    let held = HeldGroup {
        group,
        name,
        world_size,
        driver_node,
        ranks,
        pids: vec![5, 6],
        states: vec![WorkerState::Ready; 2],
        links: Vec::new(),
        launch: None,
    };
    let mut again = join(info(2, 1));
    if let ToHead::Join { held: all, .. } = &mut again {
        all.push(held);
    }
    let said = b.say(3, again);
    let verdict =
        |m: &ToNode| matches!(m, ToNode::NodeVerdict { node, state: NodeState::Suspect, .. } if *node == id(1));
    assert!(said.iter().any(verdict), "{said:?}");
    b.say(3, ToHead::Leave);
    let report = b.head.status(b.now);
    let group = report.groups.iter().find(|g| g.id == group).map(|g| g.workers.clone()).unwrap_or_default();
    let states: Vec<WorkerState> = group.iter().filter(|w| w.node == id(2)).map(|w| w.state).collect();
    assert_eq!(states, [WorkerState::Dead; 2], "what left has no part any more");
}

#[test]
fn a_stop_that_is_not_answered_is_repeated() {
    let mut b = Bench::new();
    b.open(1, 1);
    b.say(1, join(info(1, 1)));
    let start = b.say(1, ToHead::CreateGroup { request: 1, spec: spec(2, 1000) });
    let ToNode::StartKeeper { group, .. } = start[0].clone() else { panic!("{start:?}") };
    b.say(1, ToHead::KeeperReady { group });
    assert!(matches!(b.say(1, ToHead::StopGroup { request: 2, group: Some(group) })[..], [ToNode::StopKeeper { .. }]));
    b.now += Duration::from_secs(5);
    b.sent.clear();
    b.give(Input::Timer);
    assert!(matches!(b.sent[..], [(_, ToNode::StopKeeper { .. })]), "{:?}", b.sent);
    assert_eq!(b.head.status(b.now).nodes[0].available.get(GPU), Quantity::ZERO, "not free before the node says so");
    let done = b.say(1, ToHead::GroupEnded { group, cause: String::new() });
    assert!(matches!(done[..], [ToNode::Done { request: 2 }]), "{done:?}");
    assert_eq!(b.head.status(b.now).nodes[0].available.get(GPU), Quantity::whole(2));
}

#[test]
fn what_a_peer_can_make_the_head_hold_is_bounded() {
    let mut b = Bench::new();
    b.audits = false;
    b.open(1, 1);
    b.say(1, join(info(1, 1)));
    // Launches that wait.
    for request in 0..MAX_WAITING as u64 {
        b.say(1, ToHead::CreateGroup { request, spec: spec(99, 1000) });
    }
    let one_more = b.say(1, ToHead::CreateGroup { request: 1 << 40, spec: spec(99, 1000) });
    assert!(
        matches!(&one_more[..], [ToNode::RequestRefused { refusal, .. }] if refusal.kind == RefusalKind::Resources)
    );
    b.now += Duration::from_secs(2);
    b.give(Input::Timer);
    // Groups that have ended; strangers at the door; nodes that are gone.
    for request in 0..200 {
        let start = b.say(1, ToHead::CreateGroup { request: 5000 + request, spec: spec(2, 1000) });
        let Some(ToNode::StartKeeper { group, .. }) = start.first().cloned() else { panic!("{start:?}") };
        b.say(1, ToHead::GroupEnded { group, cause: "over".into() });
    }
    assert_eq!(b.head.status(b.now).groups.len(), MAX_ENDED_GROUPS);
    let told = b.told;
    for _ in 0..5000 {
        b.give(Input::HandshakeRefused { from: "10.9.9.9:1".into(), cause: "wrong token".into() });
    }
    assert_eq!(b.told - told, 1, "a flood is one line");
    for node in 2..MAX_GONE_NODES as u16 + 50 {
        b.open(1000 + u64::from(node), node);
        b.say(1000 + u64::from(node), join(info(node, 1)));
        b.say(1000 + u64::from(node), ToHead::Leave);
    }
    let report = b.head.status(b.now);
    assert_eq!(report.nodes.len(), MAX_GONE_NODES + 1);
    assert_eq!(report.events.len(), MAX_EVENTS);
    assert_eq!(report.refused_handshakes, 5000);
    assert_eq!(b.head.audit(), Ok(()));
}

#[test]
fn a_thousand_nodes_and_two_hundred_groups() {
    let mut b = Bench::new();
    b.audits = false;
    let started = Instant::now();
    for node in 1..=1000 {
        b.open(node.into(), node);
        b.say(node.into(), join(info(node, 1)));
    }
    let joined = started.elapsed();
    let started = Instant::now();
    let mut keepers = 0;
    for request in 0..200 {
        let bundles = vec![Resources::new().with(GPU, Quantity::ONE); 8];
        b.sent.clear();
        let message = ToHead::CreateGroup { request, spec: GroupSpec { bundles, ..spec(1, 60_000) } };
        b.give(Input::Message { session: SessionId(1), message });
        for (session, message) in std::mem::take(&mut b.sent) {
            let ToNode::StartKeeper { group, .. } = message else { panic!("{message:?}") };
            keepers += 1;
            b.say(session.0, ToHead::KeeperReady { group });
        }
    }
    let placed = started.elapsed();
    let started = Instant::now();
    let report = b.head.status(b.now);
    println!("1000 joins {joined:?}, 200 groups {placed:?}, a status {:?}", started.elapsed());
    assert_eq!((report.nodes.len(), report.groups.len(), keepers), (1000, 200, 800));
    let bytes = rayless_proto::codec::encode(&report).len();
    println!("a status of {bytes} bytes");
    assert!(bytes < rayless_proto::limits::MAX_CONTROL_MESSAGE);
    assert_eq!(b.head.audit(), Ok(()));
}

#[test]
fn a_report_passes_through_the_head_and_nothing_of_it_stays() {
    let mut b = Bench::new();
    for node in [1, 2] {
        b.open(node.into(), node);
        b.say(node.into(), join(info(node, 1)));
    }
    let by = Requester { node: id(1), incarnation: Incarnation(1), request: 7 };
    assert_eq!(b.say(1, ToHead::AskReport { request: 7, node: id(2) }), [ToNode::MakeReport(by)]);
    let part = |length: usize| ReportPart { archive: vec![1; length], cause: String::new() };
    let answer = b.say(2, ToHead::ReportMade { by, part: part(MAX_REPORT_PART) });
    assert_eq!(answer, [ToNode::ReportPart { request: 7, part: part(MAX_REPORT_PART) }]);
    // More than is allowed goes no further.
    let answer = b.say(2, ToHead::ReportMade { by, part: part(MAX_REPORT_PART + 1) });
    let cut = |said: &[ToNode]| matches!(said, [ToNode::ReportPart { part, .. }] if part.archive.is_empty() && part.cause.starts_with("n2 sent "));
    assert!(cut(&answer), "{answer:?}");
    // The life that asked is over: its next one never hears of it.
    let old = Requester { incarnation: Incarnation(0), ..by };
    assert!(b.say(2, ToHead::ReportMade { by: old, part: part(1) }).is_empty());
    // Who is not connected is not waited for.
    let refused = |said: &[ToNode], cause: &str| matches!(said, [ToNode::RequestRefused { request: 8, refusal, .. }] if refusal.cause.contains(cause));
    b.give(Input::SessionClosed { session: SessionId(2) });
    assert!(refused(&b.say(1, ToHead::AskReport { request: 8, node: id(2) }), "node n2 is not connected"));
    assert!(refused(&b.say(1, ToHead::AskReport { request: 8, node: id(9) }), "no node "));
}

#[test]
fn an_absurd_wait_is_no_overflow() {
    let mut b = Bench::new();
    b.open(1, 1);
    b.say(1, join(info(1, 1)));
    let said = b.say(1, ToHead::CreateGroup { request: 1, spec: spec(99, u64::MAX) });
    assert!(matches!(said[..], [ToNode::Waiting { .. }]));
    // A sum that would not fit a quantity is no panic either.
    let huge = Resources::new().with("x", Quantity::from_raw(u64::MAX));
    let said = b.say(1, ToHead::CreateGroup { request: 2, spec: GroupSpec { bundles: vec![huge; 3], ..spec(1, 0) } });
    assert!(matches!(said[..], [ToNode::RequestRefused { .. }]));
}
