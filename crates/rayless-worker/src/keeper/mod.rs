//! The keeper: owns the workers of one group on one host and outlives the daemon that started it.
//!
//! Its main thread runs a tokio loop (`group`: daemons, drivers at the door, processes, pipes, timers), since a worker must be a child of
//! that thread; a second thread (`step`) has the driver's session, and where the driver is on another host also the ring. A thread per
//! worker (`dying`) sleeps until that one dies.
//!
//! Files in the run dir: `keepers/<group>.sock` (0600) and `.pid`, gone when the keeper is; `logs/<group>/rank-<n>.log` and `keeper.log`.

mod ask;
mod child;
mod door;
mod dying;
mod group;
mod handle;
mod links;
mod logs;
mod look;
mod reap;
mod stacks;
mod step;

pub use ask::{Answer, ask};
pub use handle::{HandOver, KeeperHandle, KeeperRemote, adopt, spawn};
pub use reap::{clear_orphans, is_of_group};

use group::Group;
use rayless_net::unix;
use rayless_proto::{
    codec,
    limits::{MAX_LOCAL_MESSAGE, MAX_WORKERS_PER_HOST},
    v1::keeper::KeeperConfig,
};
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// What a keeper says on stdout once its socket takes sessions.
const READY: &str = "ready";

/// Why a keeper did not start or ended early.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// What came on stdin is not a configuration.
    #[error("no keeper configuration on stdin: {0}\nhint: `rayless keeper` is started by the daemon, not by hand")]
    Config(String),
    /// Sockets, files or shared memory could not be made.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, for example `cannot bind /run/rayless/keepers/….sock`.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The keeper process did not come up; one line of what it said.
    #[error("the keeper did not start: {0}")]
    NotStarted(String),
}

/// Body of `rayless keeper`: reads its configuration from stdin and runs until the group is over. Must be called on the process's
/// main thread: its children die with the thread that made them.
///
/// # Errors
/// Where it cannot start. After the start everything that goes wrong ends the group with a cause told to daemon and driver.
pub fn run() -> Result<(), KeeperError> {
    run_until_over().inspect_err(|error| {
        // To the daemon that waits for a word: the log may be what could not be written.
        let _ = writeln!(io::stdout(), "{error}");
    })
}

fn run_until_over() -> Result<(), KeeperError> {
    let config = read_config()?;
    // Not of the daemon's session: what ends that one must not end this. Fails where it is so already.
    let _ = rustix::process::setsid();
    // What a worker started and left behind becomes ours, to be reaped.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let log_dir = log_dir(&config);
    make_dir(&log_dir)?;
    let socket = socket_path(&config);
    make_dir(socket.parent().unwrap_or_else(|| Path::new("/")))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| KeeperError::Io { what: "cannot start a runtime".into(), source })?;
    runtime.block_on(async {
        let listener = unix::bind(&socket).map_err(|error| KeeperError::Io {
            what: format!("cannot bind {}", socket.display()),
            source: io::Error::other(error),
        })?;
        // For people only: on a full disk the group does without.
        if let Err(error) = write_pid(&config) {
            tracing::warn!("{error}");
        }
        let cleared = config.clone();
        let result = serve(config, listener, log_dir).await;
        if result.is_err() {
            group::remove_files(&cleared);
        }
        result
    })
}

async fn serve(config: KeeperConfig, listener: tokio::net::UnixListener, log_dir: PathBuf) -> Result<(), KeeperError> {
    let group = Group::new(config, listener, log_dir)?;
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| KeeperError::Io { what, source }
    };
    let mut stdout = io::stdout();
    // The daemon that waits for this may be gone already: the next one finds the socket.
    let _ = writeln!(stdout, "{READY}").and_then(|()| stdout.flush());
    tokio::task::LocalSet::new().run_until(group.run()).await.map_err(io("cannot watch signals"))
}

fn read_config() -> Result<KeeperConfig, KeeperError> {
    let mut bytes = Vec::new();
    let wrong = |error: String| KeeperError::Config(error);
    io::stdin()
        .lock()
        .take(MAX_LOCAL_MESSAGE as u64)
        .read_to_end(&mut bytes)
        .map_err(|error| wrong(error.to_string()))?;
    let config = codec::decode::<KeeperConfig>(&bytes).map_err(|error| wrong(error.to_string()))?;
    if config.ranks.is_empty() || config.ranks.len() > MAX_WORKERS_PER_HOST {
        return Err(wrong(format!(
            "{} ranks on one host, 1 to {MAX_WORKERS_PER_HOST} are possible",
            config.ranks.len()
        )));
    }
    Ok(config)
}

fn write_pid(config: &KeeperConfig) -> Result<(), KeeperError> {
    let path = pid_path(config);
    let write = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        writeln!(file, "{}", std::process::id())
    };
    write().map_err(|source| KeeperError::Io { what: format!("cannot write {}", path.display()), source })
}

fn make_dir(path: &Path) -> Result<(), KeeperError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| KeeperError::Io { what: format!("cannot make {}", path.display()), source })
}

/// `keepers/<group>.sock` in its run dir.
pub fn socket_path(config: &KeeperConfig) -> PathBuf {
    Path::new(&config.run_dir).join("keepers").join(format!("{}.sock", config.group))
}

fn pid_path(config: &KeeperConfig) -> PathBuf {
    socket_path(config).with_extension("pid")
}

/// `logs/<group>` in its run dir.
pub fn log_dir(config: &KeeperConfig) -> PathBuf {
    Path::new(&config.run_dir).join("logs").join(config.group.to_string())
}
