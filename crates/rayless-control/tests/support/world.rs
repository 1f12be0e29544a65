//! Time, events, hosts, and what must hold after every event.

use super::{
    daemon::Daemon,
    steps::{Driver, KeeperSim, Reservation},
    store::Store,
    wire::{Beat, Conn, Link},
};
use rayless_control::{Head, election};
use rayless_proto::{
    ids::{GroupId, NodeId, Term, TokenMark},
    resources::{CPU, GPU, Quantity, Resources},
    v1::{
        control::{GpuInfo, HeadTerm, NodeInfo, Refusal},
        link::LinkSettings,
        rdma::RdmaInventory,
        status::StatusReport,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

pub const MS: Duration = Duration::from_millis(1);

/// splitmix64.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn percent(&mut self, p: u64) -> bool {
        p > 0 && self.below(100) < p
    }
}

/// What happens at a time. Each event belongs to a host (`Event::host`): a paused host's events wait for its wake-up.
#[derive(Debug, Clone)]
pub enum Event {
    NetTick { host: usize, boot: u64 },
    Beat { host: usize, boot: u64 },
    Datagram { from: usize, to: usize, beat: Beat },
    MemberTimer { host: usize, boot: u64 },
    HeadTimer { host: usize, boot: u64 },
    Dial { conn: usize },
    DialOk { conn: usize },
    Wire { conn: usize, up: bool },
    StepTick { host: usize },
    KeeperUp { host: usize, group: GroupId },
    KeeperReaped { host: usize, group: GroupId },
    WorkersReady { host: usize, group: GroupId },
    StepOpen { driver: usize, host: usize, tries: u32 },
    StepPing { driver: usize },
    StepBeat { driver: usize, host: usize, to_driver: bool },
    StepEnd { driver: usize, host: usize, to_driver: bool, cause: String, tries: u32 },
    Resume { host: usize },
    CandidateTimer { host: usize, boot: u64 },
    StoreAsked { host: usize, boot: u64, request: Box<election::Effect> },
    StoreSays { host: usize, boot: u64, answer: Box<election::Input> },
    StoreTick,
}

pub struct Host {
    pub name: String,
    pub resources: Resources,
    pub gpus: u32,
    pub versions: Vec<(String, String)>,
    pub is_head: bool,
    pub address: String,
    /// On disk: survives the daemon.
    pub incarnation: u64,
    pub seen: Option<HeadTerm>,
    /// For how long its clock stood still with the machine.
    pub slept: Duration,
    pub frozen: Option<Duration>,
    pub head_state: Option<Vec<u8>>,
    /// On disk: the tokens that it accepts, the current one first.
    pub tokens: Vec<TokenMark>,
    /// On the head's disk: until when it accepts the second.
    pub overlap_ends: Option<Duration>,
    pub disk_full: bool,
    /// Which start of the daemon this is.
    pub boot: u64,
    pub daemon: Option<Daemon>,
    pub keepers: BTreeMap<GroupId, KeeperSim>,
    pub paused: bool,
    pub deferred: Vec<Event>,
    /// How late each tick of its threads comes.
    pub late: Duration,
    /// Keepers never come up.
    pub mute: bool,
    /// Its daemon was refused and has ended.
    pub refused: Option<Refusal>,
    pub talk: Vec<String>,
    /// Address as others see it, where a translation lies between.
    pub seen_as: Option<String>,
}

pub struct World {
    pub base: Instant,
    pub now: Duration,
    sequence: u64,
    events: BTreeMap<(Duration, u64), Event>,
    pub rng: Rng,
    pub hosts: Vec<Host>,
    pub links: BTreeMap<(usize, usize), Link>,
    pub conns: Vec<Conn>,
    pub drivers: Vec<Driver>,
    pub reservations: Vec<Reservation>,
    /// Answers to operators' requests by label.
    pub answers: BTreeMap<String, String>,
    pub dead_after: Duration,
    /// Every start of a keeper there ever was: a second one of the same is a failure.
    pub started: BTreeSet<(usize, GroupId)>,
    pub head_sessions: u64,
    pub log: Vec<String>,
    pub broken: Option<String>,
    /// The head handled something since the last audit.
    pub touched: bool,
    pub notices: Vec<(String, String)>,
    pub messages: u64,
    /// Of those, heartbeats.
    pub datagrams: u64,
    /// Processor time spent in the head so far, its detector included.
    pub head_time: Duration,
    /// Whether the head's books are recounted after every event: not where only time is measured.
    pub audits: bool,
    pub store: Option<Store>,
    /// Every term there ever was, and whose it was.
    pub active_terms: BTreeMap<Term, usize>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            base: Instant::now(),
            now: Duration::ZERO,
            sequence: 0,
            events: BTreeMap::new(),
            rng: Rng(seed),
            hosts: Vec::new(),
            links: BTreeMap::new(),
            conns: Vec::new(),
            drivers: Vec::new(),
            reservations: Vec::new(),
            answers: BTreeMap::new(),
            dead_after: Duration::from_secs(3),
            started: BTreeSet::new(),
            head_sessions: 0,
            log: Vec::new(),
            broken: None,
            touched: false,
            notices: Vec::new(),
            messages: 0,
            datagrams: 0,
            head_time: Duration::ZERO,
            audits: true,
            store: None,
            active_terms: BTreeMap::new(),
        }
    }

    pub fn instant(&self) -> Instant {
        self.base + self.now
    }

    /// Adds a host, off; the first is the head's.
    pub fn add_host(&mut self, name: &str, resources: Resources) -> usize {
        let index = self.hosts.len();
        let gpus = u32::try_from(resources.get(GPU).raw() / Quantity::SCALE).unwrap_or(0);
        self.hosts.push(Host {
            name: name.to_owned(),
            resources,
            gpus,
            versions: vec![("rayless".into(), "0.1.0".into())],
            is_head: index == 0 && self.store.is_none(),
            address: format!("10.0.{}.{}", index / 250, index % 250 + 1),
            incarnation: 0,
            seen: None,
            slept: Duration::ZERO,
            frozen: None,
            head_state: None,
            tokens: vec![super::tokens::FIRST],
            overlap_ends: None,
            disk_full: false,
            boot: 0,
            daemon: None,
            keepers: BTreeMap::new(),
            paused: false,
            deferred: Vec::new(),
            late: Duration::ZERO,
            mute: false,
            refused: None,
            talk: Vec::new(),
            seen_as: None,
        });
        self.after(100 * MS, Event::StepTick { host: index });
        index
    }

    pub fn host(&self, name: &str) -> Option<usize> {
        self.hosts.iter().position(|h| h.name == name)
    }

    /// Every head that there is; of several the last is the one with the highest term.
    fn heads(&self) -> Vec<&Head> {
        let sides = self.hosts.iter().filter_map(|h| h.daemon.as_ref()?.head.as_ref());
        let mut heads: Vec<&Head> = sides.map(|side| &side.head).collect();
        heads.sort_by_key(|head| head.by().term);
        heads
    }

    pub fn head(&self) -> Option<&Head> {
        self.heads().pop()
    }

    /// The host of the head, or the first where there is none.
    pub fn head_host(&self) -> usize {
        self.status().map_or(0, |status| host_of(status.head))
    }

    pub fn host_at(&self, address: std::net::SocketAddr) -> Option<usize> {
        self.hosts.iter().position(|h| address.ip().to_string() == h.address)
    }

    pub fn status(&self) -> Option<StatusReport> {
        self.head().map(|h| h.status(self.instant()))
    }

    pub fn info(&self, host: usize, incarnation: u64) -> NodeInfo {
        let h = &self.hosts[host];
        let gpu = |index| GpuInfo {
            index,
            uuid: format!("GPU-{}-{index}", h.name),
            name: "H20".into(),
            memory_bytes: 96 << 30,
        };
        NodeInfo {
            id: node_id(host),
            incarnation: rayless_proto::ids::Incarnation(incarnation),
            name: h.name.clone(),
            address: h.address.clone(),
            port: 6379,
            interface: "eth0".into(),
            host_id: h.name.clone(),
            resources: h.resources.clone(),
            gpus: (0..h.gpus).map(gpu).collect(),
            versions: h.versions.clone(),
            node_env: Vec::new(),
            links: LinkSettings::default(),
            rdma: RdmaInventory::default(),
        }
    }

    pub fn after(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + delay, self.sequence), event);
    }

    pub fn say(&mut self, line: impl Into<String>) {
        let line = format!("{:>9.3} s  {}", self.now.as_secs_f64(), line.into());
        self.log.push(line);
    }

    /// Lets everything happen that happens until `time`; stops at the first broken invariant.
    pub fn run_until(&mut self, time: Duration) {
        while self.broken.is_none() {
            let Some((&(at, _), _)) = self.events.first_key_value() else { break };
            if at > time {
                break;
            }
            let Some((_, event)) = self.events.pop_first() else { break };
            self.now = at;
            self.happen(event);
        }
        self.now = self.now.max(time);
    }

    pub fn wait(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    fn happen(&mut self, event: Event) {
        if let Some(host) = self.belongs_to(&event)
            && self.hosts[host].paused
        {
            self.hosts[host].deferred.push(event);
            return;
        }
        match event {
            Event::NetTick { host, boot } => self.on_net_tick(host, boot),
            Event::Beat { host, boot } => self.on_beat(host, boot),
            Event::Datagram { from, to, beat } => self.on_datagram(from, to, beat),
            Event::MemberTimer { host, boot } => self.on_member_timer(host, boot),
            Event::HeadTimer { host, boot } => self.on_head_timer(host, boot),
            Event::Dial { conn } => self.on_dial(conn),
            Event::DialOk { conn } => self.on_dial_ok(conn),
            Event::Wire { conn, up } => self.on_wire(conn, up),
            Event::StepTick { host } => self.on_step_tick(host),
            Event::KeeperUp { host, group } => self.on_keeper_up(host, group),
            Event::KeeperReaped { host, group } => self.on_keeper_reaped(host, group),
            Event::WorkersReady { host, group } => self.on_workers_ready(host, group),
            Event::StepOpen { driver, host, tries } => self.on_step_open(driver, host, tries),
            Event::StepPing { driver } => self.on_step_ping(driver),
            Event::StepBeat { driver, host, to_driver } => self.on_step_beat(driver, host, to_driver),
            Event::StepEnd { driver, host, to_driver, cause, tries } => {
                self.on_step_end(driver, host, to_driver, cause, tries);
            }
            Event::Resume { host } => self.resume(host),
            Event::CandidateTimer { host, boot } => self.on_candidate_timer(host, boot),
            Event::StoreAsked { host, boot, request } => self.on_store_asked(host, boot, *request),
            Event::StoreSays { host, boot, answer } => self.on_store_says(host, boot, *answer),
            Event::StoreTick => self.on_store_tick(),
        }
        self.check();
    }

    fn belongs_to(&self, event: &Event) -> Option<usize> {
        Some(match event {
            Event::NetTick { host, .. }
            | Event::Beat { host, .. }
            | Event::MemberTimer { host, .. }
            | Event::HeadTimer { host, .. }
            | Event::StepTick { host }
            | Event::CandidateTimer { host, .. }
            | Event::StoreSays { host, .. }
            | Event::KeeperUp { host, .. }
            | Event::KeeperReaped { host, .. }
            | Event::WorkersReady { host, .. } => *host,
            Event::Datagram { to, .. } => *to,
            Event::Dial { conn } => self.conns[*conn].head_host,
            Event::DialOk { conn } => self.conns[*conn].node_host,
            Event::Wire { conn, up } => self.conns[*conn].receiver(*up),
            Event::StepOpen { driver, .. } | Event::StepPing { driver } => self.drivers[*driver].host,
            Event::StepBeat { driver, host, to_driver } | Event::StepEnd { driver, host, to_driver, .. } => {
                if *to_driver {
                    self.drivers[*driver].host
                } else {
                    *host
                }
            }
            Event::Resume { .. } | Event::StoreAsked { .. } | Event::StoreTick => return None,
        })
    }

    /// Like a pause of all its processes, and its clock stands still too (a virtual machine that is moved).
    pub fn freeze(&mut self, host: usize) {
        self.hosts[host].paused = true;
        self.hosts[host].frozen = Some(self.now);
    }

    pub fn pause(&mut self, host: usize) {
        self.hosts[host].paused = true;
    }

    /// What waited in its sockets and timers comes all at once, in order; timers of the same kind only once.
    pub fn resume(&mut self, host: usize) {
        self.hosts[host].paused = false;
        if let Some(since) = self.hosts[host].frozen.take() {
            self.hosts[host].slept += self.now - since;
        }
        for event in std::mem::take(&mut self.hosts[host].deferred) {
            self.after(Duration::ZERO, event);
        }
    }

    /// What must hold after every event.
    pub fn check(&mut self) {
        if !self.audits || self.broken.is_some() || !std::mem::take(&mut self.touched) {
            return;
        }
        let broken = self.heads().into_iter().find_map(|head| head.audit().err());
        if let Some(broken) = broken {
            self.broken = Some(format!("the head's books: {broken}"));
        }
        self.check_heads();
    }

    /// No device of a host is held twice by keepers that are really there.
    pub fn check_devices(&mut self, host: usize) {
        let mut held: BTreeMap<u32, Quantity> = BTreeMap::new();
        let shares = self.hosts[host].keepers.values().flat_map(|k| &k.ranks).flat_map(|r| &r.allocation.gpus);
        for share in shares {
            let sum = held.entry(share.index).or_default();
            *sum = sum.plus(share.amount);
            if *sum > Quantity::ONE {
                let name = &self.hosts[host].name;
                self.broken = Some(format!("GPU {} of {name} is really held by more than one group", share.index));
                return;
            }
        }
        let cpus = self.hosts[host].keepers.values().flat_map(|k| &k.ranks);
        let cpus = cpus.fold(Quantity::ZERO, |sum, r| sum.plus(r.allocation.resources.get(CPU)));
        if cpus > self.hosts[host].resources.get(CPU) && !cpus.is_zero() {
            self.broken = Some(format!("the CPUs of {} are really held twice", self.hosts[host].name));
        }
    }

    /// Nothing is held anywhere: for the end of a run.
    pub fn all_free(&self) -> Result<(), String> {
        for host in &self.hosts {
            if let Some(keeper) = host.keepers.values().next() {
                return Err(format!("a keeper of {} is left on {}", keeper.name, host.name));
            }
        }
        let Some(status) = self.status() else { return Err("there is no head".into()) };
        for node in &status.nodes {
            let alive = node.state == rayless_proto::v1::status::NodeState::Alive;
            if alive && node.available != node.resources {
                return Err(format!("{}: {:?} of {:?} are free", node.name, node.available, node.resources));
            }
        }
        Ok(())
    }

    /// All there is to see, for a failing test.
    pub fn dump(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let _ = writeln!(out, "--- at {:.3} s", self.now.as_secs_f64());
        let shown = if std::env::var_os("RAYLESS_SEED").is_some() { usize::MAX } else { 60 };
        for line in self.log.iter().rev().take(shown).rev() {
            let _ = writeln!(out, "{line}");
        }
        if let Some(status) = self.status() {
            for node in &status.nodes {
                let _ = writeln!(
                    out,
                    "node {} {} life {} free {:?} of {:?}",
                    node.name,
                    node.state.name(),
                    node.incarnation,
                    node.available,
                    node.resources
                );
            }
            for group in &status.groups {
                let at: Vec<String> = group
                    .workers
                    .iter()
                    .map(|w| format!("{}@{}{:?}", w.rank, self.hosts[host_of(w.node)].name, w.gpus))
                    .collect();
                let _ = writeln!(out, "group {} {} `{}` {}", group.name, group.state.name(), group.cause, at.join(" "));
            }
        }
        for host in &self.hosts {
            let keepers: Vec<&str> = host.keepers.values().map(|k| k.name.as_str()).collect();
            let daemon = if host.daemon.is_some() { "up" } else { "down" };
            let _ =
                writeln!(out, "host {}: daemon {daemon}, life {}, keepers {keepers:?}", host.name, host.incarnation);
        }
        for driver in &self.drivers {
            let _ = writeln!(out, "driver {}: {:?}", driver.name, driver.state);
        }
        out
    }
}

pub fn node_id(host: usize) -> NodeId {
    let mut id = [0xab; 32];
    id[0] = u8::try_from(host >> 8).unwrap_or(0xff);
    id[1] = u8::try_from(host & 0xff).unwrap_or(0xff);
    NodeId(id)
}

pub fn host_of(node: NodeId) -> usize {
    usize::from(node.0[0]) << 8 | usize::from(node.0[1])
}
