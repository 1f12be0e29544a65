//! Starting a worker process.

use super::stacks::{STACKS_SIGNAL, STACKS_VARIABLE};
use crate::host::FDS_VARIABLE;
use rayless_proto::{
    ids::Rank,
    v1::{control::RankAllocation, keeper::KeeperConfig, step::Launch},
};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    pipe::PipeFlags,
    process::{Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, set_parent_process_death_signal, setsid},
};
use std::{
    collections::BTreeMap,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Child, ChildStderr, ChildStdout, Command, Stdio},
};
use tokio::io::{Interest, unix::AsyncFd};

/// A worker just started.
pub(super) struct Started {
    pub(super) process: Child,
    pub(super) pidfd: OwnedFd,
    pub(super) stdout: ChildStdout,
    pub(super) stderr: ChildStderr,
    /// Boot bytes out, `ready` in.
    pub(super) control: UnixStream,
    /// Where its Python writes its stacks when asked.
    pub(super) stacks: OwnedFd,
    /// Connections for its links out, reports of them in.
    pub(super) links: UnixStream,
}

/// Starts the worker at `index` of `config.ranks`, with `life` for its robust mutex. Must run on the process's main thread: the kernel kills a child with a death signal when
/// the *thread* that started it ends.
pub(super) fn start(
    config: &KeeperConfig,
    index: usize,
    launch: &Launch,
    directory: &Path,
    ring: BorrowedFd<'_>,
    replies: BorrowedFd<'_>,
    life: OwnedFd,
) -> io::Result<Started> {
    let (control, theirs) = UnixStream::pair()?;
    let (links, their_links) = UnixStream::pair()?;
    // Numbers of their own: clearing close-on-exec in the child must not touch what other children inherit.
    let ring = ring.try_clone_to_owned()?;
    let replies = replies.try_clone_to_owned()?;
    let fds = [ring.as_raw_fd(), replies.as_raw_fd(), theirs.as_raw_fd(), their_links.as_raw_fd(), life.as_raw_fd()];
    let (stacks, stacks_end) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let mut command = Command::new(&launch.program);
    command
        .args(&launch.arguments)
        .current_dir(directory)
        .env_clear()
        .envs(environment(config, index, launch))
        .env(FDS_VARIABLE, fds.map(|fd| fd.to_string()).join(","))
        .env(STACKS_VARIABLE, format!("{},{}", stacks_end.as_raw_fd(), STACKS_SIGNAL.as_raw()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let keeper = getpid();
    let setup = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The keeper may have died between fork and that call: then the signal never comes.
        if getppid() != Some(keeper) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        // A session of its own: no terminal's Ctrl-C, and a name for all that it starts.
        setsid()?;
        let handed = [&ring, &replies, &life, &stacks_end].map(AsFd::as_fd);
        for fd in handed.into_iter().chain([theirs.as_fd(), their_links.as_fd()]) {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made (rustix issues them directly), nothing allocates or takes a lock, and
    // the captured descriptors stay open in the parent until the command is dropped.
    unsafe { command.pre_exec(setup) };
    let mut process = command.spawn()?;
    let missing = || io::Error::other("a pipe is missing");
    let stdout = process.stdout.take().ok_or_else(missing)?;
    let stderr = process.stderr.take().ok_or_else(missing)?;
    let pid = Pid::from_child(&process);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(Started { process, pidfd, stdout, stderr, control, links, stacks })
}

/// A pidfd in the runtime: readable once the process ended.
pub(super) fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives, which is what is asked for; it lives in the `AsyncFd`.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
}

/// The driver's environment, then its words for that rank, then the node's, then what names the rank.
fn environment(config: &KeeperConfig, index: usize, launch: &Launch) -> BTreeMap<String, String> {
    let RankAllocation { rank, allocation, .. } = &config.ranks[index];
    let mut env: BTreeMap<String, String> = launch.env.iter().cloned().collect();
    env.extend(launch.rank_env.iter().filter(|(of, _)| of == rank).flat_map(|(_, more)| more.iter().cloned()));
    env.extend(config.node_env.iter().map(|entry| (entry.name.clone(), entry.value.clone())));
    let gpus: Vec<_> = allocation.gpus.iter().map(|share| share.index.to_string()).collect();
    let uuids = config.gpu_uuids.get(index).map(|uuids| uuids.join(",")).unwrap_or_default();
    let own = [
        ("RAYLESS_RANK", rank.to_string()),
        ("RAYLESS_LOCAL_RANK", index.to_string()),
        ("RAYLESS_WORLD_SIZE", config.world_size.to_string()),
        ("RAYLESS_LOCAL_WORLD_SIZE", config.ranks.len().to_string()),
        ("RAYLESS_GROUP", config.group.to_string()),
        ("RAYLESS_NODE", config.node_name.clone()),
        ("RAYLESS_NODE_NAME", config.node_name.clone()),
        ("RAYLESS_NODE_ID", config.node.to_string()),
        ("RAYLESS_NODE_IP", config.node_address.clone()),
        ("RAYLESS_GPU_IDS", gpus.join(",")),
        ("RAYLESS_GPU_UUIDS", uuids),
        ("RAYLESS_RUN_DIR", config.run_dir.clone()),
    ];
    env.extend(own.map(|(name, value)| (name.to_owned(), value)));
    // Whoever has the token is the cluster: no child ever sees it.
    env.remove("RAYLESS_TOKEN");
    env.remove("RAYLESS_TOKEN_FILE");
    env
}

/// `exited with code 1`, `was killed by SIGKILL`.
pub(super) fn how_it_ended(status: std::process::ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was killed by {}", signal_name(signal)),
        (None, None) => "ended".to_owned(),
    }
}

fn signal_name(number: i32) -> String {
    let name = match number {
        libc::SIGKILL => "SIGKILL",
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGILL => "SIGILL",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGUSR2 => "SIGUSR2",
        _ => return format!("signal {number}"),
    };
    name.to_owned()
}

/// What to say where a worker of `rank` could not be started.
pub(super) fn not_started(config: &KeeperConfig, rank: Rank, program: &str, error: &io::Error) -> String {
    let hint = if error.kind() == io::ErrorKind::NotFound {
        format!(
            "\nhint: install that interpreter on node {} at the same path, or name one that both have with --python",
            config.node_name
        )
    } else {
        String::new()
    };
    format!("rank {rank} on node {}: cannot start {program}: {error}{hint}", config.node_name)
}
