//! Why RDMA would not work here, by name, before anything is tried: the reason that `status` shows, and the one that a link gives
//! which was not to go over anything else.

use crate::{
    device::{Device, Kind, devices},
    load::{LoadError, available},
    reach::{Reach, interfaces, reaches},
};
use rustix::process::{Resource, getrlimit};
use std::{fs, io, net::IpAddr, path::Path};

/// Registered memory of one link, per end, with some room: less memlock than this cannot be meant.
const MEMLOCK_NEEDED: u64 = 16 << 20;
/// The capability that lifts the limit of locked memory (its bit, see capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;
/// PCI functions that are RDMA devices once their driver is loaded: vendor, beginning of the device id, beginning of the class, driver.
const PCI_FUNCTIONS: [(&str, &str, &str, &str); 2] =
    [("0x1ded", "0x107f", "", "erdma"), ("0x15b3", "", "0x0207", "mlx5_ib")];

/// Something that keeps RDMA from working, or may.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Finding {
    /// The libraries are missing.
    #[error("{0}")]
    Libraries(LoadError),
    /// The kernel shows no device.
    #[error("no RDMA device in /sys/class/infiniband")]
    NoDevice,
    /// There is hardware that no driver has taken.
    #[error("PCI function {place} is an RDMA device without a driver: `modprobe {driver}`")]
    NoDriver {
        /// Its address on the bus.
        place: String,
        /// Which module takes it.
        driver: &'static str,
    },
    /// `--rdma-device` names one that is not there.
    #[error("there is no RDMA device {name}; this host has {there}")]
    UnknownDevice {
        /// What was asked for.
        name: String,
        /// Those that there are.
        there: String,
    },
    /// There are devices, but every port is down.
    #[error("no port of {names} is ACTIVE")]
    NoActivePort {
        /// The devices.
        names: String,
    },
    /// rdma_cm finds devices by the address of their interface.
    #[error("the network interface of {names} has no IP address, by which rdma_cm finds it")]
    NoAddress {
        /// The devices.
        names: String,
    },
    /// A device file that is needed cannot be opened.
    #[error("{path} cannot be opened: {cause}; load ib_uverbs and rdma_ucm, docker `--device=/dev/infiniband`")]
    DeviceFile {
        /// Which.
        path: String,
        /// What the system says.
        cause: String,
    },
    /// The limit of locked memory is too small, and the process may not go beyond it.
    #[error(
        "the memlock limit is {} KiB and CAP_IPC_LOCK is missing; RDMA needs it unlimited: `ulimit -l unlimited`, docker `--ulimit memlock=-1` or `--cap-add IPC_LOCK`", .bytes / 1024
    )]
    Memlock {
        /// The limit.
        bytes: u64,
    },
    /// Alibaba's eRDMA driver in compat mode, in which connections are made in RoCE's way.
    #[error(
        "the erdma driver runs in compat mode (compat_mode=Y); links by rdma_cm were not tried there: `modprobe erdma compat_mode=N` if they fail"
    )]
    ErdmaCompat,
}

impl Finding {
    /// Whether RDMA cannot work with it.
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::ErdmaCompat | Self::NoDriver { .. })
    }
}

/// What this host has for RDMA, and what is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Preflight {
    /// All devices of the kernel.
    pub devices: Vec<Device>,
    /// The ways out over those that may be used, in the order in which `only` names them.
    pub reaches: Vec<Reach>,
    /// Empty: nothing speaks against RDMA here.
    pub findings: Vec<Finding>,
}

impl Preflight {
    /// Why RDMA cannot be used, as one line; `None` where it can.
    pub fn obstacle(&self) -> Option<String> {
        let fatal: Vec<String> = self.findings.iter().filter(|f| f.is_fatal()).map(ToString::to_string).collect();
        (!fatal.is_empty()).then(|| fatal.join("; "))
    }
}

/// Looks for all of it. `only`: the devices that may be used (`--rdma-device`), all where it is empty. `addresses`: interface and
/// address of all that this host has. The libraries are loaded only where there is a device.
pub fn preflight(only: &[String], addresses: &[(String, IpAddr)]) -> Preflight {
    let host = Host {
        memlock: getrlimit(Resource::Memlock).current,
        may_lock: has_capability(&fs::read_to_string("/proc/thread-self/status").unwrap_or_default(), CAP_IPC_LOCK),
        root: Path::new("/"),
    };
    look(&host, available, devices(), only, addresses)
}

/// What the findings depend on besides devices and libraries.
struct Host<'a> {
    /// `None`: unlimited.
    memlock: Option<u64>,
    may_lock: bool,
    root: &'a Path,
}

fn look(
    host: &Host<'_>,
    libraries: impl FnOnce() -> Result<(), LoadError>,
    devices: io::Result<Vec<Device>>,
    only: &[String],
    addresses: &[(String, IpAddr)],
) -> Preflight {
    let mut found = Preflight { devices: devices.unwrap_or_default(), ..Preflight::default() };
    found.findings.extend(undriven(host.root));
    if found.devices.is_empty() {
        // Whatever else is missing, without a device it does not matter.
        found.findings.push(Finding::NoDevice);
        return found;
    }
    let all: Vec<&str> = found.devices.iter().map(|device| device.name.as_str()).collect();
    let unknown = only.iter().filter(|name| !all.contains(&name.as_str()));
    let there = all.join(", ");
    found.findings.extend(unknown.map(|name| Finding::UnknownDevice { name: name.clone(), there: there.clone() }));
    let mut used: Vec<Device> = found.devices.clone();
    if !only.is_empty() {
        used.retain(|device| only.contains(&device.name));
        used.sort_by_key(|device| only.iter().position(|name| *name == device.name));
    }
    if used.is_empty() {
        return found;
    }
    if let Err(error) = libraries() {
        found.findings.push(Finding::Libraries(error));
    }
    found.reaches = reaches(&used, addresses);
    let names = used.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
    if !used.iter().flat_map(|device| &device.ports).any(|port| port.state == "ACTIVE") {
        found.findings.push(Finding::NoActivePort { names });
    } else if found.reaches.is_empty() {
        found.findings.push(Finding::NoAddress { names: with_interfaces(&used) });
    }
    found.findings.extend(device_files(host.root));
    if let Some(bytes) = host.memlock.filter(|bytes| *bytes < MEMLOCK_NEEDED && !host.may_lock) {
        found.findings.push(Finding::Memlock { bytes });
    }
    if used.iter().any(|device| erdma_mode_in(host.root, device) == Some(ErdmaMode::Compat)) {
        found.findings.push(Finding::ErdmaCompat);
    }
    found
}

/// `siw0 (eth1), siw1`.
fn with_interfaces(devices: &[Device]) -> String {
    let named = |device: &Device| {
        let behind: Vec<String> = device.ports.iter().flat_map(|port| interfaces(device, port)).collect();
        if behind.is_empty() { device.name.clone() } else { format!("{} ({})", device.name, behind.join(", ")) }
    };
    devices.iter().map(named).collect::<Vec<_>>().join(", ")
}

/// Those of the device files that cannot be opened.
fn device_files(root: &Path) -> Vec<Finding> {
    let verbs = fs::read_dir(root.join("dev/infiniband")).into_iter().flatten().flatten();
    let verbs = verbs.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("uverbs"));
    let manager = root.join("dev/infiniband/rdma_cm");
    let needed = [verbs.unwrap_or_else(|| root.join("dev/infiniband/uverbs0")), manager];
    let closed = needed.into_iter().filter_map(|path| {
        let error = fs::OpenOptions::new().read(true).write(true).open(&path).err()?;
        let path = Path::new("/").join(path.strip_prefix(root).unwrap_or(&path));
        Some(Finding::DeviceFile { path: path.display().to_string(), cause: error.to_string() })
    });
    closed.collect()
}

/// Hardware that would be an RDMA device.
fn undriven(root: &Path) -> Vec<Finding> {
    let functions = fs::read_dir(root.join("sys/bus/pci/devices")).into_iter().flatten().flatten();
    let mut found: Vec<Finding> = functions
        .filter_map(|entry| {
            let path = entry.path();
            let says =
                |name: &str| fs::read_to_string(path.join(name)).map(|t| t.trim().to_owned()).unwrap_or_default();
            let (vendor, device, class) = (says("vendor"), says("device"), says("class"));
            let (.., driver) = PCI_FUNCTIONS
                .iter()
                .find(|(v, d, c, _)| *v == vendor && device.starts_with(d) && class.starts_with(c))?;
            let place = entry.file_name().to_string_lossy().into_owned();
            (!path.join("driver").exists()).then_some(Finding::NoDriver { place, driver })
        })
        .collect();
    found.sort_by_key(ToString::to_string);
    found
}

/// How Alibaba's eRDMA driver makes connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErdmaMode {
    /// By rdma_cm only, as iWARP does.
    Standard,
    /// In RoCE's way too; a parameter of Alibaba's own driver.
    Compat,
}

impl ErdmaMode {
    /// As in `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Compat => "compat",
        }
    }
}

/// The mode of an eRDMA device; `None` for others.
pub fn erdma_mode(device: &Device) -> Option<ErdmaMode> {
    erdma_mode_in(Path::new("/"), device)
}

fn erdma_mode_in(root: &Path, device: &Device) -> Option<ErdmaMode> {
    let driver = device.pci_path.as_ref().and_then(|path| fs::read_link(path.join("driver")).ok());
    let is_erdma = device.name.starts_with("erdma") || driver.is_some_and(|path| path.ends_with("erdma"));
    if !is_erdma || device.kind == Kind::Other {
        return None;
    }
    let compat = fs::read_to_string(root.join("sys/module/erdma/parameters/compat_mode"));
    Some(if compat.is_ok_and(|text| text.trim() == "Y") { ErdmaMode::Compat } else { ErdmaMode::Standard })
}

/// Whether the effective capabilities in a `/proc/…/status` have this bit.
fn has_capability(status: &str, bit: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).is_some_and(|all| all >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Gid, Port};
    use std::{os::unix::fs::symlink, path::PathBuf};

    fn device(name: &str, state: &str) -> Device {
        let gid = Gid {
            index: 0,
            gid: "0200:0a4e:0001:0000:0000:0000:0000:0000".to_owned(),
            kind: String::new(),
            interface: "eth0".to_owned(),
        };
        let port = Port {
            number: 1,
            state: state.to_owned(),
            link_layer: "Ethernet".to_owned(),
            rate: String::new(),
            gids: vec![gid],
        };
        Device { name: name.to_owned(), numa_node: None, pci_path: None, kind: Kind::Iwarp, ports: vec![port] }
    }

    struct Fake {
        root: tempfile::TempDir,
        memlock: Option<u64>,
        may_lock: bool,
        addresses: Vec<(String, IpAddr)>,
    }

    impl Fake {
        fn new() -> Self {
            let addresses = vec![("eth0".to_owned(), "10.0.0.1".parse().unwrap())];
            Self { root: tempfile::tempdir().unwrap(), memlock: None, may_lock: false, addresses }
        }

        fn path(&self, path: &str) -> PathBuf {
            let path = self.root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        }

        fn write(&self, path: &str, text: &str) {
            fs::write(self.path(path), text).unwrap();
        }

        fn look(&self, devices: Vec<Device>, only: &[&str]) -> Preflight {
            let host = Host { memlock: self.memlock, may_lock: self.may_lock, root: self.root.path() };
            let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
            look(&host, || Ok(()), Ok(devices), &only, &self.addresses)
        }

        fn findings(&self, devices: Vec<Device>) -> Vec<Finding> {
            self.look(devices, &[]).findings
        }
    }

    #[test]
    fn each_obstacle_is_named() {
        let mut host = Fake::new();
        assert_eq!(host.findings(vec![]), [Finding::NoDevice]);
        let found = host.findings(vec![device("erdma_0", "ACTIVE")]);
        assert_eq!(found.len(), 2);
        assert!(found[0].to_string().starts_with("/dev/infiniband/uverbs0 cannot be opened"), "{}", found[0]);

        host.write("dev/infiniband/uverbs3", "");
        host.write("dev/infiniband/rdma_cm", "");
        assert_eq!(host.findings(vec![device("erdma_0", "ACTIVE")]), []);
        assert_eq!(host.findings(vec![device("erdma_0", "DOWN")]), [Finding::NoActivePort { names: "erdma_0".into() }]);
        host.memlock = Some(64 << 10);
        let found = host.findings(vec![device("erdma_0", "ACTIVE")]);
        assert_eq!(found, [Finding::Memlock { bytes: 64 << 10 }]);
        assert!(found[0].to_string().starts_with("the memlock limit is 64 KiB and CAP_IPC_LOCK is missing"));
        host.may_lock = true;
        assert_eq!(host.findings(vec![device("erdma_0", "ACTIVE")]), []);
        host.addresses.clear();
        assert_eq!(
            host.look(vec![device("erdma_0", "ACTIVE")], &[]).obstacle().unwrap(),
            "the network interface of erdma_0 (eth0) has no IP address, by which rdma_cm finds it"
        );
    }

    #[test]
    fn missing_libraries_are_named_only_where_there_is_a_device() {
        let host = Fake::new();
        let here = Host { memlock: None, may_lock: true, root: host.root.path() };
        let missing = || Err(LoadError::Missing { library: "libibverbs.so.1", cause: "no such file".into() });
        assert_eq!(look(&here, missing, Ok(vec![]), &[], &[]).findings, [Finding::NoDevice]);
        let found = look(&here, missing, Ok(vec![device("siw0", "ACTIVE")]), &[], &host.addresses).obstacle().unwrap();
        assert!(found.starts_with("libibverbs.so.1 cannot be loaded: no such file"), "{found}");
    }

    #[test]
    fn the_mode_of_erdma_is_told() {
        let host = Fake::new();
        host.write("dev/infiniband/uverbs0", "");
        host.write("dev/infiniband/rdma_cm", "");
        let mode = |name| erdma_mode_in(host.root.path(), &device(name, "ACTIVE"));
        assert_eq!((mode("erdma_0"), mode("siw0")), (Some(ErdmaMode::Standard), None));
        host.write("sys/module/erdma/parameters/compat_mode", "Y\n");
        assert_eq!(mode("erdma_0"), Some(ErdmaMode::Compat));
        let found = host.look(vec![device("erdma_0", "ACTIVE")], &[]);
        assert_eq!((found.findings.as_slice(), found.obstacle()), ([Finding::ErdmaCompat].as_slice(), None));
        assert_eq!(host.findings(vec![device("siw0", "ACTIVE")]), []);
        host.write("sys/module/erdma/parameters/compat_mode", "N\n");
        assert_eq!(mode("erdma_0"), Some(ErdmaMode::Standard));
        // Devices may be renamed by udev; the driver is not.
        let renamed = Device { pci_path: Some(host.path("devices/pci0000:00/x")), ..device("rdmap1s0", "ACTIVE") };
        symlink("../../../bus/pci/drivers/erdma", host.path("devices/pci0000:00/x/driver")).unwrap();
        assert_eq!(erdma_mode_in(host.root.path(), &renamed), Some(ErdmaMode::Standard));
    }

    #[test]
    fn only_the_devices_asked_for_are_used_in_that_order() {
        let host = Fake::new();
        host.write("dev/infiniband/uverbs0", "");
        host.write("dev/infiniband/rdma_cm", "");
        let both = || vec![device("siw0", "ACTIVE"), device("siw1", "ACTIVE")];
        let names = |found: &Preflight| found.reaches.iter().map(|r| r.device.clone()).collect::<Vec<_>>();
        assert_eq!(names(&host.look(both(), &["siw1", "siw0"])), ["siw1", "siw0"]);
        assert_eq!(names(&host.look(both(), &["siw1"])), ["siw1"]);
        assert_eq!(
            host.look(both(), &["mlx5_0"]).obstacle().unwrap(),
            "there is no RDMA device mlx5_0; this host has siw0, siw1"
        );
    }

    #[test]
    fn hardware_without_a_driver_is_named() {
        let host = Fake::new();
        for (file, text) in [("vendor", "0x1ded\n"), ("device", "0x107f\n"), ("class", "0x020000\n")] {
            host.write(&format!("sys/bus/pci/devices/0000:00:07.0/{file}"), text);
        }
        let found = host.findings(vec![]);
        assert_eq!(
            found[0].to_string(),
            "PCI function 0000:00:07.0 is an RDMA device without a driver: `modprobe erdma`"
        );
        assert_eq!(found[1..], [Finding::NoDevice]);
        host.write("sys/bus/pci/devices/0000:00:07.0/driver/bind", "");
        assert_eq!(host.findings(vec![]), [Finding::NoDevice]);
    }

    #[test]
    fn capabilities_are_read_as_the_kernel_writes_them() {
        let status = |digits: &str| format!("Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t{digits}\n");
        assert!(has_capability(&status("000001ffffffffff"), CAP_IPC_LOCK));
        assert!(has_capability(&status("0000000000004000"), CAP_IPC_LOCK));
        assert!(!has_capability(&status("00000000a80425fb"), CAP_IPC_LOCK) && !has_capability("", CAP_IPC_LOCK));
    }
}
