//! The node daemon, head or not: one process, a thread for the network, this one for everything else.
//!
//! Read [`run`] for how it starts, `core` for how it lives (`event` lists all that can happen to it), `groups` and `requests`
//! for what it does, `wire` for how it talks to other nodes.

mod asked;
mod clients;
mod core;
mod drain;
mod event;
mod groups;
mod keepers;
mod reports;
mod requests;
mod stand;
mod tokens;
mod wire;

use self::{
    core::{Core, Phase},
    event::{Event, Events},
    stand::Stand,
    wire::Wire,
};
use crate::{
    inventory::{self, Inventory, Wishes, gpu, rdma},
    node_env,
    run_dir::{RunDir, RunDirLock},
    store::StoreConfig,
    tokens::Tokens,
};
use rayless_control::{
    Head, Member,
    head::{HeadConfig, Story},
    member::{MemberConfig, Target},
};
use rayless_net::{
    counters::Counters,
    identity::{ClusterIdentity, NodeKey},
    interfaces::{self, Choice},
    tcp::{self, Front},
    token::Token,
    unix,
};
use rayless_proto::{
    ids::{ClusterId, Incarnation, Term},
    limits::{DEAD_AFTER, DEFAULT_PORT, WAIT_REPORT_PERIOD},
    v1::{
        control::{NodeInfo, Refusal, RefusalKind},
        link::{LinkSettings, LinkTransport},
        rdma::RdmaInventory,
        status::HeadSeat,
    },
};
use std::{
    collections::{BTreeMap, VecDeque},
    env, fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// All that a daemon is told at its start.
#[derive(Debug)]
pub struct DaemonConfig {
    /// Its directory.
    pub run_dir: RunDir,
    /// Head or not.
    pub role: Role,
    /// The cluster's secret, or one that a rotation on this node has replaced.
    pub token: Token,
    /// `--port`; 0 takes a free one.
    pub port: u16,
    /// `--bind`
    pub bind: Option<String>,
    /// `--name`, else the host name.
    pub name: String,
    /// `--gpus`, `--cpus`, `--resource`, `--shm-min`
    pub wishes: Wishes,
    /// `--dead-after`. The head's is the cluster's: it judges nodes by it. A node's own says how long it bears silence of the head, and its
    /// keepers that of their drivers.
    pub dead_after: Option<Duration>,
    /// `--step-deadline`, for the drivers of this node; zero for none.
    pub step_deadline: Duration,
    /// `--host-id`
    pub host_id: Option<String>,
    /// `--transport`, `--allow-tcp`, …
    pub links: LinkSettings,
    /// Program to start keepers with.
    pub exe: PathBuf,
}

/// What a daemon is in its cluster.
#[derive(Debug, Clone)]
pub enum Role {
    /// Starts the cluster, or goes on with it after a restart.
    Head,
    /// The head, or a standby: whoever is first in the store.
    OneOfSeveral {
        /// The store.
        store: StoreConfig,
        /// How long a lease in it holds.
        lease: Duration,
    },
    /// Joins it.
    Node {
        /// `HOST[:PORT]` of the head, or of several that take turns, with commas.
        head: String,
        /// How long to wait for it; 0 refuses at once.
        wait: Duration,
    },
}

/// What a daemon says to the one who started it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Talk {
    /// A line.
    Line(String),
    /// It serves (head), or the head has accepted it (node).
    Ready(Ready),
}

/// A daemon that is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// Name of its node.
    pub name: String,
    /// `IP:port` at which others reach it.
    pub address: String,
    /// The head as the user named it; empty on the head. On a standby `IP:port` of the head.
    pub head_address: String,
}

/// Why a daemon did not start, or ended. A line of cause, then perhaps `hint: …`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DaemonError {
    /// Told something that does not hold on this host. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Tried and failed. Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// No head was found in time. Exit code 3.
    #[error("{0}")]
    NoHead(String),
    /// The head does not take this node. Exit code 4.
    #[error("{0}")]
    Refused(String),
}

impl DaemonError {
    fn from_refusal(refusal: &Refusal) -> Self {
        let text = if refusal.hint.is_empty() {
            refusal.cause.clone()
        } else {
            format!("{}\nhint: {}", refusal.cause, refusal.hint)
        };
        match refusal.kind {
            RefusalKind::Policy => Self::Refused(text),
            RefusalKind::NoHead => Self::NoHead(text),
            RefusalKind::Invalid => Self::Usage(text),
            RefusalKind::Resources | RefusalKind::Failed => Self::Failed(text),
        }
    }
}

fn usage(error: impl ToString) -> DaemonError {
    DaemonError::Usage(error.to_string())
}

fn failed(error: impl ToString) -> DaemonError {
    DaemonError::Failed(error.to_string())
}

/// Runs a daemon until it is stopped. `talk` gets what is for people; [`Talk::Ready`] comes once.
///
/// # Errors
/// Why it could not start, or was refused. Once ready it ends only by being stopped.
pub fn run(config: DaemonConfig, talk: &mut dyn FnMut(Talk)) -> Result<(), DaemonError> {
    config.run_dir.create().map_err(failed)?;
    let lock = config.run_dir.lock().map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Name look-ups and the removal of old logs only; an idle thread of that pool goes soon.
        .max_blocking_threads(2)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(|error| failed(format!("cannot start: {error}")))?;
    let outcome = runtime.block_on(start(config, lock, talk));
    // A name look-up that hangs must not keep the process.
    runtime.shutdown_background();
    outcome
}

async fn start(config: DaemonConfig, lock: RunDirLock, talk: &mut dyn FnMut(Talk)) -> Result<(), DaemonError> {
    let started = Instant::now();
    let inventory = inventory::quick(&config.wishes).map_err(usage)?;
    inventory::raise_memlock();
    let rdma = rdma::look(&config.links.rdma_devices, &inventory.gpu_places);
    rdma::check(&config.links, &rdma).map_err(usage)?;
    let key = NodeKey::load_or_create(&config.run_dir.node_key()).map_err(failed)?;
    let tokens = Tokens::load(&config.run_dir, &config.token, SystemTime::now()).map_err(failed)?;
    tokens.save_plain(&config.run_dir).map_err(|error| failed(format!("cannot write the token file: {error}")))?;
    let identity = ClusterIdentity::from_tokens(tokens.current(), tokens.previous(), &key).map_err(failed)?;
    let (head_text, addresses, wait) = match &config.role {
        Role::Head | Role::OneOfSeveral { .. } => (String::new(), Vec::new(), None),
        Role::Node { head, wait } => {
            let (text, addresses) = resolve(head, *wait, talk).await?;
            (text, addresses, Some(*wait))
        }
    };
    let head_address = addresses.first().copied();
    let choice = choose_address(config.bind.as_deref(), head_address)?;
    let counters = Arc::new(Counters::default());
    let (events, queue) = mpsc::channel(event::QUEUE);
    let (wire, port, listener) = open_port(&config, &choice, &identity, &counters)?;
    let socket = unix::bind(&config.run_dir.socket()).map_err(failed)?;
    let incarnation = config.run_dir.next_incarnation().map_err(failed)?;
    let info = NodeInfo {
        links: config.links.clone(),
        rdma,
        ..node_info(&config, &identity, &choice, port, incarnation, &inventory)?
    };
    tokio::spawn(take_sessions(Front::open(listener, counters.clone()), events.clone()));
    take_signals(&events)?;
    let keepers = keepers::find(&config.run_dir, info.id, &events).await;
    if !keepers.is_empty() {
        talk(Talk::Line(format!("found {} running groups of an earlier daemon", keepers.len())));
    }
    let dead_after = config.dead_after.unwrap_or(DEAD_AFTER);
    let seen = config.run_dir.seen_term();
    let (head, stand, targets) = match &config.role {
        Role::Head => (Some(open_head(&config, &info, dead_after, started)?), None, vec![Target::Here]),
        Role::OneOfSeveral { store, lease } => {
            // A head that was alone so far brings its cluster's id along.
            let cluster = open_head(&config, &info, dead_after, started)?.cluster();
            let address = SocketAddr::new(choice.address, port).to_string();
            let seat = HeadSeat { node: info.id, name: info.name.clone(), address, active: false };
            let names = identity.authority_names();
            let stand = Stand::new(store.clone(), *lease, seat, names, cluster, seen);
            (None, Some(stand), Vec::new())
        }
        Role::Node { .. } => (None, None, addresses.iter().copied().map(Target::At).collect()),
    };
    let named = if addresses.len() == 1 { addresses.first().copied() } else { None };
    tell_of_rdma(&info, talk);
    tokio::spawn(clients::accept(socket, events.clone()));
    let member = Member::new(
        MemberConfig {
            head: head_text.clone(),
            targets,
            seen,
            incarnation,
            jitter_seed: u64::from_le_bytes(std::array::from_fn(|at| info.id.0[at])),
        },
        started,
    );
    let mut core = Core {
        run: config.run_dir,
        exe: config.exe,
        key,
        tokens,
        identity,
        gpu_places: inventory.gpu_places.clone(),
        gpus_measured: gpu::has_driver() && !inventory.gpus.is_empty(),
        dead_after,
        own_dead_after: config.dead_after,
        step_deadline: config.step_deadline,
        head_address: head_text,
        named,
        stand,
        seen,
        dialled: None,
        head_ip: head_address.map_or_else(|| info.address.clone(), |address| address.ip().to_string()),
        info,
        wire,
        events,
        member,
        head,
        inside: None,
        keepers,
        ending: BTreeMap::new(),
        ended: VecDeque::new(),
        story: Story::default(),
        draining: BTreeMap::new(),
        placement_groups: BTreeMap::new(),
        clients: BTreeMap::new(),
        requests: BTreeMap::new(),
        next_request: 0,
        verdicts: BTreeMap::new(),
        started,
        wait,
        phase: Phase::Up,
        sweeping: 0,
        reports: 0,
        next_look: started,
        save_failed: false,
    };
    let overlap = core.tokens.overlap_left(SystemTime::now());
    core.hand_in_tokens(overlap, started);
    if core.tokens.was_rotated() {
        core.identify_keepers();
    }
    if inventory.gpus_unknown {
        core.look_for_gpus(talk).await;
    }
    let outcome = core.serve(queue, talk).await;
    drop(lock);
    outcome
}

/// The heads' addresses. A name that does not resolve yet is waited for, like a head that is not there yet; of several, one that
/// does is enough.
async fn resolve(
    given: &str,
    wait: Duration,
    talk: &mut dyn FnMut(Talk),
) -> Result<(String, Vec<SocketAddr>), DaemonError> {
    let texts: Vec<String> = given.split(',').map(|one| with_port(one.trim())).collect::<Result<_, _>>()?;
    let text = texts.join(",");
    let started = Instant::now();
    let mut told: Option<Instant> = None;
    loop {
        let mut found: Vec<SocketAddr> = Vec::new();
        let mut cause = String::new();
        for one in &texts {
            match look_up(one).await {
                Ok(address) if found.contains(&address) => {}
                Ok(address) => found.push(address),
                Err(error) => cause = error,
            }
        }
        if !found.is_empty() {
            if !cause.is_empty() {
                talk(Talk::Line(format!("not all of the heads {text} are found: {cause}")));
            }
            return Ok((text, found));
        }
        if started.elapsed() >= wait {
            return Err(DaemonError::NoHead(format!(
                "no head at {text}: {cause}\nhint: give the head's IP address, or check the name with `getent hosts`"
            )));
        }
        if told.is_none_or(|at| at.elapsed() >= WAIT_REPORT_PERIOD) {
            told = Some(Instant::now());
            let so_far = started.elapsed().as_secs();
            talk(Talk::Line(format!(
                "waiting for the name of the head {text}: {cause} ({so_far} s of {} s)",
                wait.as_secs()
            )));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn look_up(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    // Workers and libraries around vLLM are happier with IPv4; a host that has only the other is taken as well.
    let found = tokio::net::lookup_host(text).await.map_err(|error| error.to_string())?;
    found.min_by_key(SocketAddr::is_ipv6).ok_or_else(|| "it has no address".to_owned())
}

/// `host`, `host:port`, `IPv6`, `[IPv6]:port`: with the port in any case.
fn with_port(given: &str) -> Result<String, DaemonError> {
    let bad = || {
        usage(format!(
            "`{given}` is no address of a head\nhint: give HOST or HOST:PORT, for example `10.0.0.1:{DEFAULT_PORT}`"
        ))
    };
    if let Ok(ip) = given.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, DEFAULT_PORT).to_string());
    }
    if let Ok(address) = given.parse::<SocketAddr>() {
        return if address.port() == 0 { Err(bad()) } else { Ok(given.to_owned()) };
    }
    let (host, port) = match given.rsplit_once(':') {
        Some((host, port)) => (host, port.parse::<u16>().map_err(|_| bad())?),
        None => (given, DEFAULT_PORT),
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if host.is_empty() || port == 0 || !host.chars().all(is_name) {
        return Err(bad());
    }
    Ok(format!("{host}:{port}"))
}

fn choose_address(bind: Option<&str>, head: Option<SocketAddr>) -> Result<Choice, DaemonError> {
    match (bind, head) {
        (Some(given), _) => interfaces::resolve_bind(given).map_err(usage),
        (None, None) => Ok(interfaces::for_head()),
        // Without a route yet the choice is that of a host alone; the head will compare it with what it sees.
        (None, Some(head)) => Ok(interfaces::toward(head).unwrap_or_else(|_| interfaces::for_head())),
    }
}

/// The one port, UDP and TCP. Where any will do, both must be free at once.
fn open_port(
    config: &DaemonConfig,
    choice: &Choice,
    identity: &ClusterIdentity,
    counters: &Arc<Counters>,
) -> Result<(Wire, u16, TcpListener), DaemonError> {
    let mut tries = 0;
    loop {
        let listener = tcp::listen(SocketAddr::new(choice.address, config.port)).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let dead_after = config.dead_after.unwrap_or(DEAD_AFTER);
        let listens = !matches!(config.role, Role::Node { .. });
        match Wire::open(bound, listens, identity, counters.clone(), dead_after) {
            Ok(wire) => return Ok((wire, bound.port(), listener)),
            Err(_) if config.port == 0 && tries < 16 => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

fn node_info(
    config: &DaemonConfig,
    identity: &ClusterIdentity,
    choice: &Choice,
    port: u16,
    incarnation: Incarnation,
    inventory: &Inventory,
) -> Result<NodeInfo, DaemonError> {
    let host_id = match &config.host_id {
        Some(given) => given.clone(),
        None => interfaces::host_id().map_err(|error| failed(format!("cannot tell this host from others: {error}")))?,
    };
    Ok(NodeInfo {
        id: identity.node_id(),
        incarnation,
        name: config.name.clone(),
        address: choice.address.to_string(),
        port,
        interface: choice.interface.clone(),
        host_id,
        resources: inventory.resources.clone(),
        gpus: inventory.gpus.clone(),
        versions: inventory.versions.clone(),
        node_env: node_env::node_env(
            choice.address,
            &choice.interface,
            gpu::has_driver(),
            env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
        ),
        links: LinkSettings::default(),
        rdma: RdmaInventory::default(),
    })
}

/// What keeps RDMA from working: to the user where RDMA was asked for, else into the log where there is a device at all.
fn tell_of_rdma(info: &NodeInfo, talk: &mut dyn FnMut(Talk)) {
    if info.links.policy.only == Some(LinkTransport::Rdma)
        && let Some(obstacle) = info.rdma.obstacle()
    {
        talk(Talk::Line(format!("--transport rdma: no link of this node will come up: {obstacle}")));
    }
    if !info.rdma.devices.is_empty() {
        info.rdma.findings.iter().for_each(|finding| tracing::warn!("RDMA: {}", finding.what));
    }
}

/// The head's role: with what an earlier head of this run dir saved, if it did.
fn open_head(config: &DaemonConfig, info: &NodeInfo, dead_after: Duration, now: Instant) -> Result<Head, DaemonError> {
    let mut random = [0u8; 24];
    getrandom::fill(&mut random).map_err(|error| failed(format!("no random numbers from the system: {error}")))?;
    let head = HeadConfig {
        node: info.id,
        term: Term(0),
        heads: Vec::new(),
        cluster: ClusterId(std::array::from_fn(|at| random[at])),
        seed: u64::from_le_bytes(std::array::from_fn(|at| random[16 + at])),
        dead_after,
        unix_us: unix_us(),
    };
    match fs::read(config.run_dir.head_state()) {
        Ok(bytes) => match Head::restore(head.clone(), &bytes, now) {
            Ok(restored) => return Ok(restored),
            Err(error) => tracing::warn!(%error, "the saved state is not used; the nodes bring what they hold"),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(%error, "the saved state cannot be read; the nodes bring what they hold"),
    }
    Ok(Head::new(head, now))
}

/// The wall clock, in microseconds since the Unix epoch.
pub(crate) fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// TCP callers of keepers, as events.
async fn take_sessions(mut front: Front, events: Events) {
    while let Some(arrival) = front.next().await {
        let Some(group) = tcp::group_of(&arrival.name) else {
            tracing::warn!(address = %arrival.address, name = arrival.name, "a TCP caller wants nobody that is here");
            continue;
        };
        let Ok(stream) = arrival.stream.into_std() else { continue };
        let event = Event::StepSession { group, from: arrival.address.to_string(), stream: stream.into() };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

fn take_signals(events: &Events) -> Result<(), DaemonError> {
    for (kind, name) in [(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")] {
        let mut signals = signal(kind).map_err(|error| failed(format!("cannot watch {name}: {error}")))?;
        let events = events.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if events.send(Event::Signal(name)).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_its_port() {
        let cases = [
            ("10.0.0.1", "10.0.0.1:6379"),
            ("10.0.0.1:7000", "10.0.0.1:7000"),
            ("fd00::1", "[fd00::1]:6379"),
            ("[fd00::1]", "[fd00::1]:6379"),
            ("[fd00::1]:7000", "[fd00::1]:7000"),
            ("head-1", "head-1:6379"),
            ("head.example:7000", "head.example:7000"),
        ];
        for (given, wanted) in cases {
            assert_eq!(with_port(given).unwrap(), wanted);
        }
        for bad in ["", ":6379", "a b", "host:0", "host:x", "10.0.0.1:0", "http://host"] {
            let told = with_port(bad).unwrap_err().to_string();
            assert!(told.contains("hint:"), "{told}");
        }
    }
}
