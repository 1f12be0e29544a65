//! Alive but stuck: told with what each rank is in; ended only where the call was a step.

use crate::{
    Story,
    world::{World, all, texts, wait_gone},
};
use rayless_proto::v1::{control::WorkerState, keeper::FromKeeper, step::LinkMoved};
use rayless_worker::driver::{Asked, CallError, Callbacks, GroupFailure, StuckReport, WorkerGroup};
use std::{
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

pub(crate) const STORIES: &[Story] = &[
    ("a rank that makes no progress is told with what every rank is in", told),
    ("a step over its deadline ends the group and names who was stuck", step_over),
    ("a call that is no step may take long, and so may what waits behind it", long_call),
    ("a long call that notes its progress is not stuck", notes),
];

const SOON: Duration = Duration::from_secs(6);
const STUCK_AFTER: Duration = Duration::from_millis(400);

fn start(world: &World) -> (WorkerGroup, Receiver<StuckReport>) {
    let (told, reports) = channel();
    let callbacks =
        Callbacks { on_stuck: Some(Box::new(move |report| drop(told.send(report)))), ..Callbacks::default() };
    let placed = world.placed().with_stuck_after(STUCK_AFTER);
    let group = placed.launch(world.launch(), Duration::from_secs(20), callbacks, &mut |_| true).unwrap();
    (group, reports)
}

fn told() {
    let mut world = World::new(2, 2);
    let (group, reports) = start(&world);
    all(&group, "echo").unwrap();
    assert_eq!(texts(&all(&group, "link 2 0 0 3").unwrap()), ["received by tcp", "", "sent by tcp", ""]);
    let pids = group.pids();
    let call = group.call(&b"on 2 sleep 60000"[..], &Asked::All, None).unwrap();
    let report = reports.recv_timeout(SOON).unwrap();
    assert_eq!(report.call, call.id());
    assert!(report.silent.is_empty());
    let told: Vec<_> = report.ranks.iter().map(|(rank, node)| (rank.rank, node.as_str(), rank.state)).collect();
    let (ready, busy) = (WorkerState::Ready, WorkerState::Busy);
    assert_eq!(told, [(0, "a", ready), (1, "a", ready), (2, "b", busy), (3, "b", ready)]);
    let stuck = &report.ranks[2].0;
    assert_eq!((stuck.pid, stuck.call, stuck.doing.as_str()), (pids[2].1, call.id(), "sleep"));
    assert_eq!(stuck.link, Some(LinkMoved { peer: 0, channel: 0, receiving: false, sequence: 3 }));
    assert!(stuck.stack.contains("kernel: thread "), "{}", stuck.stack);
    assert!(report.ranks[0].0.stack.is_empty());
    let lines = report.lines();
    assert!(
        lines[3].starts_with(&format!("rank 2 on node b (pid {}): 0 s in sleep (call 3)", pids[2].1)),
        "{lines:#?}"
    );
    assert!(lines[1].ends_with("waits for call 4, last received message 3 from rank 2"), "{lines:#?}");
    // Its log has the whole of it, and the daemon of its node a line for `status`.
    let log = std::fs::read_to_string(world.log_of(1, 2)).unwrap();
    assert!(log.contains("rayless: no progress: 0 s in sleep (call 3)") && log.contains("kernel: thread "), "{log}");
    let said = world.runtime.block_on(async {
        loop {
            if let Some(FromKeeper::Stuck { line }) = world.handles[1].next().await {
                return line;
            }
        }
    });
    assert_eq!(said, "rank 2: 0 s in sleep (call 3), last sent message 3 to rank 0");
    // Nothing moves: told again, later and later.
    let again = reports.recv_timeout(SOON).unwrap();
    assert!(again.waited >= 2 * report.waited && again.again >= again.waited, "{again:?}");
    assert!(again.ranks[2].0.stack.is_empty(), "stacks come once");
    group.stop();
    world.assert_nothing_left();
}

fn step_over() {
    for rank in [1, 2] {
        let mut world = World::new(2, 2);
        let (group, _reports) = start(&world);
        let pids = group.pids();
        let payload = format!("on {rank} sleep 60000");
        let step = group.step(payload.as_bytes(), &Asked::Ranks(vec![3]), None, Duration::from_secs(1)).unwrap();
        step.wait().unwrap();
        // Rank 3 was asked and has answered; who is stuck shows in the next step.
        let step = group.step(&b"echo"[..], &Asked::All, None, Duration::from_secs(1)).unwrap();
        let CallError::Failed(failure) = step.wait().unwrap_err() else { panic!() };
        let GroupFailure::Stuck { ranks, cause, stacks } = &failure else { panic!("{failure:?}") };
        assert_eq!(*ranks, [rank]);
        let (node, pid) = (if rank < 2 { "a" } else { "b" }, pids[rank as usize].1);
        let wanted =
            format!("call 2 took longer than the step deadline of 1 s: rank {rank} on node {node} (pid {pid}): ");
        assert!(cause.starts_with(&wanted) && cause.ends_with(" s in sleep (call 1)"), "{cause}");
        assert!(stacks.contains(&format!("rank {rank}| kernel: thread ")), "{stacks}");
        for (_, pid) in pids {
            assert!(wait_gone(pid, SOON));
        }
        let causes = world.assert_nothing_left();
        assert!(causes.iter().all(|told| told == cause), "{causes:?}");
    }
}

fn long_call() {
    let world = World::new(1, 1);
    let (group, reports) = start(&world);
    let long = group.call(&b"on 1 sleep 2500"[..], &Asked::All, None).unwrap();
    let step = group.step(&b"echo"[..], &Asked::All, None, Duration::from_millis(600)).unwrap();
    let report = reports.recv_timeout(SOON).unwrap();
    assert_eq!(report.call, long.id());
    long.wait().unwrap();
    step.wait().unwrap();
    assert!(group.failure().is_none());
    group.stop();
}

fn notes() {
    let world = World::new(1, 1);
    let (group, reports) = start(&world);
    group.call(&b"on 1 note 20"[..], &Asked::All, None).unwrap().wait().unwrap();
    assert!(reports.try_recv().is_err(), "it moved all the time");
    group.stop();
}
