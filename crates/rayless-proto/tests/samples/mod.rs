//! One well-formed message of every kind: where the decoder tests and the fuzz targets begin.

use rayless_proto::{
    ids::{ClusterId, GroupId, Incarnation, NodeId, PlacementGroupId, Term, TokenMark},
    resources::{Allocation, CPU, GPU, GpuShare, Quantity, Resources, Strategy},
    v1::{
        control::{
            EndedGroup, FromHead, GpuInfo, GroupSpec, HeadTerm, HeldGroup, HeldPlacementGroup, NeedHave, NeedHaveRow,
            NodeEnv, NodeInfo, PlacedNode, Placement, RankAllocation, Refusal, RefusalKind, ReportPart, Requester,
            ToHead, ToNode, WorkerState,
        },
        keeper::{FromKeeper, KeeperConfig, ToKeeper},
        link::{
            LaunchLinks, LinkAnswer, LinkBoot, LinkNode, LinkOffer, LinkOpening, LinkOutcome, LinkPlace, LinkPolicy,
            LinkReport, LinkSettings, LinkState, LinkTable, LinkTransport, LinkTry,
        },
        local::{ClientMessage, ClientReply, ClientRequest, DaemonMessage, Identity, LeafBundle},
        rdma::{RdmaDevice, RdmaFinding, RdmaGid, RdmaInventory, RdmaPort, RdmaReach},
        status::{
            Event, GpuState, GpuStatus, GroupState, GroupStatus, HeadSeat, LinkStatus, NodeState, NodeStatus,
            PlacementGroupStatus, StatusReport, TokenStatus, WorkerStatus,
        },
        step::{KeeperEvent, Launch, LinkMoved, Look, RankLook},
        token::{MarkedToken, TokenSet},
    },
};

const NODE: NodeId = NodeId([7; 32]);
const GROUP: GroupId = GroupId([3; 8]);
const PLACEMENT_GROUP: PlacementGroupId = PlacementGroupId([5; 8]);

const REQUESTER: Requester = Requester { node: NODE, incarnation: Incarnation(2), request: 4 };
const BY: HeadTerm = HeadTerm { cluster: ClusterId([9; 16]), term: Term(3) };

fn seat() -> HeadSeat {
    HeadSeat { node: NODE, name: "a".into(), address: "10.0.0.1:6379".into(), active: true }
}

/// Node to head.
pub fn to_head() -> Vec<ToHead> {
    vec![
        ToHead::Join {
            info: info(),
            head_address: "10.0.0.1".into(),
            seen: Some(BY),
            held: vec![held()],
            ended: vec![ended()],
            asks: vec![4],
            told: vec![2, 3],
            held_placement_groups: vec![held_placement_group()],
        },
        ToHead::Leave,
        ToHead::CreateGroup { request: 1, spec: spec() },
        ToHead::CancelRequest { request: 2 },
        ToHead::CreatePlacementGroup {
            request: 3,
            name: "pg".into(),
            bundles: vec![bundle(), bundle()],
            strategy: Strategy::StrictSpread,
            wait_ms: 1000,
        },
        ToHead::RemovePlacementGroup { request: 4, id: PLACEMENT_GROUP },
        ToHead::StopGroup { request: 5, group: Some(GROUP) },
        ToHead::Status { request: 6 },
        ToHead::KeeperReady { group: GROUP },
        ToHead::WorkerChanged { group: GROUP, rank: 1, pid: 77, state: WorkerState::Busy },
        ToHead::LinkChanged { group: GROUP, report: link_report() },
        ToHead::GroupEnded { group: GROUP, cause: "rank 1 was killed".into() },
        ToHead::KeeperStopped { group: GROUP, stopped: true },
        ToHead::RanksStuck { group: GROUP, line: "rank 1: 12 s in execute_model (call 17)".into() },
        ToHead::GpuDraining { gpus: vec![(0, true), (1, false)] },
        ToHead::Update { info: info() },
        ToHead::TokensHeld { marks: vec![TokenMark([1; 8]), TokenMark([2; 8])], problem: "disk full".into() },
        ToHead::AskReport { request: 7, node: NODE },
        ToHead::ReportMade { by: asker(), part: part() },
    ]
}

/// Head to node.
pub fn from_head() -> Vec<FromHead> {
    to_node().into_iter().map(|message| FromHead { by: BY, message }).collect()
}

fn to_node() -> Vec<ToNode> {
    vec![
        ToNode::Welcome {
            cluster: ClusterId([9; 16]),
            head: NODE,
            your_address: "10.0.0.2".into(),
            dead_after_ms: 3000,
            heads: vec!["10.0.0.1:6379".into()],
        },
        ToNode::Elsewhere { head: Some("10.0.0.1:6379".into()), cause: "a standby".into() },
        ToNode::Heads(vec!["10.0.0.1:6379".into()]),
        ToNode::Refused(refusal()),
        ToNode::Fenced { cause: "silent for 3.2 s".into() },
        ToNode::StartKeeper {
            group: GROUP,
            name: "g".into(),
            world_size: 4,
            driver_node: NODE,
            ranks: vec![rank()],
            requester: Some(REQUESTER),
        },
        ToNode::StopKeeper { group: GROUP, cause: String::new() },
        ToNode::HoldPlacementGroup(held_placement_group()),
        ToNode::DropPlacementGroup(PLACEMENT_GROUP),
        ToNode::Waiting { request: 1, table: table() },
        ToNode::GroupPlaced { request: 1, group: GROUP, placements: vec![placement()], nodes: vec![placed_node()] },
        ToNode::PlacementGroupPlaced { request: 2, id: PLACEMENT_GROUP, nodes: vec![NODE] },
        ToNode::Done { request: 3 },
        ToNode::RequestRefused { request: 4, refusal: refusal(), table: Some(table()) },
        ToNode::Status { request: 5, report: report() },
        ToNode::NodeVerdict { node: NODE, name: "b".into(), state: NodeState::Suspect, cause: "silent".into() },
        ToNode::KeeperStopped { group: GROUP, node: NODE, stopped: true },
        ToNode::Notice(event()),
        ToNode::Story { whole: true, events: vec![event()], ended: vec![ended()] },
        ToNode::Tokens(TokenSet { current: token(1), previous: Some(token(2)) }),
        ToNode::MakeReport(asker()),
        ToNode::ReportPart { request: 7, part: part() },
    ]
}

const fn asker() -> Requester {
    Requester { request: 7, ..REQUESTER }
}

fn part() -> ReportPart {
    ReportPart { archive: vec![0x1f, 0x8b, 8], cause: String::new() }
}

/// A command or driver to its daemon.
pub fn client_messages() -> Vec<ClientMessage> {
    [
        ClientRequest::Identify,
        ClientRequest::Status,
        ClientRequest::CreateGroup(spec()),
        ClientRequest::StopGroup(None),
        ClientRequest::CreatePlacementGroup {
            name: "pg".into(),
            bundles: vec![bundle()],
            strategy: Strategy::Pack,
            wait_ms: 0,
        },
        ClientRequest::RemovePlacementGroup(PLACEMENT_GROUP),
        ClientRequest::Stop,
        ClientRequest::RotateToken { overlap_ms: Some(60_000) },
        ClientRequest::FinishRotation,
        ClientRequest::Report(NODE),
    ]
    .into_iter()
    .zip(1..)
    .map(|(body, request)| ClientMessage { request, body })
    .collect()
}

/// A daemon to its client.
pub fn daemon_messages() -> Vec<DaemonMessage> {
    [
        ClientReply::Identity(Identity {
            node: NODE,
            name: "a".into(),
            address: "10.0.0.1:6379".into(),
            pid: 4,
            build: "0.1.0".into(),
            is_head: false,
            head_address: "10.0.0.1:6379".into(),
            joined: true,
            waiting_for: String::new(),
            dead_after_ms: 3000,
            step_deadline_ms: 300_000,
            host_id: "boot/4026531840".into(),
        }),
        ClientReply::Status(report()),
        ClientReply::Waiting(table()),
        ClientReply::WaitingForHead("no answer".into()),
        ClientReply::GroupPlaced {
            group: GROUP,
            placements: vec![placement()],
            nodes: vec![placed_node()],
            local_keeper: Some("/run/rayless/keepers/x.sock".into()),
            leaf: leaf(),
        },
        ClientReply::PlacementGroupPlaced { id: PLACEMENT_GROUP, nodes: vec![NODE] },
        ClientReply::NodeVerdict { node: NODE, name: "b".into(), state: NodeState::Dead, cause: "silent".into() },
        ClientReply::KeeperStopped { group: GROUP, node: NODE, stopped: false },
        ClientReply::Done,
        ClientReply::Refused { refusal: refusal(), table: None },
        ClientReply::Report(part()),
    ]
    .into_iter()
    .zip(1..)
    .map(|(body, request)| DaemonMessage { request, body })
    .collect()
}

/// A daemon to a keeper.
pub fn to_keeper() -> Vec<ToKeeper> {
    vec![
        ToKeeper::Watch,
        ToKeeper::Stop { cause: "stopped by `rayless stop`".into() },
        ToKeeper::NodeVerdict { node: NODE, state: NodeState::Alive },
        ToKeeper::Leaf(leaf()),
        ToKeeper::Look(look()),
    ]
}

/// A keeper to a daemon.
pub fn from_keeper() -> Vec<FromKeeper> {
    vec![
        FromKeeper::Held(held()),
        FromKeeper::WorkerChanged { rank: 0, pid: 4, state: WorkerState::Dead },
        FromKeeper::Looked { ranks: vec![rank_look()] },
        FromKeeper::Stuck { line: "rank 1: 12 s in execute_model (call 17)".into() },
        FromKeeper::Link(link_report()),
        FromKeeper::Ended { cause: String::new() },
    ]
}

/// What a keeper is started with.
pub fn keeper_configs() -> Vec<KeeperConfig> {
    vec![KeeperConfig {
        group: GROUP,
        name: "g".into(),
        world_size: 4,
        driver_node: NODE,
        node: NODE,
        node_name: "a".into(),
        node_address: "10.0.0.1".into(),
        run_dir: "/run/rayless".into(),
        ranks: vec![rank()],
        gpu_uuids: vec![vec!["declared-0".into()]],
        node_env: vec![node_env()],
        leaf: leaf(),
        dead_after_ms: 3000,
        driver_wait_ms: 60_000,
        links: link_settings(),
        requester: Some(REQUESTER),
    }]
}

/// A driver to a keeper.
pub fn launches() -> Vec<Launch> {
    vec![Launch {
        program: "/usr/bin/python3".into(),
        arguments: vec!["-m".into(), "rayless._worker".into()],
        directory: "/srv".into(),
        env: vec![("A".into(), "1".into())],
        rank_env: vec![(0, vec![("B".into(), "2".into())])],
        boot: vec![1, 2, 3],
        links: Some(LaunchLinks { table: link_table(), policy: link_policy() }),
    }]
}

/// A keeper to a worker.
pub fn link_boots() -> Vec<LinkBoot> {
    vec![LinkBoot {
        group: GROUP,
        table: link_table(),
        policy: link_policy(),
        leaf: leaf(),
        keeper_socket: "/run/rayless/keepers/0303030303030303.sock".into(),
        rdma_ports: (6400, 6463),
        rdma_devices: vec!["erdma_0".into()],
    }]
}

/// A sender's first frame to a receiver.
pub fn link_openings() -> Vec<LinkOpening> {
    vec![
        LinkOpening::Offer(LinkOffer {
            group: GROUP,
            from: 0,
            to: 1,
            channel: 2,
            ticket: [8; 32],
            node_name: "a".into(),
            host_id: "boot-1".into(),
            policy: link_policy(),
            rdma: vec![rdma_reach()],
            no_rdma: String::new(),
            max_message: 1 << 30,
        }),
        LinkOpening::Stream { from: 0, channel: 2, ticket: [9; 32] },
    ]
}

/// A receiver to a sender.
pub fn link_answers() -> Vec<LinkAnswer> {
    let places = [
        LinkPlace::Shm { keeper_socket: "/run/rayless/keepers/0303030303030303.sock".into() },
        LinkPlace::Rdma { address: "10.0.0.2:6400".into(), from: Box::new(rdma_reach()), to: Box::new(rdma_reach()) },
        LinkPlace::Tcp { streams: 4, encrypt: true },
    ];
    let tries = places.map(|place| LinkAnswer::Try(LinkTry { ticket: [7; 32], verify: true, place }));
    let others = [
        LinkAnswer::Settled { rejected: vec![(LinkTransport::Shm, "the ranks are on two hosts".into())] },
        LinkAnswer::Refused("--transport shm was given".into()),
        LinkAnswer::Waiting,
    ];
    tries.into_iter().chain(others).collect()
}

/// A sender to a receiver, after an attempt.
pub fn link_outcomes() -> Vec<LinkOutcome> {
    vec![LinkOutcome::Proven, LinkOutcome::Failed("memlock is 64 KiB".into())]
}

/// A worker to its keeper.
pub fn link_report() -> LinkReport {
    LinkReport {
        from: 0,
        to: 1,
        channel: 2,
        by_sender: true,
        state: LinkState::Open,
        cause: String::new(),
        transport: Some(LinkTransport::Rdma),
        mode: String::new(),
        device: "erdma_0".into(),
        gid: "::ffff:10.0.0.1".into(),
        mtu: 1024,
        rejected: vec![(LinkTransport::Shm, "the ranks are on two hosts".into())],
        encrypted: false,
        verified: true,
        messages: 3,
        bytes: 1 << 20,
    }
}

fn rdma_reach() -> RdmaReach {
    RdmaReach {
        device: "erdma_0".into(),
        protocol: "iwarp".into(),
        interface: "eth0".into(),
        address: "10.0.0.1".into(),
        mtu: 1500,
        gid: "0216:3e00:0001:0000:0000:0000:0000:0000".into(),
    }
}

fn rdma_inventory() -> RdmaInventory {
    let port = RdmaPort {
        number: 1,
        state: "ACTIVE".into(),
        rate: "100 Gb/sec (4X EDR)".into(),
        interface: "eth0".into(),
        address: "10.0.0.1".into(),
        mtu: 1500,
        gids: vec![RdmaGid { index: 0, gid: "0216:3e00:0001:0000:0000:0000:0000:0000".into(), kind: String::new() }],
    };
    let device = RdmaDevice {
        name: "erdma_0".into(),
        protocol: "iwarp".into(),
        mode: "standard".into(),
        numa: Some(1),
        gpu_steps: vec![(0, Some(4)), (1, None)],
        ports: vec![port],
    };
    let findings = vec![RdmaFinding { what: "the memlock limit is 64 KiB".into(), is_fatal: true }];
    RdmaInventory { devices: vec![device], findings }
}

fn link_settings() -> LinkSettings {
    LinkSettings { policy: link_policy(), rdma_ports: (6400, 6463), rdma_devices: vec!["erdma_0".into()] }
}

fn link_policy() -> LinkPolicy {
    LinkPolicy { only: Some(LinkTransport::Rdma), allow_tcp: Some(true), encrypt: false, verify: true }
}

fn link_table() -> LinkTable {
    let node = |id, name: &str| LinkNode {
        id: NodeId([id; 32]),
        name: name.into(),
        address: "10.0.0.1".into(),
        port: 6379,
        host_id: format!("boot-{id}"),
        has_rdma: true,
    };
    LinkTable { secret: [6; 32], nodes: vec![node(1, "a"), node(2, "b")], ranks: vec![0, 0, 1, 1] }
}

/// A keeper to a driver.
pub fn keeper_events() -> Vec<KeeperEvent> {
    vec![
        KeeperEvent::Launched { pids: vec![(0, 100), (1, 101)] },
        KeeperEvent::Ready { rank: 1, versions: vec![("python".into(), "3.11.7".into())] },
        KeeperEvent::Changed { rank: 1, state: WorkerState::Ready },
        KeeperEvent::Failed { rank: Some(1), cause: "killed by signal 9".into(), tail: "last words".into() },
        KeeperEvent::Looked { ranks: vec![rank_look()] },
        KeeperEvent::Link(link_report()),
        KeeperEvent::Ended,
    ]
}

fn token(number: u8) -> MarkedToken {
    MarkedToken { mark: TokenMark([number; 8]), text: "rl1_60rk4csm6mv3ee1sc5h66s35csrgesv7".into() }
}

/// What a driver asks when nothing moves.
pub fn look() -> Look {
    Look { still_ms: 10_000, stacks: true }
}

fn rank_look() -> RankLook {
    RankLook {
        rank: 1,
        pid: 77,
        state: WorkerState::Busy,
        call: 17,
        doing: "execute_model".into(),
        still_ms: 12_000,
        link: Some(LinkMoved { peer: 0, channel: 2, receiving: true, sequence: 33 }),
        stack: "Thread 0x1 (most recent call first):".into(),
    }
}

/// The state of a cluster.
pub fn report() -> StatusReport {
    StatusReport {
        cluster: ClusterId([9; 16]),
        head: NODE,
        term: Term(3),
        heads: vec![seat()],
        protocol: 1,
        uptime_ms: 1000,
        refused_handshakes: 2,
        token: TokenStatus {
            mark: Some(TokenMark([1; 8])),
            rotating: true,
            left_ms: Some(60_000),
            behind: vec![(NODE, "its disk is full".into())],
        },
        nodes: vec![NodeStatus {
            id: NODE,
            name: "a".into(),
            address: "10.0.0.1:6379".into(),
            is_head: true,
            state: NodeState::Alive,
            incarnation: 3,
            last_seen_ms: 0,
            rtt_us: 0,
            resources: bundle(),
            available: Resources::new(),
            gpus: vec![GpuStatus {
                index: 0,
                uuid: "GPU-1".into(),
                name: "H20".into(),
                memory_bytes: 96 << 30,
                state: GpuState::Held,
                held_by: vec![GROUP],
            }],
            versions: vec![("rayless".into(), "0.1.0".into())],
            interface: "eth0".into(),
            node_env: vec![node_env()],
            links: link_settings(),
            rdma: rdma_inventory(),
        }],
        groups: vec![GroupStatus {
            id: GROUP,
            name: "g".into(),
            state: GroupState::Running,
            cause: String::new(),
            driver_node: NODE,
            driver_pid: 4,
            workers: vec![WorkerStatus { rank: 0, node: NODE, pid: 5, state: WorkerState::Ready, gpus: vec![0] }],
        }],
        placement_groups: vec![PlacementGroupStatus {
            id: PLACEMENT_GROUP,
            name: "pg".into(),
            strategy: "PACK".into(),
            bundles: vec![(bundle(), NODE)],
        }],
        links: vec![LinkStatus {
            group: GROUP,
            from: 0,
            to: 1,
            channel: 2,
            state: LinkState::Open,
            cause: String::new(),
            transport: Some(LinkTransport::Tcp),
            mode: String::new(),
            device: String::new(),
            gid: String::new(),
            mtu: 1500,
            peer_device: String::new(),
            peer_gid: String::new(),
            rejected: vec![(LinkTransport::Rdma, "no device".into())],
            encrypted: true,
            verified: false,
            messages: 3,
            bytes: 1 << 20,
        }],
        events: vec![event()],
    }
}

fn bundle() -> Resources {
    Resources::new().with(CPU, Quantity::whole(2)).with(GPU, Quantity::from_raw(5_000))
}

fn allocation() -> Allocation {
    Allocation { resources: bundle(), gpus: vec![GpuShare { index: 0, amount: Quantity::from_raw(5_000) }] }
}

fn rank() -> RankAllocation {
    RankAllocation { rank: 0, allocation: allocation(), placement_group: Some((PLACEMENT_GROUP, 1)) }
}

fn node_env() -> NodeEnv {
    NodeEnv {
        name: "GLOO_SOCKET_IFNAME".into(),
        value: "eth0".into(),
        source: "interface of the route to the head".into(),
    }
}

fn info() -> NodeInfo {
    NodeInfo {
        id: NODE,
        incarnation: Incarnation(2),
        name: "b".into(),
        address: "10.0.0.2".into(),
        port: 6379,
        interface: "eth0".into(),
        host_id: "boot/4026531840".into(),
        resources: Resources::new().with(CPU, Quantity::whole(8)).with(GPU, Quantity::ONE),
        gpus: vec![GpuInfo { index: 0, uuid: "GPU-1".into(), name: "H20".into(), memory_bytes: 96 << 30 }],
        versions: vec![("rayless".into(), "0.1.0".into())],
        node_env: vec![node_env()],
        links: link_settings(),
        rdma: rdma_inventory(),
    }
}

fn held() -> HeldGroup {
    HeldGroup {
        group: GROUP,
        name: "g".into(),
        world_size: 2,
        driver_node: NODE,
        ranks: vec![rank()],
        pids: vec![100],
        states: vec![WorkerState::Ready],
        links: vec![link_report()],
        launch: Some(REQUESTER),
    }
}

fn ended() -> EndedGroup {
    EndedGroup {
        group: GROUP,
        name: "g".into(),
        world_size: 2,
        driver_node: NODE,
        cause: "rank 1 was killed".into(),
        time_us: 1_764_000_000_000_000,
        ranks: vec![(NODE, vec![0, 1])],
    }
}

fn held_placement_group() -> HeldPlacementGroup {
    HeldPlacementGroup {
        id: PLACEMENT_GROUP,
        name: "pg".into(),
        strategy: Strategy::Spread,
        bundle_count: 2,
        bundles: vec![(1, allocation())],
    }
}

fn spec() -> GroupSpec {
    GroupSpec {
        name: "g".into(),
        bundles: vec![bundle(), bundle()],
        strategy: Strategy::Spread,
        driver_node: NODE,
        driver_pid: 4,
        wait_ms: 1000,
        placement_group: None,
        driver_versions: vec![("python".into(), "3.11.7".into())],
    }
}

fn placement() -> Placement {
    Placement { rank: 0, local_rank: 0, node: NODE, allocation: allocation(), gpu_uuids: vec!["GPU-1".into()] }
}

fn placed_node() -> PlacedNode {
    PlacedNode {
        id: NODE,
        name: "a".into(),
        address: "10.0.0.1".into(),
        port: 6379,
        host_id: "boot/4026531840".into(),
        node_env: vec![node_env()],
        versions: vec![("rayless".into(), "0.1.0".into())],
        link_policy: link_policy(),
        has_rdma: true,
    }
}

fn refusal() -> Refusal {
    Refusal { kind: RefusalKind::Resources, cause: "too few GPUs".into(), hint: "add a node".into() }
}

fn table() -> NeedHave {
    NeedHave {
        cause: "4 GPU wanted, 1 free".into(),
        need: bundle(),
        bundles: 4,
        rows: vec![NeedHaveRow {
            node: "a".into(),
            state: "alive".into(),
            total: bundle(),
            available: Resources::new(),
            held: vec![(Some(0), "g".into()), (None, "h".into())],
        }],
    }
}

fn leaf() -> LeafBundle {
    LeafBundle { ca_certificates: vec![vec![1; 40]], certificates: vec![vec![2; 40]], key: vec![3; 40] }
}

fn event() -> Event {
    Event { time_us: 1_700_000_000_000_000, kind: "node-dead".into(), cause: "silent for 3.2 s".into() }
}
