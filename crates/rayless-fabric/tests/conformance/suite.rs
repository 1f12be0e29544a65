//! What every transport must do, whatever it is made of.

use crate::{
    fixture::{Fixture, TICKET, fresh_name, long},
    message::{bytes, check_flat, flat, send_flat},
};
use rayless_fabric::{
    DType, DTypeSet, EstablishError, Extra, LinkConfig, LostKind, OwnedTensor, Phase, RecvError, RejectedKind,
    SendError, SendQueue, Stop, TensorRef, TensorSpec, Ticket, Wait,
};
use std::{
    cell::Cell,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

const NOW: Wait<'static> = Wait::poll();

fn verified() -> LinkConfig {
    LinkConfig { verify: true, ..LinkConfig::default() }
}

pub(crate) fn messages_of_every_size_arrive_whole_and_in_order<F: Fixture>() {
    let mut sizes: Vec<usize> = vec![0, 1, 2, 3, 7, 8, 63, 64, 65, 4095, 4096, 4097, 14 << 10, 28 << 10];
    for around in [32 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20, 4 << 20] {
        sizes.extend([around - 65, around - 64, around - 1, around, around + 1]);
    }
    sizes.extend([16 << 20, 0, (64 << 20) + 13, 1, 256 << 20]);
    let medium: Vec<usize> = sizes.iter().copied().filter(|len| *len <= 16 << 20).collect();
    for (config, sizes) in [(LinkConfig::default(), sizes), (verified(), medium)] {
        let (mut tx, mut rx) = F::pair_with(&config, &config);
        assert_eq!((tx.level(), rx.level()), (F::LEVEL, F::LEVEL));
        thread::scope(|scope| {
            scope.spawn(|| {
                for (number, &len) in (0..).zip(&sizes) {
                    send_flat(&mut tx, number, len, &long()).unwrap();
                }
                tx.close();
            });
            for (number, &len) in (0..).zip(&sizes) {
                let (announced, tensors) = rx.recv(Some(number), &long()).unwrap();
                check_flat(&announced, &tensors, number, len);
            }
            let end = rx.recv_header(None, &long()).unwrap_err();
            assert_eq!(end, RecvError::Closed { link: rx.name(), messages: sizes.len() as u64 });
        });
        assert_eq!(tx.probe().bytes(), sizes.iter().map(|s| *s as u64).sum::<u64>());
        assert_eq!(rx.probe().bytes(), tx.probe().bytes());
    }
}

pub(crate) fn thousands_of_small_messages_keep_their_order<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..F::SMALL_MESSAGES {
                let len = (number * 37 % 300) as usize;
                send_flat(&mut tx, number, len, &long()).unwrap();
            }
        });
        for number in 0..F::SMALL_MESSAGES {
            let (announced, tensors) = rx.recv(Some(number), &long()).unwrap();
            check_flat(&announced, &tensors, number, (number * 37 % 300) as usize);
        }
    });
}

pub(crate) fn every_dtype_and_every_shape_reads_back<F: Fixture>() {
    let (mut tx, mut rx) = F::pair_with(&verified(), &verified());
    for (number, &dtype) in (0u64..).zip(DType::ALL) {
        let data: [Vec<u8>; 3] = [6, 1, 0].map(|elements| bytes(number, elements * dtype.size() as usize));
        let shapes: [&[u64]; 3] = [&[3, 1, 2], &[], &[4, 0]];
        let names = ["hidden_states", "scalar", "leer"];
        let tensors: Vec<TensorRef<'_>> = (0..3)
            .map(|i| TensorRef {
                spec: TensorSpec { name: names[i], dtype, shape: shapes[i], strides: None },
                data: &data[i],
            })
            .collect();
        tx.send(&tensors, Extra { tag: 0, bytes: dtype.name().as_bytes() }, &long()).unwrap();
        let (announced, received) = rx.recv(None, &long()).unwrap();
        assert_eq!(announced.schema.extra, dtype.name().as_bytes());
        for i in 0..3 {
            let meta = &announced.schema.tensors[i];
            assert_eq!((meta.name.as_str(), meta.dtype, meta.shape.as_slice()), (names[i], dtype, shapes[i]));
            assert_eq!(received[i], data[i]);
        }
    }
}

pub(crate) fn no_tensor_and_a_thousand_tensors_are_messages_too<F: Fixture>() {
    let (mut tx, mut rx) = F::pair_with(&verified(), &verified());
    tx.send(&[], Extra { tag: 1, bytes: b"only this" }, &long()).unwrap();
    let (announced, tensors) = rx.recv(Some(1), &long()).unwrap();
    assert_eq!((announced.schema.extra.as_slice(), tensors.len()), (b"only this".as_slice(), 0));

    let data: Vec<Vec<u8>> = (0..1000).map(|i| bytes(i, (i * 7 % 500) as usize)).collect();
    let shapes: Vec<[u64; 1]> = data.iter().map(|d| [d.len() as u64]).collect();
    let tensors: Vec<TensorRef<'_>> = data.iter().zip(&shapes).map(|(d, shape)| flat("t", shape, d)).collect();
    thread::scope(|scope| {
        scope.spawn(|| tx.send(&tensors, Extra::default(), &long()).unwrap());
        assert!(rx.recv(None, &long()).unwrap().1 == data);
    });
}

pub(crate) fn a_description_crosses_once_and_survives_eviction<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    // More forms than either end keeps, each twice in a row and all of them in two rounds.
    let mut number = 0;
    for _round in 0..2 {
        for len in 0..150 {
            for _twice in 0..2 {
                send_flat(&mut tx, number, len, &long()).unwrap();
                let (announced, tensors) = rx.recv(Some(number), &long()).unwrap();
                check_flat(&announced, &tensors, number, len);
                number += 1;
            }
        }
    }
}

pub(crate) fn many_links_at_once_do_not_mix<F: Fixture>() {
    const LINKS: usize = 24;
    let pairs: Vec<_> = (0..LINKS).map(|_| F::pair()).collect();
    thread::scope(|scope| {
        for (salt, (mut tx, mut rx)) in (0..).zip(pairs) {
            let len = move |i: u64| ((i * 31 + salt * 1009) % 90_000) as usize;
            scope.spawn(move || {
                for i in 0..40 {
                    let data = bytes(salt << 32 | i, len(i));
                    tx.send(&[flat("x", &[data.len() as u64], &data)], Extra { tag: i, bytes: &[] }, &long()).unwrap();
                }
            });
            scope.spawn(move || {
                for i in 0..40 {
                    let (_, tensors) = rx.recv(Some(i), &long()).unwrap();
                    assert!(tensors[0] == bytes(salt << 32 | i, len(i)), "link {salt}, message {i}");
                }
            });
        }
    });
}

pub(crate) fn a_header_may_leave_before_its_payload<F: Fixture>() {
    for config in [LinkConfig::default(), verified()] {
        let (mut tx, mut rx) = F::pair_with(&config, &config);
        for (step, len) in [(0, 28 << 10), (1, 0), (2, 5 << 20), (3, 1)] {
            let data = bytes(step, len);
            let shape = [len as u64];
            let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &shape, strides: None };
            tx.send_header([spec].into_iter(), Extra { tag: step, bytes: &[] }, &long()).unwrap();
            let announced = rx.recv_header(Some(step), &long()).unwrap();
            assert_eq!(announced.schema.payload_bytes(), len as u64);
            // Asked again, it says the same.
            assert_eq!(rx.recv_header(Some(step), &long()).unwrap(), announced);
            if len > 0 {
                assert_eq!((tx.probe().phase(), rx.probe().phase()), (Phase::HeaderSent, Phase::HeaderReceived));
                // Room of the right size, no byte of it there yet: the wait ends, and nothing is lost.
                let mut room = vec![0; len];
                let stopped = rx.recv_payload(&mut [&mut room], &NOW).unwrap_err();
                assert_eq!(stopped, RecvError::Stopped { link: rx.name(), sequence: step, stop: Stop::TimedOut });
                // Another message cannot overtake the payload, and the wrong payload is not taken.
                let early = send_flat(&mut tx, 9, 1, &long()).unwrap_err();
                assert!(matches!(&early, SendError::Rejected(r) if r.kind == RejectedKind::OutOfTurn), "{early}");
                let wrong = tx.send_payload(&[&data[1..]], &long()).unwrap_err();
                assert!(matches!(&wrong, SendError::Rejected(r) if r.kind == RejectedKind::Mismatch), "{wrong}");
            }
            thread::scope(|scope| {
                scope.spawn(|| tx.send_payload(&[&data], &long()).unwrap());
                let mut room = vec![0; len];
                rx.recv_payload(&mut [&mut room], &long()).unwrap();
                assert!(room == data);
            });
        }
    }
}

pub(crate) fn a_full_window_holds_the_sender_and_loses_nothing<F: Fixture>() {
    let (tx, mut rx) = F::pair();
    let mut queue = SendQueue::new(tx);
    let len = 1 << 20;
    let handles: Vec<_> = (0..64u64)
        .map(|number| {
            let data = bytes(number, len);
            let own = || {
                let shape = vec![len as u64];
                vec![OwnedTensor { name: "x".into(), dtype: DType::U8, shape, data: Box::new(data.clone()) }]
            };
            queue.isend(&[flat("x", &[len as u64], &data)], Extra { tag: number, bytes: &[] }, own).unwrap()
        })
        .collect();
    // No window is 64 MiB wide.
    assert!(queue.pending() > 0 && !handles[63].is_done().unwrap());
    assert!(!handles[63].wait(&NOW).unwrap());
    // A mistake is found at the caller although other messages are still on their way.
    let wrong = queue.isend(&[flat("x", &[2], b"1")], Extra::default(), || unreachable!()).unwrap_err();
    assert!(matches!(&wrong, SendError::Rejected(r) if r.kind == RejectedKind::Mismatch), "{wrong}");
    for number in 0..64 {
        let (announced, tensors) = rx.recv(Some(number), &long()).unwrap();
        check_flat(&announced, &tensors, number, len);
    }
    assert!(handles.iter().all(|handle| handle.wait(&long()).unwrap()));
    assert!(queue.close(&long()).unwrap());
    assert!(matches!(rx.recv_header(None, &long()), Err(RecvError::Closed { messages: 64, .. })));
}

pub(crate) fn a_dropped_queue_gives_up_and_both_ends_know<F: Fixture>() {
    let (tx, mut rx) = F::pair();
    let mut queue = SendQueue::new(tx);
    let data = bytes(0, 64 << 20);
    let own = || {
        let shape = vec![data.len() as u64];
        vec![OwnedTensor { name: "x".into(), dtype: DType::U8, shape, data: Box::new(data.clone()) }]
    };
    let handle = queue.isend(&[flat("x", &[data.len() as u64], &data)], Extra::default(), own).unwrap();
    drop(queue);
    assert!(matches!(handle.is_done(), Err(SendError::Lost(lost)) if lost.kind == LostKind::Abandoned));
    assert!(matches!(rx.recv(None, &long()), Err(RecvError::Lost(lost)) if lost.kind == LostKind::PeerGone));
}

pub(crate) fn a_wait_that_ends_early_leaves_the_link_usable<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    let name = rx.name();
    let stopped = |sequence, stop| RecvError::Stopped { link: name, sequence, stop };
    assert_eq!(rx.recv_header(None, &NOW), Err(stopped(0, Stop::TimedOut)));
    let soon = Wait::until(Instant::now() + Duration::from_millis(1));
    assert_eq!(rx.recv_header(None, &soon), Err(stopped(0, Stop::TimedOut)));
    assert_eq!(rx.recv_header(None, &Wait::forever().with_check(&|| true)), Err(stopped(0, Stop::Cancelled)));

    let cancel = rx.canceller();
    let probe = rx.probe();
    thread::scope(|scope| {
        scope.spawn(|| {
            while probe.phase() != Phase::AwaitingHeader {
                thread::yield_now();
            }
            cancel.cancel();
        });
        assert_eq!(rx.recv_header(None, &long()), Err(stopped(0, Stop::Cancelled)));
    });
    // It stays cancelled until it is reset.
    assert_eq!(rx.recv_header(None, &long()), Err(stopped(0, Stop::Cancelled)));
    cancel.reset();
    send_flat(&mut tx, 0, 5000, &long()).unwrap();
    let (announced, tensors) = rx.recv(Some(0), &long()).unwrap();
    check_flat(&announced, &tensors, 0, 5000);
}

pub(crate) fn a_send_cancelled_in_the_middle_loses_the_link_at_both_ends<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    let cancel = tx.canceller();
    let probe = tx.probe();
    let lost = thread::scope(|scope| {
        scope.spawn(|| {
            while probe.phase() != Phase::Sending {
                thread::yield_now();
            }
            cancel.cancel();
        });
        // Nobody reads, so part of it leaves and the rest never does.
        send_flat(&mut tx, 0, 64 << 20, &long()).unwrap_err()
    });
    assert!(matches!(&lost, SendError::Lost(l) if l.kind == LostKind::Abandoned), "{lost}");
    assert_eq!(send_flat(&mut tx, 1, 1, &long()).unwrap_err(), lost, "the cause stays");
    let lost = rx.recv(None, &long()).unwrap_err();
    assert!(matches!(&lost, RecvError::Lost(l) if l.kind == LostKind::PeerGone), "{lost}");
    assert_eq!(rx.recv_header(None, &long()).unwrap_err(), lost, "the cause stays");
    assert_eq!((tx.probe().phase(), rx.probe().phase()), (Phase::Lost, Phase::Lost));
}

pub(crate) fn a_receive_cancelled_in_the_middle_loses_the_link_at_both_ends<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    let (stuck_tx, stuck) = mpsc::channel();
    let (go_tx, go) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            // Asked for the first time when the window is full: part of the message has left.
            let first = Cell::new(true);
            let check = || {
                if first.replace(false) {
                    stuck_tx.send(()).unwrap();
                    go.recv().unwrap();
                }
                false
            };
            send_flat(&mut tx, 0, 64 << 20, &long().with_check(&check))
        });
        stuck.recv().unwrap();
        let announced = rx.recv_header(None, &long()).unwrap();
        let mut room = vec![0; announced.schema.payload_bytes() as usize];
        let lost = rx.recv_payload(&mut [&mut room], &long().with_check(&|| true)).unwrap_err();
        assert!(matches!(&lost, RecvError::Lost(l) if l.kind == LostKind::Abandoned), "{lost}");
        go_tx.send(()).unwrap();
        let lost = sending.join().unwrap().unwrap_err();
        assert!(matches!(&lost, SendError::Lost(l) if l.kind == LostKind::PeerReported), "{lost}");
        assert!(lost.to_string().contains("was cancelled after"), "{lost}");
    });
}

pub(crate) fn a_crossed_step_is_an_error_and_never_a_tensor<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    send_flat(&mut tx, 0, 100, &long()).unwrap();
    rx.recv(Some(0), &long()).unwrap();
    send_flat(&mut tx, 7, 100, &long()).unwrap();
    let lost = rx.recv_header(Some(8), &long()).unwrap_err();
    assert!(matches!(&lost, RecvError::Lost(l) if l.kind == LostKind::Crossed && l.sequence == 1), "{lost}");
    assert!(lost.to_string().contains("rank 1 is at step 8, but rank 0 sent step 7"), "{lost}");
    let mut room = [0; 100];
    assert_eq!(rx.recv_payload(&mut [&mut room], &long()).unwrap_err(), lost);
    assert_eq!(room, [0; 100]);
    // The sender learns the same cause with one of its next messages.
    let told = (8..).find_map(|number| send_flat(&mut tx, number, 100 << 10, &long()).err()).unwrap();
    assert!(told.to_string().contains("rank 0 sent step 7"), "{told}");
}

pub(crate) fn mistakes_cost_nothing_but_the_call<F: Fixture>() {
    let receiver = LinkConfig { dtypes: DTypeSet::of(&[DType::U8]), max_message: 1000, ..LinkConfig::default() };
    let (mut tx, mut rx) = F::pair_with(&LinkConfig::default(), &receiver);
    let mut refuse = |spec: TensorSpec<'_>, data: &[u8], kind| {
        let error = tx.send(&[TensorRef { spec, data }], Extra::default(), &long()).unwrap_err();
        let SendError::Rejected(rejected) = error else { panic!("{error}") };
        assert_eq!(rejected.kind, kind, "{rejected}");
        assert!(rejected.to_string().starts_with("link 0->1."), "{rejected}");
    };
    let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &[2, 3], strides: None };
    refuse(TensorSpec { strides: Some(&[1, 2]), ..spec }, &[0; 6], RejectedKind::NotContiguous);
    refuse(TensorSpec { dtype: DType::BF16, ..spec }, &[0; 12], RejectedKind::DType);
    refuse(TensorSpec { shape: &[1001], ..spec }, &[0; 1001], RejectedKind::TooLarge);
    refuse(TensorSpec { shape: &[u64::MAX, u64::MAX], ..spec }, &[], RejectedKind::TooLarge);
    refuse(spec, &[0; 5], RejectedKind::Mismatch);
    let early = tx.send_payload(&[b"x"], &long()).unwrap_err();
    assert!(matches!(&early, SendError::Rejected(r) if r.kind == RejectedKind::OutOfTurn), "{early}");
    let early = rx.recv_payload(&mut [], &long()).unwrap_err();
    assert!(matches!(&early, RecvError::Rejected(r) if r.kind == RejectedKind::OutOfTurn), "{early}");

    send_flat(&mut tx, 0, 1000, &long()).unwrap();
    rx.recv_header(Some(0), &long()).unwrap();
    let mut small = [0; 999];
    let error = rx.recv_payload(&mut [&mut small], &long()).unwrap_err();
    assert!(matches!(&error, RecvError::Rejected(r) if r.kind == RejectedKind::Mismatch), "{error}");
    let error = rx.recv_payload(&mut [], &long()).unwrap_err();
    assert!(matches!(&error, RecvError::Rejected(r) if r.kind == RejectedKind::Mismatch), "{error}");
    let (announced, tensors) = rx.recv(Some(0), &long()).unwrap();
    check_flat(&announced, &tensors, 0, 1000);
}

pub(crate) fn a_link_is_refused_without_its_ticket<F: Fixture>() {
    let config = LinkConfig::default();
    let (sent, received) = F::try_pair(fresh_name(), Ticket([0; 32]), &config, &config);
    for error in [sent.map(drop).unwrap_err(), received.map(drop).unwrap_err()] {
        assert!(matches!(&error, EstablishError::Refused { reason, .. } if reason.contains("ticket")), "{error}");
    }
    let (sent, received) = F::try_pair(fresh_name(), TICKET, &verified(), &config);
    for error in [sent.map(drop).unwrap_err(), received.map(drop).unwrap_err()] {
        assert!(error.to_string().contains("the sender verifies checksums, the receiver does not"), "{error}");
    }
}

pub(crate) fn a_stranger_is_refused_and_the_expected_peer_still_comes_in<F: Fixture>() {
    let listener = F::listen();
    let said = F::nonsense(&listener).unwrap();
    assert_eq!(said, "these bytes are no link greeting of this version");

    let (name, other) = (fresh_name(), fresh_name());
    let mut acceptor = rayless_fabric::Acceptor::default();
    acceptor.expect(name, TICKET, LinkConfig::default());
    let address = F::address(&listener);
    thread::scope(|scope| {
        let stranger = scope.spawn(|| F::connect(&address, other, TICKET, &LinkConfig::default()));
        let refused = F::accept(&listener, &mut acceptor).unwrap_err();
        assert!(refused.to_string().contains("no such link is expected"), "{refused}");
        assert!(stranger.join().unwrap().is_err());
        // What the stranger's other streams left in the backlog is refused or found dead; the right peer gets through.
        let listener = F::listen();
        let address = F::address(&listener);
        let right = scope.spawn(move || F::connect(&address, name, TICKET, &LinkConfig::default()).unwrap());
        let mut rx = F::accept(&listener, &mut acceptor).unwrap();
        send_flat(&mut right.join().unwrap(), 0, 10, &long()).unwrap();
        rx.recv(Some(0), &long()).unwrap();
    });
    acceptor.expect(other, TICKET, LinkConfig::default());
    acceptor.forget(other);
    assert_eq!(acceptor.pending(), 0);
}

pub(crate) fn a_closed_end_says_so<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    send_flat(&mut tx, 0, 3, &long()).unwrap();
    tx.close();
    tx.close();
    assert_eq!(send_flat(&mut tx, 1, 3, &long()), Err(SendError::Closed { link: tx.name() }));
    // What was sent before the end is still received, then the end.
    rx.recv(Some(0), &long()).unwrap();
    let closed = RecvError::Closed { link: rx.name(), messages: 1 };
    assert_eq!(rx.recv_header(None, &long()), Err(closed.clone()));
    assert_eq!(rx.recv_header(None, &long()), Err(closed));

    // A receiver that leaves is an error at the sender: its messages would go nowhere.
    let (mut tx, rx) = F::pair();
    drop(rx);
    let lost = (0..).find_map(|number| send_flat(&mut tx, number, 100 << 10, &long()).err()).unwrap();
    assert!(lost.to_string().contains("the receiver closed its end"), "{lost}");
}

pub(crate) fn a_link_proves_itself_and_a_wrong_one_is_found_out<F: Fixture>() {
    let (mut tx, mut rx) = F::pair();
    thread::scope(|scope| {
        scope.spawn(|| tx.prove(&long()).unwrap());
        rx.prove(&long()).unwrap();
    });
    // A message of the right size and step, but of other bytes.
    let data = bytes(0, 64);
    tx.send(&[flat("proof", &[64], &data)], Extra { tag: u64::MAX, bytes: &[] }, &long()).unwrap();
    let lost = rx.prove(&long()).unwrap_err();
    assert!(matches!(&lost, RecvError::Lost(l) if l.kind == LostKind::Corrupt), "{lost}");
}
