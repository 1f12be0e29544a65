//! A quick look at one hop, beside its floor in the same sitting: `cargo run --release -p rayless-fabric --example hop`.
//!
//! Ping-pong between two threads over two links (one each way), two tensors a message; half of the round trip is a
//! hop. Floors: raw TCP ping-pong of the same bytes with blocking calls, and a futex-like ping-pong (two links with no
//! payload) plus two copies for shared memory. Prints microseconds (p50, p99) and GB/s.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use rayless_fabric::{
    Acceptor, DType, Extra, LinkConfig, LinkName, RecvLink, SendLink, TensorRef, TensorSpec, Ticket, Wait, greet_tcp,
    greet_unix, shm, tcp,
};
use rayless_proto::ids::GroupId;
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

const TICKET: Ticket = Ticket([1; 32]);

fn name(channel: u16) -> LinkName {
    LinkName { group: GroupId([0; 8]), from: 0, to: 1, channel }
}

fn open_tcp(channel: u16, streams: usize, config: &LinkConfig) -> (SendLink, RecvLink) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let tx = scope.spawn(move || {
            let streams = (0..streams).map(|_| TcpStream::connect(address).unwrap()).collect();
            tcp::connect(streams, name(channel), TICKET, config).unwrap()
        });
        let mut acceptor = Acceptor::default();
        acceptor.expect(name(channel), TICKET, config.clone());
        loop {
            let greeted = greet_tcp(listener.accept().unwrap().0, Duration::from_secs(5)).unwrap();
            if let Some(rx) = acceptor.admit(greeted).unwrap() {
                return (tx.join().unwrap(), rx);
            }
        }
    })
}

fn open_shm(channel: u16, config: &LinkConfig) -> (SendLink, RecvLink) {
    let (one, other) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let tx = scope.spawn(move || shm::connect(one, name(channel), TICKET, config).unwrap());
        let mut acceptor = Acceptor::default();
        acceptor.expect(name(channel), TICKET, config.clone());
        let rx = acceptor.admit(greet_unix(other, Duration::from_secs(5)).unwrap()).unwrap().unwrap();
        (tx.join().unwrap(), rx)
    })
}

fn send(link: &mut SendLink, data: &[u8]) {
    let half = data.len() / 2;
    let shape = [half as u64];
    let spec = TensorSpec { name: "hidden_states", dtype: DType::U8, shape: &shape, strides: None };
    let tensors = [
        TensorRef { spec, data: &data[..half] },
        TensorRef { spec: TensorSpec { name: "residual", ..spec }, data: &data[half..] },
    ];
    link.send(&tensors, Extra::default(), &Wait::forever()).unwrap();
}

fn recv(link: &mut RecvLink, data: &mut [u8]) {
    link.recv_header(None, &Wait::forever()).unwrap();
    let (one, other) = data.split_at_mut(data.len() / 2);
    link.recv_payload(&mut [one, other], &Wait::forever()).unwrap();
}

fn report(what: &str, bytes: usize, mut round_trips: Vec<Duration>) {
    round_trips.sort_unstable();
    let at = |q: f64| round_trips[((round_trips.len() - 1) as f64 * q) as usize].as_secs_f64() / 2.0 * 1e6;
    println!(
        "{what:34} {bytes:>10} B  p50 {:8.1}  p99 {:8.1} us  {:6.2} GB/s",
        at(0.5),
        at(0.99),
        bytes as f64 / at(0.5) / 1e3
    );
}

fn links(what: &str, bytes: usize, rounds: usize, there: (SendLink, RecvLink), back: (SendLink, RecvLink)) {
    let ((mut tx, mut far_rx), (mut far_tx, mut rx)) = (there, back);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut data = vec![1u8; bytes];
            for _ in 0..rounds {
                recv(&mut far_rx, &mut data);
                send(&mut far_tx, &data);
            }
        });
        let mut data = vec![2u8; bytes];
        let times = (0..rounds).map(|_| {
            let start = Instant::now();
            send(&mut tx, &data);
            recv(&mut rx, &mut data);
            start.elapsed()
        });
        let times: Vec<_> = times.collect();
        report(what, bytes, times[rounds / 10..].to_vec());
    });
}

/// One way only: how fast a stream of messages goes.
fn stream(what: &str, bytes: usize, rounds: usize, (mut tx, mut rx): (SendLink, RecvLink)) {
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let data = vec![1u8; bytes];
            (0..rounds).for_each(|_| send(&mut tx, &data));
        });
        let mut data = vec![2u8; bytes];
        recv(&mut rx, &mut data);
        let start = Instant::now();
        (1..rounds).for_each(|_| recv(&mut rx, &mut data));
        let seconds = start.elapsed().as_secs_f64();
        println!("{what:34} {bytes:>10} B  stream {:6.2} GB/s", bytes as f64 * (rounds - 1) as f64 / seconds / 1e9);
    });
}

/// The floor. `one_way`: a connection each way, as links have (no acknowledgement rides on a reply).
fn raw_tcp(bytes: usize, rounds: usize, one_way: bool) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = || {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        (near, far)
    };
    let (mut near_tx, mut far_rx) = connect();
    let (mut near_rx, mut far_tx) =
        if one_way { connect() } else { (near_tx.try_clone().unwrap(), far_rx.try_clone().unwrap()) };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut data = vec![1u8; bytes];
            for _ in 0..rounds {
                far_rx.read_exact(&mut data).unwrap();
                far_tx.write_all(&data).unwrap();
            }
        });
        let mut data = vec![2u8; bytes];
        let times: Vec<_> = (0..rounds)
            .map(|_| {
                let start = Instant::now();
                near_tx.write_all(&data).unwrap();
                near_rx.read_exact(&mut data).unwrap();
                start.elapsed()
            })
            .collect();
        let what = if one_way { "raw TCP, a connection each way" } else { "raw TCP, one connection" };
        report(what, bytes, times[rounds / 10..].to_vec());
    });
}

fn raw_stream(bytes: usize, rounds: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut far = listener.accept().unwrap().0;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let data = vec![1u8; bytes];
            (0..rounds).for_each(|_| near.write_all(&data).unwrap());
        });
        let mut data = vec![2u8; bytes];
        far.read_exact(&mut data).unwrap();
        let start = Instant::now();
        (1..rounds).for_each(|_| far.read_exact(&mut data).unwrap());
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{:34} {bytes:>10} B  stream {:6.2} GB/s",
            "raw TCP",
            bytes as f64 * (rounds - 1) as f64 / seconds / 1e9
        );
    });
}

fn memcpy(bytes: usize, rounds: usize) {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let times: Vec<_> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
            // A copy is one way: doubled here because `report` halves.
            start.elapsed() * 2
        })
        .collect();
    report("memcpy", bytes, times);
}

fn main() {
    // `tcp` or `shm`: one measurement alone, for a profiler.
    if std::env::args().nth(1).as_deref() == Some("tcp") {
        let sleeping = LinkConfig { spin: Duration::ZERO, ..LinkConfig::default() };
        links("tcp", 28 << 10, 100_000, open_tcp(0, 1, &sleeping), open_tcp(1, 1, &sleeping));
        raw_tcp(28 << 10, 100_000, false);
        return raw_tcp(28 << 10, 100_000, true);
    }
    if std::env::args().nth(1).as_deref() == Some("shm") {
        for _ in 0..5 {
            memcpy(16 << 20, 30);
            links("shm", 16 << 20, 30, open_shm(0, &LinkConfig::default()), open_shm(1, &LinkConfig::default()));
            stream("shm", 16 << 20, 60, open_shm(0, &LinkConfig::default()));
        }
        return;
    }
    let rounds = |bytes: usize| if bytes > 1 << 20 { 60 } else { 10_000 };
    let sleeping = LinkConfig { spin: Duration::ZERO, ..LinkConfig::default() };
    for bytes in [14 << 10, 28 << 10, 16 << 20] {
        let n = rounds(bytes);
        raw_tcp(bytes, n, false);
        raw_tcp(bytes, n, true);
        links("tcp, 1 stream, no spin", bytes, n, open_tcp(0, 1, &sleeping), open_tcp(1, 1, &sleeping));
        links(
            "tcp, 1 stream, default",
            bytes,
            n,
            open_tcp(0, 1, &LinkConfig::default()),
            open_tcp(1, 1, &LinkConfig::default()),
        );
        links(
            "tcp, 4 streams, default",
            bytes,
            n,
            open_tcp(0, 4, &LinkConfig::default()),
            open_tcp(1, 4, &LinkConfig::default()),
        );
        memcpy(bytes, n);
        links("shm, no payload, no spin", 0, n, open_shm(0, &sleeping), open_shm(1, &sleeping));
        links(
            "shm, no payload, default",
            0,
            n,
            open_shm(0, &LinkConfig::default()),
            open_shm(1, &LinkConfig::default()),
        );
        links("shm, no spin", bytes, n, open_shm(0, &sleeping), open_shm(1, &sleeping));
        links("shm, default", bytes, n, open_shm(0, &LinkConfig::default()), open_shm(1, &LinkConfig::default()));
    }
    raw_stream(16 << 20, 60);
    stream("tcp, 1 stream", 16 << 20, 60, open_tcp(0, 1, &LinkConfig::default()));
    stream("tcp, 4 streams", 16 << 20, 60, open_tcp(0, 4, &LinkConfig::default()));
    stream("shm", 16 << 20, 60, open_shm(0, &LinkConfig::default()));
}
