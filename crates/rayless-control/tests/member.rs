//! A node's side of membership, by hand.
#![allow(clippy::unwrap_used, reason = "a test ends with the first thing that is not as it should be")]

use rayless_control::{
    Member, SessionId,
    member::{BACK_OFF_MAX, DialError, Effect, Input, MemberConfig, Target},
};
use rayless_proto::{
    ids::{ClusterId, Incarnation, NodeId, Term},
    v1::control::{FromHead, HeadTerm, Refusal, RefusalKind, ToHead, ToNode},
};
use std::time::{Duration, Instant};

fn member(now: Instant) -> Member {
    let config = MemberConfig {
        head: "10.0.0.1:6379".into(),
        targets: vec![at("10.0.0.1:6379")],
        seen: None,
        incarnation: Incarnation(4),
        jitter_seed: 17,
    };
    Member::new(config, now)
}

fn at(address: &str) -> Target {
    Target::At(address.parse().unwrap())
}

/// A message of the head with this term.
fn from(term: u64, message: ToNode) -> FromHead {
    FromHead { by: HeadTerm { cluster: ClusterId([1; 16]), term: Term(term) }, message }
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
        heads: Vec::new(),
    }
}

fn refusal() -> Refusal {
    Refusal { kind: RefusalKind::Policy, cause: "wrong token".into(), hint: "use that of the head".into() }
}

/// Dials, joins and is welcomed on session `n`.
fn welcomed(member: &mut Member, n: u64, now: Instant) {
    member.handle(now, Input::Connected(SessionId(n)));
    member.handle(now, Input::Message(SessionId(n), from(0, welcome())));
    assert!(member.is_welcomed());
    effects(member);
}

#[test]
fn dials_joins_and_is_welcomed() {
    let now = Instant::now();
    let mut m = member(now);
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(1), at("10.0.0.1:6379"))]);
    assert_eq!(m.session(), None);
    m.handle(now, Input::Connected(SessionId(1)));
    assert_eq!(effects(&mut m), [Effect::Join(SessionId(1), Incarnation(4))]);
    assert_eq!(m.session(), Some(SessionId(1)));
    m.handle(now, Input::Message(SessionId(1), from(0, welcome())));
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
    m.handle(next, Input::Message(SessionId(2), from(0, ToNode::Refused(refusal()))));
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
    m.handle(next, Input::Message(SessionId(1), from(0, fenced)));
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
    m.handle(now, Input::Message(SessionId(1), from(0, ToNode::Fenced { cause: "no heartbeat for 3.0 s".into() })));
    let done = effects(&mut m);
    assert_eq!(done[1..], [Effect::Close(SessionId(1)), Effect::KillWorkers("no heartbeat for 3.0 s".into())]);
    assert_eq!((m.next_timeout(), m.session()), (None, None), "nothing is dialled before the workers are dead");
    m.handle(now, Input::Reborn(Incarnation(5)));
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(2), at("10.0.0.1:6379"))]);
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

/// A node that was told of two heads.
fn with_two(seen: Option<u64>, now: Instant) -> Member {
    let seen = seen.map(|term| HeadTerm { cluster: ClusterId([1; 16]), term: Term(term) });
    let targets = vec![at("10.0.0.1:6379"), at("10.0.0.2:6379")];
    let config = MemberConfig {
        head: "10.0.0.1:6379,10.0.0.2:6379".into(),
        targets,
        seen,
        incarnation: Incarnation(1),
        jitter_seed: 3,
    };
    Member::new(config, now)
}

fn elsewhere(head: Option<&str>) -> FromHead {
    from(0, ToNode::Elsewhere { head: head.map(str::to_owned), cause: "b is a standby".into() })
}

#[test]
fn the_first_of_two_is_dead_the_second_is_dialled_and_nothing_is_said() {
    let now = Instant::now();
    let mut m = with_two(None, now);
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(1), at("10.0.0.1:6379"))]);
    m.handle(now, Input::DialFailed(SessionId(1), DialError::Unreachable("no answer".into())));
    assert_eq!(effects(&mut m), [], "one of two is no news");
    let next = m.next_timeout().unwrap();
    assert!(next <= now + Duration::from_millis(20));
    m.handle(next, Input::Timer);
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(2), at("10.0.0.2:6379"))]);
    m.handle(next, Input::DialFailed(SessionId(2), DialError::Unreachable("connection refused".into())));
    let said = Effect::Talk("waiting for the head at 10.0.0.2:6379: connection refused".into());
    assert_eq!(effects(&mut m), [said]);
}

#[test]
fn a_standby_names_the_head_and_it_is_dialled_at_once() {
    let now = Instant::now();
    let mut m = member(now);
    effects(&mut m);
    m.handle(now, Input::Connected(SessionId(1)));
    m.handle(now, Input::Message(SessionId(1), elsewhere(Some("10.0.0.7:6379"))));
    assert!(!effects(&mut m).iter().any(|e| matches!(e, Effect::Talk(_))));
    m.handle(m.next_timeout().unwrap(), Input::Timer);
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(2), at("10.0.0.7:6379"))]);
}

#[test]
fn two_standbys_that_name_each_other_are_not_dialled_without_a_pause() {
    let mut now = Instant::now();
    let start = now;
    let mut m = with_two(None, now);
    for session in 1..40 {
        m.handle(now, Input::Connected(SessionId(session)));
        let other = if session % 2 == 1 { "10.0.0.2:6379" } else { "10.0.0.1:6379" };
        m.handle(now, Input::Message(SessionId(session), elsewhere(Some(other))));
        effects(&mut m);
        now = m.next_timeout().unwrap();
        m.handle(now, Input::Timer);
    }
    assert!(now > start + Duration::from_secs(5), "{:?}", now - start);
}

#[test]
fn the_heads_of_the_welcome_are_tried_when_the_head_is_gone() {
    let now = Instant::now();
    let mut m = member(now);
    effects(&mut m);
    m.handle(now, Input::Connected(SessionId(1)));
    let ToNode::Welcome { cluster, head, your_address, dead_after_ms, .. } = welcome() else { unreachable!() };
    let heads = vec!["10.0.0.1:6379".to_owned(), "10.0.0.5:6379".to_owned()];
    let welcome = ToNode::Welcome { cluster, head, your_address, dead_after_ms, heads };
    m.handle(now, Input::Message(SessionId(1), from(1, welcome)));
    m.handle(
        now,
        Input::Message(SessionId(1), from(1, ToNode::Heads(vec!["10.0.0.1:6379".into(), "10.0.0.6:6379".into()]))),
    );
    effects(&mut m);
    m.handle(now, Input::HeadSilent);
    m.handle(m.next_timeout().unwrap(), Input::Timer);
    assert!(effects(&mut m).contains(&Effect::Dial(SessionId(2), at("10.0.0.6:6379"))));
}

#[test]
fn a_head_with_a_lower_term_is_obeyed_in_nothing() {
    let now = Instant::now();
    let kinds = [
        welcome(),
        ToNode::Fenced { cause: "long ago".into() },
        ToNode::Refused(refusal()),
        ToNode::StopKeeper { group: rayless_proto::ids::GroupId([1; 8]), cause: String::new() },
    ];
    for message in kinds {
        let mut m = with_two(Some(5), now);
        effects(&mut m);
        m.handle(now, Input::Connected(SessionId(1)));
        effects(&mut m);
        m.handle(now, Input::Message(SessionId(1), from(4, message)));
        assert_eq!(effects(&mut m), [Effect::Close(SessionId(1))]);
        m.handle(m.next_timeout().unwrap(), Input::Timer);
        assert_eq!(effects(&mut m), [Effect::Dial(SessionId(2), at("10.0.0.2:6379"))]);
    }
    // Of another cluster: not to be compared.
    let mut m = with_two(Some(5), now);
    m.handle(now, Input::Connected(SessionId(1)));
    let mut other = from(1, welcome());
    other.by.cluster = ClusterId([7; 16]);
    m.handle(now, Input::Message(SessionId(1), other));
    assert!(m.is_welcomed());
}

#[test]
fn a_session_is_of_one_term() {
    let now = Instant::now();
    for term in [4, 6] {
        let mut m = with_two(Some(5), now);
        m.handle(now, Input::Connected(SessionId(1)));
        m.handle(now, Input::Message(SessionId(1), from(5, welcome())));
        effects(&mut m);
        m.handle(now, Input::Message(SessionId(1), from(term, ToNode::Done { request: 1 })));
        let done = effects(&mut m);
        assert!(matches!(done[..], [Effect::Close(SessionId(1)), Effect::Lost(_)]), "{done:?}");
    }
}

#[test]
fn a_daemon_that_becomes_the_head_leaves_its_session_and_dials_itself() {
    let now = Instant::now();
    let config = MemberConfig {
        head: String::new(),
        targets: Vec::new(),
        seen: None,
        incarnation: Incarnation(1),
        jitter_seed: 3,
    };
    let mut m = Member::new(config, now);
    assert_eq!((effects(&mut m).len(), m.next_timeout()), (0, None), "a standby that knows no head is idle");
    m.handle(now, Input::Heads(vec![at("10.0.0.1:6379")], "a is the head".into()));
    assert_eq!(effects(&mut m), [Effect::Dial(SessionId(1), at("10.0.0.1:6379"))]);
    welcomed(&mut m, 1, now);
    // The same head with another standby behind it changes nothing.
    m.handle(now, Input::Heads(vec![at("10.0.0.1:6379"), at("10.0.0.3:6379")], "a is the head".into()));
    assert_eq!(effects(&mut m), []);
    m.handle(now, Input::Heads(vec![Target::Here], "this daemon is the head now".into()));
    let done = effects(&mut m);
    let lost = Effect::Lost("this daemon is the head now".into());
    assert_eq!(done, [Effect::Close(SessionId(1)), lost, Effect::Dial(SessionId(2), Target::Here)]);
    m.handle(now, Input::Heads(Vec::new(), "no longer the head".into()));
    assert_eq!((m.session(), m.next_timeout()), (None, None));
}
