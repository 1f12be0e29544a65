//! A node's side of membership, by hand.

use rayless_control::{
    Member, SessionId,
    member::{BACK_OFF_MAX, DialError, Effect, Input, MemberConfig},
};
use rayless_proto::{
    ids::{ClusterId, Incarnation, NodeId},
    v1::control::{Refusal, RefusalKind, ToHead, ToNode},
};
use std::time::{Duration, Instant};

fn member(now: Instant) -> Member {
    let config = MemberConfig { head: "10.0.0.1:6379".into(), incarnation: Incarnation(4), jitter_seed: 17 };
    Member::new(config, now)
}

fn effects(member: &mut Member) -> Vec<Effect> {
    std::iter::from_fn(|| member.poll_effect()).collect()
}

fn welcome() -> ToNode {
    ToNode::Welcome {
        cluster: ClusterId([1; 16]),
        head: NodeId([2; 32]),
        your_address: "10.0.0.2".into(),
        dead_after_ms: 3000,
    }
}

fn refusal() -> Refusal {
    Refusal { kind: RefusalKind::Policy, cause: "wrong token".into(), hint: "use that of the head".into() }
}

/// Dials, joins and is welcomed on session `n`.
fn welcomed(member: &mut Member, n: u64, now: Instant) {
    member.handle(now, Input::Connected(SessionId(n)));
    member.handle(now, Input::Message(SessionId(n), welcome()));
    assert!(member.is_welcomed());
    effects(member);
}

#[test]
fn dials_joins_and_is_welcomed() {
    let now = Instant::now();
    let mut m = member(now);
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(1))]);
    assert_eq!(m.session(), None);
    m.handle(now, Input::Connected(SessionId(1)));
    assert_eq!(effects(&mut m), [Effect::Join(SessionId(1), Incarnation(4))]);
    assert_eq!(m.session(), Some(SessionId(1)));
    m.handle(now, Input::Message(SessionId(1), welcome()));
    assert!(
        matches!(&effects(&mut m)[..], [Effect::Welcomed { first: true, dead_after, .. }] if *dead_after == Duration::from_secs(3))
    );
    assert_eq!((m.waiting_for(), m.next_timeout()), (None, None));
}

#[test]
fn backs_off_from_20_ms_to_one_second_and_says_so_once_in_ten_seconds() {
    let start = Instant::now();
    let mut m = member(start);
    let mut now = start;
    let mut pauses = Vec::new();
    let mut talks = 0;
    let mut session = 1;
    while now < start + Duration::from_secs(25) {
        effects(&mut m);
        m.handle(now, Input::DialFailed(SessionId(session), DialError::Unreachable("connection refused".into())));
        talks += effects(&mut m).iter().filter(|e| matches!(e, Effect::Talk(_))).count();
        let next = m.next_timeout().unwrap();
        pauses.push(next - now);
        now = next;
        m.handle(now, Input::Timer);
        session += 1;
    }
    assert!(pauses[0] <= Duration::from_millis(20) && pauses[0] >= Duration::from_millis(15), "{pauses:?}");
    assert!(pauses[3] >= Duration::from_millis(120) && pauses[3] <= Duration::from_millis(160), "{pauses:?}");
    assert!(pauses.iter().all(|p| *p <= BACK_OFF_MAX));
    assert_eq!(talks, 3, "at 0, 10 and 20 seconds");
    let line = m.waiting_for().unwrap();
    assert!(line.starts_with("waiting for the head at 10.0.0.1:6379: connection refused ("), "{line}");
}

#[test]
fn a_dial_without_an_answer_is_given_up() {
    let start = Instant::now();
    let mut m = member(start);
    effects(&mut m);
    let limit = m.next_timeout().unwrap();
    assert_eq!(limit, start + Duration::from_millis(300));
    m.handle(limit, Input::Timer);
    assert!(effects(&mut m).contains(&Effect::Close(SessionId(1))));
    // It comes through all the same, too late: closed, not joined.
    m.handle(limit, Input::Connected(SessionId(1)));
    assert_eq!(effects(&mut m), [Effect::Close(SessionId(1))]);
}

#[test]
fn refused_at_the_first_join_is_final() {
    let now = Instant::now();
    let mut m = member(now);
    effects(&mut m);
    m.handle(now, Input::DialFailed(SessionId(1), DialError::Refused(refusal())));
    assert_eq!(effects(&mut m), [Effect::Refused(refusal())]);
    assert_eq!(m.next_timeout(), None);
    assert_eq!(m.waiting_for().as_deref(), Some("wrong token"));
}

#[test]
fn refused_at_a_later_join_goes_on_trying() {
    // Groups run here; the head was replaced by one that we do not suit.
    let now = Instant::now();
    let mut m = member(now);
    welcomed(&mut m, 1, now);
    m.handle(now, Input::Closed(SessionId(1), "reset".into()));
    let lost = effects(&mut m);
    assert!(lost.contains(&Effect::Lost("reset".into())), "{lost:?}");
    let next = m.next_timeout().unwrap();
    m.handle(next, Input::Timer);
    m.handle(next, Input::Connected(SessionId(2)));
    m.handle(next, Input::Message(SessionId(2), ToNode::Refused(refusal())));
    assert!(!effects(&mut m).iter().any(|e| matches!(e, Effect::Refused(_))));
    assert!(m.next_timeout().unwrap() <= next + BACK_OFF_MAX);
}

#[test]
fn what_comes_on_an_earlier_session_is_a_ghosts() {
    let now = Instant::now();
    let mut m = member(now);
    welcomed(&mut m, 1, now);
    m.handle(now, Input::HeadSilent);
    assert_eq!(effects(&mut m)[0], Effect::Close(SessionId(1)));
    let next = m.next_timeout().unwrap();
    m.handle(next, Input::Timer);
    welcomed(&mut m, 2, next);
    let fenced = ToNode::Fenced { cause: "long ago".into() };
    m.handle(next, Input::Message(SessionId(1), fenced));
    m.handle(next, Input::Closed(SessionId(1), "long ago".into()));
    assert_eq!(effects(&mut m), []);
    assert!(m.is_welcomed());
}

#[test]
fn fenced_kills_first_and_dials_as_a_new_life() {
    let now = Instant::now();
    let mut m = member(now);
    effects(&mut m);
    m.handle(now, Input::Connected(SessionId(1)));
    m.handle(now, Input::Message(SessionId(1), ToNode::Fenced { cause: "no heartbeat for 3.0 s".into() }));
    let done = effects(&mut m);
    assert_eq!(done[1..], [Effect::Close(SessionId(1)), Effect::KillWorkers("no heartbeat for 3.0 s".into())]);
    assert_eq!((m.next_timeout(), m.session()), (None, None), "nothing is dialled before the workers are dead");
    m.handle(now, Input::Reborn(Incarnation(5)));
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(2))]);
    m.handle(now, Input::Connected(SessionId(2)));
    assert_eq!(effects(&mut m), [Effect::Join(SessionId(2), Incarnation(5))]);
}

#[test]
fn leaving_is_said_and_is_the_end() {
    let now = Instant::now();
    let mut m = member(now);
    welcomed(&mut m, 1, now);
    m.handle(now, Input::Leave);
    assert_eq!(effects(&mut m), [Effect::Send(SessionId(1), ToHead::Leave), Effect::Close(SessionId(1))]);
    m.handle(now, Input::Closed(SessionId(1), "closed".into()));
    m.handle(now, Input::Timer);
    assert_eq!(effects(&mut m), []);
    assert_eq!(m.next_timeout(), None);
}
