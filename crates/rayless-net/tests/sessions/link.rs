//! The handshake of links: blocking, exact to the byte, and for members only.

use crate::support::{hello_of_the_future, node, token};
use rayless_net::{
    identity::{ClusterIdentity, TlsIdentity},
    link::{Channel, ChannelError, Patience},
    tcp::{self, TcpError},
};
use rayless_proto::{
    hello::{Hello, HelloError, Purpose},
    ids::GroupId,
};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

const GROUP: GroupId = GroupId([3; 8]);

fn patient() -> Patience<'static> {
    Patience::new(Instant::now() + Duration::from_secs(20), &|| false)
}

fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Both ends of a channel, the second of a delegate.
fn pair(caller: &ClusterIdentity, called: &ClusterIdentity) -> (Channel, Channel) {
    let (listener, address) = listen();
    let worker = TlsIdentity::from_bundle(&called.issue_delegate().unwrap()).unwrap();
    thread::scope(|scope| {
        let answered = scope.spawn(move || Channel::answer(listener.accept().unwrap().0, &worker, &patient()).unwrap());
        let call = Channel::call(address, &tcp::link_name(GROUP, 1), caller.tls(), &patient()).unwrap();
        (call, answered.join().unwrap())
    })
}

#[test]
fn names_of_workers_read_back_and_nothing_else_does() {
    let name = tcp::link_name(GROUP, 12);
    assert_eq!(name, "12.0303030303030303.link.rayless");
    assert_eq!(tcp::worker_of(&name), Some((GROUP, 12)));
    assert_eq!(tcp::group_of(&name), Some(GROUP));
    for other in
        ["+1.0303030303030303.link.rayless", "01.0303030303030303.link.rayless", ".link.rayless", "1.x.link.rayless"]
    {
        assert_eq!((tcp::worker_of(other), tcp::group_of(other)), (None, None), "{other}");
    }
    assert_eq!(tcp::worker_of(&tcp::keeper_name(GROUP)), None);
}

#[test]
fn frames_arrive_whole_and_what_follows_in_clear_is_not_touched() {
    let token = token();
    let (a, b) = (node(&token), node(&token));
    let (mut caller, mut called) = pair(&a, &b);
    assert_eq!((called.peer().node, called.peer().is_delegate), (a.node_id(), false));
    assert_eq!((caller.peer().node, caller.peer().is_delegate), (b.node_id(), true));
    for length in [0, 1, 16 << 10, 100_000] {
        let frame: Vec<u8> = (0..length).map(|at| at as u8).collect();
        thread::scope(|scope| {
            scope.spawn(|| caller.send(&frame, &patient()).unwrap());
            assert_eq!(called.receive(1 << 20, &patient()).unwrap(), frame);
        });
    }
    // All at once: the last frame, and behind it bytes of another kind.
    caller.send(b"last", &patient()).unwrap();
    let mut clear = caller.into_clear().unwrap();
    clear.write_all(b"in clear").unwrap();
    assert_eq!(called.receive(10, &patient()).unwrap(), b"last");
    let mut rest = [0; 8];
    called.into_clear().unwrap().read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"in clear");
}

#[test]
fn a_frame_over_the_limit_and_bytes_that_belong_to_no_frame_are_refused() {
    let token = token();
    let (mut caller, mut called) = pair(&node(&token), &node(&token));
    caller.send(&[0; 100], &patient()).unwrap();
    let told = called.receive(99, &patient()).unwrap_err().to_string();
    assert!(told.contains("over the limit of 99"), "{told}");
    assert!(called.into_clear().is_err());
}

#[test]
fn another_cluster_is_refused_at_both_ends() {
    let (listener, address) = listen();
    let (member, stranger) = (node(&token()), node(&token()));
    thread::scope(|scope| {
        let answered =
            scope.spawn(|| Channel::answer(listener.accept().unwrap().0, member.tls(), &patient()).unwrap_err());
        let called = Channel::call(address, "1.x.link.rayless", stranger.tls(), &patient()).unwrap_err();
        assert!(matches!(called, ChannelError::Refused(TcpError::WrongToken(_))), "{called:?}");
        let answered = answered.join().unwrap();
        assert!(matches!(answered, ChannelError::Refused(_)), "{answered:?}");
    });
}

#[test]
fn another_version_and_another_purpose_are_told() {
    let token = token();
    let (a, b) = (node(&token), node(&token));
    for (hello, of_version) in
        [(hello_of_the_future(Purpose::Link), true), (Hello::of_this_build(Purpose::Step).encode(), false)]
    {
        let (listener, address) = listen();
        thread::scope(|scope| {
            let answered =
                scope.spawn(|| Channel::answer(listener.accept().unwrap().0, a.tls(), &patient()).unwrap_err());
            let name = "1.x.link.rayless".try_into().unwrap();
            let mut tls = rustls::ClientConnection::new(b.tls().client_config(), name).unwrap();
            let mut socket = TcpStream::connect(address).unwrap();
            let mut stream = rustls::Stream::new(&mut tls, &mut socket);
            stream.write_all(&[&(hello.len() as u32).to_le_bytes(), &hello[..]].concat()).unwrap();
            let told = answered.join().unwrap();
            if of_version {
                assert!(
                    matches!(told, ChannelError::Refused(TcpError::Version(HelloError::Version { .. }))),
                    "{told:?}"
                );
            } else {
                assert!(matches!(told, ChannelError::Broken(_)), "{told:?}");
            }
        });
    }
}

#[test]
fn a_caller_that_says_nothing_or_nonsense_is_given_up() {
    let member = node(&token());
    let (listener, address) = listen();
    let silent = TcpStream::connect(address).unwrap();
    let over = Patience::new(Instant::now() + Duration::from_millis(20), &|| false);
    let told = Channel::answer(listener.accept().unwrap().0, member.tls(), &over).unwrap_err();
    assert!(matches!(told, ChannelError::Stopped), "{told:?}");
    drop(silent);

    // A record that would be longer than any is not waited for.
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[22, 3, 1, 0xff, 0xff], &[0; 64]] {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(nonsense).unwrap();
        let told = Channel::answer(listener.accept().unwrap().0, member.tls(), &patient()).unwrap_err();
        assert!(matches!(told, ChannelError::Refused(_) | ChannelError::Broken(_)), "{told:?}");
    }

    // Whoever waits is heard when he gives up.
    let _full = TcpStream::connect(address).unwrap();
    let asked = std::cell::Cell::new(0);
    let gives_up = || {
        asked.set(asked.get() + 1);
        asked.get() > 3
    };
    let patience = Patience::new(Instant::now() + Duration::from_secs(3600), &gives_up);
    let told = Channel::answer(listener.accept().unwrap().0, member.tls(), &patience).unwrap_err();
    assert!(matches!(told, ChannelError::Stopped), "{told:?}");
}
