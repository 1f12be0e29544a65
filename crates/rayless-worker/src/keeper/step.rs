//! The keeper's step thread: the driver's session, and for a driver on another host the ring and the replies.
//!
//! It is a thread of its own, so that neither a flood of log lines nor a slow disk under the log files delays a step.

use crate::{
    event,
    ring::{AskedSet, CallWriter, Record, ReplyReader, Ring, RingError, timespec},
    session::{Frame, JUST_AFTER, OUTPUT_SOFT_LIMIT, Session, SessionError, plain_header},
    spin::{self, Spin},
    stopped::is_stopped,
};
use rayless_proto::{
    codec,
    ids::{CallId, Rank},
    limits::{HEARTBEAT_PERIOD, MAX_FRAGMENT, OBSERVER_LATE},
    v1::{
        status::NodeState,
        step::{FLAG_ERROR, FLAG_LAST, Header, KeeperEvent, Kind, Launch, Look},
    },
};
use rustix::event::epoll;
use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::mpsc::UnboundedSender;

const SESSION: u64 = 0;
const REPLIES: u64 = 1;
const ORDERS: u64 = 2;
/// Bytes of replies that may wait for a slow driver; beyond it the workers' reply rings fill up.
const REPLIES_QUEUED: usize = 4 << 20;
/// How long replies wait for those that complete their call, to travel in one write.
const HOLD: Duration = Duration::from_millis(2);

/// Main thread to step thread.
pub(super) enum Order {
    /// The driver is here.
    Begin {
        session: Box<Session>,
        /// On this host: calls and replies do not pass here.
        local: bool,
    },
    /// Tell the driver, with descriptors.
    Event(KeeperEvent, Vec<OwnedFd>),
    /// A line of output.
    Log { rank: Rank, stderr: bool, text: String },
    /// What the head holds the driver's node for.
    Verdict(Option<NodeState>),
    /// Send what is queued, then end.
    Finish,
}

/// Step thread to main thread.
pub(super) enum News {
    Launch(Box<Launch>),
    /// The driver wants the end; empty cause for an orderly one.
    Stop(String),
    /// The driver asks what the ranks do.
    Look(Look),
    /// The session is over; one line.
    Lost(String),
    /// A worker wrote nonsense into shared memory.
    Broken(RingError),
}

/// The main thread's end.
pub(super) struct StepThread {
    orders: Sender<Order>,
    wake: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

/// Sends lines of output, dropping what the driver does not take.
#[derive(Clone)]
pub(super) struct LogSender {
    orders: Sender<Order>,
    wake: Arc<OwnedFd>,
    queued: Arc<AtomicUsize>,
}

/// Bytes of lines on their way to the driver.
const LOG_BYTES_QUEUED: usize = 1 << 20;

impl LogSender {
    /// `false` where the line was dropped.
    pub(super) fn send(&self, rank: Rank, stderr: bool, text: &str) -> bool {
        if self.queued.load(Ordering::Relaxed) > LOG_BYTES_QUEUED {
            return false;
        }
        self.queued.fetch_add(text.len() + 64, Ordering::Relaxed);
        self.orders.send(Order::Log { rank, stderr, text: text.to_owned() }).is_ok()
    }

    /// After a batch of lines.
    pub(super) fn wake(&self) {
        event::notify(&self.wake);
    }
}

/// What the step thread needs to know of the group.
pub(super) struct StepSetup {
    pub(super) ring: Arc<Ring>,
    /// Written to by workers that want the collector.
    pub(super) replies: OwnedFd,
    /// Rank of each worker of this host, in the order of the ring's readers.
    pub(super) ranks: Vec<Rank>,
    pub(super) world_size: u32,
    pub(super) dead_after: Duration,
    pub(super) news: UnboundedSender<News>,
}

impl StepThread {
    pub(super) fn start(setup: StepSetup) -> io::Result<(Self, LogSender)> {
        let (orders, receiver) = channel();
        let wake = Arc::new(event::create()?);
        let queued = Arc::new(AtomicUsize::new(0));
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(ORDERS), epoll::EventFlags::IN)?;
        epoll::add(&epoll, &setup.replies, epoll::EventData::new_u64(REPLIES), epoll::EventFlags::IN)?;
        let log = LogSender { orders: orders.clone(), wake: Arc::clone(&wake), queued: Arc::clone(&queued) };
        let step = Step {
            readers: (0..setup.ranks.len()).map(|reader| ReplyReader::new(Arc::clone(&setup.ring), reader)).collect(),
            index: setup.ranks.iter().enumerate().map(|(index, rank)| (*rank, index)).collect(),
            writer: CallWriter::new(Arc::clone(&setup.ring)),
            spin: spin::among(setup.ranks.len() + 1),
            setup,
            orders: receiver,
            wake: Arc::clone(&wake),
            epoll,
            session: None,
            local: false,
            incoming: None,
            pending: None,
            last_call: 0,
            owed: HashMap::new(),
            hold: false,
            logs_queued: queued,
            verdict: None,
            interest: epoll::EventFlags::IN,
        };
        let thread = std::thread::Builder::new().name("rayless-step".into()).spawn(move || step.run())?;
        Ok((Self { orders, wake, thread }, log))
    }

    pub(super) fn order(&self, order: Order) {
        // The thread ends only after `Finish`.
        let _ = self.orders.send(order);
        event::notify(&self.wake);
    }

    /// Sends what is queued (for half a second at most) and closes the session.
    pub(super) fn finish(self) {
        self.order(Order::Finish);
        let _ = self.thread.join();
    }
}

/// A call whose fragments are coming in.
#[derive(Clone, Copy)]
struct Incoming {
    call: CallId,
    asked: AskedSet,
}

struct Step {
    setup: StepSetup,
    orders: Receiver<Order>,
    wake: Arc<OwnedFd>,
    epoll: OwnedFd,
    session: Option<Box<Session>>,
    local: bool,
    writer: CallWriter,
    readers: Vec<ReplyReader>,
    index: HashMap<Rank, usize>,
    incoming: Option<Incoming>,
    /// A fragment that the ring had no room for: the session is not read until it has.
    pending: Option<(Incoming, bool, Vec<u8>)>,
    last_call: CallId,
    /// Replies still to come per call.
    owed: HashMap<CallId, u32>,
    /// Replies are queued of which none completes a call: they wait for the one that does.
    hold: bool,
    logs_queued: Arc<AtomicUsize>,
    verdict: Option<NodeState>,
    spin: Spin,
    /// Of the session in the epoll set.
    interest: epoll::EventFlags,
}

impl Step {
    fn run(mut self) {
        let mut tick = Instant::now() + HEARTBEAT_PERIOD;
        let mut readable = false;
        loop {
            match self.take_orders() {
                Ok(began) => readable |= began,
                Err(Finished) => return self.drain(),
            }
            let worked = match self.work(readable) {
                Ok(worked) => worked,
                Err(error) => {
                    self.lose(&error);
                    true
                }
            };
            let now = Instant::now();
            if now >= tick {
                tick = self.tick(now, tick);
            }
            readable = if worked { self.spin() } else { false };
            if !readable && !worked {
                readable = self.sleep(tick);
            }
        }
    }

    /// Whether a session began.
    fn take_orders(&mut self) -> Result<bool, Finished> {
        let mut began = false;
        loop {
            match self.orders.try_recv() {
                Ok(Order::Begin { session, local }) => {
                    self.local = local;
                    if local {
                        // From here on the driver collects; this thread must not take its wake-ups away.
                        let _ = epoll::delete(&self.epoll, &self.setup.replies);
                    }
                    let data = epoll::EventData::new_u64(SESSION);
                    let _ = epoll::add(&self.epoll, session.fd(), data, epoll::EventFlags::IN);
                    self.interest = epoll::EventFlags::IN;
                    self.session = Some(session);
                    began = true;
                }
                Ok(Order::Event(event, fds)) => {
                    if let Some(session) = &mut self.session {
                        session.attach(fds);
                        session.queue(plain_header(Kind::Event), &[&codec::encode(&event)]);
                        self.hold = false;
                    }
                }
                Ok(Order::Log { rank, stderr, text }) => {
                    self.logs_queued.fetch_sub(text.len() + 64, Ordering::Relaxed);
                    if let Some(session) = self.session.as_mut().filter(|s| s.queued() < 2 * LOG_BYTES_QUEUED) {
                        let flags = FLAG_LAST | if stderr { FLAG_ERROR } else { 0 };
                        session.queue(Header { rank, flags, ..plain_header(Kind::Log) }, &[text.as_bytes()]);
                        self.hold = false;
                    }
                }
                Ok(Order::Verdict(state)) => self.verdict = state,
                Ok(Order::Finish) | Err(TryRecvError::Disconnected) => return Err(Finished),
                Err(TryRecvError::Empty) => return Ok(began),
            }
        }
    }

    /// One round: what came from the driver, then what came from the workers. Whether there was anything.
    fn work(&mut self, readable: bool) -> Result<bool, SessionError> {
        let mut worked = self.write_pending()?;
        let mut may_read = readable || worked;
        while let Some(session) = self.session.as_mut().filter(|_| self.pending.is_none()) {
            // What is here already comes first: only so is the memory of a session that has to wait bounded.
            if let Some(frame) = session.next_frame()? {
                self.take_frame(frame)?;
                worked = true;
            } else if std::mem::take(&mut may_read) {
                session.read()?;
            } else {
                break;
            }
        }
        self.writer.wake();
        worked |= self.collect();
        if let Some(session) = self.session.as_mut().filter(|_| !self.hold) {
            session.flush()?;
        }
        Ok(worked)
    }

    fn take_frame(&mut self, frame: Frame) -> Result<(), SessionError> {
        let header = frame.header;
        match header.kind {
            Kind::Ping => {}
            Kind::Launch => {
                let launch = codec::decode::<Launch>(&frame.payload).map_err(|e| broken(e.to_string()))?;
                let _ = self.setup.news.send(News::Launch(Box::new(launch)));
            }
            Kind::Stop => {
                let cause = String::from_utf8_lossy(&frame.payload).into_owned();
                let _ = self.setup.news.send(News::Stop(cause));
            }
            Kind::Look => {
                let look = codec::decode::<Look>(&frame.payload).map_err(|e| broken(e.to_string()))?;
                let _ = self.setup.news.send(News::Look(look));
            }
            Kind::Call if !self.local => self.take_call(header, frame.payload)?,
            Kind::Call | Kind::Reply | Kind::Event | Kind::Log => {
                return Err(broken(format!("a driver sends no {:?} here", header.kind)));
            }
        }
        Ok(())
    }

    fn take_call(&mut self, header: Header, mut payload: Vec<u8>) -> Result<(), SessionError> {
        let incoming = match self.incoming {
            Some(incoming) if incoming.call == header.call && header.asked == 0 => incoming,
            None if header.call == self.last_call + 1 => {
                let listed = header.asked.min(self.setup.world_size) as usize * 4;
                if header.asked > self.setup.world_size || payload.len() < listed {
                    return Err(broken("a call's list of ranks is cut short".into()));
                }
                let mut asked = AskedSet::default();
                for rank in payload[..listed].chunks_exact(4) {
                    let rank = u32::from_le_bytes([rank[0], rank[1], rank[2], rank[3]]);
                    if let Some(index) = self.index.get(&rank) {
                        asked.insert(*index);
                    }
                }
                payload.drain(..listed);
                Incoming { call: header.call, asked }
            }
            _ => return Err(broken(format!("call {} came after call {}", header.call, self.last_call))),
        };
        if payload.len() > MAX_FRAGMENT {
            return Err(broken("a fragment is too long".into()));
        }
        let last = header.flags & FLAG_LAST != 0;
        self.incoming = (!last).then_some(incoming);
        self.last_call = header.call;
        self.pending = Some((incoming, last, payload));
        self.write_pending().map(drop)
    }

    /// Writes the waiting fragment to the ring, if there is one and it has room.
    fn write_pending(&mut self) -> Result<bool, SessionError> {
        let Some((incoming, last, payload)) = &self.pending else { return Ok(false) };
        let record = Record { call: incoming.call, last: *last, asked: incoming.asked, payload };
        match self.writer.push(&record) {
            Ok(true) => {
                if *last && incoming.asked.len() > 0 {
                    self.owed.insert(incoming.call, incoming.asked.len());
                }
                self.pending = None;
                Ok(true)
            }
            Ok(false) => {
                // Readers must see what is there, or there will never be room.
                self.writer.wake();
                Ok(false)
            }
            Err(error) => {
                let _ = self.setup.news.send(News::Broken(error));
                self.pending = None;
                Ok(false)
            }
        }
    }

    /// Takes replies to the session's queue, all that are there. Whether there were any.
    fn collect(&mut self) -> bool {
        if self.local {
            return false;
        }
        let mut any = false;
        let mut release = !self.hold;
        for (index, reader) in self.readers.iter_mut().enumerate() {
            loop {
                if self.session.as_ref().is_some_and(|session| session.queued() > REPLIES_QUEUED) {
                    self.hold = false;
                    return any;
                }
                let fragment = match reader.try_next() {
                    Ok(Some(fragment)) => fragment,
                    Ok(None) => break,
                    Err(error) => {
                        let _ = self.setup.news.send(News::Broken(error));
                        break;
                    }
                };
                let Some(session) = &mut self.session else { break };
                if !any && session.queued() == 0 {
                    release = false;
                }
                any = true;
                let flags = if fragment.last { FLAG_LAST } else { 0 } | if fragment.error { FLAG_ERROR } else { 0 };
                let rank = self.setup.ranks[index];
                let header = Header { rank, flags, call: fragment.call, ..plain_header(Kind::Reply) };
                session.queue(header, &[&fragment.payload]);
                release |= fragment.error || session.queued() > OUTPUT_SOFT_LIMIT / 4;
                if fragment.last && count_down(&mut self.owed, fragment.call) {
                    release = true;
                }
            }
        }
        if any {
            self.hold = !release;
        }
        any
    }

    /// Looks again and again for a short while, giving the core away between looks; whether the session may have something.
    fn spin(&mut self) -> bool {
        let mut spinning = self.spin.begin();
        while self.spin.again(&mut spinning) {
            let ready = self.poll(Some(Duration::ZERO));
            if ready.session {
                return true;
            }
            if ready.any || (!self.local && self.readers.iter().any(ReplyReader::has_more)) {
                return false;
            }
        }
        false
    }

    /// Sleeps until something happens or `tick`; whether the session may have something.
    fn sleep(&mut self, tick: Instant) -> bool {
        if !self.local {
            self.setup.ring.collector_sleeps();
            if self.readers.iter().any(ReplyReader::has_more) {
                self.setup.ring.collector_wakes();
                return false;
            }
        }
        self.set_interest();
        let mut timeout = tick.saturating_duration_since(Instant::now());
        if self.hold {
            timeout = timeout.min(HOLD);
        }
        let ready = self.poll(Some(timeout));
        // The others are late: these go alone.
        self.hold &= ready.any;
        if !self.local {
            self.setup.ring.collector_wakes();
        }
        ready.session
    }

    fn set_interest(&mut self) {
        let Some(session) = &self.session else { return };
        let mut interest = epoll::EventFlags::RDHUP;
        if self.pending.is_none() {
            interest |= epoll::EventFlags::IN;
        }
        if session.queued() > 0 && !self.hold {
            interest |= epoll::EventFlags::OUT;
        }
        if interest != self.interest {
            let _ = epoll::modify(&self.epoll, session.fd(), epoll::EventData::new_u64(SESSION), interest);
            self.interest = interest;
        }
    }

    fn poll(&mut self, timeout: Option<Duration>) -> Ready {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
        let timeout = timeout.map(timespec);
        let mut ready = Ready::default();
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) else { return ready };
        let mut hung_up = false;
        for event in events.iter() {
            ready.any = true;
            match event.data.u64() {
                SESSION => {
                    let flags = event.flags;
                    ready.session |= flags.intersects(!epoll::EventFlags::OUT);
                    hung_up |=
                        flags.intersects(epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR);
                }
                REPLIES => event::clear(&self.setup.replies),
                _ => event::clear(&self.wake),
            }
        }
        if hung_up && self.pending.is_some() {
            // Nobody reads the session now, so its end would be seen only after the ring has room: too late.
            self.lose(&SessionError::Closed);
        }
        ready
    }

    /// Each half second: a ping where nothing else was said, and a look at the driver's last sign of life. Returns when to look again:
    /// sooner where the driver's time is up before.
    fn tick(&mut self, now: Instant, due: Instant) -> Instant {
        self.hold = false;
        let next = now + HEARTBEAT_PERIOD;
        let Some(session) = &mut self.session else { return next };
        if now.duration_since(session.spoke) >= HEARTBEAT_PERIOD / 2 {
            session.queue_ping();
        }
        if now.duration_since(due) > OBSERVER_LATE || self.pending.is_some() {
            // It was this thread that slept, or it does not listen: the driver may have spoken all the while.
            session.heard = now;
        }
        let silence = now.duration_since(session.heard);
        let dead_after = self.setup.dead_after;
        // A driver that is late is borne longer than one that the kernel holds stopped.
        let stopped = silence > dead_after && session.peer_pid().is_some_and(is_stopped);
        let vouched = self.local || self.verdict == Some(NodeState::Alive);
        let limit = dead_after * if vouched && !stopped { 3 } else { 1 };
        if silence <= limit {
            let first = if silence <= dead_after { dead_after } else { limit };
            return next.min(session.heard + first + JUST_AFTER);
        }
        let mut cause = format!("no sign of life from it for {:.1} s", silence.as_secs_f64());
        if stopped {
            cause.push_str(", it is stopped (SIGSTOP)");
        }
        // Should it only have slept, it finds this when it wakes.
        let cause_told = format!("lost its driver: {cause}");
        let told = KeeperEvent::Failed { rank: None, cause: cause_told, tail: String::new() };
        session.queue(plain_header(Kind::Event), &[&codec::encode(&told)]);
        let _ = session.flush();
        session.end_by_reset();
        self.lose(&SessionError::Protocol(cause));
        next
    }

    fn lose(&mut self, error: &SessionError) {
        if let Some(session) = self.session.take() {
            let _ = epoll::delete(&self.epoll, session.fd());
            let cause = match error {
                SessionError::Protocol(cause) => cause.clone(),
                other => other.in_words(),
            };
            let _ = self.setup.news.send(News::Lost(cause));
        }
    }

    /// The last words to the driver.
    fn drain(mut self) {
        let until = Instant::now() + Duration::from_millis(500);
        while let Some(session) = &mut self.session {
            if session.flush().is_err() || session.queued() == 0 || Instant::now() > until {
                return;
            }
            let data = epoll::EventData::new_u64(SESSION);
            let _ = epoll::modify(&self.epoll, session.fd(), data, epoll::EventFlags::OUT);
            self.poll(Some(Duration::from_millis(50)));
        }
    }
}

struct Finished;

#[derive(Default)]
struct Ready {
    any: bool,
    session: bool,
}

/// One reply of `call` less to come; whether it was the last.
fn count_down(owed: &mut HashMap<CallId, u32>, call: CallId) -> bool {
    match owed.get_mut(&call) {
        Some(left) if *left > 1 => {
            *left -= 1;
            false
        }
        _ => {
            owed.remove(&call);
            true
        }
    }
}

const fn broken(what: String) -> SessionError {
    SessionError::Protocol(what)
}
