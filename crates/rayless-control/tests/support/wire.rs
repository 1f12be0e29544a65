//! Links between hosts; control sessions, which are reliable and in order like QUIC streams; heartbeats, which are neither.

use super::world::{Event, MS, World, node_id};
use rayless_control::{
    SessionId, head,
    liveness::Transition,
    member::{self, Target},
};
use rayless_proto::{
    ids::Incarnation,
    v1::control::{FromHead, HeadTerm, Refusal, RefusalKind, ToHead},
};
use std::{collections::VecDeque, time::Duration};

/// Silence after which an endpoint gives a session up by itself (QUIC's idle timeout).
const IDLE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
pub enum BeatKind {
    Beat,
    Echo,
    /// The head does not know the connection, since it was started again (QUIC's stateless reset).
    Reset,
}

/// A heartbeat, on a connection of its own to the head's life `to_boot`.
#[derive(Debug, Clone, Copy)]
pub struct Beat {
    pub incarnation: u64,
    pub to_boot: u64,
    pub kind: BeatKind,
}

/// One direction between two hosts.
#[derive(Debug, Clone)]
pub struct Link {
    pub up: bool,
    /// Whether UDP passes (control and heartbeats); steps go over TCP.
    pub udp: bool,
    pub delay: Duration,
    pub jitter: Duration,
    pub loss: u64,
    pub duplicates: u64,
}

impl Default for Link {
    fn default() -> Self {
        Self { up: true, udp: true, delay: Duration::from_micros(200), jitter: Duration::ZERO, loss: 0, duplicates: 0 }
    }
}

#[derive(Debug, Clone)]
pub enum Frame {
    Up(Box<ToHead>),
    Down(Box<FromHead>),
    Close,
}

/// A control session. Each side may think it open while the other knows better.
#[derive(Debug)]
pub struct Conn {
    pub node_host: usize,
    pub node_boot: u64,
    pub head_host: usize,
    pub head_boot: u64,
    pub member_session: SessionId,
    pub head_session: Option<SessionId>,
    pub node_open: bool,
    pub head_open: bool,
    up: VecDeque<(Duration, Frame)>,
    down: VecDeque<(Duration, Frame)>,
    heard_by_node: Duration,
    heard_by_head: Duration,
}

impl Conn {
    pub fn receiver(&self, up: bool) -> usize {
        if up { self.head_host } else { self.node_host }
    }
    fn sender(&self, up: bool) -> usize {
        if up { self.node_host } else { self.head_host }
    }
}

impl World {
    pub fn link(&mut self, from: usize, to: usize) -> &mut Link {
        self.links.entry((from, to)).or_default()
    }

    pub fn passes(&self, from: usize, to: usize, udp: bool) -> bool {
        from == to || self.links.get(&(from, to)).is_none_or(|l| l.up && (l.udp || !udp))
    }

    pub fn delay(&mut self, from: usize, to: usize) -> Duration {
        if from == to {
            return Duration::from_micros(10);
        }
        let link = self.links.get(&(from, to)).cloned().unwrap_or_default();
        let jitter = u64::try_from(link.jitter.as_micros()).unwrap_or(0);
        link.delay + Duration::from_micros(self.rng.below(jitter + 1))
    }

    fn lost(&mut self, from: usize, to: usize) -> bool {
        let loss = self.links.get(&(from, to)).map_or(0, |l| l.loss);
        from != to && self.rng.percent(loss)
    }

    fn doubled(&mut self, from: usize, to: usize) -> bool {
        let duplicates = self.links.get(&(from, to)).map_or(0, |l| l.duplicates);
        from != to && self.rng.percent(duplicates)
    }

    /// A node dials the head.
    pub fn dial(&mut self, host: usize, session: SessionId, target: Target) {
        let head_host = match target {
            Target::Here => host,
            Target::At(address) => self.host_at(address).unwrap_or(host),
        };
        self.conns.push(Conn {
            node_host: host,
            node_boot: self.hosts[host].boot,
            head_host,
            head_boot: 0,
            member_session: session,
            head_session: None,
            node_open: true,
            head_open: false,
            up: VecDeque::new(),
            down: VecDeque::new(),
            heard_by_node: self.now,
            heard_by_head: self.now,
        });
        let conn = self.conns.len() - 1;
        let trip = self.delay(host, head_host) * 3;
        self.after(trip, Event::Dial { conn });
    }

    pub fn on_dial(&mut self, conn: usize) {
        let (host, head) = (self.conns[conn].node_host, self.conns[conn].head_host);
        if !self.conns[conn].node_open {
            return;
        }
        let reachable = self.passes(host, head, true) && self.passes(head, host, true);
        let listening = self.hosts[head].daemon.as_ref().is_some_and(|d| d.head.is_some() || d.candidate.is_some());
        if !reachable || !listening || self.lost(host, head) {
            // The handshake's packets are sent again until the dial is given up.
            self.after(300 * MS, Event::Dial { conn });
            return;
        }
        if !self.share_a_token(host, head) {
            let member_session = self.conns[conn].member_session;
            let cause = "the head has another cluster token".to_owned();
            let refusal = Refusal { kind: RefusalKind::Policy, cause: cause.clone(), hint: String::new() };
            self.conns[conn].node_open = false;
            self.head_in(head, head::Input::HandshakeRefused { from: self.hosts[host].address.clone(), cause });
            let error = member::DialError::Refused(refusal);
            return self.member_in(host, member::Input::DialFailed(member_session, error));
        }
        self.head_sessions += 1;
        let session = SessionId(self.head_sessions);
        self.conns[conn].head_session = Some(session);
        self.conns[conn].head_open = true;
        self.conns[conn].head_boot = self.hosts[head].boot;
        self.conns[conn].heard_by_head = self.now;
        let h = &self.hosts[host];
        let address = if host == head { String::new() } else { h.seen_as.clone().unwrap_or_else(|| h.address.clone()) };
        self.head_in(head, head::Input::SessionOpened { session, node: node_id(host), address });
        let delay = self.delay(head, host);
        self.after(delay, Event::DialOk { conn });
    }

    pub fn on_dial_ok(&mut self, conn: usize) {
        let host = self.conns[conn].node_host;
        if self.conns[conn].node_open && self.conns[conn].node_boot == self.hosts[host].boot {
            self.conns[conn].heard_by_node = self.now;
            let session = self.conns[conn].member_session;
            self.member_in(host, member::Input::Connected(session));
        }
    }

    pub fn send_frame(&mut self, conn: usize, up: bool, frame: Frame) {
        self.messages += 1;
        let (from, to) = (self.conns[conn].sender(up), self.conns[conn].receiver(up));
        let due = self.now + self.delay(from, to);
        let queue = if up { &mut self.conns[conn].up } else { &mut self.conns[conn].down };
        queue.push_back((due, frame));
        if queue.len() == 1 {
            self.after(due - self.now, Event::Wire { conn, up });
        }
    }

    pub fn on_wire(&mut self, conn: usize, up: bool) {
        let (from, to) = (self.conns[conn].sender(up), self.conns[conn].receiver(up));
        if !self.passes(from, to, true) {
            self.after(100 * MS, Event::Wire { conn, up });
            return;
        }
        if self.lost(from, to) {
            let again = self.delay(from, to) * 2 + 50 * MS;
            self.after(again, Event::Wire { conn, up });
            return;
        }
        let queue = if up { &mut self.conns[conn].up } else { &mut self.conns[conn].down };
        let Some((_, frame)) = queue.pop_front() else { return };
        if let Some((due, _)) = queue.front() {
            let due = due.saturating_sub(self.now) + Duration::from_micros(1);
            self.after(due, Event::Wire { conn, up });
        }
        if self.doubled(from, to) {
            self.deliver(conn, up, frame.clone());
        }
        self.deliver(conn, up, frame);
    }

    fn deliver(&mut self, conn: usize, up: bool, frame: Frame) {
        let c = &self.conns[conn];
        let (host, boot, open) =
            if up { (c.head_host, c.head_boot, c.head_open) } else { (c.node_host, c.node_boot, c.node_open) };
        if !open || self.hosts[host].daemon.is_none() || self.hosts[host].boot != boot {
            return;
        }
        let (session, member_session) = (c.head_session, c.member_session);
        match (frame, session) {
            (Frame::Up(_), Some(_)) if self.hosts[host].daemon.as_ref().is_some_and(|d| d.head.is_none()) => {
                // A standby.
                let by =
                    HeadTerm { cluster: rayless_proto::ids::ClusterId([0; 16]), term: rayless_proto::ids::Term(0) };
                let message = self.not_the_head(host);
                self.send_frame(conn, false, Frame::Down(Box::new(FromHead { by, message })));
                self.conns[conn].head_open = false;
                self.send_frame(conn, false, Frame::Close);
            }
            (Frame::Up(message), Some(session)) => {
                let tokens_held = matches!(*message, ToHead::TokensHeld { .. });
                self.head_in(host, head::Input::Message { session, message: *message });
                if tokens_held {
                    self.name_authority(host);
                }
            }
            (Frame::Down(message), _) => self.member_in(host, member::Input::Message(member_session, *message)),
            (Frame::Close, Some(session)) if up => {
                self.conns[conn].head_open = false;
                self.head_in(host, head::Input::SessionClosed { session });
            }
            (Frame::Close, _) => {
                self.conns[conn].node_open = false;
                let cause = "the head closed the session".to_owned();
                self.member_in(host, member::Input::Closed(member_session, cause));
            }
            (Frame::Up(_), None) => {}
        }
    }

    /// The node's side closes; what it sent before still arrives.
    pub fn close_from_node(&mut self, host: usize, session: SessionId) {
        if let Some(conn) = self.conn_of_member(host, session) {
            self.conns[conn].node_open = false;
            if self.conns[conn].head_session.is_some() {
                self.send_frame(conn, true, Frame::Close);
            }
        }
    }

    pub fn close_from_head(&mut self, session: SessionId) {
        if let Some(conn) = self.conn_of_head(session) {
            self.conns[conn].head_open = false;
            self.send_frame(conn, false, Frame::Close);
            let head = self.conns[conn].head_host;
            self.head_in(head, head::Input::SessionClosed { session });
        }
    }

    /// Something on the way ends the session; both sides learn of it at once.
    pub fn break_session(&mut self, host: usize) {
        let session = self.hosts[host].daemon.as_ref().and_then(|d| d.member.session());
        let Some(conn) = session.and_then(|s| self.conn_of_member(host, s)) else { return };
        let (head, member_session, head_session) =
            (self.conns[conn].head_host, self.conns[conn].member_session, self.conns[conn].head_session);
        self.conns[conn].node_open = false;
        self.conns[conn].head_open = false;
        self.member_in(host, member::Input::Closed(member_session, "the session broke".into()));
        if let Some(session) = head_session {
            self.head_in(head, head::Input::SessionClosed { session });
        }
    }

    /// The host of the head that this host's session goes to.
    pub fn head_of(&self, host: usize) -> Option<usize> {
        let session = self.hosts[host].daemon.as_ref()?.member.session()?;
        self.conn_of_member(host, session).map(|conn| self.conns[conn].head_host)
    }

    pub fn conn_of_member(&self, host: usize, session: SessionId) -> Option<usize> {
        let boot = self.hosts[host].boot;
        self.conns
            .iter()
            .rposition(|c| c.node_host == host && c.node_boot == boot && c.member_session == session && c.node_open)
    }

    pub fn conn_of_head(&self, session: SessionId) -> Option<usize> {
        self.conns.iter().rposition(|c| c.head_session == Some(session) && c.head_open)
    }

    /// The net thread wakes when a detector is due (or to look after idle sessions), as late as its host is busy.
    pub fn on_net_tick(&mut self, host: usize, boot: u64) {
        if self.hosts[host].boot != boot || self.hosts[host].daemon.is_none() {
            return;
        }
        self.drop_idle(host);
        let now = self.instant();
        let Some(daemon) = self.hosts[host].daemon.as_mut() else { return };
        let silent = daemon.echo.tick(now).iter().any(|(_, t)| *t == Transition::Dead);
        let changes = daemon.head.as_mut().map(|h| h.detector.tick(now)).unwrap_or_default();
        let of_head = daemon.head.as_ref().and_then(|h| h.detector.next_tick(now));
        let due = daemon.echo.next_tick(now).into_iter().chain(of_head).min();
        let pause = due.map_or(500 * MS, |at| at.saturating_duration_since(now)).clamp(MS, 500 * MS);
        let late = self.hosts[host].late;
        self.after(pause + late, Event::NetTick { host, boot });
        if silent && self.head_of(host) != Some(host) {
            self.member_in(host, member::Input::HeadSilent);
        }
        for ((node, incarnation), transition) in changes {
            self.head_in(host, head::Input::Liveness { node, incarnation, transition });
        }
    }

    fn drop_idle(&mut self, host: usize) {
        let now = self.now;
        for conn in 0..self.conns.len() {
            let c = &self.conns[conn];
            if !(c.node_open || c.head_open) {
                continue;
            }
            let speaks = |h: usize, boot: u64| {
                self.hosts[h].daemon.is_some() && self.hosts[h].boot == boot && !self.hosts[h].paused
            };
            if c.node_host == host && c.node_open && c.node_boot == self.hosts[host].boot && c.head_session.is_some() {
                if c.head_open && speaks(c.head_host, c.head_boot) && self.passes(c.head_host, host, true) {
                    self.conns[conn].heard_by_node = now;
                } else if now - c.heard_by_node > IDLE {
                    let session = c.member_session;
                    self.conns[conn].node_open = false;
                    self.member_in(host, member::Input::Closed(session, "the session was silent".into()));
                    continue;
                }
            }
            let c = &self.conns[conn];
            if c.head_host == host && c.head_open && c.head_boot == self.hosts[host].boot {
                let Some(session) = c.head_session else { continue };
                if c.node_open && speaks(c.node_host, c.node_boot) && self.passes(c.node_host, host, true) {
                    self.conns[conn].heard_by_head = now;
                } else if now - c.heard_by_head > IDLE {
                    self.conns[conn].head_open = false;
                    self.head_in(host, head::Input::SessionClosed { session });
                }
            }
        }
    }

    /// The 500 ms of a member.
    pub fn on_beat(&mut self, host: usize, boot: u64) {
        if self.hosts[host].boot != boot || self.hosts[host].daemon.is_none() {
            return;
        }
        let late = self.hosts[host].late;
        self.after(500 * MS + late, Event::Beat { host, boot });
        let Some(head) = self.head_of(host) else { return };
        let member = self.hosts[host].daemon.as_ref().map(|d| (d.member.is_welcomed(), d.member.incarnation().0));
        if let Some((true, incarnation)) = member
            && host != head
        {
            let session = self.hosts[host].daemon.as_ref().and_then(|d| d.member.session());
            let conn = session.and_then(|s| self.conn_of_member(host, s));
            let to_boot = conn.map_or(0, |c| self.conns[c].head_boot);
            self.send_datagram(host, head, Beat { incarnation, to_boot, kind: BeatKind::Beat });
        }
    }

    fn send_datagram(&mut self, from: usize, to: usize, beat: Beat) {
        self.messages += 1;
        self.datagrams += 1;
        if !self.passes(from, to, true) || self.lost(from, to) {
            return;
        }
        let copies = if self.doubled(from, to) { 2 } else { 1 };
        for _ in 0..copies {
            let delay = self.delay(from, to);
            self.after(delay, Event::Datagram { from, to, beat });
        }
    }

    pub fn on_datagram(&mut self, from: usize, to: usize, beat: Beat) {
        let now = self.instant();
        let boot = self.hosts[to].boot;
        let Some(daemon) = self.hosts[to].daemon.as_mut() else { return };
        match beat.kind {
            BeatKind::Echo if daemon.member.incarnation().0 == beat.incarnation => {
                let _ = daemon.echo.heard((), now);
            }
            BeatKind::Echo => {}
            BeatKind::Reset => {
                let session = daemon.member.session();
                let conn = session.and_then(|s| self.conn_of_member(to, s));
                if conn.is_some_and(|c| self.conns[c].head_boot == beat.to_boot) {
                    self.member_in(to, member::Input::HeadSilent);
                }
            }
            BeatKind::Beat if beat.to_boot != boot => {
                self.send_datagram(to, from, Beat { kind: BeatKind::Reset, ..beat });
            }
            BeatKind::Beat => {
                let Some(side) = daemon.head.as_mut() else { return };
                let (node, incarnation) = (node_id(from), Incarnation(beat.incarnation));
                let transition = side.detector.heard((node, incarnation), now);
                if let Some(transition) = transition {
                    self.head_in(to, head::Input::Liveness { node, incarnation, transition });
                }
                self.head_in(to, head::Input::Heard { node, incarnation, ago: Duration::ZERO, rtt_us: 400 });
                self.send_datagram(to, from, Beat { kind: BeatKind::Echo, ..beat });
            }
        }
    }
}
