//! The thread that owns all QUIC traffic of a daemon, so that nothing the daemon does can delay a heartbeat.
//!
//! It has a runtime of its own (one thread, real-time priority and locked memory where the system allows). On the head it owns
//! the endpoint on rayless' UDP port: control sessions go to the main thread as [`NetEvent`]s, heartbeats are dealt with
//! here. On a node it keeps the control connection to the head and, on a socket of its own, the heartbeat connection.
//!
//! # Heartbeats
//! Every half second ([`HEARTBEAT_PERIOD`](rayless_proto::limits::HEARTBEAT_PERIOD)) a node sends one datagram; QUIC's acknowledgement, which it asks for at once, is the echo.
//! Alive is who sent *any* authentic packet: where one is lost, QUIC probes again after 30 ms, 60, 120, …, and a node whose
//! heartbeat is not answered sends twenty a second. Between two hosts that lose 30 % of all packets, some forty have to be
//! lost in a row, there or back, before three seconds are silent. No congestion window holds them back.
//!
//! # Judgement
//! Who is dead is not decided here: [`Watch`] hears every sign and is asked to judge, on this thread. Before it is asked, all that
//! waits in the sockets has been read: an observer that slept does not mistake its own silence for that of others.

mod event;
mod privilege;
mod pulse;
mod session;
mod traffic;

pub use event::{DialError, NetEvent, Sign, Watch};
pub use privilege::Privileges;
pub use pulse::PeerPulse;
pub use session::{ControlSession, SessionId, SessionOver};

use crate::{
    counters::Counters,
    identity::ClusterIdentity,
    quic::{Acceptor, CloseCode, Endpoint, EndpointError, Session},
    runtime::Alarm,
};
use pulse::Pulses;
use rayless_proto::{
    hello::Purpose,
    ids::{Incarnation, NodeId},
    limits::OBSERVER_LATE,
    v1::heartbeat::Heartbeat,
};
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle as Task, yield_now},
    time::{sleep, timeout},
};

/// Events that wait for the main thread; with more, peers are not read further.
const EVENT_QUEUE: usize = 256;
const STACK: usize = 1 << 20;
/// Between two attempts to bring a lost heartbeat connection back.
const RETRY_FROM: Duration = Duration::from_millis(50);
const RETRY_TO: Duration = Duration::from_secs(1);

/// How long a thread that ends waits for its last words to arrive.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the thread is started with.
pub struct NetConfig {
    /// Who this is.
    pub identity: ClusterIdentity,
    /// Where refusals are counted; shared with the TCP side.
    pub counters: Arc<Counters>,
    /// Where to be called (a head); `None` only calls (a node).
    pub listen: Option<SocketAddr>,
    /// Who judges.
    pub watch: Box<dyn Watch>,
}

/// The thread. Dropping it ends the thread at once; [`shutdown`](Self::shutdown) in order.
#[derive(Debug)]
pub struct NetThread {
    commands: mpsc::UnboundedSender<Command>,
    pulses: Pulses,
    privileges: Privileges,
    local: Option<SocketAddr>,
    thread: Option<JoinHandle<()>>,
}

enum Command {
    Dial { head: SocketAddr, local: IpAddr },
    Beat { head: SocketAddr, local: IpAddr, incarnation: Incarnation },
    Identity(Box<ClusterIdentity>, std::sync::mpsc::SyncSender<()>),
    StopBeating,
    Shutdown { reason: String, done: oneshot::Sender<()> },
}

impl NetThread {
    /// Starts the thread; a head listens when this returns.
    ///
    /// # Errors
    /// [`EndpointError`]: the port cannot be had.
    pub fn start(config: NetConfig) -> Result<(Self, mpsc::Receiver<NetEvent>), EndpointError> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (events, outbox) = mpsc::channel(EVENT_QUEUE);
        let (started, ready) = std::sync::mpsc::sync_channel(1);
        let NetConfig { identity, counters, listen, watch } = config;
        let pulses = Pulses::new(watch);
        let shared = pulses.clone();
        let body = move || {
            let privileges = privilege::acquire();
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = started.send(Err(EndpointError::SetUp(error.to_string())));
                    return;
                }
            };
            runtime.block_on(async {
                let alarm = match Alarm::new() {
                    Ok(alarm) => alarm,
                    Err(error) => {
                        let _ = started.send(Err(EndpointError::SetUp(error.to_string())));
                        return;
                    }
                };
                let endpoint = listen.map(|address| Endpoint::server(address, &identity, counters.clone())).transpose();
                let (endpoint, acceptor) = match endpoint {
                    Ok(pair) => pair.unzip(),
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return;
                    }
                };
                let local = endpoint.as_ref().and_then(|e| e.local_address().ok());
                let _ = started.send(Ok((privileges, local)));
                let refusals = events.clone();
                // A main thread with a full queue has other worries; the count is kept in any case.
                counters.on_refusal(move |refusal| drop(refusals.try_send(NetEvent::Refused(refusal))));
                let identity = Arc::new(Mutex::new(identity));
                let calling =
                    Calling { identity, counters, events, pulses: shared, sessions: 0, dialling: None, beating: None };
                calling.run(alarm, endpoint, acceptor, inbox).await;
            });
        };
        let thread = std::thread::Builder::new().name("rayless-net".to_owned()).stack_size(STACK);
        let thread = thread.spawn(body).map_err(|error| EndpointError::SetUp(error.to_string()))?;
        let (privileges, local) =
            ready.recv().unwrap_or_else(|_| Err(EndpointError::SetUp("the network thread ended".to_owned())))?;
        Ok((Self { commands, pulses, privileges, local, thread: Some(thread) }, outbox))
    }

    /// Where a head is called; the port that it got where it asked for port 0.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.local
    }

    /// What the system allowed this thread, for `status`.
    pub fn privileges(&self) -> &Privileges {
        &self.privileges
    }

    /// Every peer with a heartbeat connection.
    pub fn pulses(&self) -> Vec<PeerPulse> {
        self.pulses.all()
    }

    /// Opens a control session to the head from the address `local`; ends an attempt that is under way. Answered by
    /// [`NetEvent::Opened`] or [`NetEvent::DialFailed`].
    pub fn dial(&self, head: SocketAddr, local: IpAddr) {
        let _ = self.commands.send(Command::Dial { head, local });
    }

    /// Sends heartbeats of `incarnation` to the head until told otherwise, through lost connections too.
    pub fn start_heartbeats(&self, head: SocketAddr, local: IpAddr, incarnation: Incarnation) {
        let _ = self.commands.send(Command::Beat { head, local, incarnation });
    }

    /// Shakes hands with `identity` from the return of this on: tokens have changed, the node has not. Open connections stay. Blocks for as
    /// long as the thread takes to hear of it, which waits for nobody.
    pub fn set_identity(&self, identity: ClusterIdentity) {
        let (done, changed) = std::sync::mpsc::sync_channel(1);
        if self.commands.send(Command::Identity(Box::new(identity), done)).is_ok() {
            let _ = changed.recv();
        }
    }

    /// Sends no more heartbeats, and closes their connection.
    pub fn stop_heartbeats(&self) {
        let _ = self.commands.send(Command::StopBeating);
    }

    /// Ends every session with `reason`, lets the peers know (a second at most), and ends the thread. What was sent on sessions that were closed
    /// before arrives first (another second at most).
    pub async fn shutdown(mut self, reason: &str) {
        let (done, finished) = oneshot::channel();
        let _ = self.commands.send(Command::Shutdown { reason: reason.to_owned(), done });
        let _ = finished.await;
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // The thread ends when its last command sender is gone.
            let (closed, _) = mpsc::unbounded_channel();
            self.commands = closed;
            let _ = thread.join();
        }
    }
}

impl Drop for NetThread {
    fn drop(&mut self) {
        self.join();
    }
}

/// The life of the thread.
struct Calling {
    identity: Arc<Mutex<ClusterIdentity>>,
    counters: Arc<Counters>,
    events: mpsc::Sender<NetEvent>,
    pulses: Pulses,
    sessions: u64,
    dialling: Option<Task<()>>,
    beating: Option<Task<()>>,
}

impl Calling {
    async fn run(
        mut self,
        alarm: Alarm,
        endpoint: Option<Endpoint>,
        mut acceptor: Option<Acceptor>,
        mut inbox: mpsc::UnboundedReceiver<Command>,
    ) {
        let ticking = tokio::spawn(tick(self.pulses.clone(), alarm));
        let mut nodes: HashMap<NodeId, (ControlSession, Task<()>)> = HashMap::new();
        let (dialled, mut fresh) = mpsc::channel::<(Endpoint, Session)>(1);
        let mut called: Option<(Endpoint, ControlSession)> = None;
        let (unsure, mut doubts) = mpsc::channel::<()>(1);
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(Command::Dial { head, local }) => self.dial(head, local, dialled.clone()),
                    Some(Command::Beat { head, local, incarnation }) => self.beat(head, local, incarnation, unsure.clone()),
                    Some(Command::StopBeating) => self.stop_beating(),
                    Some(Command::Identity(identity, done)) => {
                        if let Some(Err(error)) = endpoint.as_ref().map(|endpoint| endpoint.set_identity(&identity)) {
                            tracing::error!(%error, "the cluster's tokens are not changed here");
                        }
                        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = *identity;
                        let _ = done.send(());
                    }
                    Some(Command::Shutdown { reason, done }) => {
                        self.stop_beating();
                        self.dialling.take().inspect(Task::abort);
                        // Last words, a node's leave among them, that the main thread has queued before this.
                        let farewells = async {
                            for control in called.iter().map(|(_, control)| control).chain(nodes.values().map(|(control, _)| control)) {
                                control.ended().await;
                            }
                        };
                        let _ = timeout(FAREWELL, farewells).await;
                        if let Some((endpoint, _)) = &called {
                            endpoint.close(CloseCode::Done, &reason).await;
                        }
                        if let Some(endpoint) = &endpoint {
                            endpoint.close(CloseCode::Done, &reason).await;
                        }
                        let _ = done.send(());
                        break;
                    }
                    None => break,
                },
                session = accept(&mut acceptor) => match session.link.purpose() {
                    Purpose::Heartbeat => self.listen_to(session),
                    _ => self.take_in(session, &mut nodes),
                },
                // A heartbeat connection does not end by itself. If the head is another process now, the control connection,
                // at rest, would find out at its next keep-alive only.
                Some(()) = doubts.recv() => {
                    if let Some((_, control)) = &called {
                        control.probe();
                    }
                }
                Some((endpoint, session)) = fresh.recv() => {
                    let id = self.next_session();
                    let (control, _) = traffic::run(id, session, None, self.events.clone(), self.counters.clone());
                    if let Some((_, old)) = called.replace((endpoint, control)) {
                        old.abort(CloseCode::Replaced, "dialled again");
                    }
                }
            }
        }
        self.stop_beating();
        ticking.abort();
    }

    /// A node's control session; it takes over from an older one of the same node.
    fn take_in(&mut self, session: Session, nodes: &mut HashMap<NodeId, (ControlSession, Task<()>)>) {
        let id = self.next_session();
        nodes.retain(|_, (_, task)| !task.is_finished());
        let older = nodes.remove(&session.link.peer().node).map(|(older, task)| {
            older.abort(CloseCode::Replaced, "a newer session of this node took over");
            task
        });
        let peer = session.link.peer().node;
        nodes.insert(peer, traffic::run(id, session, older, self.events.clone(), self.counters.clone()));
    }

    /// A node's heartbeats.
    fn listen_to(&mut self, session: Session) {
        let number = self.next_session().0;
        let pulses = self.pulses.clone();
        let link = session.link.clone();
        if let Some(older) = pulses.open(number, link.clone(), None) {
            older.close(CloseCode::Replaced, "a newer heartbeat connection took over");
        }
        tokio::spawn(async move {
            let peer = link.peer().node;
            // The session's stream is kept open and unread: one window is all that it can be made to hold.
            while let Ok(datagram) = link.receive_datagram().await {
                if let Some(beat) = Heartbeat::decode(&datagram) {
                    pulses.heard(peer, number, beat, Instant::now());
                }
            }
            pulses.close(peer, number);
            drop(session);
        });
    }

    fn dial(&mut self, head: SocketAddr, local: IpAddr, dialled: mpsc::Sender<(Endpoint, Session)>) {
        self.dialling.take().inspect(Task::abort);
        let (identity, counters, events) = (self.identity.clone(), self.counters.clone(), self.events.clone());
        self.dialling = Some(tokio::spawn(async move {
            let present = identity.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match call(head, local, Purpose::Control, &present, counters).await {
                Ok(pair) => drop(dialled.send(pair).await),
                Err(error) => drop(events.send(NetEvent::DialFailed { head, error }).await),
            }
        }));
    }

    fn beat(&mut self, head: SocketAddr, local: IpAddr, incarnation: Incarnation, unsure: mpsc::Sender<()>) {
        self.stop_beating();
        let (identity, counters, pulses) = (self.identity.clone(), self.counters.clone(), self.pulses.clone());
        let first = self.sessions;
        // Numbers of the connections to come; a node opens fewer in its life.
        self.sessions += 1 << 32;
        self.beating = Some(tokio::spawn(async move {
            let mut pause = RETRY_FROM;
            for number in first.. {
                let present = identity.lock().unwrap_or_else(PoisonError::into_inner).clone();
                match call(head, local, Purpose::Heartbeat, &present, counters.clone()).await {
                    Ok((_endpoint, session)) => {
                        pause = RETRY_FROM;
                        let beating = Beating { pulses: pulses.clone(), session, number };
                        pulses.open(number, beating.session.link.clone(), Some(incarnation));
                        // The first one now and not at the next tick: the head may already be waiting for it.
                        pulses.tick();
                        let cause = beating.session.link.closed().await;
                        tracing::info!(%head, "heartbeat connection lost: {cause}");
                        let _ = unsure.try_send(());
                    }
                    Err(error) => tracing::debug!(%head, "no heartbeat connection: {error}"),
                }
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_TO);
            }
        }));
    }

    fn stop_beating(&mut self) {
        self.beating.take().inspect(Task::abort);
    }

    fn next_session(&mut self) -> SessionId {
        self.sessions += 1;
        SessionId(self.sessions)
    }
}

/// A heartbeat connection that this side beats on. Its end, also by an abort of the task that holds it, is told to both.
struct Beating {
    pulses: Pulses,
    session: Session,
    number: u64,
}

impl Drop for Beating {
    fn drop(&mut self) {
        self.session.link.close(CloseCode::Done, "");
        self.pulses.close(self.session.link.peer().node, self.number);
    }
}

async fn call(
    head: SocketAddr,
    local: IpAddr,
    purpose: Purpose,
    identity: &ClusterIdentity,
    counters: Arc<Counters>,
) -> Result<(Endpoint, Session), DialError> {
    let endpoint = Endpoint::client(SocketAddr::new(local, 0), identity, counters)?;
    let session = endpoint.connect(head, purpose).await?;
    Ok((endpoint, session))
}

/// The next session of a head; for a node, never.
async fn accept(acceptor: &mut Option<Acceptor>) -> Session {
    match acceptor {
        Some(acceptor) => match acceptor.next().await {
            Some(session) => session,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

async fn tick(pulses: Pulses, alarm: Alarm) {
    let mut due = Instant::now();
    loop {
        let late = Instant::now().saturating_duration_since(due);
        // What waits in the sockets comes first; after a pause there may be much of it.
        for _ in 0..if late > OBSERVER_LATE { 32 } else { 2 } {
            yield_now().await;
        }
        due = pulses.tick();
        if alarm.until(due).await.is_err() {
            sleep(due.saturating_duration_since(Instant::now())).await;
        }
    }
}
