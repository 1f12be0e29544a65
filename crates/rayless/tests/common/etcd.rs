//! An etcd of a test's own, alone or of several members, each in its own directory and on its own ports.
#![allow(clippy::unwrap_used, reason = "a test ends with the first thing that is not as it should be")]

use super::PATIENCE;
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

pub struct Etcd {
    dir: TempDir,
    name: String,
    client: u16,
    peer: u16,
    /// `--initial-cluster`
    members: String,
    more: Vec<String>,
    child: Option<Child>,
}

impl Etcd {
    /// One that answers.
    pub fn start() -> Self {
        Self::start_with(&[], "http")
    }

    /// With more arguments, for clients that speak `scheme`.
    pub fn start_with(more: &[&str], scheme: &str) -> Self {
        let mut etcd = Self::alone(more, scheme);
        etcd.resume();
        etcd
    }

    /// So many that are one store; each answers.
    pub fn members(count: usize) -> Vec<Self> {
        let mut all: Vec<Self> = (0..count).map(|_| Self::alone(&[], "http")).collect();
        for (number, etcd) in all.iter_mut().enumerate() {
            etcd.name = format!("m{number}");
        }
        let urls: Vec<String> = all.iter().map(|etcd| format!("{}={}", etcd.name, etcd.peer_url())).collect();
        all.iter_mut().for_each(|etcd| etcd.members = urls.join(","));
        Self::resume_all(&mut all);
        all
    }

    /// Starts several; a member answers when most of them are there.
    pub fn resume_all(members: &mut [Self]) {
        members.iter_mut().for_each(Self::spawn);
        members.iter().for_each(Self::await_answer);
    }

    fn alone(more: &[&str], scheme: &str) -> Self {
        // Both are held until both are known.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = free.each_ref().map(|socket| socket.local_addr().unwrap().port());
        drop(free);
        let url = format!("{scheme}://127.0.0.1:{client}");
        let mut args = vec!["--listen-client-urls".to_owned(), url.clone(), "--advertise-client-urls".to_owned(), url];
        args.extend(more.iter().map(ToString::to_string));
        let dir = tempfile::tempdir().unwrap();
        let members = format!("default=http://127.0.0.1:{peer}");
        Self { dir, name: "default".to_owned(), client, peer, members, more: args, child: None }
    }

    fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer)
    }

    /// For `--store`.
    pub fn address(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.client)
    }

    /// What an operator does, through the gateway of a server without TLS.
    pub fn operate(&self, what: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.client)).unwrap();
        let length = body.len();
        let head =
            format!("POST /v3/{what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{what}: {answer}");
        answer
    }

    /// Kills it; its data stay.
    pub fn crash(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it with the data of before.
    pub fn resume(&mut self) {
        self.spawn();
        self.await_answer();
    }

    fn spawn(&mut self) {
        let peer = self.peer_url();
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args(["--name", &self.name])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.members])
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let started = command.spawn();
        self.child =
            Some(started.unwrap_or_else(|error| {
                panic!("cannot start etcd ({error}); `tests/setup/apt etcd-server` installs it")
            }));
    }

    fn await_answer(&self) {
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.client)).is_err() {
            assert!(Instant::now() < end, "etcd: {}", fs::read_to_string(self.dir.path().join("log")).unwrap());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.crash();
    }
}
