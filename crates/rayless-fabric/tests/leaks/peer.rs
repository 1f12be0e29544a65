//! A peer in a process of its own (this test binary, run again) that is killed while it works.

use crate::{
    fixture::{Fixture, TICKET, fresh_name, long},
    length, send,
    transports::{Rxe, Shm, Siw, Tcp, Tls},
};
use rayless_fabric::{Acceptor, LinkConfig, LinkName};
use std::{
    any::type_name,
    hash::{BuildHasher, RandomState},
    io::Read as _,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

const ENV: &str = "RAYLESS_FABRIC_LEAKS_PEER";
/// It lives up to this long, in microseconds, from where its end of the link is there. (Its peer's may not be yet.)
const LIFE_US: u64 = 3000;

pub(crate) struct Peer {
    child: Option<Child>,
}

impl Peer {
    /// One that connects to `address`.
    pub(crate) fn sender<F: Fixture>(address: &str, name: LinkName) -> Self {
        Self { child: Some(spawn::<F>("sender", name, address)) }
    }

    /// One that listens; also where.
    pub(crate) fn receiver<F: Fixture>(name: LinkName) -> (Self, String) {
        let mut child = spawn::<F>("receiver", name, "-");
        // By stderr, for the test harness writes to stdout.
        let err = child.stderr.as_mut().unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while err.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            line.push(byte[0]);
        }
        (Self { child: Some(child) }, String::from_utf8(line).unwrap())
    }

    /// Reaps it, and fails the test unless it was killed.
    pub(crate) fn was_killed(mut self) {
        let mut child = self.child.take().unwrap();
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {text}");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn<F: Fixture>(role: &str, name: LinkName, address: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["peer::child", "--exact", "--nocapture", "--test-threads=1"])
        .env(ENV, format!("{} {role} {} {address}", type_name::<F>(), name.channel))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The peer's life; as a test of its own, without the variable, it does nothing.
#[test]
fn child() {
    let Ok(script) = std::env::var(ENV) else { return };
    let [transport, role, channel, address] = script.splitn(4, ' ').collect::<Vec<_>>().try_into().unwrap();
    let name = LinkName { channel: channel.parse().unwrap(), ..fresh_name() };
    match transport {
        asked if asked == type_name::<Tcp<2>>() => live::<Tcp<2>>(role, name, address),
        asked if asked == type_name::<Tls>() => live::<Tls>(role, name, address),
        asked if asked == type_name::<Shm>() => live::<Shm>(role, name, address),
        asked if asked == type_name::<Rxe>() => live::<Rxe>(role, name, address),
        asked if asked == type_name::<Siw>() => live::<Siw>(role, name, address),
        other => panic!("{other}"),
    }
}

fn live<F: Fixture>(role: &str, name: LinkName, address: &str) {
    let config = LinkConfig::default();
    if role == "sender" {
        let mut tx = F::connect(address, name, TICKET, &config).unwrap();
        die_soon();
        for round in 0usize.. {
            send(&mut tx, length(round)).unwrap();
        }
    } else {
        let listener = F::listen();
        eprintln!("{}", F::address(&listener));
        let mut acceptor = Acceptor::default();
        acceptor.expect(name, TICKET, config);
        let mut rx = F::accept(&listener, &mut acceptor).unwrap();
        die_soon();
        loop {
            rx.recv(None, &long()).unwrap();
        }
    }
}

/// As the out-of-memory killer would, at a time that comes from the system's randomness.
fn die_soon() {
    let life = Duration::from_micros(RandomState::new().hash_one(0) % LIFE_US);
    thread::spawn(move || {
        thread::sleep(life);
        // SAFETY: no memory is touched; the process ends here.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    });
}
