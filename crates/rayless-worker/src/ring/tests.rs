//! The ring within one process: threads stand for the workers.

use super::*;
use rustix::event::{EventfdFlags, eventfd};
use std::{os::fd::AsFd, sync::Arc, thread};

fn ring(readers: usize, ring: usize, reply: usize) -> (OwnedFd, Arc<Ring>) {
    let (fd, ring) = Ring::create_sized(readers, ring, reply).unwrap();
    (fd, Arc::new(ring))
}

fn asked(readers: &[usize]) -> AskedSet {
    let mut set = AskedSet::default();
    readers.iter().for_each(|reader| set.insert(*reader));
    set
}

#[test]
fn every_reader_gets_every_call_in_order_through_a_ring_that_wraps() {
    let (_fd, shared) = ring(4, 4096, 4096);
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let workers: Vec<_> = (0..4)
        .map(|reader| {
            let (ring, event) = (Arc::clone(&shared), Arc::clone(&event));
            thread::spawn(move || {
                let mut calls = CallReader::new(Arc::clone(&ring), reader);
                let mut seen = 0;
                loop {
                    while let Some(call) = calls.try_next(event.as_fd()).unwrap() {
                        seen += 1;
                        assert_eq!(call.call, seen);
                        assert_eq!(call.payload, vec![seen as u8; seen as usize % 1500]);
                        assert_eq!(call.asked, seen as usize % 4 == reader);
                    }
                    if ring.is_closed() {
                        return seen;
                    }
                    calls.sleep(None);
                }
            })
        })
        .collect();
    let mut writer = CallWriter::new(Arc::clone(&shared));
    for call in 1..=3000u64 {
        let payload = vec![call as u8; call as usize % 1500];
        let record = Record { call, last: true, asked: asked(&[call as usize % 4]), payload: &payload };
        while !writer.push(&record).unwrap() {
            writer.wake();
            rustix::io::read(&event, &mut [0; 8]).unwrap();
        }
        writer.wake();
    }
    // Closed only once all was read: a closed ring may be left with calls in it.
    while (0..4).any(|r| shared.map.word64(Ring::slot(r, SLOT_READ)).load(Ordering::SeqCst) != writer.position()) {
        thread::yield_now();
    }
    shared.close();
    for worker in workers {
        assert_eq!(worker.join().unwrap(), 3000);
    }
}

#[test]
fn the_slowest_reader_holds_the_writer_up_until_it_is_gone() {
    let (_fd, shared) = ring(3, 4096, 4096);
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let mut readers: Vec<_> = (0..3).map(|reader| CallReader::new(Arc::clone(&shared), reader)).collect();
    let mut writer = CallWriter::new(Arc::clone(&shared));
    let payload = [7; 1000];
    let mut call = 0;
    loop {
        call += 1;
        if !writer.push(&Record { call, last: true, asked: asked(&[]), payload: &payload }).unwrap() {
            break;
        }
        for reader in [0, 2] {
            assert_eq!(readers[reader].try_next(event.as_fd()).unwrap().unwrap().call, call);
        }
    }
    assert_eq!(writer.slowest(), 1);
    shared.mark_gone(1);
    assert!(writer.push(&Record { call, last: true, asked: asked(&[]), payload: &payload }).unwrap());
}

#[test]
fn the_last_reply_wakes_the_collector_and_an_error_does_at_once() {
    let (fd, shared) = ring(2, 4096, 4096);
    let opened = Arc::new(Ring::open(fd.as_fd()).unwrap());
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let woken = || rustix::io::read(&event, &mut [0; 8]).is_ok();
    let mut writer = CallWriter::new(Arc::clone(&shared));
    let mut repliers: Vec<_> = (0..2).map(|reader| ReplyWriter::new(Arc::clone(&opened), reader)).collect();
    let mut collect: Vec<_> = (0..2).map(|reader| ReplyReader::new(Arc::clone(&shared), reader)).collect();

    writer.push(&Record { call: 1, last: true, asked: asked(&[0, 1]), payload: b"one" }).unwrap();
    shared.collector_sleeps();
    assert!(repliers[0].write(1, true, false, b"a", event.as_fd()));
    assert!(!woken());
    assert!(repliers[1].write(1, true, false, b"b", event.as_fd()));
    assert!(woken());
    for (reader, expected) in [b"a", b"b"].into_iter().enumerate() {
        let reply = collect[reader].try_next().unwrap().unwrap();
        assert!(reply.call == 1 && reply.last && !reply.error && reply.payload == expected);
    }

    writer.push(&Record { call: 2, last: true, asked: asked(&[0, 1]), payload: b"two" }).unwrap();
    shared.collector_sleeps();
    assert!(repliers[1].write(2, true, true, b"raised", event.as_fd()));
    assert!(woken());
    assert!(collect[1].try_next().unwrap().unwrap().error);

    // An awake collector costs nobody a system call.
    shared.collector_wakes();
    assert!(repliers[0].write(2, true, false, b"", event.as_fd()));
    assert!(!woken());
}

#[test]
fn a_reply_larger_than_its_ring_arrives_whole() {
    let (_fd, shared) = ring(1, 4096, 4096);
    let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
    let payload: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    let worker = {
        let (ring, event, payload) = (Arc::clone(&shared), Arc::clone(&event), payload.clone());
        thread::spawn(move || ReplyWriter::new(ring, 0).write(9, true, false, &payload, event.as_fd()))
    };
    let mut collect = ReplyReader::new(Arc::clone(&shared), 0);
    let mut got = Vec::new();
    loop {
        let Some(part) = collect.try_next().unwrap() else {
            thread::yield_now();
            continue;
        };
        got.extend_from_slice(&part.payload);
        if part.last {
            break;
        }
    }
    assert_eq!(got, payload);
    assert!(worker.join().unwrap());
}

#[test]
fn whatever_a_broken_worker_writes_is_an_error_and_not_a_crash() {
    let mut state = 1u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..2000 {
        let (_fd, shared) = ring(1, 4096, 4096);
        let mut writer = CallWriter::new(Arc::clone(&shared));
        let mut collect = ReplyReader::new(Arc::clone(&shared), 0);
        let mut garbage = [0u8; 4096];
        garbage.fill_with(|| random() as u8 & if random() % 2 == 0 { 0xff } else { 0x3 });
        shared.map.write(shared.at_replies, &garbage);
        let scale = [64, 4096, u64::MAX][random() as usize % 3];
        shared.map.word64(Ring::slot(0, SLOT_HEAD)).store(random() % scale, Ordering::SeqCst);
        shared.map.word64(Ring::slot(0, SLOT_READ)).store(random() % scale, Ordering::SeqCst);
        while let Ok(Some(_)) = collect.try_next() {}
        for call in 1..10 {
            let _ = writer.push(&Record { call, last: true, asked: asked(&[0]), payload: &[0; 900] });
        }
    }
}

#[test]
fn only_a_sealed_ring_is_mapped() {
    let fd =
        rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
    assert!(Ring::open(fd.as_fd()).is_err());
}
