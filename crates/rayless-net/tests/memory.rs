//! What a node holds while nobody answers it. A binary of its own: the figure is that of the process.

use rayless_net::{
    counters::Counters,
    heartbeat::{NetConfig, NetThread, Sign, Watch},
    identity::{ClusterIdentity, NodeKey},
    token::Token,
};
use std::{
    collections::HashSet,
    fs,
    net::{Ipv4Addr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

struct Deaf;

impl Watch for Deaf {
    fn heard(&mut self, _sign: Sign) {}

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        Some(now + Duration::from_secs(1))
    }
}

/// A head that takes everything in and answers nothing, as at the other end of a wire that is cut.
struct Silent {
    socket: UdpSocket,
    /// The ids that callers gave its connections, a random one each time.
    calls: HashSet<[u8; 8]>,
}

impl Silent {
    /// Waits for a call that has not been heard before.
    fn called_anew(&mut self) {
        let mut packet = [0; 2048];
        loop {
            self.socket.recv(&mut packet).unwrap();
            // One byte of flags, four of the version, one of the id's length.
            if self.calls.insert(std::array::from_fn(|at| packet[6 + at])) {
                return;
            }
        }
    }
}

/// Sockets of this process.
fn sockets() -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))).count()
}

/// Memory of this process' own that is in RAM, in KiB.
fn own_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn dials_that_nobody_answers_hold_little_memory() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    let mut head = Silent { socket, calls: HashSet::new() };
    let identity = ClusterIdentity::from_token(&Token::generate().unwrap(), &NodeKey::generate().unwrap()).unwrap();
    let config = NetConfig { identity, counters: Arc::new(Counters::default()), listen: None, watch: Box::new(Deaf) };
    let (net, _events) = NetThread::start(config).unwrap();
    let mut dial = |times: u32| {
        for _ in 0..times {
            // It takes the place of the one before, whose socket stays until QUIC has given its connection up.
            net.dial(address, address.ip());
            head.called_anew();
        }
    };
    dial(1);
    let (one, before) = (sockets(), own_memory());
    // The allocator keeps large pieces once it has seen some come back, and writes to those that it gives out again.
    for _ in 0..3 {
        dial(10);
        while sockets() > one {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let grown = own_memory() - before;
    assert!(grown < 4 << 10, "{grown} KiB for 10 dials at a time");
}
