//! Who gets a QUIC session, and what happens to those who do not.

use crate::support::{ANY, counted, counters, gullible, hello_of_the_future, node, raw_client, raw_server, token};
use rayless_net::{
    counters::Refused,
    framing::{FrameReader, write_frame},
    identity::{ClusterIdentity, NodeKey, TlsIdentity},
    interfaces::PortError,
    quic::{Acceptor, CloseCause, CloseCode, ConnectError, Endpoint, EndpointError},
};
use rayless_proto::{
    BUILD,
    hello::{Hello, HelloError, Purpose},
    limits::{MAX_CONTROL_MESSAGE, MAX_HALF_OPEN, MAX_HELLO},
};
use std::{net::SocketAddr, time::Duration};

fn head(identity: &ClusterIdentity) -> (Endpoint, Acceptor, SocketAddr) {
    let (endpoint, acceptor) = Endpoint::server(ANY, identity, counters()).unwrap();
    let address = endpoint.local_address().unwrap();
    (endpoint, acceptor, address)
}

fn caller(identity: &ClusterIdentity) -> Endpoint {
    Endpoint::client(ANY, identity, counters()).unwrap()
}

/// A node of this cluster still gets in.
async fn serves_on(token: &rayless_net::token::Token, acceptor: &mut Acceptor, address: SocketAddr) {
    let good = node(token);
    let endpoint = caller(&good);
    let session = endpoint.connect(address, Purpose::Control).await.unwrap();
    let accepted = acceptor.next().await.unwrap();
    assert_eq!(accepted.link.peer().node, good.node_id());
    drop(session);
}

#[tokio::test]
async fn two_nodes_know_each_other_and_exchange_messages_and_datagrams() {
    let token = token();
    let (a, b) = (node(&token), node(&token));
    let (endpoint, mut acceptor, address) = head(&a);
    let calling = caller(&b);
    let mut near = calling.connect(address, Purpose::Control).await.unwrap();
    let mut far = acceptor.next().await.unwrap();
    assert_eq!((near.link.peer().node, far.link.peer().node), (a.node_id(), b.node_id()));
    assert_eq!((far.link.purpose(), far.link.version(), far.link.build()), (Purpose::Control, 1, BUILD));
    assert_eq!(far.link.peer_address(), calling.local_address().unwrap());
    assert_eq!(endpoint.counters().accepted(), 1);
    for length in [0, 1, 100_000] {
        near.send(&vec![7; length]).await.unwrap();
        assert_eq!(far.receive().await.unwrap(), vec![7; length]);
        far.send(b"thanks").await.unwrap();
        assert_eq!(near.receive().await.unwrap(), b"thanks");
    }
    let before = far.link.signs_of_life();
    near.link.send_datagram(b"beat");
    assert_eq!(&far.link.receive_datagram().await.unwrap()[..], b"beat");
    assert!(far.link.signs_of_life() > before);
}

#[tokio::test]
async fn the_last_words_and_the_reason_arrive() {
    let token = token();
    let (endpoint, mut acceptor, address) = head(&node(&token));
    let mut near = caller(&node(&token)).connect(address, Purpose::Control).await.unwrap();
    let mut far = acceptor.next().await.unwrap();
    far.send(b"you are refused").await.unwrap();
    far.sender.finish().await;
    far.link.close(CloseCode::Refused, "because\nof this");
    assert_eq!(near.receive().await.unwrap(), b"you are refused");
    let cause = near.receive().await.unwrap_err();
    assert_eq!(cause, CloseCause::ByPeer { code: CloseCode::Refused, reason: "because".to_owned() });
    assert_eq!(near.link.closed().await, cause);
    assert_eq!(far.link.closed().await, CloseCause::Local);
    endpoint.close(CloseCode::Done, "").await;
    assert!(acceptor.next().await.is_none());
}

#[tokio::test]
async fn a_message_as_long_as_the_limit_passes_and_a_longer_one_does_not() {
    let token = token();
    let (_endpoint, mut acceptor, address) = head(&node(&token));
    let mut near = caller(&node(&token)).connect(address, Purpose::Control).await.unwrap();
    let mut far = acceptor.next().await.unwrap();
    let (sent, received) =
        tokio::join!(async { near.send(&vec![1; MAX_CONTROL_MESSAGE]).await }, async { far.receive().await });
    sent.unwrap();
    assert_eq!(received.unwrap().len(), MAX_CONTROL_MESSAGE);
    assert!(matches!(near.send(&vec![1; MAX_CONTROL_MESSAGE + 1]).await, Err(CloseCause::Violation(_))));
}

#[tokio::test]
async fn another_token_is_told_to_the_caller_and_counted_by_the_head() {
    let token = token();
    let (endpoint, mut acceptor, address) = head(&node(&token));
    let error = caller(&node(&crate::support::token())).connect(address, Purpose::Control).await.unwrap_err();
    assert!(matches!(error, ConnectError::WrongToken(at) if at == address), "{error}");
    assert!(error.to_string().contains("hint: "), "{error}");
    counted(endpoint.counters(), Refused::WrongToken, 1).await;
    serves_on(&token, &mut acceptor, address).await;
}

#[tokio::test]
async fn a_stranger_that_believes_any_server_is_still_a_stranger() {
    let token = token();
    let (endpoint, mut acceptor, address) = head(&node(&token));
    let other = node(&crate::support::token());
    for (times, shown) in [(1, Some(other.tls())), (2, None)] {
        let connection = raw_client(gullible(shown), address).await;
        // The client's own view is "connected" until the server has looked at what it showed.
        if let Ok(connection) = connection {
            connection.closed().await;
        }
        counted(endpoint.counters(), Refused::WrongToken, times).await;
    }
    serves_on(&token, &mut acceptor, address).await;
}

#[tokio::test]
async fn two_tokens_overlap_while_one_is_rotated() {
    let (old, new) = (token(), token());
    let both = ClusterIdentity::from_tokens(&new, Some(&old), &NodeKey::generate().unwrap()).unwrap();
    let (endpoint, mut acceptor, address) = head(&both);
    serves_on(&old, &mut acceptor, address).await;
    serves_on(&new, &mut acceptor, address).await;
    let third = caller(&node(&token())).connect(address, Purpose::Control).await.unwrap_err();
    assert!(matches!(third, ConnectError::WrongToken(_)));
    counted(endpoint.counters(), Refused::WrongToken, 1).await;
    for token in [old, new] {
        let (_endpoint, _acceptor, address) = head(&node(&token));
        caller(&both).connect(address, Purpose::Control).await.unwrap();
    }
}

#[tokio::test]
async fn a_driver_may_not_join_as_a_node() {
    let token = token();
    let daemon = node(&token);
    let (endpoint, mut acceptor, address) = head(&daemon);
    let driver = TlsIdentity::from_bundle(&daemon.issue_delegate().unwrap()).unwrap();
    let connection = raw_client(driver.client_config(), address).await.unwrap();
    let quinn::ConnectionError::ApplicationClosed(close) = connection.closed().await else { panic!() };
    assert!(String::from_utf8_lossy(&close.reason).contains("only nodes"));
    counted(endpoint.counters(), Refused::NotAllowed, 1).await;
    serves_on(&token, &mut acceptor, address).await;
}

#[tokio::test]
async fn a_version_mismatch_is_told_to_both_with_both_named() {
    let token = token();
    let us = node(&token);
    // Called by a later build: it gets our hello, so that it can say the same.
    let (endpoint, mut acceptor, address) = head(&us);
    let connection = raw_client(node(&token).tls().client_config(), address).await.unwrap();
    let (mut send, receive) = connection.open_bi().await.unwrap();
    write_frame(&mut send, &hello_of_the_future(Purpose::Control), MAX_HELLO).await.unwrap();
    let ours = Hello::decode(&FrameReader::new(receive, MAX_HELLO).next().await.unwrap()).unwrap();
    assert_eq!(ours.build, BUILD);
    connection.close(1u32.into(), b"");
    counted(endpoint.counters(), Refused::Version, 1).await;
    serves_on(&token, &mut acceptor, address).await;
    // Calling a later build.
    let (address, server) = raw_server(us.tls(), hello_of_the_future(Purpose::Control));
    let error = caller(&node(&token)).connect(address, Purpose::Control).await.unwrap_err();
    assert!(matches!(&error, ConnectError::Version(HelloError::Version { .. })));
    let text = error.to_string();
    assert!(text.contains("7.0.0") && text.contains(BUILD) && text.contains("hint: "), "{text}");
    assert_eq!(Hello::decode(&server.await.unwrap()).unwrap().build, BUILD);
}

#[tokio::test]
async fn a_first_frame_that_is_no_hello_is_refused() {
    let token = token();
    let (endpoint, mut acceptor, address) = head(&node(&token));
    let long = (MAX_HELLO as u32 + 1).to_le_bytes();
    let wrong_purpose = {
        let hello = Hello::of_this_build(Purpose::Step).encode();
        [&(hello.len() as u32).to_le_bytes()[..], &hello].concat()
    };
    for (why, bytes) in [
        (Refused::NotRayless, &b"\x0e\0\0\0GET / HTTP/1.1"[..]),
        (Refused::NotRayless, &long[..]),
        (Refused::NotRayless, b"\xff\xff\xff\xff"),
        (Refused::NotAllowed, &wrong_purpose),
    ] {
        let before = endpoint.counters().refused(why);
        let connection = raw_client(node(&token).tls().client_config(), address).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        assert!(matches!(connection.closed().await, quinn::ConnectionError::ApplicationClosed(_)));
        counted(endpoint.counters(), why, before + 1).await;
    }
    serves_on(&token, &mut acceptor, address).await;
}

#[tokio::test]
async fn a_member_that_announces_too_much_loses_its_session() {
    let token = token();
    let (_endpoint, mut acceptor, address) = head(&node(&token));
    let connection = raw_client(node(&token).tls().client_config(), address).await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    write_frame(&mut send, &Hello::of_this_build(Purpose::Control).encode(), MAX_HELLO).await.unwrap();
    let mut session = acceptor.next().await.unwrap();
    // One stream is what a session gets.
    assert!(tokio::time::timeout(Duration::from_millis(50), connection.open_bi()).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(50), connection.open_uni()).await.is_err());
    send.write_all(&(MAX_CONTROL_MESSAGE as u32 + 1).to_le_bytes()).await.unwrap();
    assert!(matches!(session.receive().await, Err(CloseCause::Violation(_))));
    let quinn::ConnectionError::ApplicationClosed(close) = connection.closed().await else { panic!() };
    assert_eq!(close.error_code, 5u32.into());
    serves_on(&token, &mut acceptor, address).await;
}

#[tokio::test]
async fn stray_datagrams_are_counted_and_nothing_else() {
    let token = token();
    let (endpoint, mut acceptor, address) = head(&node(&token));
    let socket = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    let mut long = vec![0xa5; 1472];
    for n in 0..200u8 {
        long[1] = n;
        for stray in [&[][..], &[n], &[n; 40], b"GET / HTTP/1.1\r\n\r\n", &long] {
            socket.send_to(stray, address).await.unwrap();
        }
    }
    serves_on(&token, &mut acceptor, address).await;
    let stray = endpoint.counters().all().into_iter().find(|(name, _)| *name == "stray_datagrams").unwrap().1;
    assert!(stray > 200, "{stray}");
}

#[tokio::test]
async fn idle_handshakes_make_way_for_a_true_node_and_end_in_time() {
    let token = token();
    let (endpoint, mut acceptor, address) = head(&node(&token));
    // Members even, that shake hands and then say nothing: the strangers that get furthest.
    let member = node(&token);
    let mut idle = Vec::new();
    for _ in 0..MAX_HALF_OPEN + 20 {
        idle.push(raw_client(member.tls().client_config(), address).await.unwrap());
    }
    serves_on(&token, &mut acceptor, address).await;
    counted(endpoint.counters(), Refused::TooMany, 21).await;
    counted(endpoint.counters(), Refused::Unfinished, MAX_HALF_OPEN as u64 - 1).await;
    for connection in idle {
        connection.closed().await;
    }
    serves_on(&token, &mut acceptor, address).await;
}

#[tokio::test]
async fn nobody_there_is_unreachable_and_nothing_else() {
    let silent = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    let address = silent.local_addr().unwrap();
    let endpoint = caller(&node(&token()));
    let error = endpoint.connect_within(address, Purpose::Control, Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }));
    assert!(error.to_string().contains(&format!("{}/udp", address.port())), "{error}");
}

#[tokio::test]
async fn a_head_that_comes_up_later_is_found() {
    let token = token();
    // Holds the port, and hears the first packets into the void.
    let silent = tokio::net::UdpSocket::bind(ANY).await.unwrap();
    let address = silent.local_addr().unwrap();
    let calling = caller(&node(&token));
    let calls = tokio::spawn(async move { calling.connect(address, Purpose::Control).await.map(drop) });
    // The packets of a first call (at 0, 0.3 and 0.9 s) and the first of a second one.
    for _ in 0..4 {
        silent.recv(&mut [0; 2048]).await.unwrap();
    }
    drop(silent);
    let (_endpoint, mut acceptor) = Endpoint::server(address, &node(&token), counters()).unwrap();
    acceptor.next().await.unwrap();
    calls.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_port_that_is_taken_is_told_with_its_holder() {
    let token = token();
    let (_endpoint, _acceptor, address) = head(&node(&token));
    let error = Endpoint::server(address, &node(&token), counters()).unwrap_err();
    let EndpointError::Port(PortError::InUse { holder: Some(holder), .. }) = error else { panic!("{error}") };
    assert!(holder.contains(&std::process::id().to_string()), "{holder}");
}
