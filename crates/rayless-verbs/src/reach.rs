//! The ways out of this host by RDMA: a port, the network interface behind it, and the IP address by which rdma_cm finds it.

use crate::device::{Device, Kind, Port};
use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// A way out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reach {
    /// The device.
    pub device: String,
    /// Its port, from 1.
    pub port: u32,
    /// What it speaks; only equal ones can talk.
    pub protocol: Protocol,
    /// The network interface behind it.
    pub interface: String,
    /// The interface's address, for rdma_cm.
    pub address: IpAddr,
    /// The interface's MTU in bytes; 0 where it does not say.
    pub mtu: u32,
    /// The GID that goes with the address; empty where there is none.
    pub gid: String,
}

/// What a port speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// InfiniBand.
    InfiniBand,
    /// RDMA over Converged Ethernet.
    Roce,
    /// iWARP: siw, and eRDMA.
    Iwarp,
    /// Something else, which no link uses.
    Other,
}

impl Protocol {
    /// As in `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InfiniBand => "infiniband",
            Self::Roce => "roce",
            Self::Iwarp => "iwarp",
            Self::Other => "other",
        }
    }

    /// What `port` of `device` speaks.
    pub fn of(device: &Device, port: &Port) -> Self {
        match device.kind {
            Kind::Iwarp => Self::Iwarp,
            Kind::Ib if port.link_layer == "Ethernet" => Self::Roce,
            Kind::Ib => Self::InfiniBand,
            Kind::Other => Self::Other,
        }
    }
}

/// The ways out over the ports that are up. `addresses`: interface and address of all that this host has.
pub fn reaches(devices: &[Device], addresses: &[(String, IpAddr)]) -> Vec<Reach> {
    reaches_in(Path::new("/sys"), devices, addresses)
}

fn reaches_in(sys: &Path, devices: &[Device], addresses: &[(String, IpAddr)]) -> Vec<Reach> {
    let mut found = Vec::new();
    for device in devices {
        for port in device.ports.iter().filter(|port| port.state == "ACTIVE") {
            for interface in interfaces_in(sys, device, port) {
                let Some(address) = address_of(&interface, addresses) else { continue };
                let mtu = word(&sys.join("class/net").join(&interface).join("mtu")).parse().unwrap_or(0);
                let protocol = Protocol::of(device, port);
                let gid = gid_of(port, address);
                found.push(Reach {
                    device: device.name.clone(),
                    port: port.number,
                    protocol,
                    interface,
                    address,
                    mtu,
                    gid,
                });
            }
        }
    }
    found
}

/// The network interfaces behind a port, by name.
pub fn interfaces(device: &Device, port: &Port) -> BTreeSet<String> {
    interfaces_in(Path::new("/sys"), device, port)
}

fn interfaces_in(sys: &Path, device: &Device, port: &Port) -> BTreeSet<String> {
    let named: BTreeSet<String> =
        port.gids.iter().map(|gid| gid.interface.clone()).filter(|name| !name.is_empty()).collect();
    if !named.is_empty() {
        return named;
    }
    let nets = || fs::read_dir(sys.join("class/net")).into_iter().flatten().flatten().map(|entry| entry.path());
    let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    if device.kind == Kind::Iwarp {
        // Kernels before 6.5 do not name an iWARP port's interface, but its GID begins with the interface's MAC address.
        let macs: BTreeSet<String> = port.gids.iter().filter_map(|gid| mac_of(&gid.gid)).collect();
        return nets().filter(|path| macs.contains(&word(&path.join("address")))).filter_map(name).collect();
    }
    // InfiniBand: IPoIB's interfaces hang on the same place of the PCIe tree, one per port.
    let Some(place) = &device.pci_path else { return BTreeSet::new() };
    let same_place = |path: &PathBuf| fs::canonicalize(path.join("device")).is_ok_and(|there| there == *place);
    let same_port = |path: &PathBuf| {
        word(&path.join("dev_port")).parse::<u32>().map_or(device.ports.len() == 1, |index| index + 1 == port.number)
    };
    nets().filter(same_place).filter(same_port).filter_map(name).collect()
}

/// IPv4 first; an IPv6 address must reach beyond its link.
fn address_of(interface: &str, addresses: &[(String, IpAddr)]) -> Option<IpAddr> {
    let of_it = || addresses.iter().filter(|(name, _)| name == interface).map(|(_, address)| *address);
    let far = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if !v6.is_unicast_link_local());
    of_it().find(IpAddr::is_ipv4).or_else(|| of_it().find(far))
}

/// The GID that carries the address, v2 before v1 of RoCE; else the first.
fn gid_of(port: &Port, address: IpAddr) -> String {
    let carries = |gid: &&crate::device::Gid| match (gid.gid.parse::<std::net::Ipv6Addr>(), address) {
        (Ok(gid), IpAddr::V4(v4)) => gid.to_ipv4_mapped() == Some(v4),
        (Ok(gid), IpAddr::V6(v6)) => gid == v6,
        (Err(_), _) => false,
    };
    let best = port.gids.iter().filter(carries).min_by_key(|gid| (gid.kind.contains("v1"), gid.index));
    best.or_else(|| port.gids.first()).map(|gid| gid.gid.clone()).unwrap_or_default()
}

/// `0011:2233:4455:…` as `00:11:22:33:44:55`.
fn mac_of(gid: &str) -> Option<String> {
    let digits: String = gid.chars().filter(|c| *c != ':').take(12).collect();
    let is_mac = digits.len() == 12 && digits.bytes().any(|byte| byte != b'0');
    is_mac.then(|| {
        digits.as_bytes().chunks(2).map(|pair| String::from_utf8_lossy(pair).into_owned()).collect::<Vec<_>>().join(":")
    })
}

fn word(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Gid;

    fn device(name: &str, kind: Kind, gids: &[(&str, &str, &str)]) -> Device {
        let gids = (0..).zip(gids).map(|(index, (gid, kind, interface))| Gid {
            index,
            gid: (*gid).to_owned(),
            kind: (*kind).to_owned(),
            interface: (*interface).to_owned(),
        });
        let port = Port {
            number: 1,
            state: "ACTIVE".to_owned(),
            link_layer: "Ethernet".to_owned(),
            rate: String::new(),
            gids: gids.collect(),
        };
        Device { name: name.to_owned(), numa_node: None, pci_path: None, kind, ports: vec![port] }
    }

    #[test]
    fn an_address_leads_to_its_device_whether_or_not_the_kernel_names_the_interface() {
        let sys = tempfile::tempdir().unwrap();
        for (name, mac, mtu) in [("eth0", "02:00:0a:4d:00:01", "9000"), ("eth1", "02:00:0a:4e:00:01", "1500")] {
            let net = sys.path().join("class/net").join(name);
            fs::create_dir_all(&net).unwrap();
            fs::write(net.join("address"), format!("{mac}\n")).unwrap();
            fs::write(net.join("mtu"), format!("{mtu}\n")).unwrap();
        }
        let roce = device(
            "mlx5_0",
            Kind::Ib,
            &[
                ("fe80:0000:0000:0000:0000:00ff:fe4d:0001", "IB/RoCE v1", "eth0"),
                ("0000:0000:0000:0000:0000:ffff:0a4d:0001", "IB/RoCE v1", "eth0"),
                ("0000:0000:0000:0000:0000:ffff:0a4d:0001", "RoCE v2", "eth0"),
            ],
        );
        let iwarp = device("siw0", Kind::Iwarp, &[("0200:0a4e:0001:0000:0000:0000:0000:0000", "", "")]);
        let addresses = [
            ("lo".to_owned(), "127.0.0.1".parse().unwrap()),
            ("eth0".to_owned(), "fe80::ff:fe4d:1".parse().unwrap()),
            ("eth0".to_owned(), "10.77.0.1".parse().unwrap()),
            ("eth1".to_owned(), "10.78.0.1".parse().unwrap()),
        ];
        let found = reaches_in(sys.path(), &[roce.clone(), iwarp], &addresses);
        let shown: Vec<_> = found
            .iter()
            .map(|r| (r.device.as_str(), r.protocol.name(), r.interface.as_str(), r.address.to_string(), r.mtu))
            .collect();
        assert_eq!(
            shown,
            [
                ("mlx5_0", "roce", "eth0", "10.77.0.1".to_owned(), 9000),
                ("siw0", "iwarp", "eth1", "10.78.0.1".to_owned(), 1500),
            ]
        );
        assert_eq!(found[0].gid, "0000:0000:0000:0000:0000:ffff:0a4d:0001");

        let mut down = roce;
        down.ports[0].state = "DOWN".to_owned();
        assert_eq!(reaches_in(sys.path(), &[down], &addresses), []);
    }
}
