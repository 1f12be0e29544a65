//! This daemon and the others: `rayless_net`'s thread on one side, the two state machines on the other.
//!
//! It translates: session handles to numbers, bytes to messages, heartbeats to verdicts. It decides nothing.

use super::DaemonError;
use rayless_control::{
    SessionId, head,
    liveness::{Detector, Transition},
    member,
};
use rayless_net::{
    counters::{Counters, Refused},
    heartbeat::{ControlSession, DialError, NetConfig, NetEvent, NetThread, SessionId as NetSession, Sign, Watch},
    identity::ClusterIdentity,
    quic::{CloseCause, CloseCode, ConnectError, EndpointError},
};
use rayless_proto::{
    codec,
    ids::{Incarnation, NodeId},
    v1::control::{FromHead, Refusal, RefusalKind, ToHead},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// News for one of the machines.
#[allow(clippy::large_enum_variant, reason = "each is moved once, into its machine")]
#[derive(Debug)]
pub(crate) enum News {
    /// For this node's membership.
    Member(member::Input),
    /// For the head on this node.
    Head(head::Input),
    /// This node has not heard of its head for half the limit (`true`), or hears of it again.
    HeadInDoubt(bool),
}

/// The network of one daemon.
pub(crate) struct Wire {
    net: Option<NetThread>,
    events: mpsc::Receiver<NetEvent>,
    verdicts: mpsc::UnboundedReceiver<Verdict>,
    judge: Judge,
    counters: Arc<Counters>,
    /// This node's address, for calls.
    local: SocketAddr,
    /// The head that is called; `None` while it is in this process.
    head: Option<SocketAddr>,
    incarnation: Incarnation,
    /// As a node: the session being dialled, and the one that is open, as the member and as the net number it.
    dialling: Option<SessionId>,
    up: Option<(SessionId, ControlSession)>,
    /// As the head, or as a daemon that is taken for it: open sessions.
    down: BTreeMap<u64, ControlSession>,
    /// Sessions inside this process count down from the top: the net's count up from 1.
    inside: u64,
}

impl Wire {
    /// Starts the network thread. One that `listens` takes calls at `local` when this returns.
    pub(crate) fn open(
        local: SocketAddr,
        listens: bool,
        identity: &ClusterIdentity,
        counters: Arc<Counters>,
        dead_after: Duration,
    ) -> Result<Self, DaemonError> {
        let (told, verdicts) = mpsc::unbounded_channel();
        let watched = Arc::new(Mutex::new(Watched {
            nodes: Detector::new(dead_after),
            head: Detector::new(dead_after),
            at: None,
        }));
        let judge = Judge { watched, told };
        let config = NetConfig {
            identity: identity.clone(),
            counters: counters.clone(),
            listen: listens.then_some(local),
            watch: Box::new(judge.clone()),
        };
        let (net, events) = NetThread::start(config).map_err(|error| DaemonError::Failed(error.to_string()))?;
        for (what, allowed) in [("memory", &net.privileges().memory_locked), ("priority", &net.privileges().real_time)]
        {
            if let Err(reason) = allowed {
                tracing::info!("heartbeats go without a locked {what}: {reason}");
            }
        }
        Ok(Self {
            net: Some(net),
            events,
            verdicts,
            judge,
            counters,
            local,
            head: None,
            incarnation: Incarnation(0),
            dialling: None,
            up: None,
            down: BTreeMap::new(),
            inside: u64::MAX,
        })
    }

    /// The next news. May be dropped while waiting. `None`: the network thread is gone.
    pub(crate) async fn next(&mut self) -> Option<News> {
        loop {
            let news = tokio::select! {
                event = self.events.recv() => self.translate(event?),
                Some(verdict) = self.verdicts.recv() => Some(match verdict {
                    Verdict::Node(node, incarnation, transition) => {
                        News::Head(head::Input::Liveness { node, incarnation, transition })
                    }
                    Verdict::Head(Transition::Dead) => News::Member(member::Input::HeadSilent),
                    Verdict::Head(transition) => News::HeadInDoubt(transition == Transition::Suspect),
                }),
            };
            if news.is_some() {
                return news;
            }
        }
    }

    fn translate(&mut self, event: NetEvent) -> Option<News> {
        match event {
            NetEvent::Opened(session) if !session.is_ours() => {
                let number = session.id().0;
                let (node, address) = (session.peer(), session.peer_address().ip().to_canonical().to_string());
                self.down.insert(number, session);
                Some(News::Head(head::Input::SessionOpened { session: SessionId(number), node, address }))
            }
            NetEvent::Opened(session) => match self.dialling.take() {
                Some(dialled) => {
                    self.up = Some((dialled, session));
                    Some(News::Member(member::Input::Connected(dialled)))
                }
                None => {
                    session.close(CloseCode::Done, "given up meanwhile");
                    None
                }
            },
            NetEvent::Message { session, message } if self.down.contains_key(&session.0) => {
                match codec::decode::<ToHead>(&message) {
                    Ok(message) => Some(News::Head(head::Input::Message { session: SessionId(session.0), message })),
                    Err(error) => {
                        if let Some(session) = self.down.get(&session.0) {
                            self.malformed(session, &error);
                        }
                        None
                    }
                }
            }
            NetEvent::Message { session, message } => {
                let (mine, open) = self.up.as_ref().filter(|(_, open)| open.id() == session)?;
                match codec::decode::<FromHead>(&message) {
                    Ok(message) => Some(News::Member(member::Input::Message(*mine, message))),
                    Err(error) => {
                        self.malformed(open, &error);
                        None
                    }
                }
            }
            NetEvent::Closed { session: NetSession(number), .. } if self.down.contains_key(&number) => {
                self.down.remove(&number)?;
                Some(News::Head(head::Input::SessionClosed { session: SessionId(number) }))
            }
            NetEvent::Closed { session, cause } => {
                let (mine, _) = self.up.take_if(|(_, open)| open.id() == session)?;
                Some(News::Member(member::Input::Closed(mine, cause.to_string())))
            }
            NetEvent::DialFailed { error, .. } => {
                let dialled = self.dialling.take()?;
                Some(News::Member(member::Input::DialFailed(dialled, dial_error(&error))))
            }
            NetEvent::Refused(refusal) => {
                let more = if refusal.untold > 0 { format!(" (and {} more)", refusal.untold) } else { String::new() };
                let cause = format!("{}{more}", refusal.detail);
                tracing::warn!(from = %refusal.address, "turned away: {cause}");
                let from = refusal.address.to_string();
                Some(News::Head(head::Input::HandshakeRefused { from, cause }))
            }
        }
    }

    fn malformed(&self, session: &ControlSession, error: &codec::DecodeError) {
        let address = session.peer_address();
        self.counters.report(Refused::Malformed, address, &error.to_string());
        session.abort(CloseCode::Malformed, &error.to_string());
    }

    /// A number for a session that never leaves this process.
    pub(crate) const fn number_session(&mut self) -> SessionId {
        self.inside -= 1;
        SessionId(self.inside)
    }

    /// Strangers turned away so far.
    pub(crate) fn refused(&self) -> u64 {
        [
            Refused::WrongToken,
            Refused::NotAllowed,
            Refused::NotRayless,
            Refused::Version,
            Refused::Unfinished,
            Refused::TooMany,
            Refused::Malformed,
        ]
        .into_iter()
        .map(|why| self.counters.refused(why))
        .sum()
    }

    /// Shakes hands with this identity from here on.
    pub(crate) fn set_identity(&self, identity: &ClusterIdentity) {
        if let Some(net) = &self.net {
            net.set_identity(identity.clone());
        }
    }

    // A node's side.

    pub(crate) fn dial(&mut self, session: SessionId, head: SocketAddr) {
        if let Some(net) = &self.net {
            self.head = Some(head);
            self.dialling = Some(session);
            net.dial(head, self.local.ip());
        }
    }

    /// The head is in this process: nobody is called.
    pub(crate) const fn stay(&mut self) {
        self.head = None;
    }

    /// Ends a session, or gives up its dial. What was sent on it still goes out.
    pub(crate) fn hang_up(&mut self, session: SessionId) {
        self.dialling.take_if(|dialling| *dialling == session);
        if let Some((_, open)) = self.up.take_if(|(mine, _)| *mine == session) {
            open.close(CloseCode::Done, "");
        }
    }

    pub(crate) fn send_up(&self, session: SessionId, message: &ToHead) {
        if let Some((_, open)) = self.up.as_ref().filter(|(mine, _)| *mine == session) {
            // An error means that the session is over, which is told as an event.
            let _ = open.send(codec::encode(message));
        }
    }

    pub(crate) const fn set_incarnation(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// The head has taken this node: it hears this node's heartbeats from now on, and is watched in turn.
    pub(crate) fn welcomed(&mut self, head: NodeId, dead_after: Duration) {
        let (Some(net), Some(address)) = (&self.net, self.head) else { return };
        let mut watched = self.judge.lock();
        watched.head.set_dead_after(dead_after);
        watched.head.watch((), Instant::now());
        watched.at = Some(head);
        drop(watched);
        net.start_heartbeats(address, self.local.ip(), self.incarnation);
    }

    /// The session with the head is over.
    pub(crate) fn lost(&self) {
        let mut watched = self.judge.lock();
        watched.head.forget(());
        watched.at = None;
        drop(watched);
        if let Some(net) = self.net.as_ref().filter(|_| self.head.is_some()) {
            net.stop_heartbeats();
        }
    }

    // The head's side.

    pub(crate) fn send_down(&self, session: SessionId, message: &FromHead) {
        if let Some(session) = self.down.get(&session.0) {
            let _ = session.send(codec::encode(message));
        }
    }

    /// Ends a session once what was sent on it has arrived.
    pub(crate) fn close_down(&self, session: SessionId) {
        if let Some(session) = self.down.get(&session.0) {
            session.close(CloseCode::Refused, "");
        }
    }

    /// This daemon is no longer the head: all nodes are let go at once, and nobody is judged any more.
    pub(crate) fn drop_nodes(&mut self, reason: &str) {
        for session in self.down.values() {
            session.abort(CloseCode::Done, reason);
        }
        let mut watched = self.judge.lock();
        let dead_after = watched.nodes.dead_after();
        watched.nodes = Detector::new(dead_after);
    }

    pub(crate) fn watch(&self, node: NodeId, incarnation: Incarnation) {
        self.judge.lock().nodes.watch((node, incarnation), Instant::now());
    }

    pub(crate) fn unwatch(&self, node: NodeId, incarnation: Incarnation) {
        self.judge.lock().nodes.forget((node, incarnation));
    }

    /// The last heartbeat of each node.
    pub(crate) fn heard(&self, now: Instant) -> Vec<head::Input> {
        let pulses = self.net.as_ref().map(NetThread::pulses).unwrap_or_default();
        pulses
            .into_iter()
            .map(|pulse| head::Input::Heard {
                node: pulse.peer,
                incarnation: pulse.incarnation,
                ago: now.saturating_duration_since(pulse.heard),
                rtt_us: pulse.rtt.map_or(0, |rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            })
            .collect()
    }

    /// Ends all sessions in order.
    pub(crate) async fn close(&mut self) {
        if let Some(net) = self.net.take() {
            net.shutdown("this daemon is being stopped").await;
        }
    }
}

/// What is told to people when a dial fails, and whether it is final.
fn dial_error(error: &DialError) -> member::DialError {
    let text = error.to_string();
    let (cause, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
    let is_final = match error {
        DialError::Connect(ConnectError::WrongToken(_) | ConnectError::Version(_)) => true,
        DialError::Connect(ConnectError::Refused { cause: CloseCause::ByPeer { code, .. }, .. }) => {
            matches!(code, CloseCode::Version | CloseCode::NotRayless | CloseCode::NotAllowed)
        }
        DialError::Connect(_) | DialError::Endpoint(EndpointError::Port(_) | EndpointError::SetUp(_)) => false,
    };
    if is_final {
        let (cause, hint) = (cause.to_owned(), hint.to_owned());
        return member::DialError::Refused(Refusal { kind: RefusalKind::Policy, cause, hint });
    }
    member::DialError::Unreachable(cause.to_owned())
}

enum Verdict {
    Node(NodeId, Incarnation, Transition),
    Head(Transition),
}

/// The detectors. They judge on the network thread, which is on time where this one may not be.
#[derive(Clone)]
struct Judge {
    watched: Arc<Mutex<Watched>>,
    told: mpsc::UnboundedSender<Verdict>,
}

struct Watched {
    /// On the head: lives of nodes.
    nodes: Detector<(NodeId, Incarnation)>,
    /// On a node: the head.
    head: Detector<()>,
    /// Who that is.
    at: Option<NodeId>,
}

impl Judge {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch for Judge {
    fn heard(&mut self, sign: Sign) {
        let mut watched = self.lock();
        if watched.at == Some(sign.peer) {
            if let Some(transition) = watched.head.heard((), sign.at) {
                let _ = self.told.send(Verdict::Head(transition));
            }
        } else if let Some(transition) = watched.nodes.heard((sign.peer, sign.incarnation), sign.at) {
            let _ = self.told.send(Verdict::Node(sign.peer, sign.incarnation, transition));
        }
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        let mut watched = self.lock();
        for ((node, incarnation), transition) in watched.nodes.tick(now) {
            let _ = self.told.send(Verdict::Node(node, incarnation, transition));
        }
        for ((), transition) in watched.head.tick(now) {
            let _ = self.told.send(Verdict::Head(transition));
        }
        [watched.nodes.next_tick(now), watched.head.next_tick(now)].into_iter().flatten().min()
    }
}
