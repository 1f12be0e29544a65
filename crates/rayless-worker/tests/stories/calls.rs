//! Calls and replies.

use crate::{
    Story,
    world::{World, all, ask, texts},
};
use rayless_worker::driver::{Asked, CallError};
use std::{
    sync::mpsc::channel,
    time::{Duration, Instant},
};

pub(crate) const STORIES: &[Story] = &[
    ("every rank runs every call in order, asked or not", in_order),
    ("a worker's environment: the node wins, the token is not in it", environment),
    ("thousands of calls one after another, and no wake-up is lost", one_after_another),
    ("payloads and replies of 10 MiB go through", large),
    ("a full ring holds the driver up, not its thread", full_ring),
    ("the 65th call under way is refused and names the slowest rank", too_many),
    ("after a timeout the late reply is dropped and the group goes on", timeout),
    ("the lowest rank that raised is told", raised),
    ("a rank that was not asked can fail the call", raised_unasked),
    ("many threads call at once", many_threads),
    ("a call that nobody waits for is done all the same", on_done),
    ("a call of nobody's reply is done at once", nobody_asked),
];

fn in_order() {
    let mut world = World::new(2, 2);
    let group = world.start();
    let calls: Vec<_> = (0..60).map(|i| ask(&group, "echo x", &[i % 4])).collect();
    let expected: Vec<String> = (1..=61u64).map(|id| id.to_string()).collect();
    for replies in texts(&all(&group, "done").unwrap()) {
        assert_eq!(replies, expected.join(" "));
    }
    for (i, call) in calls.iter().enumerate() {
        let replies = call.wait().unwrap();
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].rank, i as u32 % 4);
    }
    // Pipelined through many turns of the 64 that may be under way.
    for _ in 0..20 {
        let calls: Vec<_> = (0..50).map(|_| ask(&group, "echo y", &[0, 3])).collect();
        assert!(calls.iter().all(|call| texts(&call.wait().unwrap()) == ["y", "y"]));
    }
    assert_eq!(group.pids().len(), 4);
    group.stop();
    group.stop();
    assert_eq!(all(&group, "echo").unwrap_err(), CallError::Stopped);
    world.assert_nothing_left();
}

fn environment() {
    let world = World::new(1, 1);
    let group = world.start();
    assert_eq!(texts(&all(&group, "env TEST_NODE").unwrap()), ["a", "b"]);
    assert_eq!(texts(&all(&group, "env RAYLESS_TOKEN").unwrap()), ["(none)", "(none)"]);
    assert_eq!(texts(&all(&group, "env RAYLESS_RANK").unwrap()), ["0", "1"]);
    assert_eq!(texts(&all(&group, "env RAYLESS_LOCAL_RANK").unwrap()), ["0", "0"]);
    assert_eq!(texts(&all(&group, "env RAYLESS_WORLD_SIZE").unwrap()), ["2", "2"]);
    assert_eq!(texts(&all(&group, "env RAYLESS_GPU_UUIDS").unwrap()), ["GPU-0", "GPU-1"]);
    assert_eq!(texts(&all(&group, "boot").unwrap()), ["boot bytes", "boot bytes"]);
    let here = world.dir.path().to_string_lossy().into_owned();
    assert_eq!(texts(&all(&group, "cwd").unwrap()), [here.clone(), here]);
}

fn one_after_another() {
    for (local, remote) in [(2, 0), (0, 2), (1, 1)] {
        let world = World::new(local, remote);
        let group = world.start();
        for i in 0..1500 {
            if i % 100 == 0 {
                // Now and then everybody has gone to sleep.
                std::thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(ask(&group, "echo x", &[i % 2]).wait().unwrap().len(), 1);
            assert_eq!(all(&group, "echo").unwrap().len(), 2);
        }
    }
}

fn large() {
    let world = World::new(2, 2);
    let group = world.start();
    let mut payload = b"echo ".to_vec();
    payload.extend((0..10u32 << 20).map(|i| (i * 7) as u8));
    let replies = group.call(payload.clone(), &Asked::All, None).unwrap().wait().unwrap();
    assert!(replies.len() == 4 && replies.iter().all(|reply| reply.payload[..] == payload[5..]));
    let length = texts(&group.call(payload, &Asked::All, None).unwrap().wait().unwrap());
    assert_eq!(length.len(), 4);
    let replies = all(&group, "big 10485760").unwrap();
    assert!(replies.iter().all(|r| r.payload.len() == 10 << 20 && r.payload.iter().all(|b| *b == r.rank as u8)));
    let over = group.call(vec![0; (1 << 30) + 1], &Asked::All, None).unwrap_err();
    assert_eq!(over, CallError::TooLarge((1 << 30) + 1));
}

fn full_ring() {
    let world = World::new(2, 2);
    let group = world.start();
    let sleeper = ask(&group, "sleep 300", &[0, 1, 2, 3]);
    let payload: Vec<u8> = [b"length ".to_vec(), vec![b'x'; 1 << 20]].concat();
    let before = Instant::now();
    let calls: Vec<_> = (0..30).map(|_| group.call(payload.clone(), &Asked::All, None).unwrap()).collect();
    // 30 MiB do not fit into a ring of 8, nor into a socket: what has no room waits outside of the caller.
    assert!(before.elapsed() < Duration::from_millis(300) || sleeper.is_done());
    for call in calls {
        assert_eq!(texts(&call.wait().unwrap()), vec![payload.len().to_string(); 4]);
    }
    assert!(sleeper.is_done());
}

fn too_many() {
    let world = World::new(2, 2);
    let group = world.start();
    let slow = || ask(&group, "on 2 sleep 10", &[1, 2]);
    let mut calls: Vec<_> = (0..63).map(|_| slow()).collect();
    // Calls run in order: with this one answered, rank 1 has answered all of those.
    ask(&group, "echo", &[1]).wait().unwrap();
    calls.push(slow());
    let error = group.call(&b"echo"[..], &Asked::All, None).unwrap_err();
    let CallError::TooManyInFlight { in_flight: 64, rank: 2, node, .. } = &error else { panic!("{error:?}") };
    assert_eq!(node, "b");
    assert!(error.to_string().contains("the slowest is rank 2 on node b"));
    calls.iter().for_each(|call| assert!(call.wait().is_ok()));
    assert!(all(&group, "echo").is_ok());
}

fn timeout() {
    let world = World::new(1, 1);
    let group = world.start();
    let slow = group.call(&b"on 1 sleep 400"[..], &Asked::All, Some(Duration::from_millis(50))).unwrap();
    assert_eq!(slow.wait_for(Duration::from_millis(1)), None);
    let error = slow.wait().unwrap_err();
    let CallError::TimedOut { missing, .. } = &error else { panic!("{error:?}") };
    assert_eq!(missing, &[1]);
    assert!(error.to_string().contains("no reply from rank 1"));
    assert_eq!(texts(&all(&group, "echo again").unwrap()), ["again", "again"]);
    // Nobody waits for this one: the pump has the clock.
    let (told, done) = channel();
    let slow = group.call(&b"sleep 300"[..], &Asked::All, Some(Duration::from_millis(20))).unwrap();
    slow.on_done(Box::new(move || told.send(()).unwrap()));
    done.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(matches!(slow.wait(), Err(CallError::TimedOut { .. })));
    assert_eq!(texts(&all(&group, "echo more").unwrap()), ["more", "more"]);
}

fn raised() {
    let world = World::new(2, 2);
    let group = world.start();
    let CallError::Raised { rank: 0, payload, .. } = all(&group, "raise").unwrap_err() else { panic!() };
    assert_eq!(payload, b"raised on 0");
    // Rank 3 raises while rank 0 is busy: it is told soon, not when rank 0 is done.
    let busy = group.call(&b"on 0 sleep 500"[..], &Asked::Ranks(vec![0]), None).unwrap();
    let error = all(&group, "on 3 raise").unwrap_err();
    assert!(matches!(error, CallError::Raised { rank: 3, .. }));
    busy.wait().unwrap();
    assert_eq!(all(&group, "echo").unwrap().len(), 4);
}

fn raised_unasked() {
    let world = World::new(2, 2);
    let group = world.start();
    for rank in [0, 3] {
        // Rank 1 waits (as a stage does for its tensor), and nobody asked the one that raises.
        let text = format!("on {rank} raise");
        let blocker = ask(&group, "on 1 sleep 300", &[1]);
        let error = ask(&group, &text, &[1]).wait().unwrap_err();
        assert!(matches!(error, CallError::Raised { rank: told, .. } if told == rank), "{error:?}");
        blocker.wait().unwrap();
    }
    assert_eq!(all(&group, "echo").unwrap().len(), 4);
}

fn many_threads() {
    let world = World::new(2, 2);
    let group = world.start();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let group = &group;
            scope.spawn(move || {
                for i in 0..100 {
                    let word = format!("{thread}-{i}");
                    let replies = ask(group, &format!("echo {word}"), &[i % 4, 3]).wait().unwrap();
                    assert!(texts(&replies).iter().all(|text| *text == word));
                }
            });
        }
    });
}

fn on_done() {
    let world = World::new(1, 1);
    let group = world.start();
    let (told, done) = channel();
    let call = ask(&group, "sleep 20", &[0, 1]);
    call.on_done(Box::new(move || told.send(1).unwrap()));
    assert_eq!(done.recv_timeout(Duration::from_secs(5)), Ok(1));
    assert!(call.is_done());
    assert_eq!(texts(&call.wait().unwrap()), ["0", "1"]);
    // And again, once it is done already.
    let (told, done) = channel();
    call.on_done(Box::new(move || told.send(2).unwrap()));
    assert_eq!(done.recv_timeout(Duration::from_secs(5)), Ok(2));
}

fn nobody_asked() {
    let world = World::new(1, 1);
    let group = world.start();
    let call = ask(&group, "sleep 50", &[]);
    assert!(call.is_done());
    assert_eq!(call.wait().unwrap(), []);
    assert_eq!(texts(&all(&group, "done").unwrap()), ["1 2", "1 2"]);
    let error = group.call(&b"echo"[..], &Asked::Ranks(vec![2]), None).unwrap_err();
    assert_eq!(error, CallError::NoSuchRank { rank: 2, world_size: 2 });
}
