//! Links that come and go leave nothing: no descriptor, no mapping. Alone in its process, for it counts both.
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests too")]

use rayless_fabric::{
    Acceptor, Extra, LinkConfig, LinkName, RecvLink, SendLink, Ticket, Wait, greet_tcp, greet_unix, shm, tcp,
};
use rayless_proto::ids::GroupId;
use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    time::Duration,
};

const TICKET: Ticket = Ticket([3; 32]);
const NAME: LinkName = LinkName { group: GroupId([1; 8]), from: 0, to: 1, channel: 0 };
const SOON: Duration = Duration::from_secs(60);

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn mappings() -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains("rayless-link")).count()
}

fn acceptor() -> Acceptor {
    let mut acceptor = Acceptor::default();
    acceptor.expect(NAME, TICKET, LinkConfig::default());
    acceptor
}

fn open_tcp(listener: &TcpListener) -> (SendLink, RecvLink) {
    let streams: Vec<_> = (0..2).map(|_| TcpStream::connect(listener.local_addr().unwrap()).unwrap()).collect();
    std::thread::scope(|scope| {
        let tx = scope.spawn(|| tcp::connect(streams, NAME, TICKET, &LinkConfig::default()).unwrap());
        let mut acceptor = acceptor();
        loop {
            if let Some(rx) = acceptor.admit(greet_tcp(listener.accept().unwrap().0, SOON).unwrap()).unwrap() {
                return (tx.join().unwrap(), rx);
            }
        }
    })
}

fn open_shm() -> (SendLink, RecvLink) {
    let (one, other) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let tx = scope.spawn(|| shm::connect(one, NAME, TICKET, &LinkConfig::default()).unwrap());
        let rx = acceptor().admit(greet_unix(other, SOON).unwrap()).unwrap().unwrap();
        (tx.join().unwrap(), rx)
    })
}

/// A link's life: a message, then one of four ends.
fn live((mut tx, mut rx): (SendLink, RecvLink), end: usize) {
    tx.send(&[], Extra { tag: 7, bytes: b"hello" }, &Wait::at_most(SOON)).unwrap();
    rx.recv(Some(7), &Wait::at_most(SOON)).unwrap();
    match end % 4 {
        0 => tx.close(),
        1 => drop(rx),
        2 => drop(tx),
        _ => {
            // Lost at both ends.
            tx.send(&[], Extra::default(), &Wait::at_most(SOON)).unwrap();
            assert!(rx.recv_header(Some(9), &Wait::at_most(SOON)).is_err());
        }
    }
}

#[test]
fn links_that_come_and_go_leave_nothing() {
    // `make test-long` asks for 10,000.
    let links: usize = std::env::var("RAYLESS_TEST_LINKS").map_or(400, |text| text.parse().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // The watcher over peers of shared memory comes with the first link and stays.
    live(open_shm(), 0);
    let before = (descriptors(), mappings());
    for i in 0..links {
        live(open_shm(), i);
        live(open_tcp(&listener), i);
        // A handshake that fails leaves nothing either.
        let (one, other) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let tx = scope.spawn(|| shm::connect(one, NAME, Ticket([0; 32]), &LinkConfig::default()));
            assert!(acceptor().admit(greet_unix(other, SOON).unwrap()).is_err());
            assert!(tx.join().unwrap().is_err());
        });
    }
    assert_eq!((descriptors(), mappings()), before);
}
