//! RDMA on this node, from sysfs: devices, how far each is from each GPU, and what keeps them from working.

use rayless_net::interfaces;
use rayless_proto::v1::{
    link::{LinkSettings, LinkTransport},
    rdma::{MAX_GIDS, RdmaDevice, RdmaFinding, RdmaGid, RdmaInventory, RdmaPort},
};
use rayless_verbs::{Device, Port, Protocol, erdma_mode, pci_distance, preflight};
use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Place of each GPU on the PCI bus, by its index: `0000:3b:00.0`.
pub type Places = BTreeMap<u32, String>;

/// What the user set for links and what this host has do not go together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkSettingsError {
    /// `--rdma-device` names none of this host's.
    #[error(
        "--rdma-device {name}: this host has {there}\nhint: `ls /sys/class/infiniband` shows the devices; leave --rdma-device out to use all"
    )]
    UnknownDevice {
        /// What was asked for.
        name: String,
        /// What there is, on one line.
        there: String,
    },
    /// Nothing could follow both.
    #[error("{0} contradict each other: {1}\nhint: leave one of them out")]
    Contradiction(&'static str, &'static str),
}

/// Looks at the devices; `only` are those that `--rdma-device` names.
pub fn look(only: &[String], gpus: &Places) -> RdmaInventory {
    let addresses: Vec<(String, IpAddr)> =
        interfaces::list().unwrap_or_default().into_iter().map(|found| (found.name, found.address)).collect();
    let found = preflight(only, &addresses);
    let gpus: Vec<(u32, PathBuf)> = gpus
        .iter()
        .filter_map(|(index, place)| {
            Some((*index, fs::canonicalize(Path::new("/sys/bus/pci/devices").join(place)).ok()?))
        })
        .collect();
    RdmaInventory {
        devices: found.devices.iter().map(|device| shown(device, &gpus, &addresses)).collect(),
        findings: found
            .findings
            .iter()
            .map(|finding| RdmaFinding { what: finding.to_string(), is_fatal: finding.is_fatal() })
            .collect(),
    }
}

/// Whether the settings make sense here.
///
/// # Errors
/// [`LinkSettingsError`], for a usage error.
pub fn check(settings: &LinkSettings, found: &RdmaInventory) -> Result<(), LinkSettingsError> {
    let names: Vec<&str> = found.devices.iter().map(|device| device.name.as_str()).collect();
    if let Some(name) = settings.rdma_devices.iter().find(|name| !names.contains(&name.as_str())) {
        let there = if names.is_empty() { "no RDMA device".to_owned() } else { names.join(", ") };
        return Err(LinkSettingsError::UnknownDevice { name: name.clone(), there });
    }
    let policy = &settings.policy;
    match policy.only {
        Some(LinkTransport::Rdma) if policy.encrypt => Err(LinkSettingsError::Contradiction(
            "--transport rdma and --encrypt-tensors",
            "RDMA carries tensors in clear",
        )),
        Some(LinkTransport::Tcp) if policy.allow_tcp == Some(false) => Err(LinkSettingsError::Contradiction(
            "--transport tcp and RAYLESS_ALLOW_TCP=0",
            "one asks for what the other forbids",
        )),
        _ => Ok(()),
    }
}

fn shown(device: &Device, gpus: &[(u32, PathBuf)], addresses: &[(String, IpAddr)]) -> RdmaDevice {
    let steps = |gpu: &Path| {
        let steps = device.pci_path.as_ref().and_then(|path| pci_distance(path, gpu))?;
        u32::try_from(steps).ok()
    };
    RdmaDevice {
        name: device.name.clone(),
        protocol: device.ports.first().map_or(Protocol::Other, |port| Protocol::of(device, port)).name().to_owned(),
        mode: erdma_mode(device).map_or("", |mode| mode.name()).to_owned(),
        numa: device.numa_node,
        // Of a software device no way to a GPU can be told.
        gpu_steps: match device.pci_path {
            Some(_) => gpus.iter().map(|(index, path)| (*index, steps(path))).collect(),
            None => Vec::new(),
        },
        ports: device.ports.iter().map(|port| shown_port(device, port, addresses)).collect(),
    }
}

fn shown_port(device: &Device, port: &Port, addresses: &[(String, IpAddr)]) -> RdmaPort {
    let interface = rayless_verbs::interfaces(device, port).into_iter().next().unwrap_or_default();
    let of_it = || addresses.iter().filter(|(name, _)| *name == interface).map(|(_, address)| *address);
    let address = of_it().find(IpAddr::is_ipv4).or_else(|| of_it().next());
    let mtu = fs::read_to_string(Path::new("/sys/class/net").join(&interface).join("mtu"));
    RdmaPort {
        number: port.number,
        state: port.state.clone(),
        rate: port.rate.clone(),
        interface,
        address: address.map(|address| address.to_string()).unwrap_or_default(),
        mtu: mtu.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0),
        gids: port
            .gids
            .iter()
            .take(MAX_GIDS)
            .map(|gid| RdmaGid { index: gid.index, gid: gid.gid.clone(), kind: gid.kind.clone() })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::v1::link::LinkPolicy;

    fn device(name: &str) -> RdmaDevice {
        RdmaDevice {
            name: name.to_owned(),
            protocol: "iwarp".to_owned(),
            mode: String::new(),
            numa: None,
            gpu_steps: Vec::new(),
            ports: Vec::new(),
        }
    }

    #[test]
    fn settings_that_cannot_be_are_refused_with_what_there_is() {
        let has =
            |names: &[&str]| RdmaInventory { devices: names.iter().map(|n| device(n)).collect(), findings: Vec::new() };
        let wants = |names: &[&str]| LinkSettings {
            rdma_devices: names.iter().map(|name| (*name).to_owned()).collect(),
            ..LinkSettings::default()
        };
        check(&wants(&["erdma_0"]), &has(&["erdma_0", "erdma_1"])).unwrap();
        let told = check(&wants(&["erdma_0", "mlx5_0"]), &has(&["erdma_0", "erdma_1"])).unwrap_err().to_string();
        assert!(told.starts_with("--rdma-device mlx5_0: this host has erdma_0, erdma_1\nhint: "), "{told}");
        let told = check(&wants(&["mlx5_0"]), &has(&[])).unwrap_err().to_string();
        assert!(told.starts_with("--rdma-device mlx5_0: this host has no RDMA device\nhint: "), "{told}");

        let policy = |only, encrypt, allow_tcp| LinkSettings {
            policy: LinkPolicy { only: Some(only), encrypt, allow_tcp, verify: false },
            ..LinkSettings::default()
        };
        assert!(check(&policy(LinkTransport::Rdma, true, None), &has(&[])).is_err());
        assert!(check(&policy(LinkTransport::Tcp, true, Some(false)), &has(&[])).is_err());
        check(&policy(LinkTransport::Tcp, true, None), &has(&[])).unwrap();
    }

    #[test]
    fn a_host_without_devices_says_so() {
        let found = look(&[], &Places::new());
        if found.devices.is_empty() {
            assert!(found.obstacle().unwrap().contains("no RDMA device in /sys/class/infiniband"));
        }
    }
}
