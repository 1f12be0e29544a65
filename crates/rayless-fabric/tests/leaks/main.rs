//! Links that come and go, and peers that are killed, leave nothing: no descriptor, no mapping, no memory, no thread, no
//! queue pair or memory region. Alone in its process, for it counts what the process has.
//!
//! `make test` takes few of each, `make test-long` 10,000 links and 1,000 killed peers a transport
//! (RAYLESS_TEST_LINKS, RAYLESS_TEST_KILLS), and shows the counts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test's helpers are tests too"
)]

mod counts;
#[path = "../conformance/fixture.rs"]
#[allow(dead_code, reason = "the conformance suite uses all of it")]
mod fixture;
mod peer;
#[path = "../conformance/transports.rs"]
#[allow(dead_code, reason = "as above")]
mod transports;

use counts::Counts;
use fixture::{Fixture, TICKET, fresh_name, long};
use peer::Peer;
use rayless_fabric::{
    Acceptor, DType, Extra, LinkConfig, RecvLink, SendError, SendLink, TensorRef, TensorSpec, Ticket,
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use transports::{Rxe, Shm, Siw, Tcp, Tls};

/// One test at a time: each counts what the whole process has.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// At the end, and in a long run on its way too: one that is cut short shows how far it came, and that nothing had grown.
fn is_milestone(done: usize, all: usize) -> bool {
    done == all || all >= 200 && done.is_multiple_of(all / 20)
}

fn send(tx: &mut SendLink, len: usize) -> Result<(), SendError> {
    let (data, shape) = (vec![7; len], [len as u64]);
    let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &shape, strides: None };
    tx.send(&[TensorRef { spec, data: &data }], Extra::default(), &long())
}

/// How long a killed peer's messages are: all over the range from the first rounds on. malloc keeps room for the longest
/// there was, so lengths that rise from round to round would look like a leak, and hide one.
fn length(round: usize) -> usize {
    round * 250_007 % 600_000
}

/// A link's life: a message, then one of four ends.
fn live((mut tx, mut rx): (SendLink, RecvLink), end: usize) {
    send(&mut tx, 1000).unwrap();
    rx.recv(Some(0), &long()).unwrap();
    match end % 4 {
        0 => tx.close(),
        1 => drop(rx),
        2 => drop(tx),
        _ => {
            // Lost at both ends.
            send(&mut tx, 10).unwrap();
            assert!(rx.recv_header(Some(9), &long()).is_err());
        }
    }
}

fn links_that_come_and_go_leave_nothing<F: Fixture>(default: usize) {
    let _alone = alone();
    let links = number("RAYLESS_TEST_LINKS", default);
    // What comes with the first links and stays: the watcher of shared memory's peers, the libraries of verbs, malloc's arenas.
    (0..links / 10 + 4).for_each(|i| live(F::pair(), i));
    let before = Counts::now();
    for i in 0..links {
        live(F::pair(), i);
        if i % 10 == 0 {
            // A handshake that fails leaves nothing either.
            let config = LinkConfig::default();
            let (sent, received) = F::try_pair(fresh_name(), Ticket([0; 32]), &config, &config);
            assert!(sent.is_err() && received.is_err());
        }
        if is_milestone(i + 1, links) {
            before.are_back(&format!("{} of {links} links over {}", i + 1, F::LEVEL));
        }
    }
}

fn peers_that_are_killed_leave_nothing<F: Fixture>(default: usize) {
    let _alone = alone();
    let kills = number("RAYLESS_TEST_KILLS", default);
    // What comes with the first peers and stays, and malloc's room for the longest messages.
    (0..kills / 10 + 2).for_each(outlive_a_peer::<F>);
    let before = Counts::now();
    for i in 0..kills {
        outlive_a_peer::<F>(i);
        if is_milestone(i + 1, kills) {
            before.are_back(&format!("{} of {kills} peers killed over {}", i + 1, F::LEVEL));
        }
    }
}

/// Works with a peer until that is killed, at a point that nobody chose.
fn outlive_a_peer<F: Fixture>(round: usize) {
    let name = fresh_name();
    if round.is_multiple_of(2) {
        let listener = F::listen();
        let peer = Peer::sender::<F>(&F::address(&listener), name);
        let mut acceptor = Acceptor::default();
        acceptor.expect(name, TICKET, LinkConfig::default());
        let mut rx = F::accept(&listener, &mut acceptor).unwrap();
        while rx.recv(None, &long()).is_ok() {}
        peer.was_killed();
    } else {
        let (peer, address) = Peer::receiver::<F>(name);
        // It may be dead before it has answered on every stream.
        if let Ok(mut tx) = F::connect(&address, name, TICKET, &LinkConfig::default()) {
            while send(&mut tx, length(round)).is_ok() {}
        }
        peer.was_killed();
    }
}

macro_rules! leaks {
    ($module:ident, $fixture:ty, $links:literal, $kills:literal $(, $attribute:meta)?) => {
        mod $module {
            #[test]
            $(#[$attribute])?
            fn links_that_come_and_go_leave_nothing() {
                crate::links_that_come_and_go_leave_nothing::<$fixture>($links);
            }
            #[test]
            $(#[$attribute])?
            fn peers_that_are_killed_leave_nothing() {
                crate::peers_that_are_killed_leave_nothing::<$fixture>($kills);
            }
        }
    };
}

leaks!(shm, crate::Shm, 400, 40);
leaks!(tcp, crate::Tcp<2>, 400, 40);
leaks!(tls, crate::Tls, 40, 20);
leaks!(rxe, crate::Rxe, 30, 6, ignore = "needs soft-RoCE devices: tests/rdma-vm/conformance");
leaks!(siw, crate::Siw, 30, 6, ignore = "needs soft-iWARP devices: tests/rdma-vm/conformance");
