//! A cluster without daemons: keepers on two "hosts" of this machine, one of them reached over TLS on loopback.

use rayless_net::{
    identity::{ClusterIdentity, NodeKey},
    token::Token,
};
use rayless_proto::{
    ids::{GroupId, NodeId},
    resources::Allocation,
    v1::{
        control::{NodeEnv, PlacedNode, Placement, RankAllocation},
        keeper::{FromKeeper, KeeperConfig},
        link::{LinkPolicy, LinkReport, LinkSettings},
        local::LeafBundle,
        step::Launch,
    },
};
use rayless_worker::{
    driver::{Asked, Call, CallError, Callbacks, Placed, PlacedParts, Reply, StartError, WorkerGroup},
    keeper::{self, KeeperHandle},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use std::{
    net::{SocketAddr, TcpListener as StdListener},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{runtime::Handle, sync::oneshot};

/// Everything that a daemon would have.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) runtime: Handle,
    _runtime_until: oneshot::Sender<()>,
    pub(crate) handles: Vec<KeeperHandle>,
    pub(crate) configs: Vec<KeeperConfig>,
    parts: PlacedParts,
}

/// How the hosts look.
pub(crate) struct Shape {
    /// Ranks on the driver's host.
    pub(crate) local: u32,
    /// Ranks on the other host.
    pub(crate) remote: u32,
    pub(crate) dead_after: Duration,
    pub(crate) driver_wait: Duration,
    /// Both are one host for shared memory.
    pub(crate) one_host: bool,
    /// What the user of each wants of links.
    pub(crate) wishes: [LinkPolicy; 2],
    /// The RDMA device that each may use, and the ports on it; none: they have no RDMA at all.
    pub(crate) rdma: Option<([String; 2], (u16, u16))>,
}

impl Shape {
    pub(crate) fn new(local: u32, remote: u32) -> Self {
        Self {
            local,
            remote,
            dead_after: Duration::from_secs(3),
            driver_wait: Duration::from_secs(10),
            one_host: false,
            wishes: Default::default(),
            rdma: None,
        }
    }
}

impl World {
    pub(crate) fn new(local: u32, remote: u32) -> Self {
        Self::of(&Shape::new(local, remote))
    }

    pub(crate) fn of(shape: &Shape) -> Self {
        let dir = tempfile::Builder::new().prefix("rayless-stories-").tempdir().unwrap();
        let (runtime, until) = start_runtime();
        let token = Token::generate().unwrap();
        let group = GroupId(std::array::from_fn(|_| random_byte()));
        let world_size = shape.local + shape.remote;
        let mut handles = Vec::new();
        let mut configs = Vec::new();
        let (mut placements, mut nodes) = (Vec::new(), Vec::new());
        let mut local_keeper = None;
        let mut driver_leaf = None;
        let mut driver_node = None;
        let hosts = [(shape.local, "a", 0), (shape.remote, "b", shape.local)];
        for ((count, name, first), wishes) in hosts.into_iter().zip(&shape.wishes) {
            let identity = ClusterIdentity::from_token(&token, &NodeKey::generate().unwrap()).unwrap();
            let node = identity.node_id();
            let driver_node = *driver_node.get_or_insert(node);
            driver_leaf.get_or_insert_with(|| identity.issue_delegate().unwrap());
            if count == 0 {
                continue;
            }
            let ranks: Vec<u32> = (first..first + count).collect();
            let run_dir = dir.path().join(name);
            let (devices, rdma_ports) = shape.rdma.clone().unwrap_or_default();
            let rdma_devices =
                devices.into_iter().skip(handles.len()).take(1).filter(|name| !name.is_empty()).collect();
            let config = KeeperConfig {
                group,
                name: "story".into(),
                world_size,
                driver_node,
                node,
                node_name: name.into(),
                node_address: "127.0.0.1".into(),
                run_dir: run_dir.to_string_lossy().into_owned(),
                ranks: ranks
                    .iter()
                    .map(|rank| RankAllocation {
                        rank: *rank,
                        allocation: Allocation::default(),
                        placement_group: None,
                    })
                    .collect(),
                gpu_uuids: ranks.iter().map(|rank| vec![format!("GPU-{rank}")]).collect(),
                node_env: vec![NodeEnv { name: "TEST_NODE".into(), value: name.into(), source: "test".into() }],
                leaf: identity.issue_delegate().unwrap(),
                dead_after_ms: shape.dead_after.as_millis() as u64,
                driver_wait_ms: shape.driver_wait.as_millis() as u64,
                links: LinkSettings { policy: wishes.clone(), rdma_devices, rdma_ports },
                requester: None,
            };
            let handle = runtime.block_on(keeper::spawn(&std::env::current_exe().unwrap(), &config)).unwrap();
            if name == "a" {
                local_keeper = Some(handle.socket().clone());
            }
            let port = hand_sessions_over(&runtime, &handle);
            for (local_rank, rank) in ranks.iter().enumerate() {
                placements.push(Placement {
                    rank: *rank,
                    local_rank: local_rank as u32,
                    node,
                    allocation: Allocation::default(),
                    gpu_uuids: Vec::new(),
                });
            }
            nodes.push(PlacedNode {
                id: node,
                name: name.into(),
                address: "127.0.0.1".into(),
                port,
                host_id: if shape.one_host { "ab".into() } else { name.into() },
                node_env: Vec::new(),
                versions: Vec::new(),
                link_policy: LinkPolicy::default(),
                has_rdma: shape.rdma.is_some(),
            });
            handles.push(handle);
            configs.push(config);
        }
        let parts = PlacedParts {
            group,
            placements,
            nodes,
            local_node: driver_node.unwrap(),
            local_keeper,
            leaf: driver_leaf.unwrap(),
            dead_after: shape.dead_after,
            versions: vec![("vllm".into(), "1.0".into())],
        };
        Self { dir, runtime, _runtime_until: until, handles, configs, parts }
    }

    pub(crate) fn launch(&self) -> Launch {
        Launch {
            program: std::env::current_exe().unwrap().to_string_lossy().into_owned(),
            arguments: vec!["worker".into()],
            directory: self.dir.path().to_string_lossy().into_owned(),
            env: ["PATH", "RAYLESS_SPIN_US"]
                .into_iter()
                .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
                .chain([("RAYLESS_TOKEN".to_owned(), "secret".to_owned()), ("TEST_NODE".into(), "the driver's".into())])
                .collect(),
            rank_env: Vec::new(),
            boot: b"boot bytes".to_vec(),
            links: None,
        }
    }

    /// Where callers of the other host, or of links, find node `index`.
    pub(crate) fn address_of(&self, index: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.parts.nodes[index].port))
    }

    /// The leaf of the driver.
    pub(crate) fn leaf(&self) -> &LeafBundle {
        &self.parts.leaf
    }

    /// The first report of a link from node `index` that is as wanted.
    pub(crate) fn report(&mut self, index: usize, wanted: impl Fn(&LinkReport) -> bool) -> LinkReport {
        let handle = &mut self.handles[index];
        self.runtime.block_on(async {
            let found = async {
                loop {
                    match handle.next().await.expect("the keeper lives") {
                        FromKeeper::Link(report) if wanted(&report) => return report,
                        _ => {}
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(20), found).await.expect("such a report comes")
        })
    }

    pub(crate) fn placed(&self) -> Placed {
        Placed::from_parts(self.parts.clone()).unwrap()
    }

    pub(crate) fn start(&self) -> WorkerGroup {
        self.start_with(self.launch(), Callbacks::default()).unwrap()
    }

    pub(crate) fn start_with(&self, launch: Launch, callbacks: Callbacks) -> Result<WorkerGroup, StartError> {
        self.placed().launch(launch, Duration::from_secs(20), callbacks, &mut |_| true)
    }

    pub(crate) fn keeper_pid(&self, index: usize) -> u32 {
        let path = keeper::socket_path(&self.configs[index]).with_extension("pid");
        std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    pub(crate) fn log_of(&self, index: usize, rank: u32) -> PathBuf {
        keeper::log_dir(&self.configs[index]).join(format!("rank-{rank}.log"))
    }

    pub(crate) fn socket_of(&self, index: usize) -> PathBuf {
        keeper::socket_path(&self.configs[index])
    }

    /// Nothing of the group is left on any host: every keeper ended and took its files along. The cause that each told its daemon.
    pub(crate) fn assert_nothing_left(&mut self) -> Vec<String> {
        let mut causes = Vec::new();
        for (handle, config) in self.handles.iter_mut().zip(&self.configs) {
            self.runtime.block_on(async {
                let all = async {
                    while let Some(message) = handle.next().await {
                        if let FromKeeper::Ended { cause } = message {
                            causes.push(cause);
                        }
                    }
                };
                tokio::time::timeout(Duration::from_secs(8), all).await.expect("the keeper ends");
            });
            assert!(!keeper::socket_path(config).exists());
        }
        causes
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Also after a failed story: whatever still runs is ended by its keeper.
        for handle in &self.handles {
            handle.stop("the story is over");
        }
        for index in 0..self.configs.len() {
            let path = self.socket_of(index).with_extension("pid");
            let pid = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
            if let Some(pid) = pid.filter(|pid| !wait_gone(*pid, Duration::from_secs(6))) {
                signal(pid, Signal::KILL);
            }
        }
    }
}

/// A runtime on a thread of its own, until the sender is dropped.
fn start_runtime() -> (Handle, oneshot::Sender<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    let (until, ended) = oneshot::channel();
    std::thread::spawn(move || runtime.block_on(ended));
    (handle, until)
}

/// What a daemon's TCP front does for one keeper.
fn hand_sessions_over(runtime: &Handle, handle: &KeeperHandle) -> u16 {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    listener.set_nonblocking(true).unwrap();
    let hand_over = handle.hand_over();
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        while let Ok((stream, _)) = listener.accept().await {
            let _ = hand_over.session(OwnedFd::from(stream.into_std().unwrap())).await;
        }
    });
    port
}

/// Whether process `pid` ends within `timeout`.
pub(crate) fn wait_gone(pid: u32, timeout: Duration) -> bool {
    let Some(process) = Pid::from_raw(pid as i32) else { return true };
    let Ok(fd) = pidfd_open(process, PidfdFlags::empty()) else { return true };
    let until = Instant::now() + timeout;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.unwrap() > 0,
        }
    }
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}

pub(crate) fn ask(group: &WorkerGroup, payload: &str, ranks: &[u32]) -> Call {
    group.call(payload.as_bytes(), &Asked::Ranks(ranks.to_vec()), Some(Duration::from_secs(20))).unwrap()
}

pub(crate) fn all(group: &WorkerGroup, payload: &str) -> Result<Vec<Reply>, CallError> {
    group.call(payload.as_bytes(), &Asked::All, Some(Duration::from_secs(20)))?.wait()
}

pub(crate) fn texts(replies: &[Reply]) -> Vec<String> {
    replies.iter().map(|reply| String::from_utf8_lossy(&reply.payload).into_owned()).collect()
}

pub(crate) fn node_of(world: &World, index: usize) -> NodeId {
    world.configs[index].node
}

fn random_byte() -> u8 {
    let mut byte = [0];
    std::io::Read::read_exact(&mut std::fs::File::open(Path::new("/dev/urandom")).unwrap(), &mut byte).unwrap();
    byte[0]
}
