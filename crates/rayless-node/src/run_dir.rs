//! The run dir of one daemon: sockets, keys, incarnation, logs.
//!
//! | name | what |
//! |---|---|
//! | `daemon.pid` | process of the daemon, locked while it runs: two daemons never share a run dir |
//! | `daemon.sock` | local clients |
//! | `daemon.log` | what the daemon says when it has no terminal |
//! | `token` | the cluster token, where the head made it or where it was rotated |
//! | `tokens` | once the token was rotated: the present one, the one before it, what they replaced |
//! | `node.key` | seed of the leaf key; the node's id is the hash of its public part |
//! | `incarnation` | counted up at each start |
//! | `term` | where heads take turns: the cluster and the highest term that this node was a member under |
//! | `head-state` | head only: a help for its restart, not needed for it |
//! | `head-story` | where heads take turns: what has happened, for `status` after a restart |
//! | `keepers/<group>.sock`, `.pid` | one per group with ranks on this host |
//! | `logs/<group>/rank-<n>.log` | output of the workers; of ended groups the last 64, 1 GiB together |
//!
//! The directory has mode 0700, files 0600.

use rayless_proto::{
    ids::{GroupId, Incarnation, Term},
    v1::control::HeadTerm,
};
use rustix::fs::{FlockOperation, Mode};
use std::{
    env, fs, io,
    io::{Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// A run dir could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// A daemon of it runs already.
    #[error(
        "a daemon (pid {pid}) already runs in {path}\nhint: `rayless stop` ends it; `--run-dir` gives a second one its own directory"
    )]
    Busy {
        /// The run dir.
        path: PathBuf,
        /// The daemon that runs there.
        pid: u32,
    },
    /// Others could read the keys in it.
    #[error(
        "the run dir {path} belongs to user {owner} (mode {mode:03o})\nhint: a run dir must belong to the user of the daemon and be closed to others; choose another with `--run-dir`"
    )]
    Unsafe {
        /// The run dir.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Its mode.
        mode: u32,
    },
    /// The file system said no.
    #[error("cannot {what} {path}: {source}\nhint: choose another directory with `--run-dir` or RAYLESS_RUN_DIR")]
    Io {
        /// A verb.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The paths of one run dir. Holding one says nothing of whether a daemon runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The directory meant by `flag` (or RAYLESS_RUN_DIR, already read by the command), else `/run/rayless` as root,
    /// else `$XDG_RUNTIME_DIR/rayless`, else `~/.rayless`. Nothing is created.
    pub fn resolve(flag: Option<PathBuf>) -> Self {
        let path = flag.unwrap_or_else(|| {
            if rustix::process::geteuid().is_root() {
                return PathBuf::from("/run/rayless");
            }
            match (env::var_os("XDG_RUNTIME_DIR"), env::var_os("HOME")) {
                (Some(runtime), _) if !runtime.is_empty() => PathBuf::from(runtime).join("rayless"),
                (_, Some(home)) => PathBuf::from(home).join(".rayless"),
                _ => PathBuf::from("/run/rayless"),
            }
        });
        // Children get the path in their configuration and have another working directory.
        Self { path: std::path::absolute(&path).unwrap_or(path) }
    }

    /// Creates what is missing, and refuses a directory that others can read.
    ///
    /// # Errors
    /// [`RunDirError::Unsafe`] and [`RunDirError::Io`].
    pub fn create(&self) -> Result<(), RunDirError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError::Io { what, path, source }
        };
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.path).map_err(io("create", &self.path))?;
        let meta = fs::metadata(&self.path).map_err(io("read", &self.path))?;
        if meta.uid() != rustix::process::geteuid().as_raw() {
            return Err(RunDirError::Unsafe { path: self.path.clone(), owner: meta.uid(), mode: meta.mode() & 0o777 });
        }
        if meta.mode() & 0o077 != 0 {
            // Ours, but made by hand (`mkdir`): close it rather than send the user away.
            fs::set_permissions(&self.path, fs::Permissions::from_mode(0o700)).map_err(io("close", &self.path))?;
        }
        for sub in [self.keepers(), self.logs()] {
            builder.create(&sub).map_err(io("create", &sub))?;
        }
        Ok(())
    }

    /// Takes the run dir for this process, until the lock is dropped.
    ///
    /// # Errors
    /// [`RunDirError::Busy`] with the pid of the daemon that has it.
    pub fn lock(&self) -> Result<RunDirLock, RunDirError> {
        let path = self.path.join("daemon.pid");
        let io = |what| {
            let path = path.clone();
            move |source| RunDirError::Io { what, path, source }
        };
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open"))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            return Err(RunDirError::Busy { path: self.path.clone(), pid: text.trim().parse().unwrap_or(0) });
        }
        file.set_len(0).map_err(io("write"))?;
        writeln!(file, "{}", std::process::id()).map_err(io("write"))?;
        Ok(RunDirLock { file, path })
    }

    /// Pid of the daemon that has the lock, `None` where none runs.
    pub fn daemon_pid(&self) -> Option<u32> {
        let mut file = fs::File::open(self.path.join("daemon.pid")).ok()?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            return None;
        }
        let mut text = String::new();
        file.read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }

    /// Counts the incarnation up and saves it.
    ///
    /// # Errors
    /// [`RunDirError::Io`]; [`Incarnation`] then is not used up.
    pub fn next_incarnation(&self) -> Result<Incarnation, RunDirError> {
        let path = self.path.join("incarnation");
        let next = match fs::read_to_string(&path) {
            Ok(text) => match text.trim().parse::<u64>() {
                Ok(last) => last.saturating_add(1),
                // Not from us (writes are atomic). Any number above those used before will do.
                Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs()),
            },
            Err(_) => 1,
        };
        write_atomically(&path, format!("{next}\n").as_bytes()).map_err(|source| RunDirError::Io {
            what: "write",
            path,
            source,
        })?;
        Ok(Incarnation(next))
    }

    /// The highest term that this node was a member under, if it ever was under any.
    pub fn seen_term(&self) -> Option<HeadTerm> {
        let text = fs::read_to_string(self.path.join("term")).ok()?;
        let (cluster, term) = text.trim().split_once(' ')?;
        Some(HeadTerm { cluster: cluster.parse().ok()?, term: Term(term.parse().ok()?) })
    }

    /// Keeps it, for later lives of this node.
    ///
    /// # Errors
    /// [`RunDirError::Io`]
    pub fn keep_term(&self, seen: HeadTerm) -> Result<(), RunDirError> {
        let path = self.path.join("term");
        write_atomically(&path, format!("{} {}\n", seen.cluster, seen.term.0).as_bytes())
            .map_err(|source| RunDirError::Io { what: "write", path, source })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Socket for local clients.
    pub fn socket(&self) -> PathBuf {
        self.path.join("daemon.sock")
    }

    /// Log of a daemon that has no terminal.
    pub fn log(&self) -> PathBuf {
        self.path.join("daemon.log")
    }

    /// The token that a head made, or the present one once it was rotated.
    pub fn token(&self) -> PathBuf {
        self.path.join("token")
    }

    /// The tokens of a rotation.
    pub fn tokens(&self) -> PathBuf {
        self.path.join("tokens")
    }

    /// Seed of the leaf key.
    pub fn node_key(&self) -> PathBuf {
        self.path.join("node.key")
    }

    /// What a head saves.
    pub fn head_state(&self) -> PathBuf {
        self.path.join("head-state")
    }

    /// What a head that takes turns with others saves: only what it says of the past is used again.
    pub fn head_story(&self) -> PathBuf {
        self.path.join("head-story")
    }

    /// Directory of the keepers' sockets.
    pub fn keepers(&self) -> PathBuf {
        self.path.join("keepers")
    }

    /// Socket of one keeper.
    pub fn keeper_socket(&self, group: GroupId) -> PathBuf {
        self.keepers().join(format!("{group}.sock"))
    }

    /// Pid file of one keeper.
    pub fn keeper_pid(&self, group: GroupId) -> PathBuf {
        self.keepers().join(format!("{group}.pid"))
    }

    /// Directory of the workers' logs.
    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// Removes the logs of groups that are over (they have no keeper here), oldest first, until those of at most `count` groups with at most `bytes`
    /// are left. Those of the last one stay, however long they are. What cannot be removed stays, too.
    pub fn remove_old_logs(&self, count: usize, bytes: u64) {
        let live = self.groups_with_keeper();
        let mut over: Vec<(SystemTime, PathBuf)> = fs::read_dir(self.logs())
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let group: GroupId = entry.file_name().to_str()?.parse().ok()?;
                (!live.contains(&group)).then_some((entry.metadata().ok()?.modified().ok()?, entry.path()))
            })
            .collect();
        over.sort_unstable_by(|one, other| other.cmp(one));
        let mut sum = 0;
        for (at, (_, path)) in over.into_iter().enumerate() {
            let files = fs::read_dir(&path).into_iter().flatten().flatten();
            sum += files.filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum::<u64>();
            if at > 0 && (at >= count || sum > bytes) {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }

    /// Groups that have a keeper's socket here, alive or not.
    pub fn groups_with_keeper(&self) -> Vec<GroupId> {
        let Ok(entries) = fs::read_dir(self.keepers()) else { return Vec::new() };
        let mut groups: Vec<GroupId> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".sock")?.parse().ok()).collect();
        groups.sort_unstable();
        groups
    }
}

/// The run dir is this process's own until this is dropped.
#[derive(Debug)]
pub struct RunDirLock {
    file: fs::File,
    path: PathBuf,
}

impl Drop for RunDirLock {
    fn drop(&mut self) {
        // Emptied, not removed: a daemon that opened the file just now would lock a name that is gone.
        let _ = self.file.set_len(0);
        tracing::debug!(path = %self.path.display(), "run dir given back");
    }
}

/// Writes beside `path` and renames: a killed process or a full disk leaves the old content. Not synced: nothing here
/// must outlive a power cut, and a start must not wait for a disk.
///
/// # Errors
/// Those of the file system.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o600))?;
        file.write_all(content)?;
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::resolve(Some(dir.path().join("run")));
        run.create().unwrap();
        (dir, run)
    }

    #[test]
    fn old_logs_go_and_those_of_living_groups_stay() {
        let (_dir, run) = fresh();
        let logs = |group: u8| run.logs().join(GroupId([group; 8]).to_string());
        let time = |group: u8| UNIX_EPOCH + std::time::Duration::from_secs(group.into());
        for group in 1..=6 {
            fs::create_dir(logs(group)).unwrap();
            fs::write(logs(group).join("rank-0.log"), vec![b'x'; 100]).unwrap();
            fs::File::open(logs(group)).unwrap().set_modified(time(group)).unwrap();
        }
        fs::create_dir(run.logs().join("not-a-group")).unwrap();
        fs::write(run.keeper_socket(GroupId([1; 8])), "").unwrap();
        let left = || (1..=6).filter(|group| logs(*group).exists()).collect::<Vec<u8>>();
        run.remove_old_logs(4, 1000);
        assert_eq!(left(), [1, 3, 4, 5, 6]);
        run.remove_old_logs(4, 250);
        assert_eq!(left(), [1, 5, 6]);
        // Of one that is larger than all may be the logs stay, if it is the last.
        run.remove_old_logs(4, 10);
        assert_eq!(left(), [1, 6]);
        assert!(run.logs().join("not-a-group").exists());
    }

    #[test]
    fn is_closed_to_others_and_knows_its_daemon() {
        let (_dir, run) = fresh();
        assert_eq!(fs::metadata(run.path()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(run.daemon_pid(), None);
        let lock = run.lock().unwrap();
        // flock is per open file: a second open of the same process is refused like another process.
        let told = run.lock().unwrap_err().to_string();
        assert!(told.contains(&format!("pid {}", std::process::id())) && told.contains("hint:"), "{told}");
        assert_eq!(run.daemon_pid(), Some(std::process::id()));
        drop(lock);
        assert_eq!(run.daemon_pid(), None);
        run.lock().unwrap();
    }

    #[test]
    fn a_directory_open_to_others_is_closed() {
        let (_dir, run) = fresh();
        fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755)).unwrap();
        run.create().unwrap();
        assert_eq!(fs::metadata(run.path()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn each_start_is_a_new_incarnation() {
        let (_dir, run) = fresh();
        assert_eq!(run.next_incarnation().unwrap(), Incarnation(1));
        assert_eq!(run.next_incarnation().unwrap(), Incarnation(2));
        fs::write(run.path().join("incarnation"), "junk").unwrap();
        assert!(run.next_incarnation().unwrap() > Incarnation(2));
    }

    #[test]
    fn keepers_are_found_by_their_sockets() {
        let (_dir, run) = fresh();
        let group = GroupId([7; 8]);
        fs::write(run.keeper_socket(group), "").unwrap();
        fs::write(run.keepers().join("other.sock"), "").unwrap();
        fs::write(run.keeper_pid(group), "1").unwrap();
        assert_eq!(run.groups_with_keeper(), [group]);
    }
}
