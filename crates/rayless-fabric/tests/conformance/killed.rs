//! A peer that is killed, at each step of its life. The peer is this test binary, run again as `child`.

use crate::{
    fixture::{Fixture, TICKET, fresh_name, long},
    message::send_flat,
    transports::{Rxe, Shm, ShmRing, Siw, Tcp, Tls},
};
use rayless_fabric::{
    Acceptor, DType, Extra, LinkConfig, LinkName, LostKind, RecvError, RecvLink, SendError, SendLink, TensorSpec, Wait,
};
use std::{
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
};

const ENV: &str = "RAYLESS_FABRIC_TEST_CHILD";
const BIG: usize = 64 << 20;

/// Kills this process as the kernel's out-of-memory killer would.
fn die() -> bool {
    // SAFETY: no memory is touched; the process ends here.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    unreachable!("SIGKILL returned")
}

/// A child that is reaped in the end, whatever the test does.
struct Reaped(Child);

impl Reaped {
    fn spawn<F: Fixture>(role: &str, step: &str, address: &str, name: LinkName, tmp: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["killed::child", "--exact", "--nocapture", "--test-threads=1"])
            .env(ENV, format!("{} {role} {step} {} {address}", std::any::type_name::<F>(), name.channel))
            // What it leaves behind goes with the parent's folder.
            .env("TMPDIR", tmp)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Waits for its end and fails the test unless it was killed.
    fn was_killed(mut self) {
        use std::os::unix::process::ExitStatusExt;
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        let status = self.0.wait().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {text}");
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The life of a killed peer; as a test of its own, without the variable, it does nothing.
#[test]
fn child() {
    let Ok(script) = std::env::var(ENV) else { return };
    let [transport, role, step, channel, address] = script.splitn(5, ' ').collect::<Vec<_>>().try_into().unwrap();
    let name = LinkName { channel: channel.parse().unwrap(), ..fresh_name() };
    match transport {
        asked if is::<Tcp<1>>(asked) => live::<Tcp<1>>(role, step, name, address),
        asked if is::<Tcp<3>>(asked) => live::<Tcp<3>>(role, step, name, address),
        asked if is::<Tls>(asked) => live::<Tls>(role, step, name, address),
        asked if is::<Shm>(asked) => live::<Shm>(role, step, name, address),
        asked if is::<ShmRing>(asked) => live::<ShmRing>(role, step, name, address),
        asked if is::<Rxe>(asked) => live::<Rxe>(role, step, name, address),
        asked if is::<Siw>(asked) => live::<Siw>(role, step, name, address),
        other => panic!("{other}"),
    }
}

fn is<F>(name: &str) -> bool {
    std::any::type_name::<F>() == name
}

fn live<F: Fixture>(role: &str, step: &str, name: LinkName, address: &str) {
    match role {
        "sender" => live_as_sender(F::connect(address, name, TICKET, &LinkConfig::default()).unwrap(), step),
        "receiver" => {
            // The child accepts here, so it tells the parent where.
            let listener = F::listen();
            std::fs::write(address, F::address(&listener)).unwrap();
            std::fs::rename(address, format!("{address}.ready")).unwrap();
            let mut acceptor = Acceptor::default();
            acceptor.expect(name, TICKET, LinkConfig::default());
            live_as_receiver(F::accept(&listener, &mut acceptor).unwrap(), step);
        }
        other => panic!("{other}"),
    }
    die();
}

const SENDER_STEPS: [&str; 5] = ["opened", "between", "header", "payload", "whole"];

fn live_as_sender(mut tx: SendLink, step: &str) {
    match step {
        "opened" => {}
        "between" => send_flat(&mut tx, 0, 100, &long()).unwrap(),
        "header" => {
            let spec = TensorSpec { name: "x", dtype: DType::U8, shape: &[100], strides: None };
            tx.send_header([spec].into_iter(), Extra::default(), &long()).unwrap();
        }
        // Asked when the window is full: part of the payload has left.
        "payload" => send_flat(&mut tx, 0, BIG, &Wait::forever().with_check(&die)).unwrap(),
        "whole" => (0..3).for_each(|number| send_flat(&mut tx, number, 10_000, &long()).unwrap()),
        other => panic!("{other}"),
    }
    die();
}

const RECEIVER_STEPS: [&str; 4] = ["opened", "between", "header", "payload"];

fn live_as_receiver(mut rx: RecvLink, step: &str) {
    match step {
        "opened" => {}
        "between" => drop(rx.recv(Some(0), &long()).unwrap()),
        "header" => drop(rx.recv_header(Some(0), &long()).unwrap()),
        "payload" => {
            let announced = rx.recv_header(Some(0), &long()).unwrap();
            let mut room = vec![0; announced.schema.payload_bytes() as usize];
            let _ = rx.recv_payload(&mut [&mut room], &Wait::forever().with_check(&die));
        }
        other => panic!("{other}"),
    }
    die();
}

pub(crate) fn a_killed_sender_is_news_and_its_whole_messages_are_not_lost<F: Fixture>() {
    for step in SENDER_STEPS {
        let name = fresh_name();
        let listener = F::listen();
        let dir = tempfile::tempdir().unwrap();
        let child = Reaped::spawn::<F>("sender", step, &F::address(&listener), name, dir.path());
        let mut acceptor = Acceptor::default();
        acceptor.expect(name, TICKET, LinkConfig::default());
        let mut rx = F::accept(&listener, &mut acceptor).unwrap();
        // How many whole messages the sender gave away. Who is asked in the middle of a payload is asked only where it
        // must wait: with a receiver that keeps up, the message may be whole before that.
        let whole = match step {
            "between" => 1..=1,
            "whole" => 3..=3,
            "payload" => 0..=1,
            _ => 0..=0,
        };
        let mut came = 0;
        let lost = loop {
            match rx.recv(Some(came), &long()) {
                Ok(_) => came += 1,
                Err(lost) => break lost,
            }
        };
        assert!(
            matches!(&lost, RecvError::Lost(l) if l.kind == LostKind::PeerGone && l.sequence == came),
            "{step}: {lost}"
        );
        let kept = whole.contains(&came) || !F::OUTLIVES_ITS_SENDER && came < *whole.start();
        assert!(kept, "{step}: {came} of {whole:?} messages came");
        child.was_killed();
    }
}

pub(crate) fn a_killed_receiver_is_news<F: Fixture>() {
    for step in RECEIVER_STEPS {
        let name = fresh_name();
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("address");
        let child = Reaped::spawn::<F>("receiver", step, told.to_str().unwrap(), name, dir.path());
        let ready = dir.path().join("address.ready");
        while !ready.exists() {
            std::thread::yield_now();
        }
        let mut tx =
            F::connect(&std::fs::read_to_string(ready).unwrap(), name, TICKET, &LinkConfig::default()).unwrap();
        let lost = (0..).find_map(|number| send_flat(&mut tx, number, BIG / 16, &long()).err()).unwrap();
        assert!(matches!(&lost, SendError::Lost(l) if l.kind == LostKind::PeerGone), "{step}: {lost}");
        child.was_killed();
    }
}
