//! An etcd of a test's own, in its own directory and on its own ports.
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
    client: u16,
    peer: u16,
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
        // Both are held until both are known.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = free.each_ref().map(|socket| socket.local_addr().unwrap().port());
        drop(free);
        let url = format!("{scheme}://127.0.0.1:{client}");
        let mut args = vec!["--listen-client-urls".to_owned(), url.clone(), "--advertise-client-urls".to_owned(), url];
        args.extend(more.iter().map(ToString::to_string));
        let mut etcd = Self { dir: tempfile::tempdir().unwrap(), client, peer, more: args, child: None };
        etcd.resume();
        etcd
    }

    /// For `--store`.
    pub fn address(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.client)
    }

    /// What an operator does, through the gateway of a server without TLS.
    pub fn operate(&self, what: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.client)).unwrap();
        let length = body.len();
        let head =
            format!("POST /v3/{what} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{what}: {answer}");
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
        let peer = format!("http://127.0.0.1:{}", self.peer);
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let started = command.spawn();
        self.child =
            Some(started.unwrap_or_else(|error| {
                panic!("cannot start etcd ({error}); `tests/setup/apt etcd-server` installs it")
            }));
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
