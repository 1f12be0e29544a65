//! The keeper's main loop: from the driver's launch to the last reaped process.

use super::{
    KeeperError, child,
    door::{self, Caller},
    dying,
    links::{self, Arrival},
    logs::{Pipe, RankLog},
    look, reap,
    stacks::Stacks,
    step::{self, News, Order, StepSetup, StepThread},
};
use crate::{event, ring::Ring, robust::RobustMutex, session::plain_header};
use rayless_net::{framing, identity::TlsIdentity};
use rayless_proto::{
    codec,
    ids::Rank,
    limits::{MAX_LINK_ENDS, MAX_LOCAL_MESSAGE, REAP_TIMEOUT},
    v1::{
        control::{HeldGroup, WorkerState},
        keeper::{FromKeeper, KeeperConfig, ToKeeper},
        link::{LaunchLinks, LinkBoot, LinkReport, LinkState},
        step::{KeeperEvent, Kind, Launch, Look, RankLook},
    },
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::spawn_local,
    time::sleep_until,
};

/// From the end of an orderly stop's calls to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// Between two looks at what the workers do.
const LOOK: Duration = Duration::from_secs(1);

/// What happens to a worker.
enum Event {
    /// Its process will have ended so, surely.
    Dying(usize, ExitStatus),
    /// Its process ended.
    Exited(usize),
    /// It said that it takes calls.
    Ready(usize, Vec<(String, String)>),
    /// One of its links changed.
    Link(usize, LinkReport),
    /// A driver of this host ended.
    DriverEnded(u32),
    /// A look is over.
    Looked(Asker, Look, Vec<RankLook>),
}

/// Who wants to know what the ranks do.
enum Asker {
    Driver,
    /// Its number.
    Daemon(u64),
}

pub(super) struct Worker {
    pub(super) rank: Rank,
    pub(super) pid: u32,
    process: Child,
    pub(super) pidfd: Rc<AsyncFd<OwnedFd>>,
    log: Rc<RefCell<RankLog>>,
    pipes: [Rc<Pipe>; 2],
    pub(super) stacks: Rc<Stacks>,
    arrivals: mpsc::UnboundedSender<Arrival>,
    ready: bool,
    /// As last told to the daemons.
    told: WorkerState,
    /// Until it ends; `None` where no thread could be had for it.
    watch: Option<dying::Watch>,
    /// How it will have ended, told before it has.
    dying: Option<ExitStatus>,
    status: Option<ExitStatus>,
}

/// How the group ends.
struct Ending {
    /// Empty for an orderly end.
    cause: String,
    /// When what still runs is killed, for an orderly end.
    kill_at: Option<Instant>,
    /// When even a process that cannot be killed is left alone.
    give_up_at: Instant,
}

/// From, to, channel, and whether it is the sending end.
type LinkEnd = (Rank, Rank, u16, bool);

/// One group's part on this host.
pub(super) struct Group {
    config: KeeperConfig,
    /// What sessions to come shake hands with; the door looks at it.
    identity: Arc<Mutex<TlsIdentity>>,
    log_dir: PathBuf,
    ring: Arc<Ring>,
    ring_fd: OwnedFd,
    replies: OwnedFd,
    step: StepThread,
    log: step::LogSender,
    workers: Vec<Worker>,
    daemons: HashMap<u64, mpsc::UnboundedSender<FromKeeper>>,
    /// The last word of each end of a link here that is not over.
    links: BTreeMap<LinkEnd, LinkReport>,
    events: mpsc::UnboundedSender<Event>,
    /// A driver has come, and whether it runs on this host.
    driver: Option<bool>,
    launched: bool,
    orphans: bool,
    ending: Option<Ending>,
    inbox: Inbox,
}

struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    news: mpsc::UnboundedReceiver<News>,
    callers: mpsc::UnboundedReceiver<Caller>,
}

impl Group {
    /// Opens the door and makes the ring. Within a runtime.
    pub(super) fn new(config: KeeperConfig, listener: UnixListener, log_dir: PathBuf) -> Result<Self, KeeperError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source: io::Error| KeeperError::Io { what, source }
        };
        let identity = TlsIdentity::from_bundle(&config.leaf).map_err(|e| KeeperError::Config(e.to_string()))?;
        let (ring_fd, ring) = Ring::create(config.ranks.len()).map_err(failed("cannot make the ring"))?;
        let ring = Arc::new(ring);
        let replies = event::create().map_err(failed("no eventfd"))?;
        let (news_sender, news) = mpsc::unbounded_channel();
        let (step, log) = StepThread::start(StepSetup {
            ring: Arc::clone(&ring),
            replies: replies.try_clone().map_err(failed("no descriptors"))?,
            ranks: config.ranks.iter().map(|r| r.rank).collect(),
            world_size: config.world_size,
            dead_after: Duration::from_millis(config.dead_after_ms),
            news: news_sender,
        })
        .map_err(failed("cannot start the step thread"))?;
        let (events_sender, events) = mpsc::unbounded_channel();
        let (callers_sender, callers) = mpsc::unbounded_channel();
        let identity = Arc::new(Mutex::new(identity));
        door::open(listener, Arc::clone(&identity), config.group, config.driver_node, callers_sender);
        Ok(Self {
            config,
            identity,
            log_dir,
            ring,
            ring_fd,
            replies,
            step,
            log,
            workers: Vec::new(),
            daemons: HashMap::new(),
            links: BTreeMap::new(),
            events: events_sender,
            driver: None,
            launched: false,
            orphans: false,
            ending: None,
            inbox: Inbox { events, news, callers },
        })
    }

    /// Runs until the group is over and its processes are reaped. Within a `LocalSet` on the main thread.
    pub(super) async fn run(mut self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut children = signal(SignalKind::child())?;
        let driver_wait = Instant::now() + Duration::from_millis(self.config.driver_wait_ms);
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.is_over() {
            let deadline = self.deadline(driver_wait);
            tokio::select! {
                Some(event) = self.inbox.events.recv() => self.on_event(event),
                Some(news) = self.inbox.news.recv() => self.on_news(news),
                Some(caller) = self.inbox.callers.recv() => self.on_caller(caller),
                _ = terminate.recv() => self.end("its keeper was told to end by SIGTERM".into(), None),
                _ = interrupt.recv() => self.end("its keeper was told to end by SIGINT".into(), None),
                _ = children.recv() => self.orphans = true,
                _ = look.tick() => self.look(),
                () = sleep_until(deadline.into()) => self.on_deadline(),
            }
        }
        self.leave().await;
        Ok(())
    }

    fn deadline(&self, driver_wait: Instant) -> Instant {
        match &self.ending {
            Some(ending) => ending.kill_at.unwrap_or(ending.give_up_at),
            None if !self.launched => driver_wait,
            None => Instant::now() + Duration::from_secs(3600),
        }
    }

    fn on_deadline(&mut self) {
        if let Some(ending) = &mut self.ending {
            if ending.kill_at.take().is_some() {
                self.kill_all();
            }
        } else if !self.launched {
            self.end("no driver came to start it".into(), None);
        }
    }

    fn is_over(&self) -> bool {
        let Some(ending) = &self.ending else { return false };
        self.workers.iter().all(|worker| worker.status.is_some()) || Instant::now() >= ending.give_up_at
    }

    fn on_caller(&mut self, caller: Caller) {
        match caller {
            Caller::Driver { session, pid } => self.on_driver(session, pid),
            Caller::Link { rank, arrival } => {
                // Dropped, and with it closed, where there is no such worker yet: its peer calls again.
                if let Some(worker) = self.workers.iter().find(|worker| worker.rank == rank) {
                    let _ = worker.arrivals.send(arrival);
                }
            }
            Caller::Daemon { id, outbox } => {
                self.daemons.insert(id, outbox);
            }
            Caller::Gone { id } => {
                self.daemons.remove(&id);
                if self.daemons.is_empty() {
                    // Nobody would tell if what it said last no longer held.
                    self.step.order(Order::Verdict(None));
                }
            }
            Caller::Said { id, message: ToKeeper::Watch } => {
                if let Some(daemon) = self.daemons.get(&id) {
                    let _ = daemon.send(FromKeeper::Held(self.held()));
                }
            }
            Caller::Said { message: ToKeeper::Stop { cause }, .. } => {
                if cause.is_empty() && self.ending.is_none() {
                    // In order for the workers; for the driver it is the end of its group all the same.
                    let cause = format!("group {} was stopped (rayless stop)", self.config.group);
                    let failed = KeeperEvent::Failed { rank: None, cause, tail: String::new() };
                    self.step.order(Order::Event(failed, Vec::new()));
                }
                self.end(cause, None);
            }
            Caller::Said { message: ToKeeper::Leaf(leaf), .. } => match TlsIdentity::from_bundle(&leaf) {
                Ok(identity) => *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity,
                Err(error) => tracing::error!(%error, "the daemon's new identity is not taken"),
            },
            Caller::Said { id, message: ToKeeper::Look(look) } => self.begin_look(Asker::Daemon(id), look),
            Caller::Said { message: ToKeeper::NodeVerdict { node, state }, .. } => {
                if node == self.config.driver_node {
                    self.step.order(Order::Verdict(Some(state)));
                }
            }
        }
    }

    fn on_driver(&mut self, mut session: Box<crate::session::Session>, pid: Option<u32>) {
        if self.driver.is_some() || self.ending.is_some() {
            let what = if self.ending.is_some() { "is ending" } else { "has a driver already" };
            let cause = format!("group {} {what}", self.config.group);
            let refusal = KeeperEvent::Failed { rank: None, cause, tail: String::new() };
            session.queue(plain_header(Kind::Event), &[&codec::encode(&refusal)]);
            let _ = session.flush();
            return;
        }
        self.driver = Some(pid.is_some());
        self.step.order(Order::Begin { session, local: pid.is_some() });
        if let Some(pid) = pid {
            self.watch_driver(pid);
        }
    }

    /// The end of a driver of this host is seen even where a child that it forked holds its sockets open.
    fn watch_driver(&self, pid: u32) {
        let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
        let Ok(fd) = pidfd_open(process, PidfdFlags::empty()) else { return };
        let events = self.events.clone();
        spawn_local(async move {
            if let Ok(fd) = child::watch(fd) {
                let _ = fd.readable().await;
                let _ = events.send(Event::DriverEnded(pid));
            }
        });
    }

    fn on_news(&mut self, news: News) {
        match news {
            News::Launch(launch) if !self.launched && self.ending.is_none() => self.launch(&launch),
            News::Launch(_) => {}
            News::Stop(cause) => self.end(cause, None),
            News::Look(look) => self.begin_look(Asker::Driver, look),
            News::Lost(cause) => self.end(format!("lost its driver: {cause}"), None),
            News::Broken(error) => {
                let index = error.reader as usize;
                let Some(worker) = self.workers.get(index) else { return };
                let (rank, pid) = (worker.rank, worker.pid);
                let what = error.what;
                self.end(format!("{} broke the ring: {what}", self.named(rank, pid)), Some(index));
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Dying(index, status) => self.on_dying(index, status),
            Event::Exited(index) => self.on_exit(index),
            Event::Ready(index, versions) => {
                let worker = &mut self.workers[index];
                worker.ready = true;
                let rank = worker.rank;
                self.step.order(Order::Event(KeeperEvent::Ready { rank, versions }, Vec::new()));
                self.tell_change(index, WorkerState::Ready);
            }
            Event::Looked(asker, look, ranks) => self.end_look(&asker, &look, ranks),
            Event::Link(index, report) => self.on_link(index, report),
            Event::DriverEnded(pid) => self.end(format!("its driver (pid {pid}) ended"), None),
        }
    }

    /// A worker speaks for its own end of a link only.
    fn on_link(&mut self, index: usize, report: LinkReport) {
        let LinkReport { from, to, by_sender, .. } = report;
        let end = report.key();
        let known = self.links.contains_key(&end);
        let own = self.workers[index].rank == if by_sender { from } else { to };
        if !own || !known && self.links.len() >= MAX_LINK_ENDS {
            tracing::warn!(?end, "a report of a link is dropped");
            return;
        }
        for daemon in self.daemons.values() {
            let _ = daemon.send(FromKeeper::Link(report.clone()));
        }
        self.step.order(Order::Event(KeeperEvent::Link(report.clone()), Vec::new()));
        if report.state == LinkState::Closed {
            self.links.remove(&end);
        } else {
            self.links.insert(end, report);
        }
    }

    fn on_exit(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        let status = match worker.process.try_wait() {
            Ok(Some(status)) => status,
            Ok(None) => return,
            // Reaped by someone else: that it is gone is certain.
            Err(_) => ExitStatus::from_raw(libc::SIGKILL),
        };
        worker.status = Some(status);
        worker.watch = None;
        if worker.dying.is_some_and(|told| told != status) {
            tracing::warn!(rank = worker.rank, "it {}, other than was told", child::how_it_ended(status));
        }
        let cause = self.bury(index, status);
        if self.ending.is_none() {
            // A driver on this host closes the ring itself; the workers may leave before its `Stop` is read here.
            if self.ring.is_closed() && status.success() {
                self.end(String::new(), None);
            } else {
                self.end(cause, Some(index));
            }
        }
    }

    /// What [`Self::on_exit`] will find, and the end of the group at once: the kernel may have gigabytes to free before it. What is no death
    /// of a worker on its own account is left to that: the group ends already, or its driver lets the workers leave.
    fn on_dying(&mut self, index: usize, status: ExitStatus) {
        let worker = &mut self.workers[index];
        if self.ending.is_some() || worker.status.is_some() || self.ring.is_closed() {
            return;
        }
        worker.dying = Some(status);
        let cause = self.bury(index, status);
        self.end(cause, Some(index));
    }

    /// The ring and the daemons do without the worker; what its death is called.
    fn bury(&mut self, index: usize, status: ExitStatus) -> String {
        self.ring.mark_gone(index);
        let worker = &self.workers[index];
        // Its last words are still in the pipes.
        worker.pipes.iter().for_each(|pipe| pipe.last_words());
        let mut cause = format!("{} {}", self.named(worker.rank, worker.pid), child::how_it_ended(status));
        let last = worker.log.borrow().last_stderr().trim().to_owned();
        if status.code().is_some_and(|code| code != 0) && !last.is_empty() {
            cause = format!("{cause}: {last}");
        }
        self.tell_change(index, WorkerState::Dead);
        cause
    }

    fn begin_look(&self, asker: Asker, look: Look) {
        let states = self.workers.iter().enumerate().map(|(index, worker)| self.state(index, worker));
        let ranks = look::at(&self.ring, &self.workers, states);
        let stacks = look::begin(&self.workers, ranks, look.clone());
        let events = self.events.clone();
        spawn_local(async move {
            let _ = events.send(Event::Looked(asker, look, stacks.await));
        });
    }

    fn end_look(&self, asker: &Asker, look: &Look, ranks: Vec<RankLook>) {
        if let Asker::Daemon(id) = asker {
            if let Some(daemon) = self.daemons.get(id) {
                let _ = daemon.send(FromKeeper::Looked { ranks });
            }
            return;
        }
        if let Some(line) = look::line(&ranks, look) {
            tracing::warn!(group = %self.config.group, "stuck: {line}");
            for daemon in self.daemons.values() {
                let _ = daemon.send(FromKeeper::Stuck { line: line.clone() });
            }
        }
        for (worker, rank) in self.workers.iter().zip(&ranks).filter(|(_, rank)| !rank.stack.is_empty()) {
            let what = rank.sentence();
            worker.log.borrow_mut().keep(&format!("rayless: no progress: {what}\n{}", rank.stack));
        }
        self.step.order(Order::Event(KeeperEvent::Looked { ranks }, Vec::new()));
    }

    /// `rank 3 on node b (pid 123)`.
    fn named(&self, rank: Rank, pid: u32) -> String {
        format!("rank {rank} on node {} (pid {pid})", self.config.node_name)
    }

    fn launch(&mut self, launch: &Launch) {
        self.launched = true;
        let boot = match self.link_boot(launch) {
            Ok(boot) => boot,
            Err(cause) => return self.end(cause, None),
        };
        let mut directory = PathBuf::from(&launch.directory);
        let missing = !directory.is_dir();
        if missing {
            directory = PathBuf::from(&self.config.run_dir);
        }
        for index in 0..self.config.ranks.len() {
            let rank = self.config.ranks[index].rank;
            if let Err(error) = self.start_worker(index, launch, &boot, &directory) {
                let cause = child::not_started(&self.config, rank, &launch.program, &error);
                self.end(cause, None);
                return;
            }
            if missing {
                let told = format!("{} is not here, running in {}", launch.directory, directory.display());
                self.workers[index].log.borrow_mut().note(&told);
            }
        }
        let fds = if self.driver == Some(true) {
            [&self.ring_fd, &self.replies].iter().filter_map(|fd| fd.try_clone().ok()).collect()
        } else {
            Vec::new()
        };
        let pids = self.workers.iter().map(|worker| (worker.rank, worker.pid)).collect();
        self.step.order(Order::Event(KeeperEvent::Launched { pids }, fds));
        for index in 0..self.workers.len() {
            self.tell_change(index, WorkerState::Starting);
        }
    }

    /// What this host's workers need for links, in bytes; empty where the driver gave nothing for them. An error: its wishes and this node's
    /// contradict each other.
    fn link_boot(&self, launch: &Launch) -> Result<Rc<[u8]>, String> {
        let Some(LaunchLinks { table, policy }) = &launch.links else { return Ok(Rc::default()) };
        let node = format!("node {}", self.config.node_name);
        let policy = crate::links::together((&self.config.links.policy, &node), (policy, "the driver"));
        let boot = LinkBoot {
            group: self.config.group,
            table: table.clone(),
            policy: policy.map_err(|contradiction| contradiction.to_string())?,
            leaf: self.config.leaf.clone(),
            keeper_socket: super::socket_path(&self.config).to_string_lossy().into_owned(),
            rdma_ports: self.config.links.rdma_ports,
            rdma_devices: self.config.links.rdma_devices.clone(),
        };
        Ok(codec::encode(&boot).into())
    }

    fn start_worker(
        &mut self,
        index: usize,
        launch: &Launch,
        link_boot: &Rc<[u8]>,
        directory: &Path,
    ) -> io::Result<()> {
        let rank = self.config.ranks[index].rank;
        let (life, mutex) = RobustMutex::create()?;
        let (ring, replies) = (self.ring_fd.as_fd(), self.replies.as_fd());
        let started = child::start(&self.config, index, launch, directory, ring, replies, life)?;
        let log = Rc::new(RefCell::new(RankLog::open(&self.log_dir, rank, self.log.clone())));
        let pidfd = Rc::new(child::watch(started.pidfd)?);
        let pipes = [
            Rc::new(Pipe::new(OwnedFd::from(started.stdout), Rc::clone(&log), false)?),
            Rc::new(Pipe::new(OwnedFd::from(started.stderr), Rc::clone(&log), true)?),
        ];
        for pipe in &pipes {
            let pipe = Rc::clone(pipe);
            spawn_local(async move { pipe.follow().await });
        }
        let (events, watched) = (self.events.clone(), Rc::clone(&pidfd));
        spawn_local(async move {
            let _ = watched.readable().await;
            let _ = events.send(Event::Exited(index));
        });
        let events = self.events.clone();
        let watch = dying::watch(mutex, started.process.id(), move |status| {
            let _ = events.send(Event::Dying(index, status));
        });
        let watch = watch.inspect_err(|error| tracing::warn!(%error, "deaths are told late")).ok();
        let stacks = Rc::new(Stacks::new(started.process.id(), started.stacks)?);
        started.control.set_nonblocking(true)?;
        let control = tokio::net::UnixStream::from_std(started.control)?;
        let (events, boot, link_boot) = (self.events.clone(), launch.boot.clone(), Rc::clone(link_boot));
        spawn_local(async move {
            if let Some(versions) = boot_worker(control, &boot, &link_boot).await {
                let _ = events.send(Event::Ready(index, versions));
            }
        });
        started.links.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(started.links)?;
        let (arrivals, arriving) = mpsc::unbounded_channel();
        let events = self.events.clone();
        spawn_local(links::serve(socket, arriving, move |report| {
            let _ = events.send(Event::Link(index, report));
        }));
        self.workers.push(Worker {
            rank,
            pid: started.process.id(),
            process: started.process,
            pidfd,
            log,
            pipes,
            stacks,
            arrivals,
            ready: false,
            told: WorkerState::Dead,
            watch,
            dying: None,
            status: None,
        });
        Ok(())
    }

    /// The group is over: for a fault everything is killed at once, in order the workers get a moment to leave by themselves.
    fn end(&mut self, cause: String, worker: Option<usize>) {
        if let Some(ending) = &mut self.ending {
            if !cause.is_empty() && ending.kill_at.take().is_some() {
                ending.cause = cause;
                self.kill_all();
            }
            return;
        }
        tracing::info!(group = %self.config.group, cause, "ending");
        let now = Instant::now();
        let orderly = cause.is_empty();
        self.ring.close();
        let kill_at = orderly.then(|| now + GRACE);
        let give_up_at = kill_at.unwrap_or(now) + REAP_TIMEOUT;
        self.ending = Some(Ending { cause: cause.clone(), kill_at, give_up_at });
        if !orderly {
            self.kill_all();
            let worker = worker.and_then(|index| self.workers.get(index));
            let rank = worker.map(|worker| worker.rank);
            let tail = worker.map(|worker| worker.log.borrow().tail()).unwrap_or_default();
            self.step.order(Order::Event(KeeperEvent::Failed { rank, cause, tail }, Vec::new()));
        }
    }

    fn kill_all(&self) {
        for worker in self.workers.iter().filter(|worker| worker.status.is_none()) {
            let _ = pidfd_send_signal(worker.pidfd.get_ref(), Signal::KILL);
        }
    }

    /// After the last worker: its leftovers, the last words, the files.
    async fn leave(mut self) {
        let Some(ending) = self.ending.take() else { return };
        let pids: Vec<u32> = self.workers.iter().map(|worker| worker.pid).collect();
        let reaped = self.workers.iter().all(|worker| worker.status.is_some());
        if !reap::clear_leftovers(&pids, ending.give_up_at).await || !reaped {
            tracing::warn!(group = %self.config.group, "processes are left that could not be killed");
        }
        self.step.order(Order::Event(KeeperEvent::Ended, Vec::new()));
        for daemon in self.daemons.values() {
            let _ = daemon.send(FromKeeper::Ended { cause: ending.cause.clone() });
        }
        // Not before all is reaped: who finds the socket gone may count on that.
        remove_files(&self.config);
        self.step.finish();
        let flushed = async {
            for daemon in self.daemons.values() {
                daemon.closed().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(500), flushed).await;
    }

    fn held(&self) -> HeldGroup {
        let count = self.config.ranks.len();
        let of = |index: usize| self.workers.get(index);
        HeldGroup {
            group: self.config.group,
            name: self.config.name.clone(),
            world_size: self.config.world_size,
            driver_node: self.config.driver_node,
            ranks: self.config.ranks.clone(),
            links: self.links.values().cloned().collect(),
            launch: self.config.requester.filter(|_| !self.launched),
            pids: (0..count).map(|index| of(index).map_or(0, |worker| worker.pid)).collect(),
            states: (0..count).map(|index| of(index).map_or(WorkerState::Starting, |w| self.state(index, w))).collect(),
        }
    }

    fn state(&self, index: usize, worker: &Worker) -> WorkerState {
        match (worker.status.or(worker.dying), worker.ready) {
            (Some(_), _) => WorkerState::Dead,
            (None, false) => WorkerState::Starting,
            (None, true) => match self.ring.state(index).0 {
                WorkerState::Busy => WorkerState::Busy,
                _ => WorkerState::Ready,
            },
        }
    }

    /// Once a second: what the workers do, for the daemons.
    fn look(&mut self) {
        if std::mem::take(&mut self.orphans) && self.ending.is_none() {
            reap::reap_orphans(&self.workers.iter().map(|worker| worker.pid).collect::<Vec<_>>());
        }
        if self.daemons.is_empty() {
            return;
        }
        for index in 0..self.workers.len() {
            let state = self.state(index, &self.workers[index]);
            self.tell_change(index, state);
        }
    }

    fn tell_change(&mut self, index: usize, state: WorkerState) {
        let worker = &mut self.workers[index];
        if worker.told == state {
            return;
        }
        worker.told = state;
        for daemon in self.daemons.values() {
            let _ = daemon.send(FromKeeper::WorkerChanged { rank: worker.rank, pid: worker.pid, state });
        }
    }
}

pub(super) fn remove_files(config: &KeeperConfig) {
    let _ = std::fs::remove_file(super::socket_path(config));
    let _ = std::fs::remove_file(super::pid_path(config));
}

/// Sends the boot bytes and waits for `ready`; `None` where the worker ends before that.
async fn boot_worker(
    mut control: tokio::net::UnixStream,
    boot: &[u8],
    link_boot: &[u8],
) -> Option<Vec<(String, String)>> {
    framing::write_frame(&mut control, boot, MAX_LOCAL_MESSAGE).await.ok()?;
    framing::write_frame(&mut control, link_boot, MAX_LOCAL_MESSAGE).await.ok()?;
    let ready = framing::read_frame(&mut control, MAX_VERSIONS).await.ok()?;
    let versions = codec::decode::<Vec<(String, String)>>(&ready).ok()?;
    // Held open for the life of the worker, which has nothing more to say here.
    spawn_local(async move {
        let _ = control.read(&mut [0]).await;
    });
    Some(versions)
}

/// Bytes of a worker's list of versions.
const MAX_VERSIONS: usize = 64 << 10;
