//! A cable between two network namespaces that a test can damage while it runs.
//!
//! `rayless-test-wire NAMESPACE-A NAMESPACE-B MTU SEED` makes a TUN device `eth0` in each of the two namespaces and carries
//! packets between them. It is what `tc netem` would be used for where the kernel has it; machines that run tests often do not.
//!
//! It prints `ready`, then answers each line on stdin by one line on stdout and ends with stdin:
//!
//! ```text
//! set ab|ba|both KEY=VALUE …   loss=% duplicate=% reorder=% hold=ms delay=ms jitter=ms mtu=bytes rate=Mbit/s cut=on|off flap=UP/DOWN(ms)
//! clear                        a perfect wire again (what is under way still arrives)
//! counters                     one line of JSON: what became of the packets of each direction
//! ```
//!
//! What happens to the n-th packet of a direction depends on the seed and on the rules only. One thread; asleep while no packet moves.

mod link;
mod rule;
mod tun;

use link::{Direction, Fate};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    process::ExitCode,
    time::{Duration, Instant},
};

/// Packets taken from one side before the other side gets its turn.
const BATCH: usize = 64;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum WireError {
    #[error("usage: rayless-test-wire NAMESPACE-A NAMESPACE-B MTU SEED")]
    Usage,
    #[error("namespace {name}: {error}")]
    Namespace { name: String, error: io::Error },
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn run(words: &[String]) -> Result<(), WireError> {
    let [a, b, mtu, seed] = words else { return Err(WireError::Usage) };
    let mtu: usize = mtu.parse().map_err(|_| WireError::Usage)?;
    let seed: u64 = seed.parse().map_err(|_| WireError::Usage)?;
    let open =
        |name: &String| tun::open(name, "eth0").map_err(|error| WireError::Namespace { name: name.clone(), error });
    let mut wire = Wire {
        ends: [open(a)?, open(b)?],
        directions: [Direction::new(seed), Direction::new(seed ^ 0x9e37_79b9_7f4a_7c15)],
        begin: Instant::now(),
        buffer: vec![0; mtu + 64],
    };
    say("ready")?;
    let mut script = Script::default();
    loop {
        let wait = wire.deliver_due()?.map(timespec);
        let stdin = io::stdin();
        let mut ready = [
            PollFd::new(&wire.ends[0], PollFlags::IN),
            PollFd::new(&wire.ends[1], PollFlags::IN),
            PollFd::new(&stdin, PollFlags::IN),
        ];
        match poll(&mut ready, wait.as_ref()) {
            Err(Errno::INTR) => continue,
            other => other.map_err(io::Error::from)?,
        };
        let [from_a, from_b, from_script] = ready.map(|fd| !fd.revents().is_empty());
        if from_a {
            wire.forward(0)?;
        }
        if from_b {
            wire.forward(1)?;
        }
        if from_script && !script.read(&mut wire)? {
            return Ok(());
        }
    }
}

/// Both ends and both directions; direction 0 goes from end 0 to end 1.
struct Wire {
    ends: [File; 2],
    directions: [Direction; 2],
    begin: Instant,
    buffer: Vec<u8>,
}

impl Wire {
    /// Takes what waits at one end and decides on each packet.
    fn forward(&mut self, from: usize) -> io::Result<()> {
        for _ in 0..BATCH {
            let length = match self.ends[from].read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The interface was set down from outside: nothing can come from it now.
                Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => break,
                Err(error) => return Err(error),
            };
            let packet = &self.buffer[..length];
            if let Fate::Now = self.directions[from].offer(self.begin.elapsed(), packet) {
                put(&self.ends[1 - from], packet)?;
            }
        }
        Ok(())
    }

    /// Delivers what is due; returns how long nothing more will be.
    fn deliver_due(&mut self) -> io::Result<Option<Duration>> {
        let now = self.begin.elapsed();
        for from in 0..2 {
            while let Some(packet) = self.directions[from].due(now) {
                put(&self.ends[1 - from], &packet)?;
            }
        }
        let next = self.directions.iter().filter_map(Direction::next_due).min();
        Ok(next.map(|at| at.saturating_sub(now)))
    }
}

/// Hands one packet to the kernel. One that it does not take (interface down, no room) is lost, as on any wire.
fn put(end: &File, packet: &[u8]) -> io::Result<()> {
    match rustix::io::write(end, packet) {
        Ok(_) | Err(Errno::IO | Errno::AGAIN | Errno::NOBUFS | Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The command lines that have come so far.
#[derive(Default)]
struct Script {
    pending: Vec<u8>,
}

impl Script {
    /// Reads and carries out what is there; false at the end of stdin.
    fn read(&mut self, wire: &mut Wire) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let count = rustix::io::read(io::stdin().as_fd(), &mut bytes)?;
        self.pending.extend_from_slice(&bytes[..count]);
        while let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            say(&command(&String::from_utf8_lossy(&line), wire))?;
        }
        Ok(count > 0)
    }
}

/// Carries out one line and returns the answer.
fn command(line: &str, wire: &mut Wire) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let now = wire.begin.elapsed();
    match words[..] {
        ["set", which, ref changes @ ..] => {
            let range = match which {
                "ab" => 0..1,
                "ba" => 1..2,
                "both" => 0..2,
                _ => return format!("error: no direction `{which}`"),
            };
            let mut rules: Vec<_> = wire.directions[range.clone()].iter().map(|d| d.rule().clone()).collect();
            for rule in &mut rules {
                for change in changes {
                    if let Err(error) = rule.change(change, now) {
                        return format!("error: {error}");
                    }
                }
            }
            for (direction, rule) in wire.directions[range].iter_mut().zip(rules) {
                direction.set_rule(rule);
            }
            "ok".to_owned()
        }
        ["clear"] => {
            for direction in &mut wire.directions {
                direction.set_rule(rule::Rule::default());
            }
            "ok".to_owned()
        }
        ["counters"] => {
            let [ab, ba] = &wire.directions;
            format!("{{\"ab\":{},\"ba\":{}}}", ab.counters().to_json(), ba.counters().to_json())
        }
        _ => format!("error: no command `{}`", line.trim()),
    }
}

fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn timespec(wait: Duration) -> Timespec {
    Timespec { tv_sec: wait.as_secs().min(3600) as i64, tv_nsec: wait.subsec_nanos().into() }
}
