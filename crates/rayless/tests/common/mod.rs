//! Real processes of the command under test, ended whatever happens.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod etcd;
pub mod groups;

use serde_json::Value;
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Ends a test that would hang; nothing is measured with it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// One host's worth of rayless: a run dir, and whatever was started in it.
pub struct Host {
    dir: TempDir,
    /// Given to every command on it.
    pub token: PathBuf,
}

impl Host {
    /// A fresh one with the token of `cluster`.
    pub fn new(cluster: &Cluster) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), token: cluster.token.clone() }
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The command with this host's run dir; nothing of the environment of the test gets in.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = rayless(args);
        command.env("RAYLESS_RUN_DIR", self.run_dir());
        command
    }

    /// Runs it to its end.
    pub fn run(&self, args: &[&str]) -> Shown {
        shown(&mut self.command(args), self.dir.path())
    }

    /// Runs `args` (`head …` or `join …`) in the foreground; returns before it is ready.
    pub fn start(&self, args: &[&str]) -> Daemon {
        let mut all = args.to_vec();
        let token = self.token.to_str().unwrap().to_owned();
        all.extend(["--token-file", &token, "--port", "0"]);
        if !args.contains(&"--bind") {
            all.extend(["--bind", "127.0.0.1"]);
        }
        Daemon::of(&mut self.command(&all))
    }

    /// A head that is ready, with its address.
    pub fn head(&self, args: &[&str]) -> (Daemon, String) {
        let mut all = vec!["head"];
        all.extend(args);
        let mut daemon = self.start(&all);
        let address = daemon.join_address();
        (daemon, address)
    }

    /// What `status --json` says.
    pub fn status(&self) -> Value {
        let shown = self.run(&["status", "--json"]);
        assert_eq!(shown.code, 0, "{shown:?}");
        serde_json::from_str(&shown.stdout).unwrap()
    }

    /// Waits until `status --json` fulfils `wanted`.
    pub fn await_status(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let shown = self.run(&["status", "--json"]);
            if let Ok(status) = serde_json::from_str::<Value>(&shown.stdout)
                && wanted(&status)
            {
                return status;
            }
            assert!(Instant::now() < end, "never saw {what}: {shown:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the nodes, by name, are in these states.
    pub fn await_nodes(&self, wanted: &[(&str, &str)]) -> Value {
        self.await_status(&format!("{wanted:?}"), |status| {
            wanted.iter().all(|(name, state)| node(status, name).is_some_and(|node| node["state"] == *state))
        })
    }

    /// Pid of the daemon, from its file.
    pub fn daemon_pid(&self) -> i32 {
        fs::read_to_string(self.run_dir().join("daemon.pid")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Host {
    /// Ends a background daemon and the keepers that it left.
    fn drop(&mut self) {
        let mut pids = vec![self.run_dir().join("daemon.pid")];
        let keepers = fs::read_dir(self.run_dir().join("keepers")).into_iter().flatten().flatten();
        pids.extend(keepers.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "pid")));
        for path in pids {
            let pid = fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i32>().ok());
            // Only what this run dir started: its path is in the process's environment or arguments.
            if let Some(pid) = pid.filter(|pid| self.owns(*pid)) {
                kill(pid);
            }
        }
    }
}

impl Host {
    fn owns(&self, pid: i32) -> bool {
        let marks = self.dir.path().to_str().unwrap().as_bytes().to_vec();
        ["environ", "cmdline"].iter().any(|file| {
            fs::read(format!("/proc/{pid}/{file}"))
                .is_ok_and(|text| text.windows(marks.len()).any(|window| window == marks))
        })
    }
}

/// The node named `name` in a status.
pub fn node<'a>(status: &'a Value, name: &str) -> Option<&'a Value> {
    status["nodes"].as_array()?.iter().find(|node| node["name"] == name)
}

/// A file system of its own for a run dir, small enough to be filled.
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// `None` where this user may not mount.
    pub fn mount(path: &Path) -> Option<Self> {
        fs::create_dir_all(path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs"]).arg(path).stderr(Stdio::null());
        mount.status().ok()?.success().then(|| Self { path: path.to_owned() })
    }

    /// Takes every byte.
    pub fn fill(&self) {
        let mut file = fs::File::create(self.path.join("filler")).unwrap();
        let block = vec![0; 4096];
        while std::io::Write::write_all(&mut file, &block).is_ok() {}
        while std::io::Write::write_all(&mut file, &[0]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a daemon of a failed test may still sit in it for a moment.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// A token that hosts share.
pub struct Cluster {
    _dir: TempDir,
    token: PathBuf,
}

impl Cluster {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        let made = rayless(&["token", "new"]).output().unwrap();
        assert!(made.status.success());
        fs::write(&token, made.stdout).unwrap();
        Self { _dir: dir, token }
    }
}

/// A daemon in the foreground.
pub struct Daemon {
    child: Child,
    stdout: Option<BufReader<ChildStdout>>,
    lines: mpsc::Receiver<String>,
    seen: Vec<String>,
}

impl Daemon {
    /// Starts it.
    pub fn of(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (tx, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).all(|line| tx.send(line).is_ok()));
        let stdout = child.stdout.take().map(BufReader::new);
        Self { child, stdout, lines, seen: Vec::new() }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The address in the join line, the head's one line on stdout.
    pub fn join_address(&mut self) -> String {
        let mut line = String::new();
        self.stdout.as_mut().unwrap().read_line(&mut line).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words.get(..2), Some(&["rayless", "join"][..]), "{line:?}, stderr: {:?}", self.drain());
        words[2].to_owned()
    }

    /// Waits for a line of talk with `part` in it.
    pub fn says(&mut self, part: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(_) => panic!("never said {part:?}, but: {:?}", self.seen),
            }
        }
    }

    fn drain(&mut self) -> Vec<String> {
        self.seen.extend(self.lines.try_iter());
        self.seen.clone()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Kills it as a crash would.
    pub fn crash(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_raw(self.pid()).unwrap(), signal).unwrap();
    }

    /// Waits for its end; code and what it said.
    pub fn ends(mut self) -> (i32, Vec<String>) {
        let status = wait(&mut self.child);
        let end = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
        (status, self.seen.clone())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(child: &mut Child) -> i32 {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if Instant::now() > end {
            let _ = child.kill();
            panic!("still runs after {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Kills a process and waits until it is gone.
pub fn kill(pid: i32) {
    let Some(target) = rustix::process::Pid::from_raw(pid) else { return };
    let _ = rustix::process::kill_process(target, rustix::process::Signal::KILL);
    let end = Instant::now() + PATIENCE;
    while is_alive(pid) && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process runs (a zombie does not).
pub fn is_alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z')))
}

/// The command, without any RAYLESS_* of the test's own environment.
pub fn rayless(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rayless"));
    command.args(args).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("RAYLESS_") {
            command.env_remove(name);
        }
    }
    command
}

/// What a command showed.
#[derive(Debug, PartialEq, Eq)]
pub struct Shown {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end; `dir` is shown as `[DIR]`.
pub fn shown(command: &mut Command, dir: &Path) -> Shown {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let read = |mut pipe: Box<dyn std::io::Read + Send>| {
        thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            text
        })
    };
    let (out, err) = (read(Box::new(child.stdout.take().unwrap())), read(Box::new(child.stderr.take().unwrap())));
    let code = wait(&mut child);
    let clean = |text: String| text.replace(dir.to_str().unwrap(), "[DIR]");
    Shown { code, stdout: clean(out.join().unwrap()), stderr: clean(err.join().unwrap()) }
}

/// For tests that look at a finished process.
pub fn text(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}
