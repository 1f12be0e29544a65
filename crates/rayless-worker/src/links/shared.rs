//! What all links of a worker share: the socket to its keeper, the thread that waits there, and those who have come but are not asked for.

use super::{LinkFault, TCP_ARRIVAL, UNIX_ARRIVAL, report::Live, ticket};
use crate::{event, ring::Ring, spin};
use rayless_fabric::{Greeted, LinkName, Phase, Ticket, greet_tcp, greet_tls, greet_unix};
use rayless_net::{
    identity::TlsIdentity,
    link::{Channel, ChannelError, Patience},
    unix::recv_fds_now,
};
use rayless_proto::{
    codec,
    ids::{GroupId, Rank},
    limits::HANDSHAKE_TIMEOUT,
    v1::{
        link::{LinkAnswer, LinkBoot, LinkNode, LinkOffer, LinkOpening, LinkReport, MAX_LINK_FRAME},
        step::LinkMoved,
    },
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    time::Timespec,
};
use std::{
    collections::{HashMap, HashSet, VecDeque, hash_map::Entry},
    io::{self, Write},
    net::TcpStream,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Between two looks at the counters of open links.
const LOOK: Duration = Duration::from_secs(2);
/// Handshakes with callers at once; one more is closed, and calls again.
const MAX_HANDSHAKES: usize = 64;
/// Offers that wait for their receiver to ask.
const MAX_OFFERS: usize = 1024;
/// How long a waiting thread sleeps at most before it looks at its patience again.
const SLICE: Duration = Duration::from_millis(50);

/// A link of this worker by its other end and channel.
type Key = (Rank, u16);

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: Rank,
    pub(super) spin: Duration,
    ring: Arc<Ring>,
    /// This worker's slot in the ring.
    reader: usize,
    socket: UnixStream,
    boot: Option<LinkBoot>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Made when the first link is asked for: the identity, and what wakes the thread.
    running: Option<(TlsIdentity, Arc<OwnedFd>)>,
    /// The keeper is gone.
    over: bool,
    handshakes: usize,
    /// Links whose sending end is asked for.
    sending: HashSet<Key>,
    /// Links whose receiving end is asked for.
    receiving: HashMap<Key, Receiving>,
    /// Senders that have said what they want.
    offers: HashMap<Key, (Channel, LinkOffer)>,
    live: Vec<Live>,
}

#[derive(Debug, Default)]
struct Receiving {
    /// Of the attempt in progress: its ticket, and whether its streams stay within TLS.
    attempt: Option<([u8; 32], bool)>,
    /// What came for it.
    greeted: VecDeque<Greeted>,
}

/// The right to open one end of one link; given back when dropped.
pub(super) struct Claim<'a> {
    shared: &'a Shared,
    key: Key,
    by_sender: bool,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if self.by_sender {
            state.sending.remove(&self.key);
        } else {
            state.receiving.remove(&self.key);
        }
    }
}

impl Shared {
    pub(super) fn new(rank: Rank, ring: Arc<Ring>, reader: usize, socket: UnixStream, boot: Option<LinkBoot>) -> Self {
        Self {
            rank,
            spin: spin::limit(ring.readers() + 1),
            ring,
            reader,
            socket,
            boot,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_over(&self) -> bool {
        self.ring.is_closed() || self.lock().over
    }

    pub(super) fn boot(&self) -> Result<&LinkBoot, LinkFault> {
        self.boot.as_ref().ok_or_else(|| LinkFault::Over("the driver of this group has set up no links".to_owned()))
    }

    pub(super) fn name(&self, from: Rank, to: Rank, channel: u16) -> LinkName {
        let group = self.boot.as_ref().map_or(GroupId([0; 8]), |boot| boot.group);
        LinkName { group, from, to, channel }
    }

    pub(super) fn node(&self, rank: Rank) -> Option<&LinkNode> {
        self.boot.as_ref()?.table.node_of(rank)
    }

    pub(super) fn node_name(&self, rank: Rank) -> String {
        self.node(rank).map_or_else(|| "?".to_owned(), |node| node.name.clone())
    }

    /// Checks what the caller asks for, and keeps others from asking for the same meanwhile.
    pub(super) fn claim(&self, link: LinkName, by_sender: bool) -> Result<Claim<'_>, LinkFault> {
        let peer = if by_sender { link.to } else { link.from };
        let ranks = self.boot()?.table.ranks.len();
        if peer as usize >= ranks {
            let last = ranks.saturating_sub(1);
            return Err(LinkFault::Caller(format!("there is no rank {peer}, the group has ranks 0 to {last}")));
        }
        if peer == self.rank {
            return Err(LinkFault::Caller(format!("rank {peer} has no link to itself")));
        }
        let key = (peer, link.channel);
        let mut state = self.lock();
        let is_open = |live: &Live| {
            live.report.by_sender == by_sender
                && live.probe.name() == link
                && !matches!(live.probe.phase(), Phase::Closed | Phase::Lost)
        };
        if state.live.iter().any(is_open) {
            let hint = "close it first, or take another channel";
            return Err(LinkFault::Caller(format!("it is open already\nhint: {hint}")));
        }
        let fresh = if by_sender {
            state.sending.insert(key)
        } else {
            match state.receiving.entry(key) {
                Entry::Occupied(_) => false,
                Entry::Vacant(place) => {
                    place.insert(Receiving::default());
                    true
                }
            }
        };
        if !fresh {
            return Err(LinkFault::Caller("another thread is opening it".to_owned()));
        }
        drop(state);
        Ok(Claim { shared: self, key, by_sender })
    }

    /// Has the thread wait for callers, from the first time on.
    pub(super) fn listen(self: &Arc<Self>) -> Result<TlsIdentity, LinkFault> {
        let boot = self.boot()?;
        let mut state = self.lock();
        if let Some((identity, _)) = &state.running {
            return Ok(identity.clone());
        }
        let failed = |what: &str, error: &dyn std::fmt::Display| LinkFault::Over(format!("{what}: {error}"));
        let identity = TlsIdentity::from_bundle(&boot.leaf).map_err(|e| failed("cannot set up TLS", &e))?;
        // Tells the keeper that from now on someone takes what it has.
        (&self.socket).write_all(&0u32.to_le_bytes()).map_err(|e| failed("the keeper is gone", &e))?;
        let wake = Arc::new(event::create().map_err(|e| failed("no eventfd", &e))?);
        let (shared, woken) = (Arc::clone(self), Arc::clone(&wake));
        spawn("rayless-links", move || shared.wait_for_callers(&woken))
            .map_err(|e| failed("cannot start a thread", &e))?;
        state.running = Some((identity.clone(), wake));
        Ok(identity)
    }

    /// Tells the keeper. It may be gone: then nobody needs to know any more.
    pub(super) fn tell(&self, report: &LinkReport) {
        let frame = codec::encode(report);
        let whole = [&(frame.len() as u32).to_le_bytes(), &frame[..]].concat();
        // One at a time, so that frames do not mix.
        let _one = self.lock();
        let _ = (&self.socket).write_all(&whole);
    }

    /// The link is open. From here on the line that is printed when nothing moves knows its last message.
    pub(super) fn keep(&self, live: Live) {
        let (ring, reader, link) = (Arc::clone(&self.ring), self.reader, live.probe.name());
        let receiving = !live.report.by_sender;
        let peer = if receiving { link.from } else { link.to };
        live.follow(move |message| {
            ring.set_link_moved(reader, LinkMoved { peer, channel: link.channel, receiving, sequence: message });
        });
        self.tell(&live.report);
        let probe = Arc::clone(&live.probe);
        let mut state = self.lock();
        state.live.push(live);
        let wake = state.running.as_ref().map(|(_, wake)| Arc::clone(wake));
        drop(state);
        if let Some(wake) = wake {
            event::notify(&wake);
            // A loss ends the group soon, so it is told at once.
            probe.on_loss(move || event::notify(&wake));
        }
    }

    // ---- what a receiver waits for

    /// The next sender that wants `link`; `None` once the patience is over.
    pub(super) fn next_offer(&self, link: LinkName, patience: &Patience<'_>) -> Option<(Channel, LinkOffer)> {
        let mut state = self.lock();
        loop {
            if let Some(offer) = state.offers.remove(&(link.from, link.channel)) {
                return Some(offer);
            }
            state = self.sleep(state, patience)?;
        }
    }

    /// Begins an attempt: from now on streams with this ticket are let through.
    pub(super) fn expect(&self, link: LinkName, ticket: [u8; 32], encrypt: bool) {
        let fresh = Receiving { attempt: Some((ticket, encrypt)), greeted: VecDeque::new() };
        // The claim's place; nothing but that claim takes it away.
        self.lock().receiving.insert((link.from, link.channel), fresh);
    }

    /// The next stream that came for the attempt; `None` where none came within a moment.
    pub(super) fn next_stream(&self, link: LinkName, patience: &Patience<'_>) -> Option<Greeted> {
        let key = (link.from, link.channel);
        let mut state = self.lock();
        let take = |state: &mut State| state.receiving.get_mut(&key)?.greeted.pop_front();
        if let Some(stream) = take(&mut state) {
            return Some(stream);
        }
        let mut state = self.sleep(state, patience)?;
        take(&mut state)
    }

    /// Sleeps for a moment, or until something came; `None`: the patience is over.
    fn sleep<'a>(&'a self, state: MutexGuard<'a, State>, patience: &Patience<'_>) -> Option<MutexGuard<'a, State>> {
        let (state, _) = self.changed.wait_timeout(state, SLICE).unwrap_or_else(PoisonError::into_inner);
        // The lock is free while the caller's check runs: it may take this lock, or another one that is held elsewhere.
        drop(state);
        patience.left()?;
        Some(self.lock())
    }

    // ---- the thread

    fn wait_for_callers(self: Arc<Self>, wake: &OwnedFd) {
        let mut look = Instant::now() + LOOK;
        loop {
            let timeout = (!self.lock().live.is_empty()).then(|| look.saturating_duration_since(Instant::now()));
            let timeout =
                timeout.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => {}
                // A new link, which was told of when it opened; or a lost one.
                Ok(_) if fds[0].revents().is_empty() => {
                    event::clear(wake);
                    if self.lock().live.iter().any(|live| live.probe.phase() == Phase::Lost) {
                        self.look();
                    }
                }
                Ok(_) => match self.take_caller() {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                    Err(_) => break,
                },
                Err(_) => break,
            }
            if Instant::now() >= look {
                self.look();
                look = Instant::now() + LOOK;
            }
        }
        self.lock().over = true;
        self.changed.notify_all();
    }

    fn look(&self) {
        let mut changed = Vec::new();
        self.lock().live.retain_mut(|live| {
            changed.extend(live.look().cloned());
            !live.is_over()
        });
        changed.iter().for_each(|report| self.tell(report));
    }

    /// One connection that the keeper passes on. What takes time happens on a thread of its own.
    fn take_caller(self: &Arc<Self>) -> io::Result<()> {
        let mut kind = [0];
        let (count, mut fds) = recv_fds_now(&self.socket, &mut kind)?;
        let (1, Some(fd)) = (count, fds.pop()) else {
            return if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) };
        };
        let mut state = self.lock();
        let Some((identity, _)) = state.running.clone().filter(|_| state.handshakes < MAX_HANDSHAKES) else {
            return Ok(());
        };
        state.handshakes += 1;
        drop(state);
        let shared = Arc::clone(self);
        let greeted = spawn("rayless-link", move || {
            let _ = shared.greet(kind[0], fd, &identity);
            shared.lock().handshakes -= 1;
        });
        if greeted.is_err() {
            self.lock().handshakes -= 1;
        }
        Ok(())
    }

    /// Finds out what a caller wants, and puts it where it is waited for. Whoever does not keep to the protocol is closed.
    fn greet(&self, kind: u8, fd: OwnedFd, identity: &TlsIdentity) -> Option<()> {
        let is_over = || self.is_over();
        let patience = Patience::new(Instant::now() + HANDSHAKE_TIMEOUT, &is_over);
        match kind {
            UNIX_ARRIVAL => {
                let greeted = greet_unix(UnixStream::from(fd), HANDSHAKE_TIMEOUT).ok()?;
                let name = greeted.name();
                self.stream((name.from, name.channel), greeted);
            }
            TCP_ARRIVAL => {
                let mut channel = Channel::answer(TcpStream::from(fd), identity, &patience).ok()?;
                let opening = channel.receive(MAX_LINK_FRAME, &patience).ok()?;
                match codec::decode::<LinkOpening>(&opening).ok()? {
                    LinkOpening::Offer(offer) => self.offer(channel, offer, &patience).ok()?,
                    LinkOpening::Stream { from, channel: number, ticket } => {
                        let key = (from, number);
                        let (expected, encrypt) = self.lock().receiving.get(&key)?.attempt?;
                        if !Ticket(expected).matches(&ticket) {
                            return None;
                        }
                        let greeted = if encrypt {
                            let (stream, tls) = channel.into_tls();
                            greet_tls(stream, tls, HANDSHAKE_TIMEOUT)
                        } else {
                            greet_tcp(channel.into_clear().ok()?, HANDSHAKE_TIMEOUT)
                        };
                        self.stream(key, greeted.ok()?);
                    }
                }
            }
            _ => {}
        }
        Some(())
    }

    fn stream(&self, key: Key, greeted: Greeted) {
        if let Some(receiving) = self.lock().receiving.get_mut(&key) {
            receiving.greeted.push_back(greeted);
        }
        self.changed.notify_all();
    }

    fn offer(&self, mut channel: Channel, offer: LinkOffer, patience: &Patience<'_>) -> Result<(), ChannelError> {
        if let Err(reason) = self.examine(&channel, &offer) {
            return channel.send(&codec::encode(&LinkAnswer::Refused(reason)), patience);
        }
        let key = (offer.from, offer.channel);
        if !self.lock().receiving.contains_key(&key) {
            channel.send(&codec::encode(&LinkAnswer::Waiting), patience)?;
        }
        let mut state = self.lock();
        if state.offers.len() >= MAX_OFFERS {
            state.offers.retain(|_, (channel, _)| !channel.is_gone());
        }
        if state.offers.len() < MAX_OFFERS {
            // The sender's last word counts: an earlier one was given up.
            state.offers.insert(key, (channel, offer));
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}

impl Shared {
    /// Whether a caller is who it says.
    fn examine(&self, channel: &Channel, offer: &LinkOffer) -> Result<(), String> {
        let boot = self.boot().map_err(|fault| fault.to_string())?;
        let link = self.name(offer.from, self.rank, offer.channel);
        if (offer.group, offer.to) != (boot.group, self.rank) {
            return Err(format!("this is rank {} of group {}", self.rank, boot.group));
        }
        if !Ticket(ticket::of_link(&boot.table.secret, link)).matches(&offer.ticket) {
            return Err("the ticket is not this link's".to_owned());
        }
        match self.node(offer.from) {
            Some(node) if node.id == channel.peer().node => Ok(()),
            _ => Err(format!("rank {} is not on the node that calls", offer.from)),
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(run).map(drop)
}
