//! TCP sessions: found by name, handed over, and closed to strangers.

use crate::support::{ANY, counted, counters, gullible, hello_of_the_future, node, token};
use rayless_net::{
    counters::{Counters, Refused},
    framing::{read_frame, write_frame},
    identity::TlsIdentity,
    interfaces::PortError,
    tcp::{self, Front, TcpError},
    unix,
};
use rayless_proto::{
    BUILD,
    hello::{Hello, HelloError, Purpose},
    ids::GroupId,
    limits::{MAX_HALF_OPEN, MAX_HELLO},
};
use rustls::pki_types::ServerName;
use std::{net::SocketAddr, os::fd::AsFd, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

const GROUP: GroupId = GroupId([1; 8]);

fn front() -> (Front, SocketAddr, Arc<Counters>) {
    let listener = tcp::listen(ANY).unwrap();
    let address = listener.local_addr().unwrap();
    let counters = counters();
    (Front::open(listener, counters.clone()), address, counters)
}

async fn raw_tls(config: Arc<rustls::ClientConfig>, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("raw.rayless").unwrap();
    Ok(TlsConnector::from(config).connect(name, stream).await?.into())
}

#[tokio::test]
async fn a_session_is_handed_over_before_a_byte_of_it_is_read() {
    let token = token();
    let (driver_node, keeper_node) = (node(&token), node(&token));
    let (mut front, address, _) = front();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("keeper.sock");
    let listener = unix::bind(&socket).unwrap();
    // The keeper has a leaf and no token.
    let keeper = TlsIdentity::from_bundle(&keeper_node.issue_delegate().unwrap()).unwrap();
    let keeper = tokio::spawn(async move {
        let (daemon, _) = listener.accept().await.unwrap();
        let (byte, fd) = unix::recv_fd(&daemon).await.unwrap();
        assert_eq!(byte, b'S');
        let stream = TcpStream::from_std(std::net::TcpStream::from(fd)).unwrap();
        let mut session = tcp::accept(stream, &keeper).await.unwrap();
        let call = read_frame(&mut session.stream, 1 << 20).await.unwrap();
        write_frame(&mut session.stream, &call, 1 << 20).await.unwrap();
        session
    });
    let daemon = tokio::spawn(async move {
        let arrival = front.next().await.unwrap();
        assert_eq!(tcp::group_of(&arrival.name), Some(GROUP));
        let keeper = unix::connect(&socket).await.unwrap();
        unix::send_fd(&keeper, b'S', arrival.stream.as_fd()).await.unwrap();
    });
    let driver = TlsIdentity::from_bundle(&driver_node.issue_delegate().unwrap()).unwrap();
    let wanted = Some(keeper_node.node_id());
    let mut session = tcp::connect(address, &tcp::keeper_name(GROUP), &driver, Purpose::Step, wanted).await.unwrap();
    daemon.await.unwrap();
    let call = vec![7; 300_000];
    write_frame(&mut session.stream, &call, 1 << 20).await.unwrap();
    assert_eq!(read_frame(&mut session.stream, 1 << 20).await.unwrap(), call);
    let far = keeper.await.unwrap();
    assert_eq!((far.peer.node, far.peer.is_delegate, far.purpose), (driver_node.node_id(), true, Purpose::Step));
    assert_eq!((session.peer.node, session.version, session.build.as_str()), (keeper_node.node_id(), 1, BUILD));
}

#[tokio::test]
async fn a_caller_that_ends_in_the_middle_of_its_wish_costs_nothing_more() {
    let (mut front, address, counters) = front();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(&[22, 3, 1]).await.unwrap();
    half.shutdown().await.unwrap();
    // Long before the time-out for those who are silent.
    counted(&counters, Refused::Unfinished, 1).await;
    assert_eq!(half.read(&mut [0]).await.unwrap_or(0), 0, "closed");
    // Others are served meanwhile.
    let token = token();
    let (ours, theirs) = (node(&token), node(&token));
    let server = async { tcp::accept(front.next().await.unwrap().stream, ours.tls()).await };
    let client = tcp::connect(address, "x.keeper.rayless", theirs.tls(), Purpose::Step, None);
    let (server, client) = tokio::join!(server, client);
    assert!(server.is_ok() && client.is_ok());
}

#[tokio::test]
async fn another_token_is_told_on_both_sides() {
    let (ours, theirs) = (node(&token()), node(&token()));
    let (mut front, address, _) = front();
    let server = async {
        let stream = front.next().await.unwrap().stream;
        tcp::accept(stream, ours.tls()).await.unwrap_err()
    };
    let client = tcp::connect(address, "x.keeper.rayless", theirs.tls(), Purpose::Step, None);
    let (server, client) = tokio::join!(server, client);
    assert!(matches!(server, TcpError::WrongToken(_)), "{server}");
    assert!(matches!(client.unwrap_err(), TcpError::WrongToken(_)));
    // A client that believes any server: the server's word counts.
    for shown in [Some(theirs.tls()), None] {
        let server = async {
            let stream = front.next().await.unwrap().stream;
            tcp::accept(stream, ours.tls()).await.unwrap_err()
        };
        let (server, _) = tokio::join!(server, async {
            if let Ok(mut stream) = raw_tls(gullible(shown), address).await {
                let _ = stream.read(&mut [0]).await;
            }
        });
        assert_eq!(tcp::refusal_of(&server), Refused::WrongToken, "{server}");
    }
}

#[tokio::test]
async fn another_node_than_the_one_wanted_is_not_taken() {
    let token = token();
    let (ours, theirs, wanted) = (node(&token), node(&token), node(&token).node_id());
    let (mut front, address, _) = front();
    let server = async { tcp::accept(front.next().await.unwrap().stream, ours.tls()).await };
    let client = tcp::connect(address, "x.keeper.rayless", theirs.tls(), Purpose::Step, Some(wanted));
    let (_, client) = tokio::join!(server, client);
    assert!(matches!(client.unwrap_err(), TcpError::WrongNode { found, .. } if found == ours.node_id()));
}

#[tokio::test]
async fn a_version_mismatch_is_told_to_both_with_both_named() {
    let token = token();
    let (ours, theirs) = (node(&token), node(&token));
    let names_both = |error: TcpError| {
        assert!(matches!(&error, TcpError::Version(HelloError::Version { .. })), "{error}");
        let text = error.to_string();
        assert!(text.contains("7.0.0") && text.contains(BUILD) && text.contains("hint: "), "{text}");
    };
    // A later build calls.
    let (mut front, address, _) = front();
    let server = async { tcp::accept(front.next().await.unwrap().stream, ours.tls()).await.unwrap_err() };
    let client = async {
        let mut stream = raw_tls(theirs.tls().client_config(), address).await.unwrap();
        write_frame(&mut stream, &hello_of_the_future(Purpose::Step), MAX_HELLO).await.unwrap();
        Hello::decode(&read_frame(&mut stream, MAX_HELLO).await.unwrap()).unwrap()
    };
    let (error, hello) = tokio::join!(server, client);
    names_both(error);
    assert_eq!(hello.build, BUILD);
    // A later build is called.
    let listener = tcp::listen(ANY).unwrap();
    let address = listener.local_addr().unwrap();
    let server = async {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = TlsAcceptor::from(ours.tls().server_config());
        let mut stream = TlsStream::from(acceptor.accept(stream).await.unwrap());
        write_frame(&mut stream, &hello_of_the_future(Purpose::Step), MAX_HELLO).await.unwrap();
        Hello::decode(&read_frame(&mut stream, MAX_HELLO).await.unwrap()).unwrap()
    };
    let client = tcp::connect(address, "x.keeper.rayless", theirs.tls(), Purpose::Step, None);
    let (hello, client) = tokio::join!(server, client);
    names_both(client.unwrap_err());
    assert_eq!(hello.build, BUILD);
}

#[tokio::test]
async fn strangers_are_dropped_and_counted() {
    let (mut front, address, counters) = front();
    for (n, words) in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"\0", b"\x16\x03\x01\xff\xff"].iter().enumerate() {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(words).await.unwrap();
        counted(&counters, Refused::NotRayless, n as u64 + 1).await;
        // Not a byte of ours goes out to them.
        assert!(matches!(stranger.read(&mut [0; 16]).await, Ok(0) | Err(_)));
    }
    drop(TcpStream::connect(address).await.unwrap());
    counted(&counters, Refused::Unfinished, 1).await;
    let token = token();
    let (ours, theirs) = (node(&token), node(&token));
    let (server, client) = tokio::join!(
        async { tcp::accept(front.next().await.unwrap().stream, ours.tls()).await },
        tcp::connect(address, "x.keeper.rayless", theirs.tls(), Purpose::Link, None)
    );
    assert_eq!(server.unwrap().purpose, Purpose::Link);
    client.unwrap();
}

#[tokio::test]
async fn a_hello_that_trickles_in_is_waited_for_and_idlers_make_way() {
    let (mut front, address, counters) = front();
    let mut config = gullible(None);
    Arc::make_mut(&mut config).enable_sni = true;
    let name = ServerName::try_from("0101010101010101.keeper.rayless").unwrap();
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    let mut idle = Vec::new();
    for _ in 0..MAX_HALF_OPEN + 10 {
        let mut idler = TcpStream::connect(address).await.unwrap();
        idler.write_all(&hello[..7]).await.unwrap();
        idle.push(idler);
    }
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.set_nodelay(true).unwrap();
    for byte in &hello {
        slow.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let arrival = front.next().await.unwrap();
    assert_eq!(tcp::group_of(&arrival.name), Some(GROUP));
    let mut taken = vec![0; hello.len()];
    let mut stream = arrival.stream;
    stream.read_exact(&mut taken).await.unwrap();
    assert_eq!(taken, hello, "the bytes were looked at and not taken");
    counted(&counters, Refused::TooMany, 11).await;
    // The rest of the idlers are dropped in time.
    counted(&counters, Refused::Unfinished, MAX_HALF_OPEN as u64 - 1).await;
    for mut idler in idle {
        assert!(matches!(idler.read(&mut [0]).await, Ok(0) | Err(_)));
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_told() {
    let (_front, address, _) = front();
    let error = tcp::listen(address).unwrap_err();
    assert!(matches!(error, PortError::InUse { .. }));
    let text = error.to_string();
    assert!(text.contains(&format!("{}/tcp", address.port())) && text.contains("hint: "), "{text}");
}
