//! Which address and which interface: chosen once, at the start of a daemon, and told with the reason.

use crate::{holder, os};
use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

/// One address of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The interface, for example `eth0`.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Whether the interface is up.
    pub is_up: bool,
    /// Whether it only reaches this host.
    pub is_loopback: bool,
}

/// The address chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The address.
    pub address: IpAddr,
    /// Its interface; empty where none was found.
    pub interface: String,
    /// Where it comes from, for `status`: for example `interface of the route to the head`.
    pub source: &'static str,
}

/// What `--bind` named is not there.
#[derive(Debug, thiserror::Error)]
pub enum BindChoiceError {
    /// Neither an address nor an interface of this host.
    #[error("`{given}` is neither an address nor an interface of this host\nhint: this host has {there}")]
    Unknown {
        /// What was given.
        given: String,
        /// What there is, on one line.
        there: String,
    },
    /// The interface is there, but has no address that could be used.
    #[error("interface `{given}` has no IP address\nhint: this host has {there}")]
    NoAddress {
        /// What was given.
        given: String,
        /// What there is, on one line.
        there: String,
    },
    /// The system does not tell.
    #[error("cannot list the interfaces: {0}")]
    Io(#[from] io::Error),
}

/// The two protocols on rayless' one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Membership.
    Udp,
    /// Steps and tensors.
    Tcp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        })
    }
}

/// A port cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PortError {
    /// Another process has it.
    #[error("port {}/{protocol} on {} is in use{}\nhint: stop that process, or give another --port", .address.port(), .address.ip(), by(.holder))]
    InUse {
        /// What was asked for.
        address: SocketAddr,
        /// UDP or TCP.
        protocol: Protocol,
        /// Who has it, where this user may know.
        holder: Option<String>,
    },
    /// The address is not one of this host.
    #[error("{} is no address of this host\nhint: this host has {there}", .address.ip())]
    NotLocal {
        /// What was asked for.
        address: SocketAddr,
        /// What there is, on one line.
        there: String,
    },
    /// Anything else that the system says.
    #[error("cannot listen on {address}/{protocol}: {reason}")]
    Other {
        /// What was asked for.
        address: SocketAddr,
        /// UDP or TCP.
        protocol: Protocol,
        /// The system's answer.
        reason: String,
    },
}

fn by(holder: &Option<String>) -> String {
    holder.as_ref().map(|holder| format!(" by {holder}")).unwrap_or_default()
}

/// Why `address` could not be bound, in words fit for people.
pub(crate) fn port_error(address: SocketAddr, protocol: Protocol, error: &io::Error) -> PortError {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let is_tcp = protocol == Protocol::Tcp;
            let holder = holder::holder_of(address.port(), &holder::tables(address, is_tcp), is_tcp);
            PortError::InUse { address, protocol, holder }
        }
        io::ErrorKind::AddrNotAvailable => PortError::NotLocal { address, there: there(&list().unwrap_or_default()) },
        _ => PortError::Other { address, protocol, reason: error.to_string() },
    }
}

/// Every address of every interface.
///
/// # Errors
/// The system's.
pub fn list() -> io::Result<Vec<Interface>> {
    Ok(os::addresses()?
        .into_iter()
        .map(|raw| Interface {
            name: raw.interface,
            address: raw.address,
            is_up: raw.is_up,
            is_loopback: raw.is_loopback,
        })
        .collect())
}

/// The interface that carries `address`.
pub fn name_of(address: IpAddr) -> Option<String> {
    list().ok()?.into_iter().find(|i| i.address == address).map(|i| i.name)
}

/// What `--bind` means: an address of this host, or an interface (its IPv4 address before an IPv6 one).
///
/// # Errors
/// See [`BindChoiceError`].
pub fn resolve_bind(given: &str) -> Result<Choice, BindChoiceError> {
    resolve_among(given, &list()?)
}

fn resolve_among(given: &str, all: &[Interface]) -> Result<Choice, BindChoiceError> {
    let choice = |i: &Interface| Choice { address: i.address, interface: i.name.clone(), source: "--bind" };
    let unknown = || BindChoiceError::Unknown { given: given.to_owned(), there: there(all) };
    if let Ok(address) = given.parse::<IpAddr>() {
        // All of 127.0.0.0/8 is this host's, though only one address of it is listed.
        let loopback = |i: &&Interface| i.is_loopback && address.is_ipv4() && address.is_loopback();
        return match all.iter().find(|i| i.address == address).or_else(|| all.iter().find(loopback)) {
            Some(found) => Ok(Choice { address, ..choice(found) }),
            None => Err(unknown()),
        };
    }
    let of_it: Vec<_> = all.iter().filter(|i| i.name == given).collect();
    match of_it.iter().find(|i| i.address.is_ipv4()).or_else(|| of_it.iter().find(|i| is_usable(i))) {
        Some(found) => Ok(choice(found)),
        None if of_it.is_empty() && !interface_exists(given) => Err(unknown()),
        None => Err(BindChoiceError::NoAddress { given: given.to_owned(), there: there(all) }),
    }
}

/// The address that this host sends from when it calls `head`. No packet is sent.
///
/// # Errors
/// The system's, where there is no route.
pub fn toward(head: SocketAddr) -> io::Result<Choice> {
    let any: IpAddr = if head.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(head)?;
    let address = socket.local_addr()?.ip();
    Ok(Choice {
        address,
        interface: name_of(address).unwrap_or_default(),
        source: "interface of the route to the head",
    })
}

/// The address of a head that was given none: that of the default route, else the first that others can reach, else
/// the loopback one.
pub fn for_head() -> Choice {
    // Addresses for documentation (RFC 5737, RFC 3849): they take the default route. Nothing is sent.
    const ELSEWHERE: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
    let by_route = ELSEWHERE.iter().find_map(|there| toward(SocketAddr::new(*there, 9)).ok());
    if let Some(choice) = by_route.filter(|c| !c.address.is_loopback()) {
        return Choice { source: "interface of the default route", ..choice };
    }
    let all = list().unwrap_or_default();
    let reachable = || all.iter().filter(|i| i.is_up && !i.is_loopback);
    match reachable().find(|i| i.address.is_ipv4()).or_else(|| reachable().find(|i| is_usable(i))) {
        Some(found) => {
            Choice { address: found.address, interface: found.name.clone(), source: "first interface that is up" }
        }
        None => Choice {
            address: Ipv4Addr::LOCALHOST.into(),
            interface: name_of(Ipv4Addr::LOCALHOST.into()).unwrap_or_default(),
            source: "loopback, for want of another interface",
        },
    }
}

/// Something between two peers changes addresses: neither could be reached at what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{who} says its address is {says}, but it is seen at {seen}: something translates addresses in between\nhint: in a container, use --network=host, or publish {port}/udp and {port}/tcp and --bind an address that the other hosts can reach"
)]
pub struct Translated {
    /// `this node`, or a node's name.
    pub who: String,
    /// What it says of itself.
    pub says: IpAddr,
    /// What its peer sees.
    pub seen: IpAddr,
    /// The port of rayless there.
    pub port: u16,
}

/// Compares what `who` says of itself with what its peer sees.
///
/// # Errors
/// [`Translated`] where they differ.
pub fn check_echo(who: &str, says: IpAddr, seen: IpAddr, port: u16) -> Result<(), Translated> {
    let (says, seen) = (says.to_canonical(), seen.to_canonical());
    if says == seen { Ok(()) } else { Err(Translated { who: who.to_owned(), says, seen, port }) }
}

/// What is equal for two processes exactly when they can share memory and loopback: boot id and network namespace.
///
/// # Errors
/// `/proc` is not there.
pub fn host_id() -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = fs::read_link("/proc/self/ns/net")?;
    let namespace: String = namespace.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
    Ok(format!("{}/{namespace}", boot.trim()))
}

/// All there is, on one line: `lo 127.0.0.1, eth0 10.0.0.1`.
fn there(all: &[Interface]) -> String {
    let usable = all.iter().filter(|i| is_usable(i)).map(|i| format!("{} {}", i.name, i.address));
    let line = usable.collect::<Vec<_>>().join(", ");
    if line.is_empty() { "no address at all".to_owned() } else { line }
}

/// Link-local IPv6 addresses mean nothing without an interface beside them, so they are no identity of a node.
fn is_usable(interface: &Interface) -> bool {
    !matches!(interface.address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn interface_exists(name: &str) -> bool {
    !name.contains('/') && !name.is_empty() && fs::exists(format!("/sys/class/net/{name}")).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<Interface> {
        [("lo", "127.0.0.1"), ("lo", "::1"), ("eth0", "fe80::1"), ("eth0", "10.0.0.1"), ("ib0", "fe80::2")]
            .iter()
            .map(|(name, address)| Interface {
                name: (*name).to_owned(),
                address: address.parse().unwrap(),
                is_up: true,
                is_loopback: *name == "lo",
            })
            .collect()
    }

    #[test]
    fn bind_takes_an_address_or_an_interface() {
        let address = |given| resolve_among(given, &host()).map(|c| (c.interface, c.address.to_string()));
        assert_eq!(address("eth0").unwrap(), ("eth0".into(), "10.0.0.1".into()));
        assert_eq!(address("10.0.0.1").unwrap(), ("eth0".into(), "10.0.0.1".into()));
        assert_eq!(address("127.0.0.7").unwrap(), ("lo".into(), "127.0.0.7".into()));
        assert_eq!(address("::1").unwrap(), ("lo".into(), "::1".into()));
    }

    #[test]
    fn an_unknown_interface_lists_those_there_are() {
        for given in ["eth9", "10.9.9.9", "", "../../etc"] {
            let error = resolve_among(given, &host()).unwrap_err();
            assert!(matches!(error, BindChoiceError::Unknown { .. }));
            let text = error.to_string();
            assert!(text.contains("hint: this host has lo 127.0.0.1, lo ::1, eth0 10.0.0.1"), "{text}");
            assert!(!text.contains("fe80"), "{text}");
        }
        assert!(matches!(resolve_among("ib0", &host()), Err(BindChoiceError::NoAddress { .. })));
    }

    #[test]
    fn the_loopback_of_this_host_is_found() {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let choice = toward(SocketAddr::new(loopback, 9)).unwrap();
        assert_eq!((choice.address, choice.interface), (loopback, name_of(loopback).unwrap()));
        assert!(list().unwrap().iter().any(|i| i.address == for_head().address));
    }

    #[test]
    fn a_translated_address_is_refused_with_the_way_out() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        check_echo("b", ip("10.0.0.2"), ip("::ffff:10.0.0.2"), 6379).unwrap();
        let text = check_echo("b", ip("172.17.0.2"), ip("10.0.0.2"), 6379).unwrap_err().to_string();
        for part in ["172.17.0.2", "10.0.0.2", "--network=host", "6379/udp", "6379/tcp", "hint: "] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_host_is_known_by_boot_and_namespace() {
        let id = host_id().unwrap();
        assert_eq!(id, host_id().unwrap());
        assert!(id.len() > 38 && id.split('/').count() == 2, "{id}");
    }

    #[test]
    fn a_port_in_use_names_the_process() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let error = UdpSocket::bind(address).unwrap_err();
        let text = port_error(address, Protocol::Udp, &error).to_string();
        assert!(text.contains(&format!("pid {}", std::process::id())) && text.contains("hint: "), "{text}");
        let elsewhere = "192.0.2.1:1".parse().unwrap();
        let error = UdpSocket::bind(elsewhere).unwrap_err();
        let text = port_error(elsewhere, Protocol::Udp, &error).to_string();
        assert!(text.contains("192.0.2.1 is no address of this host\nhint: this host has "), "{text}");
    }
}
