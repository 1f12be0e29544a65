//! Bringing up the two links of a measurement, one each way, at both sides.
//!
//! The driving side says `open TRANSPORT STREAMS VERIFY STALL TICKET [ADDRESS]`; the ticket is fresh and secret between the two.
//! shm: it gives one end of two socket pairs. tcp: it dials all streams of both links, each with a preface of ticket and
//! link number. rdma: each side listens for the link whose receiver it is.

use super::{LinkOptions, control::Control};
use crate::message::Failure;
use rayless_fabric::{
    Acceptor, Greeted, Level, LinkConfig, LinkName, RecvLink, SendLink, Ticket, greet_rdma, greet_tcp, greet_unix,
    rdma, shm, tcp,
};
use rayless_net::{
    congestion::{Congestion, ConnectError},
    interfaces,
};
use rayless_proto::ids::GroupId;
use rayless_verbs::Listener;
use std::{
    fmt::{Display, Write as _},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

const WITHIN: Duration = Duration::from_secs(10);
/// Bytes in front of a TCP stream's greeting: the ticket and the link's number.
const PREFACE: usize = 33;

/// A link each way, as one side has them.
pub(super) struct Links {
    pub(super) tx: SendLink,
    pub(super) rx: RecvLink,
    /// How long one message may take.
    pub(super) stall: Duration,
}

impl Links {
    /// The RDMA device.
    pub(super) fn device(&self) -> Option<String> {
        self.tx.device().map(str::to_owned)
    }

    /// How shared memory carries long messages here.
    pub(super) fn mode(&self) -> Option<String> {
        self.tx.mode().map(str::to_owned)
    }

    /// Closes both in order, at both sides.
    pub(super) fn close(mut self, control: &mut Control) -> Result<(), Failure> {
        self.tx.close();
        give_up(control).map(drop)
    }
}

/// Has the other side drop what links it has, and brings both to the same place of the conversation. Gives what went
/// wrong there.
pub(super) fn give_up(control: &mut Control) -> Result<Option<String>, Failure> {
    control.say("close")?;
    let mut theirs = None;
    loop {
        match control.hear()?.as_str() {
            "closed" => return Ok(theirs),
            line => theirs = line.strip_prefix("failed ").map(str::to_owned).or(theirs),
        }
    }
}

/// What an `open` asks for.
pub(super) struct Opening {
    level: Level,
    streams: usize,
    verify: bool,
    stall: Duration,
    ticket: Ticket,
    /// Where the driving side listens for RDMA.
    back: Option<SocketAddr>,
}

/// Link 0 goes from the driving side to the other, link 1 back.
fn name(link: u8) -> LinkName {
    let (from, to) = if link == 0 { (0, 1) } else { (1, 0) };
    LinkName { group: GroupId(*b"bench-ln"), from, to, channel: 0 }
}

fn config(verify: bool) -> LinkConfig {
    LinkConfig { verify, handshake: WITHIN, ..LinkConfig::default() }
}

fn failed(error: impl Display) -> Failure {
    Failure::failed(error)
}

/// Which transports are measured, best first.
pub(super) fn transports(control: &Control, options: &LinkOptions) -> Result<Vec<Level>, Failure> {
    let one_host = control.addresses().is_none();
    if options.transports.contains(&Level::Shm) && !one_host {
        return Err(Failure::failed(format!(
            "shm: the other side is {}, on another host\nhint: measure tcp or rdma between hosts",
            control.peer()
        )));
    }
    if !options.transports.is_empty() {
        return Ok(options.transports.clone());
    }
    let rdma = !rayless_verbs::devices().map_err(failed)?.is_empty();
    let all = [(Level::Shm, one_host), (Level::Rdma, rdma), (Level::Tcp, true)];
    Ok(all.into_iter().filter(|(_, there)| *there).map(|(level, _)| level).collect())
}

/// The driving side.
pub(super) fn links(control: &mut Control, level: Level, options: &LinkOptions) -> Result<Links, Failure> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(failed)?;
    let opening = Opening {
        level,
        streams: options.streams,
        verify: options.verify,
        stall: options.stall,
        ticket: Ticket(secret),
        back: None,
    };
    match level {
        Level::Shm => drive_shm(control, &opening),
        Level::Tcp => drive_tcp(control, &opening),
        Level::Rdma => drive_rdma(control, opening, options.rdma_address),
    }
}

impl Opening {
    fn encode(&self) -> String {
        let Self { level, streams, verify, stall, ticket, back } = self;
        let mut line = format!("open {level} {streams} {verify} {} ", stall.as_millis());
        // Writing to a String cannot fail.
        for byte in ticket.0 {
            let _ = write!(line, "{byte:02x}");
        }
        if let Some(address) = back {
            let _ = write!(line, " {address}");
        }
        line
    }

    /// `None`: it is no opening.
    pub(super) fn decode(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix("open ")?.split(' ');
        let level = words.next()?;
        let level = [Level::Shm, Level::Rdma, Level::Tcp].into_iter().find(|known| known.name() == level)?;
        let streams = words.next()?.parse().ok().filter(|n| (1..=rayless_fabric::MAX_STREAMS).contains(n))?;
        let verify = words.next()?.parse().ok()?;
        let stall = Duration::from_millis(words.next()?.parse().ok()?);
        let hex = words.next()?;
        let mut secret = [0; 32];
        if !hex.is_ascii() || hex.len() != 64 {
            return None;
        }
        for (byte, at) in secret.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
        }
        let back = words.next().map(str::parse).transpose().ok()?;
        Some(Self { level, streams, verify, stall, ticket: Ticket(secret), back })
    }

    fn connect(&self, link: u8, streams: Vec<TcpStream>) -> Result<SendLink, Failure> {
        tcp::connect(streams, name(link), self.ticket, &config(self.verify)).map_err(failed)
    }

    fn accept(&self, link: u8, mut next: impl FnMut() -> Result<Greeted, Failure>) -> Result<RecvLink, Failure> {
        let mut acceptor = Acceptor::default();
        acceptor.expect(name(link), self.ticket, config(self.verify));
        loop {
            if let Some(link) = acceptor.admit(next()?).map_err(failed)? {
                return Ok(link);
            }
        }
    }
}

fn drive_shm(control: &mut Control, opening: &Opening) -> Result<Links, Failure> {
    control.say(&opening.encode())?;
    let (there, their_end) = UnixStream::pair().map_err(failed)?;
    let (back, their_other) = UnixStream::pair().map_err(failed)?;
    control.give(&[their_end, their_other])?;
    let tx = shm::connect(there, name(0), opening.ticket, &config(opening.verify)).map_err(failed)?;
    let mut back = Some(back);
    let rx = opening.accept(1, || greet_once(&mut back))?;
    control.expect_ok()?;
    Ok(Links { tx, rx, stall: opening.stall })
}

fn greet_once(stream: &mut Option<UnixStream>) -> Result<Greeted, Failure> {
    let stream = stream.take().ok_or_else(|| Failure::failed("one socket is all of a link over shared memory"))?;
    greet_unix(stream, WITHIN).map_err(failed)
}

fn drive_tcp(control: &mut Control, opening: &Opening) -> Result<Links, Failure> {
    control.say(&opening.encode())?;
    let place: SocketAddr = control.expect_ok()?.parse().map_err(|_| control.nonsense())?;
    // Between hosts the other side listens on every address; the one that reached it is the right one.
    let to = control.addresses().map_or(place, |(peer, _)| SocketAddr::new(peer.ip(), place.port()));
    let dial = |link: u8| -> Result<Vec<TcpStream>, Failure> {
        let streams = (0..opening.streams).map(|_| -> Result<TcpStream, ConnectError> {
            let mut stream = Congestion::from_env().connect(to, WITHIN)?;
            let mut preface = [link; PREFACE];
            preface[..32].copy_from_slice(&opening.ticket.0);
            stream.write_all(&preface)?;
            Ok(stream)
        });
        streams.collect::<Result<_, _>>().map_err(|error| match error {
            ConnectError::Congestion(error) => failed(error),
            ConnectError::Io(error) => Failure::failed(format!("connecting to {to}: {error}")),
        })
    };
    let (there, mut back) = (dial(0)?, dial(1)?.into_iter());
    let tx = opening.connect(0, there)?;
    let rx = opening.accept(1, || {
        let stream = back.next().ok_or_else(|| Failure::failed("a stream of the link back is missing"))?;
        greet_tcp(stream, WITHIN).map_err(failed)
    })?;
    control.expect_ok()?;
    Ok(Links { tx, rx, stall: opening.stall })
}

fn drive_rdma(control: &mut Control, mut opening: Opening, given: Option<IpAddr>) -> Result<Links, Failure> {
    let own = rdma_address(control, given)?;
    let mut listener = Listener::bind(SocketAddr::new(own, 0)).map_err(failed)?;
    opening.back = Some(listener.address());
    control.say(&opening.encode())?;
    let to: SocketAddr = control.expect_ok()?.parse().map_err(|_| control.nonsense())?;
    let tx = rdma::connect(to, Some(own), name(0), opening.ticket, &config(opening.verify)).map_err(failed)?;
    let rx = opening.accept(1, || greet_rdma(&mut listener, WITHIN).map_err(failed))?;
    control.expect_ok()?;
    Ok(Links { tx, rx, stall: opening.stall })
}

/// The other side, once it was asked. It says `ok` (with its address, where one is needed) when it is ready for the links.
pub(super) fn answer(
    control: &mut Control,
    opening: &Opening,
    listener: &TcpListener,
    given: Option<IpAddr>,
) -> Result<Links, Failure> {
    match opening.level {
        Level::Shm => {
            let [there, back] = control.take()?;
            let mut there = Some(there);
            let rx = opening.accept(0, || greet_once(&mut there))?;
            let tx = shm::connect(back, name(1), opening.ticket, &config(opening.verify)).map_err(failed)?;
            Ok(Links { tx, rx, stall: opening.stall })
        }
        Level::Tcp => {
            control.say(&format!("ok {}", listener.local_addr().map_err(failed)?))?;
            let [there, back] = take_streams(listener, opening)?;
            let mut there = there.into_iter();
            let rx = opening.accept(0, || {
                let stream = there.next().ok_or_else(|| Failure::failed("a stream of the link is missing"))?;
                greet_tcp(stream, WITHIN).map_err(failed)
            })?;
            Ok(Links { tx: opening.connect(1, back)?, rx, stall: opening.stall })
        }
        Level::Rdma => {
            let own = rdma_address(control, given)?;
            let mut listener = Listener::bind(SocketAddr::new(own, 0)).map_err(failed)?;
            let back = opening.back.ok_or_else(|| control.nonsense())?;
            control.say(&format!("ok {}", listener.address()))?;
            let rx = opening.accept(0, || greet_rdma(&mut listener, WITHIN).map_err(failed))?;
            let tx =
                rdma::connect(back, Some(own), name(1), opening.ticket, &config(opening.verify)).map_err(failed)?;
            Ok(Links { tx, rx, stall: opening.stall })
        }
    }
}

/// Takes connections until all streams of both links are there. One that does not know the ticket is closed.
fn take_streams(listener: &TcpListener, opening: &Opening) -> Result<[Vec<TcpStream>; 2], Failure> {
    let deadline = Instant::now() + WITHIN;
    let mut streams = [Vec::new(), Vec::new()];
    while streams.iter().any(|link| link.len() < opening.streams) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let come: usize = streams.iter().map(Vec::len).sum();
            let cause = format!("{come} of {} streams came within {} s", 2 * opening.streams, WITHIN.as_secs());
            return Err(Failure::failed(cause));
        }
        let Some(mut stream) = super::serve::accept(listener, left)? else { continue };
        let mut preface = [0; PREFACE];
        let read = stream.set_read_timeout(Some(Duration::from_secs(2))).and_then(|()| stream.read_exact(&mut preface));
        let (secret, link) = preface.split_at(32);
        let known = read.is_ok() && secret.try_into().is_ok_and(|secret| opening.ticket.matches(secret));
        if let (true, Some(link)) = (known, streams.get_mut(usize::from(link[0]))) {
            link.push(stream);
        }
    }
    Ok(streams)
}

/// The address of the RDMA device to use here: the one given, else that of a device on the way to the peer, else
/// that of the first one whose port is up.
fn rdma_address(control: &Control, given: Option<IpAddr>) -> Result<IpAddr, Failure> {
    if let Some(address) = given {
        return Ok(address);
    }
    let addresses = interfaces::list().map_err(failed)?;
    let addresses: Vec<_> = addresses.into_iter().map(|there| (there.name, there.address)).collect();
    let found = rayless_verbs::preflight(&[], &addresses);
    let own = control.addresses().map(|(_, own)| own.ip());
    let mut usable = found.reaches.iter().map(|way| way.address);
    let first = usable.clone().next();
    usable.find(|address| Some(*address) == own).or(first).ok_or_else(|| {
        let cause = found.obstacle().unwrap_or_else(|| "no way out over any RDMA device".to_owned());
        let cause = format!("rdma: {cause}");
        Failure::failed(format!("{cause}\nhint: name the address of the device with `--rdma-address`"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opening_reads_back_and_nonsense_does_not() {
        let ticket = Ticket(std::array::from_fn(|i| i as u8 * 7));
        let back = Some("10.78.0.1:4711".parse().unwrap());
        let stall = Duration::from_millis(1500);
        let opening = Opening { level: Level::Rdma, streams: 3, verify: true, stall, ticket, back };
        let read = Opening::decode(&opening.encode()).unwrap();
        assert_eq!((read.level, read.streams, read.verify, read.back), (Level::Rdma, 3, true, back));
        assert_eq!(read.stall, stall);
        assert!(read.ticket.matches(&ticket.0));
        let line = opening.encode();
        for wrong in [
            "",
            "open",
            "open shm",
            "open x 1 true",
            &line[..60],
            &line.replace(" 3 ", " 17 "),
            &line.replace(":4711", ""),
        ] {
            assert!(Opening::decode(wrong).is_none(), "{wrong}");
        }
    }
}
