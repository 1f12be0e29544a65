//! Which TCP congestion control the streams of links use.
//!
//! A host's choice suits what it serves to the internet. BBR, where it is that choice, paces each stream by timers and
//! keeps little more in flight than one round trip holds: between the hosts of one data centre, where a round trip is
//! tens of microseconds, a link then does less than half of what it does otherwise (benches/links.py shows both).
//!
//! It has to be chosen before a stream is connected, or its listener before it accepts: BBR marks a stream as paced when it
//! starts, and Linux never takes that mark back.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::AsFd,
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt,
        sockopt::{set_tcp_congestion, tcp_congestion},
    },
};
use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpStream},
    str::FromStr,
    time::{Duration, Instant},
};

/// Taken in the place of one that paces, the first that this process may have. Linux has the second always, and for everybody.
const INSTEAD: [&str; 2] = ["cubic", "reno"];

/// `RAYLESS_TCP_CONGESTION`.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum Congestion {
    /// `auto`: the host's, but cubic or reno in the place of bbr.
    #[default]
    Auto,
    /// `host`: the host's, whatever it is.
    Host,
    /// The one of this name in the kernel.
    Named(String),
}

/// The kernel does not let this process have it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("RAYLESS_TCP_CONGESTION=`{name}`: {errno}\nhint: {}", self.hint())]
pub struct NoSuchCongestion {
    name: String,
    errno: Errno,
}

impl NoSuchCongestion {
    const fn hint(&self) -> &'static str {
        match self.errno {
            Errno::PERM => {
                "add it to the sysctl net.ipv4.tcp_allowed_congestion_control, or unset RAYLESS_TCP_CONGESTION"
            }
            _ => "the sysctl net.ipv4.tcp_available_congestion_control lists those that this kernel has",
        }
    }
}

/// Why [`Congestion::connect`] has no stream.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Another try does not help.
    #[error(transparent)]
    Congestion(#[from] NoSuchCongestion),
    /// The peer, or the network.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for ConnectError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

impl FromStr for Congestion {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "" | "auto" => Self::Auto,
            "host" => Self::Host,
            name => Self::Named(name.to_owned()),
        })
    }
}

impl Congestion {
    /// As the environment of this process has it.
    pub fn from_env() -> Self {
        std::env::var("RAYLESS_TCP_CONGESTION").ok().and_then(|text| text.parse().ok()).unwrap_or_default()
    }

    /// Connects a stream that uses it, within `within`.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(&self, address: SocketAddr, within: Duration) -> Result<TcpStream, ConnectError> {
        let deadline = Instant::now() + within;
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        self.apply(&socket)?;
        match connect(&socket, &address) {
            Ok(()) => {}
            Err(Errno::INPROGRESS) => loop {
                let left = deadline.saturating_duration_since(Instant::now());
                let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
                match poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&left)) {
                    Ok(0) => return Err(Errno::TIMEDOUT.into()),
                    Ok(_) => {
                        sockopt::socket_error(&socket)??;
                        break;
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            },
            Err(errno) => return Err(errno.into()),
        }
        let stream = TcpStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    /// Has a socket use it that is not connected yet, or a listener those that it accepts from now on.
    ///
    /// # Errors
    /// [`NoSuchCongestion`] where a name was asked for.
    pub fn apply(&self, socket: impl AsFd) -> Result<(), NoSuchCongestion> {
        let socket = socket.as_fd();
        match self {
            Self::Host => {}
            Self::Named(name) => {
                set_tcp_congestion(socket, name).map_err(|errno| NoSuchCongestion { name: name.clone(), errno })?;
            }
            Self::Auto => {
                if tcp_congestion(socket).is_ok_and(|name| name.starts_with("bbr")) {
                    // Where not even reno can be had, the host's works as well, if slowly.
                    let _ = INSTEAD.iter().any(|name| set_tcp_congestion(socket, name).is_ok());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const WITHIN: Duration = Duration::from_secs(20);

    /// What a stream has that was connected with `wish`, and what it is accepted with.
    fn connected(wish: &str) -> (String, String) {
        let wish: Congestion = wish.parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        wish.apply(&listener).unwrap();
        let stream = wish.connect(listener.local_addr().unwrap(), WITHIN).unwrap();
        (tcp_congestion(&stream).unwrap(), tcp_congestion(listener.accept().unwrap().0).unwrap())
    }

    #[test]
    fn the_hosts_choice_is_kept_and_a_name_is_taken() {
        let own = tcp_congestion(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        assert_eq!(connected("host"), (own.clone(), own.clone()));
        assert_eq!(connected("reno"), ("reno".into(), "reno".into()));
        if !own.starts_with("bbr") {
            assert_eq!(connected("auto"), (own.clone(), own));
        }
    }

    #[test]
    fn one_that_paces_gives_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // A kernel without bbr has nothing to give way.
        if set_tcp_congestion(&listener, "bbr").is_ok() {
            Congestion::Host.apply(&listener).unwrap();
            assert_eq!(tcp_congestion(&listener).unwrap(), "bbr");
            Congestion::Auto.apply(&listener).unwrap();
            assert!(INSTEAD.contains(&tcp_congestion(&listener).unwrap().as_str()));
        }
    }

    #[test]
    fn a_name_that_the_kernel_does_not_have_is_told() {
        let wish = Congestion::Named("pigeon".to_owned());
        let told = wish.connect(SocketAddr::from(([127, 0, 0, 1], 9)), WITHIN).unwrap_err().to_string();
        assert!(told.starts_with("RAYLESS_TCP_CONGESTION=`pigeon`: "), "{told}");
        assert!(told.contains("\nhint: the sysctl net.ipv4.tcp_available_congestion_control"), "{told}");
        let denied = NoSuchCongestion { name: "x".to_owned(), errno: Errno::PERM };
        assert!(denied.to_string().contains("tcp_allowed_congestion_control"));
    }

    #[test]
    fn an_address_where_nobody_listens_is_the_systems_error() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        match Congestion::Auto.connect(address, WITHIN) {
            Err(ConnectError::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused),
            other => panic!("{other:?}"),
        }
    }
}
