//! What a daemon's network holds of its memory. A binary of its own: the figure is that of the process.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends with the first thing that is not as it should be")]

use rayless_net::{
    heartbeat::{NetConfig, NetEvent, NetThread, Sign, Watch},
    identity::{ClusterIdentity, NodeKey},
    token::Token,
};
use rayless_proto::limits::MAX_CONTROL_MESSAGE;
use std::{
    collections::HashSet,
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

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

/// Both ask for the memory of the process: one after the other.
static ALONE: Mutex<()> = Mutex::new(());

fn start(token: &Token, listen: Option<SocketAddr>) -> (NetThread, mpsc::Receiver<NetEvent>) {
    let identity = ClusterIdentity::from_token(token, &NodeKey::generate().unwrap()).unwrap();
    NetThread::start(NetConfig { identity, counters: Arc::default(), listen, watch: Box::new(Deaf) }).unwrap()
}

#[test]
fn dials_that_nobody_answers_hold_little_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    let mut head = Silent { socket, calls: HashSet::new() };
    let (net, _events) = start(&Token::generate().unwrap(), None);
    let mut dial = |times: u32| {
        for _ in 0..times {
            // It takes the place of the one before, whose socket stays until QUIC has given its connection up.
            net.dial(address, address.ip());
            head.called_anew();
        }
    };
    dial(1);
    let (one, before) = (sockets(), own_memory());
    // Whatever an allocator keeps of the first round it writes to in a later one.
    for _ in 0..3 {
        dial(10);
        while sockets() > one {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 4 << 10, "{grown} KiB for 10 dials at a time");
}

#[test]
fn the_longest_messages_leave_nothing_behind() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let token = Token::generate().unwrap();
    let (head, mut heard) = start(&token, Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
    let (node, mut events) = start(&token, None);
    let address = head.local_address().unwrap();
    node.dial(address, address.ip());
    let Some(NetEvent::Opened(session)) = events.blocking_recv() else { panic!("no session") };
    let Some(NetEvent::Opened(_)) = heard.blocking_recv() else { panic!("no session") };
    let mut say = |length: usize| {
        session.send(vec![7; length]).unwrap();
        let Some(NetEvent::Message { message, .. }) = heard.blocking_recv() else { panic!("no message") };
        assert_eq!(message.len(), length);
    };
    say(1);
    let before = own_memory();
    for _ in 0..2 {
        say(MAX_CONTROL_MESSAGE);
    }
    // After the last of them, so that nothing of it is on its way any more.
    say(1);
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 3 << 10, "{grown} KiB after messages of {} KiB", MAX_CONTROL_MESSAGE >> 10);
}
