//! A daemon's hold on a keeper: starting one, or finding one that an earlier daemon started.

use super::{KeeperError, socket_path};
use rayless_net::{framing, unix};
use rayless_proto::{
    codec,
    ids::{GroupId, NodeId},
    limits::MAX_LOCAL_MESSAGE,
    v1::{
        control::HeldGroup,
        keeper::{FromKeeper, KeeperConfig, ToKeeper},
        local::LeafBundle,
        status::NodeState,
    },
};
use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    process::Command,
    sync::mpsc,
    time::timeout,
};

/// A keeper that takes longer than this to come up or to answer is no use.
const START: Duration = Duration::from_secs(10);

/// Starts `exe keeper` in a session of its own, hands it `config`, and returns once its socket takes sessions. Needs a tokio
/// runtime with I/O and time. Dropping the handle leaves the keeper alone.
///
/// # Errors
/// [`KeeperError::NotStarted`] with its last line.
pub async fn spawn(exe: &Path, config: &KeeperConfig) -> Result<KeeperHandle, KeeperError> {
    let failed = |what: String| move |source: io::Error| KeeperError::Io { what, source };
    let log_dir = super::log_dir(config);
    super::make_dir(&log_dir)?;
    let log_path = log_dir.join("keeper.log");
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(failed(format!("cannot open {}", log_path.display())))?;
    let mut child = Command::new(exe)
        .arg("keeper")
        .env_remove("RAYLESS_TOKEN")
        .env_remove("RAYLESS_TOKEN_FILE")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(failed(format!("cannot start {}", exe.display())))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (Some(mut stdin), Some(stdout)) = (stdin, stdout) else {
        return Err(KeeperError::NotStarted("its pipes are missing".into()));
    };
    // Reaps it, whenever it ends.
    tokio::spawn(async move { child.wait().await });
    let config_bytes = codec::encode(config);
    let told = async {
        stdin.write_all(&config_bytes).await?;
        drop(stdin);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        io::Result::Ok(line)
    };
    let line = match timeout(START, told).await {
        Ok(Ok(line)) => line,
        Ok(Err(error)) => return Err(KeeperError::NotStarted(error.to_string())),
        Err(_) => return Err(KeeperError::NotStarted(format!("no word from it for {START:?}"))),
    };
    if line.trim_end() != super::READY {
        let log = std::fs::read_to_string(&log_path).unwrap_or_default();
        let said = [line.as_str(), &log].into_iter().flat_map(|text| text.lines().rev());
        let last = said.map(str::trim).find(|line| !line.is_empty()).unwrap_or("it ended without a word");
        return Err(KeeperError::NotStarted(last.to_owned()));
    }
    adopt(&socket_path(config)).await
}

/// Connects to the keeper behind `socket` (one found in `keepers/`).
///
/// # Errors
/// Where nobody listens there any more: the caller removes the file.
pub async fn adopt(socket: &Path) -> Result<KeeperHandle, KeeperError> {
    let what = || format!("cannot reach the keeper at {}", socket.display());
    let failed = |source| KeeperError::Io { what: what(), source };
    let opened = async {
        let mut stream = unix::connect(socket).await.map_err(io::Error::other)?;
        let pid = unix::peer_credentials(&stream)?.pid;
        stream.write_all(b"D").await?;
        let (read, mut write) = stream.into_split();
        let mut frames = framing::FrameReader::new(read, MAX_LOCAL_MESSAGE);
        send(&mut write, &ToKeeper::Watch).await?;
        let first = frames.next().await.map_err(io::Error::other)?;
        let first = codec::decode::<FromKeeper>(&first).map_err(io::Error::other)?;
        Ok((pid, frames, write, first))
    };
    let (pid, frames, write, first) =
        timeout(START, opened).await.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
    let FromKeeper::Held(held) = first else {
        return Err(KeeperError::NotStarted("it did not say what it holds".into()));
    };
    let (outbox, queue) = mpsc::unbounded_channel();
    tokio::spawn(send_all(write, queue));
    Ok(KeeperHandle { held, pid, socket: socket.to_owned(), frames, outbox })
}

async fn send(write: &mut OwnedWriteHalf, message: &ToKeeper) -> io::Result<()> {
    framing::write_frame(write, &codec::encode(message), MAX_LOCAL_MESSAGE).await.map_err(io::Error::other)
}

async fn send_all(mut write: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<ToKeeper>) {
    while let Some(message) = queue.recv().await {
        if send(&mut write, &message).await.is_err() {
            return;
        }
    }
}

/// A daemon's hold on one keeper.
#[derive(Debug)]
pub struct KeeperHandle {
    held: HeldGroup,
    pid: u32,
    socket: PathBuf,
    frames: framing::FrameReader<OwnedReadHalf>,
    outbox: mpsc::UnboundedSender<ToKeeper>,
}

impl KeeperHandle {
    /// Its group.
    pub const fn group(&self) -> GroupId {
        self.held.group
    }

    /// What it held when this handle was made.
    pub const fn held(&self) -> &HeldGroup {
        &self.held
    }

    /// Its process.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Its socket.
    pub const fn socket(&self) -> &PathBuf {
        &self.socket
    }

    /// The next message; `None` once the keeper is gone (after `Ended`, or without it where it was killed). Cancel safe.
    pub async fn next(&mut self) -> Option<FromKeeper> {
        let frame = self.frames.next().await.ok()?;
        codec::decode(&frame).ok()
    }

    /// Tells it to kill its workers and end (empty cause: in order). Queued, never blocks.
    pub fn stop(&self, cause: &str) {
        self.remote().stop(cause);
    }

    /// Tells it what the head holds a node for. Queued, never blocks.
    pub fn verdict(&self, node: NodeId, state: NodeState) {
        self.remote().verdict(node, state);
    }

    /// Gives it another identity for the sessions that are still to come. Queued, never blocks.
    pub fn identify(&self, leaf: LeafBundle) {
        let _ = self.outbox.send(ToKeeper::Leaf(leaf));
    }

    /// The talking half, for who does not also listen: [`Self::next`] wants the handle for itself.
    pub fn remote(&self) -> KeeperRemote {
        KeeperRemote { outbox: self.outbox.clone() }
    }

    /// A hand-over to the same keeper that can be kept in another task (the TCP accept loop).
    pub fn hand_over(&self) -> HandOver {
        HandOver { socket: self.socket.clone() }
    }
}

/// Sends to a keeper while someone else waits for its messages.
#[derive(Debug, Clone)]
pub struct KeeperRemote {
    outbox: mpsc::UnboundedSender<ToKeeper>,
}

impl KeeperRemote {
    /// As [`KeeperHandle::stop`].
    pub fn stop(&self, cause: &str) {
        let _ = self.outbox.send(ToKeeper::Stop { cause: cause.to_owned() });
    }

    /// As [`KeeperHandle::verdict`].
    pub fn verdict(&self, node: NodeId, state: NodeState) {
        let _ = self.outbox.send(ToKeeper::NodeVerdict { node, state });
    }
}

/// Passes TCP step sessions to a keeper.
#[derive(Debug, Clone)]
pub struct HandOver {
    socket: PathBuf,
}

impl HandOver {
    /// Passes `session`, of which nothing was consumed yet.
    ///
    /// # Errors
    /// Where the keeper is gone.
    pub async fn session(&self, session: OwnedFd) -> io::Result<()> {
        let stream = unix::connect(&self.socket).await.map_err(io::Error::other)?;
        unix::send_fd(&stream, b'S', session.as_fd()).await
    }
}
