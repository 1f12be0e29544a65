//! The network thread: control sessions, heartbeats, and what is heard of whom.

use crate::support::{ANY, Wire, counters, node, token};
use rayless_net::{
    heartbeat::{ControlSession, DialError, NetConfig, NetEvent, NetThread, Sign, Watch},
    identity::{ClusterIdentity, NodeKey},
    quic::{CloseCause, CloseCode, ConnectError},
    token::Token,
};
use rayless_proto::ids::Incarnation;
use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Passes on what it hears, judges nothing.
struct Listen(mpsc::UnboundedSender<Sign>);

impl Watch for Listen {
    fn heard(&mut self, sign: Sign) {
        let _ = self.0.send(sign);
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        Some(now + Duration::from_millis(100))
    }
}

struct Daemon {
    net: NetThread,
    events: mpsc::Receiver<NetEvent>,
    signs: mpsc::UnboundedReceiver<Sign>,
}

impl Daemon {
    fn start(identity: &ClusterIdentity, listen: Option<SocketAddr>) -> Self {
        let (tell, signs) = mpsc::unbounded_channel();
        let watch = Box::new(Listen(tell));
        let config = NetConfig { identity: identity.clone(), counters: counters(), listen, watch };
        let (net, events) = NetThread::start(config).unwrap();
        Self { net, events, signs }
    }

    async fn opened(&mut self) -> ControlSession {
        match self.events.recv().await.unwrap() {
            NetEvent::Opened(session) => session,
            other => panic!("{other:?}"),
        }
    }

    async fn message(&mut self) -> Vec<u8> {
        match self.events.recv().await.unwrap() {
            NetEvent::Message { message, .. } => message,
            other => panic!("{other:?}"),
        }
    }

    async fn closed(&mut self) -> (rayless_net::heartbeat::SessionId, CloseCause) {
        match self.events.recv().await.unwrap() {
            NetEvent::Closed { session, cause } => (session, cause),
            other => panic!("{other:?}"),
        }
    }
}

struct Cluster {
    token: Token,
    head: Daemon,
    address: SocketAddr,
}

const LOCAL: IpAddr = ANY.ip();

fn cluster() -> Cluster {
    let token = token();
    let head = Daemon::start(&node(&token), Some(ANY));
    let address = head.net.local_address().unwrap();
    Cluster { token, head, address }
}

#[tokio::test]
async fn a_node_dials_talks_beats_and_leaves() {
    let mut c = cluster();
    let identity = node(&c.token);
    let mut n = Daemon::start(&identity, None);
    n.net.dial(c.address, LOCAL);
    let near = n.opened().await;
    let far = c.head.opened().await;
    assert_eq!((far.peer(), far.peer_address().ip()), (identity.node_id(), LOCAL));
    near.send(b"join".to_vec()).unwrap();
    assert_eq!(c.head.message().await, b"join");
    far.send(b"welcome".to_vec()).unwrap();
    assert_eq!(n.message().await, b"welcome");

    n.net.start_heartbeats(c.address, LOCAL, Incarnation(7));
    let first = c.head.signs.recv().await.unwrap();
    assert_eq!((first.peer, first.incarnation), (identity.node_id(), Incarnation(7)));
    let echo = n.signs.recv().await.unwrap();
    assert_eq!((echo.peer, echo.incarnation), (near.peer(), Incarnation(0)));
    assert!(echo.rtt.is_some() && echo.at <= Instant::now());
    // The next heartbeat brings the round trip to the head.
    while c.head.signs.recv().await.unwrap().rtt.is_none() {}
    assert_eq!(c.head.net.pulses().len(), 1);
    assert_eq!(c.head.net.pulses()[0].incarnation, Incarnation(7));

    n.net.shutdown("stopped").await;
    let (session, cause) = c.head.closed().await;
    assert_eq!(session, far.id());
    assert_eq!(cause, CloseCause::ByPeer { code: CloseCode::Done, reason: "stopped".to_owned() });
    while !c.head.net.pulses().is_empty() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(far.send(b"anyone?".to_vec()).is_err() || c.head.events.try_recv().is_err());
}

#[tokio::test]
async fn all_that_was_said_before_the_end_arrives_and_then_the_reason() {
    let mut c = cluster();
    let mut n = Daemon::start(&node(&c.token), None);
    n.net.dial(c.address, LOCAL);
    let near = n.opened().await;
    let far = c.head.opened().await;
    for n in 0..100u8 {
        far.send(vec![n; 10_000]).unwrap();
    }
    far.close(CloseCode::Refused, "fenced");
    for n_th in 0..100u8 {
        assert_eq!(n.message().await, vec![n_th; 10_000]);
    }
    let told = CloseCause::ByPeer { code: CloseCode::Refused, reason: "fenced".to_owned() };
    assert_eq!(n.closed().await, (near.id(), told));
    assert_eq!(c.head.closed().await, (far.id(), CloseCause::Local));
}

#[tokio::test]
async fn last_words_arrive_even_if_the_thread_ends_at_once() {
    let mut c = cluster();
    let mut n = Daemon::start(&node(&c.token), None);
    n.net.dial(c.address, LOCAL);
    let near = n.opened().await;
    c.head.opened().await;
    // More than leaves with one datagram.
    let words = vec![7; 3 << 20];
    near.send(words.clone()).unwrap();
    near.close(CloseCode::Done, "");
    n.net.shutdown("stopped").await;
    assert!(c.head.message().await == words);
}

#[tokio::test]
async fn a_newer_session_of_a_node_takes_over_after_the_older_has_ended() {
    let mut c = cluster();
    let identity = node(&c.token);
    let mut first = Daemon::start(&identity, None);
    first.net.dial(c.address, LOCAL);
    first.opened().await;
    let old = c.head.opened().await;
    let mut second = Daemon::start(&identity, None);
    second.net.dial(c.address, LOCAL);
    second.opened().await;
    assert_eq!(c.head.closed().await.0, old.id());
    let new = c.head.opened().await;
    assert!(new.id() > old.id());
    let (_, cause) = first.closed().await;
    assert!(matches!(cause, CloseCause::ByPeer { code: CloseCode::Replaced, .. }), "{cause}");
    new.send(b"hello".to_vec()).unwrap();
    assert_eq!(second.message().await, b"hello");
}

#[tokio::test]
async fn a_wrong_token_is_told_to_the_node_and_to_the_head_which_serves_on() {
    let mut c = cluster();
    let mut stranger = Daemon::start(&node(&token()), None);
    stranger.net.dial(c.address, LOCAL);
    let Some(NetEvent::DialFailed { head, error: DialError::Connect(ConnectError::WrongToken(_)) }) =
        stranger.events.recv().await
    else {
        panic!("not told")
    };
    assert_eq!(head, c.address);
    let Some(NetEvent::Refused(refusal)) = c.head.events.recv().await else { panic!("not told") };
    assert_eq!(refusal.why.name(), "wrong_token");
    let mut n = Daemon::start(&node(&c.token), None);
    n.net.dial(c.address, LOCAL);
    n.opened().await;
    c.head.opened().await;
}

#[tokio::test]
async fn tokens_change_under_open_sessions() {
    let [old, new] = [token(), token()];
    let [head_key, node_key] = std::array::from_fn(|_| NodeKey::generate().unwrap());
    let holds =
        |key: &NodeKey, token: &Token, other: Option<&Token>| ClusterIdentity::from_tokens(token, other, key).unwrap();
    let mut head = Daemon::start(&holds(&head_key, &old, None), Some(ANY));
    let address = head.net.local_address().unwrap();
    let mut n = Daemon::start(&holds(&node_key, &old, None), None);
    n.net.dial(address, LOCAL);
    let near = n.opened().await;
    let far = head.opened().await;
    n.net.start_heartbeats(address, LOCAL, Incarnation(1));
    head.signs.recv().await.unwrap();

    // Both are accepted, whichever the caller has.
    head.net.set_identity(holds(&head_key, &new, Some(&old)));
    for known in [&old, &new] {
        let mut other = Daemon::start(&node(known), None);
        other.net.dial(address, LOCAL);
        other.opened().await;
        let seen = head.opened().await;
        other.net.shutdown("enough").await;
        assert_eq!(head.closed().await.0, seen.id());
    }
    n.net.set_identity(holds(&node_key, &new, Some(&old)));

    // Then the new one alone; what was open stays, and the node can call again.
    head.net.set_identity(holds(&head_key, &new, None));
    n.net.set_identity(holds(&node_key, &new, None));
    let mut stranger = Daemon::start(&node(&old), None);
    stranger.net.dial(address, LOCAL);
    let Some(NetEvent::DialFailed { error: DialError::Connect(ConnectError::WrongToken(_)), .. }) =
        stranger.events.recv().await
    else {
        panic!("not told")
    };
    let Some(NetEvent::Refused(refusal)) = head.events.recv().await else { panic!("not told") };
    assert_eq!(refusal.why.name(), "wrong_token");
    near.send(b"still here".to_vec()).unwrap();
    assert_eq!(head.message().await, b"still here");
    while head.signs.try_recv().is_ok() {}
    assert_eq!(head.signs.recv().await.unwrap().peer, far.peer());
    n.net.dial(address, LOCAL);
    let again = n.opened().await;
    assert_eq!(head.closed().await.0, far.id());
    assert_eq!(head.opened().await.peer(), far.peer());
    again.send(b"with the new one".to_vec()).unwrap();
    assert_eq!(head.message().await, b"with the new one");
    // The heartbeat connection too, when it has to be made anew.
    n.net.start_heartbeats(address, LOCAL, Incarnation(2));
    while head.signs.recv().await.unwrap().incarnation != Incarnation(2) {}
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_cut_off() {
    let mut c = cluster();
    let n = Daemon::start(&node(&c.token), None);
    n.net.dial(c.address, LOCAL);
    let far = c.head.opened().await;
    // The node's main thread takes no event: its queue, then QUIC's window, then ours fill up.
    while far.send(vec![0; 1 << 20]).is_ok() {}
    assert_eq!(c.head.closed().await, (far.id(), CloseCause::Local));
}

#[tokio::test]
async fn a_port_that_is_taken_ends_the_start_and_not_the_process() {
    let c = cluster();
    let (tell, _signs) = mpsc::unbounded_channel();
    let config = NetConfig {
        identity: node(&c.token),
        counters: counters(),
        listen: Some(c.address),
        watch: Box::new(Listen(tell)),
    };
    assert!(NetThread::start(config).unwrap_err().to_string().contains("in use"));
}

#[tokio::test]
async fn heartbeats_get_through_a_third_lost_and_come_back_after_a_cut() {
    let mut c = cluster();
    let wire = Wire::to(c.address).await;
    let mut n = Daemon::start(&node(&c.token), None);
    n.net.start_heartbeats(wire.address, LOCAL, Incarnation(1));
    c.head.signs.recv().await.unwrap();
    n.signs.recv().await.unwrap();
    wire.lose(30, 30);
    // In both directions no second of silence, let alone three.
    for signs in [&mut c.head.signs, &mut n.signs] {
        let mut last = Instant::now();
        for _ in 0..8 {
            let sign = tokio::time::timeout(Duration::from_secs(3), signs.recv()).await.unwrap().unwrap();
            last = last.max(sign.at);
        }
    }
    // One way only: the head hears the node, the node does not hear the head.
    wire.lose(0, 100);
    while c.head.signs.try_recv().is_ok() {}
    for _ in 0..2 {
        c.head.signs.recv().await.unwrap();
    }
    while n.signs.try_recv().is_ok() {}
    for _ in 0..3 {
        c.head.signs.recv().await.unwrap();
    }
    assert!(n.signs.try_recv().is_err(), "nothing came back");
    wire.lose(0, 0);
    n.signs.recv().await.unwrap();
}

#[tokio::test]
async fn what_the_system_did_not_allow_is_a_fact_and_no_failure() {
    let c = cluster();
    let privileges = c.head.net.privileges();
    for fact in [&privileges.memory_locked, &privileges.real_time] {
        if let Err(why) = fact {
            assert!(!why.is_empty());
        }
    }
}
