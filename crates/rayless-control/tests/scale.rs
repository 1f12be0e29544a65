//! How the control plane grows: clusters of 10 to 1,000 nodes of 8 GPUs in virtual time, with a join storm, a group for every five nodes and a rolling loss
//! of one node in twenty.
//!
//! Messages are counted, and so come out the same each time; the head's processor time is measured on this machine. `make test` plays two small
//! clusters and compares counts only; `tests/run scale` plays all sizes in a release build and writes `docs/scale.md`.

mod support;

use rayless_proto::{
    ids::NodeId,
    resources::{CPU, GPU, Quantity, Resources, Strategy},
    v1::{
        control::GroupSpec,
        status::{GroupState, NodeState},
    },
};
use std::{fmt::Write as _, fs, time::Duration};
use support::{
    steps::DriverState,
    world::{Rng, World},
};

const SECOND: Duration = Duration::from_secs(1);
/// Ranks of a group: two nodes of eight GPUs.
const RANKS: usize = 16;

/// What a stretch of time cost, for all of the cluster.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    seconds: f64,
    /// Messages on control sessions, both ways.
    messages: u64,
    /// Heartbeats and their echoes.
    beats: u64,
    /// Of the head.
    cpu: Duration,
}

struct Run {
    nodes: usize,
    groups: usize,
    join: Cost,
    rest: Cost,
    launch: Cost,
    work: Cost,
    lost: usize,
    hit: usize,
    loss: Cost,
    stop: Cost,
}

fn cost(w: &mut World, what: impl FnOnce(&mut World)) -> Cost {
    let (now, messages, datagrams, cpu) = (w.now, w.messages, w.datagrams, w.head_time);
    what(w);
    let beats = w.datagrams - datagrams;
    Cost {
        seconds: (w.now - now).as_secs_f64(),
        messages: w.messages - messages - beats,
        beats,
        cpu: w.head_time - cpu,
    }
}

fn spec() -> GroupSpec {
    GroupSpec {
        name: String::new(),
        bundles: vec![Resources::new().with(GPU, Quantity::ONE); RANKS],
        strategy: Strategy::Pack,
        driver_node: NodeId([0; 32]),
        driver_pid: 0,
        wait_ms: 60_000,
        placement_group: None,
        driver_versions: Vec::new(),
    }
}

fn launch(w: &mut World, rng: &mut Rng, name: &str) {
    let from = rng.below(w.hosts.len() as u64) as usize;
    w.launch(name, from, spec());
}

fn run(nodes: usize) -> Run {
    let mut rng = Rng(7);
    let mut w = World::new(1);
    w.audits = false;
    for node in 0..nodes {
        let resources = Resources::new().with(GPU, Quantity::whole(8)).with(CPU, Quantity::whole(64));
        w.add_host(&format!("n{node:04}"), resources);
    }
    let alive = |w: &World| w.status().map_or(0, |s| s.nodes.iter().filter(|n| n.state == NodeState::Alive).count());
    let running =
        |w: &World| w.status().map_or(0, |s| s.groups.iter().filter(|g| g.state == GroupState::Running).count());
    let join = cost(&mut w, |w| {
        (0..nodes).for_each(|host| w.start(host));
        w.wait(5 * SECOND);
    });
    assert_eq!(alive(&w), nodes, "{nodes} nodes have not all joined");
    let rest = cost(&mut w, |w| w.wait(10 * SECOND));
    let groups = (nodes / 5).max(1);
    let launched = cost(&mut w, |w| {
        for group in 0..groups {
            launch(w, &mut rng, &format!("g{group}"));
            w.wait(Duration::from_millis(20));
        }
        w.wait(5 * SECOND);
    });
    assert_eq!(running(&w), groups, "{nodes} nodes: not all groups run");
    let work = cost(&mut w, |w| w.wait(10 * SECOND));
    let lost = (nodes / 20).max(1);
    let mut hit = 0;
    let loss = cost(&mut w, |w| {
        for turn in 0..lost {
            // The head's own host stays.
            let host = 1 + (turn * 19) % (nodes - 1);
            let before = running(w);
            w.kill_host(host);
            w.wait(4 * SECOND);
            let down = before - running(w).min(before);
            hit += down;
            for again in 0..down {
                launch(w, &mut rng, &format!("again{turn}-{again}"));
            }
            w.start(host);
            w.wait(SECOND);
        }
        w.wait(10 * SECOND);
    });
    assert_eq!(alive(&w), nodes, "{nodes} nodes: not all came back");
    let stop = cost(&mut w, |w| {
        for driver in 0..w.drivers.len() {
            if w.drivers[driver].state == DriverState::Placed {
                w.stop_driver(driver);
            }
        }
        w.wait(10 * SECOND);
    });
    assert_eq!(w.broken, None);
    w.all_free().unwrap_or_else(|left| panic!("{nodes} nodes: {left}"));
    assert_eq!(w.head().map(|head| head.audit()), Some(Ok(())), "{nodes} nodes");
    Run { nodes, groups, join, rest, launch: launched, work, lost, hit, loss, stop }
}

fn per(cost: Cost, count: usize) -> (f64, f64) {
    let count = count as f64;
    (cost.messages as f64 / count, cost.cpu.as_secs_f64() * 1e6 / count)
}

fn per_node_second(cost: Cost, nodes: usize) -> (f64, f64, f64) {
    let count = nodes as f64 * cost.seconds;
    (cost.messages as f64 / count, cost.beats as f64 / count, cost.cpu.as_secs_f64() * 1e6 / count)
}

#[test]
fn what_a_node_costs_does_not_grow_with_the_cluster() {
    let (small, large) = (run(20), run(100));
    for (name, of) in [("rest", (|r: &Run| r.rest) as fn(&Run) -> Cost), ("work", |r| r.work)] {
        let (messages, beats, _) = per_node_second(of(&small), small.nodes);
        let (more_messages, more_beats, _) = per_node_second(of(&large), large.nodes);
        assert!(more_messages <= messages * 1.1 + 0.02, "{name}: {messages} and {more_messages} a node and second");
        assert!(more_beats <= beats * 1.1, "{name}: {beats} and {more_beats} a node and second");
    }
    assert!(per(large.join, 100).0 <= per(small.join, 20).0 * 1.1, "messages of a join");
    assert!(per(large.launch, large.groups).0 <= per(small.launch, small.groups).0 * 1.2, "messages of a launch");
}

#[test]
#[ignore = "minutes: `tests/run scale`"]
fn curve() {
    let note = std::env::var("RAYLESS_SCALE_NOTE").unwrap_or_default();
    let mut page = PAGE.replace("{note}", &note);
    for nodes in [10, 30, 100, 300, 1000] {
        let r = run(nodes);
        let (join, launch, stop) = (per(r.join, nodes), per(r.launch, r.groups), per(r.stop, r.groups));
        let (rest, work) = (per_node_second(r.rest, nodes), per_node_second(r.work, nodes));
        let loss = per(r.loss, r.lost);
        let row = format!(
            "| {nodes} | {:.1}; {:.0} | {:.2}; {:.2}; {:.2} | {} | {:.0}; {:.2} | {:.2}; {:.2}; {:.2} | {} / {} | {:.0}; {:.2} | {:.0}; {:.2} |",
            join.0,
            join.1,
            rest.0,
            rest.1,
            rest.2,
            r.groups,
            launch.0,
            launch.1 / 1e3,
            work.0,
            work.1,
            work.2,
            r.lost,
            r.hit,
            loss.0,
            loss.1 / 1e3,
            stop.0,
            stop.1 / 1e3,
        );
        println!("{row}");
        let _ = writeln!(page, "{row}");
    }
    if let Some(path) = std::env::var_os("RAYLESS_SCALE_PAGE") {
        fs::write(path, page).expect("the page is written");
    }
}

const PAGE: &str = "# Scale

Made by `tests/run scale` ({note}); do not edit. The control plane (the real head, members and failure detectors, in one thread and virtual time) with 10 to 1,000 nodes of 8 GPUs: all join at once, then rest for 10 s; a group of 16 ranks
for every five nodes, 50 launches a second, from random nodes, then work for 10 s; one node in twenty loses power and comes back 4 s later, one every 5 s, and what it took down is launched again; all groups are stopped.

Messages are those on control sessions, both ways, and come out the same in every run. Processor time is the head's state machine and nothing else: no QUIC, no encryption, no system call (a node at rest costs a real daemon about 0.05 % of a core). Per node where not said
otherwise. The curve to look at is down each column: flat is linear growth of the whole.

| nodes | join: messages; head µs | at rest, per node and second: messages; heartbeats and echoes; head µs | groups | launch, per group: messages; head ms | at work, per node and second: messages; heartbeats and echoes; head µs | nodes lost / groups hit | loss, per lost node (that second for all the others included): messages; head ms | stop, per group: messages; head ms |
|---|---|---|---|---|---|---|---|---|
";
