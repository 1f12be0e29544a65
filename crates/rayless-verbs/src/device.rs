//! Devices as sysfs shows them: no library and no permission is needed, so `doctor` and `status` can always tell.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// An RDMA device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// As in /sys/class/infiniband.
    pub name: String,
    /// The NUMA node that it hangs on, if the machine says.
    pub numa_node: Option<u32>,
    /// Its place in the PCIe tree; `None` for software devices.
    pub pci_path: Option<PathBuf>,
    /// What it speaks, by its kernel's `node_type`.
    pub kind: Kind,
    /// Its ports, from 1.
    pub ports: Vec<Port>,
}

/// What a device speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// InfiniBand or RoCE.
    Ib,
    /// iWARP: siw, and eRDMA.
    Iwarp,
    /// Something else.
    Other,
}

/// A port of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// Its number.
    pub number: u32,
    /// `ACTIVE`, `DOWN`, ….
    pub state: String,
    /// `InfiniBand` or `Ethernet`.
    pub link_layer: String,
    /// `100 Gb/sec (4X EDR)`, as the kernel words it.
    pub rate: String,
    /// Addresses: index, GID, its type (`RoCE v2`, …) and network interface.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gid {
    /// Its place in the table.
    pub index: u32,
    /// As the kernel writes it.
    pub gid: String,
    /// `IB/RoCE v1`, `RoCE v2`, …; empty where the kernel does not say.
    pub kind: String,
    /// The network interface behind it; empty where there is none.
    pub interface: String,
}

/// The devices of this machine, by name. A machine without RDMA has none.
pub fn devices() -> io::Result<Vec<Device>> {
    devices_in(Path::new("/sys/class/infiniband"))
}

fn devices_in(class: &Path) -> io::Result<Vec<Device>> {
    let entries = match fs::read_dir(class) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut devices = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        let parent = fs::canonicalize(path.join("device")).ok();
        let kind = match word(&path.join("node_type")).split(':').next() {
            Some("1") => Kind::Ib,
            Some("4") => Kind::Iwarp,
            _ => Kind::Other,
        };
        devices.push(Device {
            name,
            // -1: the machine has no NUMA, or does not say.
            numa_node: word(&path.join("device/numa_node")).parse().ok(),
            pci_path: parent
                .filter(|path| path.components().any(|part| part.as_os_str().to_string_lossy().starts_with("pci"))),
            kind,
            ports: ports_in(&path.join("ports")),
        });
    }
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(devices)
}

fn ports_in(folder: &Path) -> Vec<Port> {
    let mut ports: Vec<Port> = numbered(folder)
        .map(|(number, path)| Port {
            number,
            // `4: ACTIVE`
            state: word(&path.join("state")).split_once(": ").map_or_else(String::new, |(_, state)| state.to_owned()),
            link_layer: word(&path.join("link_layer")),
            rate: word(&path.join("rate")),
            gids: gids_in(&path),
        })
        .collect();
    ports.sort_by_key(|port| port.number);
    ports
}

fn gids_in(port: &Path) -> Vec<Gid> {
    let mut gids: Vec<Gid> = numbered(&port.join("gids"))
        .map(|(index, path)| Gid {
            index,
            gid: word(&path),
            kind: word(&port.join(format!("gid_attrs/types/{index}"))),
            interface: word(&port.join(format!("gid_attrs/ndevs/{index}"))),
        })
        // An all-zero entry is a free place of the table.
        .filter(|gid| gid.gid.bytes().any(|byte| byte != b'0' && byte != b':'))
        .collect();
    gids.sort_by_key(|gid| gid.index);
    gids
}

fn numbered(folder: &Path) -> impl Iterator<Item = (u32, PathBuf)> {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, entry.path()))
    })
}

/// A file's text; a file that is not there, or not readable, has none.
fn word(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// Where a PCI device, a GPU say, sits in the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PciPlace {
    /// Its place in the PCIe tree.
    pub path: PathBuf,
    /// The NUMA node that it hangs on, if the machine says.
    pub numa_node: Option<u32>,
}

impl PciPlace {
    /// The place of the device with this bus id, as NVML (`00000000:17:00.0`), CUDA and lspci (`17:00.0`) write it.
    /// `None`: there is no such device, or it is no bus id.
    pub fn of(bus_id: &str) -> Option<Self> {
        Self::of_in(Path::new("/sys/bus/pci/devices"), bus_id)
    }

    fn of_in(devices: &Path, bus_id: &str) -> Option<Self> {
        // The kernel writes the domain with four digits (more where it needs more), NVML with eight.
        let (domain, rest) = match bus_id.matches(':').count() {
            1 => (0, bus_id),
            _ => {
                bus_id.split_once(':').and_then(|(domain, rest)| Some((u32::from_str_radix(domain, 16).ok()?, rest)))?
            }
        };
        if rest.contains('/') {
            return None;
        }
        let path = fs::canonicalize(devices.join(format!("{domain:04x}:{}", rest.to_lowercase()))).ok()?;
        let numa_node = word(&path.join("numa_node")).parse().ok();
        Some(Self { path, numa_node })
    }
}

impl Device {
    /// Steps in the PCIe tree to another device; see [`pci_distance`]. `None`: no common host bridge, or a software device.
    pub fn distance_to(&self, other: &PciPlace) -> Option<usize> {
        pci_distance(self.pci_path.as_deref()?, &other.path)
    }

    /// Whether both hang on one NUMA node, if the machine says.
    pub fn shares_node_with(&self, other: &PciPlace) -> Option<bool> {
        Some(self.numa_node? == other.numa_node?)
    }
}

/// The device nearest to a GPU: by steps in the PCIe tree, then by NUMA node, then by name. Software devices come last.
pub fn nearest<'a>(devices: &'a [Device], to: &PciPlace) -> Option<&'a Device> {
    devices.iter().min_by_key(|device| {
        let steps = device.distance_to(to).unwrap_or(usize::MAX);
        (device.pci_path.is_none(), steps, device.shares_node_with(to) == Some(false), &device.name)
    })
}

/// Steps between two places in the PCIe tree, up to the nearest common one and down again: under one switch 2 to 4,
/// more across root ports. `None`: no common host bridge, so the way leads through the processor.
pub fn pci_distance(a: &Path, b: &Path) -> Option<usize> {
    let (a, b): (Vec<_>, Vec<_>) = (a.components().collect(), b.components().collect());
    let common = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let shares_bridge = a[..common].iter().any(|part| part.as_os_str().to_string_lossy().starts_with("pci"));
    shares_bridge.then_some(a.len() + b.len() - 2 * common)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_steps_in_the_tree() {
        let nic = Path::new("/sys/devices/pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:00.0/0000:13:00.0");
        let near = Path::new("/sys/devices/pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:01.0/0000:14:00.0");
        let far = Path::new("/sys/devices/pci0000:10/0000:10:02.0/0000:20:00.0");
        let other = Path::new("/sys/devices/pci0000:80/0000:80:01.0/0000:81:00.0");
        assert_eq!(pci_distance(nic, nic), Some(0));
        assert_eq!(pci_distance(nic, near), Some(4));
        assert_eq!(pci_distance(nic, far), Some(6));
        assert_eq!(pci_distance(nic, other), None);
    }

    #[test]
    fn the_nearest_device_shares_a_switch_or_else_a_node_with_the_gpu() {
        let root = tempfile::tempdir().unwrap();
        let devices = root.path().join("bus/pci/devices");
        fs::create_dir_all(&devices).unwrap();
        let put = |path: &str, node: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("numa_node"), node).unwrap();
            std::os::unix::fs::symlink(&path, devices.join(path.file_name().unwrap())).unwrap();
        };
        put("pci0000:10/0000:10:01.0/0000:17:00.0", "1\n");
        put("pci0000:10/0000:10:01.0/0000:18:00.0", "1\n");
        put("pci0000:10/0000:10:02.0/0000:20:00.0", "1\n");
        put("pci0000:80/0000:80:01.0/0000:81:00.0", "0\n");
        put("pci0000:90/0000:90:01.0/0000:91:00.0", "1\n");
        let place = |bus_id: &str| PciPlace::of_in(&devices, bus_id);
        let gpu = place("00000000:17:00.0").unwrap();
        assert_eq!((place("17:00.0").as_ref(), place("0000:17:00.0").as_ref()), (Some(&gpu), Some(&gpu)));
        for nothing in ["", "0000:99:00.0", "x", "0000:17:00.0/..", "zz:17:00.0", "../17:00.0"] {
            assert_eq!(place(nothing), None, "{nothing}");
        }
        let device = |name: &str, bus_id: &str| {
            let at = place(bus_id);
            Device {
                name: name.to_owned(),
                numa_node: at.as_ref().and_then(|at| at.numa_node),
                pci_path: at.map(|at| at.path),
                kind: Kind::Ib,
                ports: Vec::new(),
            }
        };
        let mut all = vec![
            device("rxe0", "none"),
            device("mlx5_0", "81:00.0"),
            device("mlx5_1", "91:00.0"),
            device("mlx5_2", "20:00.0"),
            device("mlx5_3", "18:00.0"),
        ];
        assert_eq!((all[4].distance_to(&gpu), all[4].shares_node_with(&gpu)), (Some(2), Some(true)));
        assert_eq!((all[3].distance_to(&gpu), all[1].distance_to(&gpu)), (Some(4), None));
        for expected in ["mlx5_3", "mlx5_2", "mlx5_1", "mlx5_0", "rxe0"] {
            assert_eq!(nearest(&all, &gpu).unwrap().name, expected);
            all.retain(|device| device.name != expected);
        }
        assert_eq!(nearest(&all, &gpu), None);
    }

    #[test]
    fn a_tree_like_sysfs_reads_as_devices() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("bus/pci0000:00/0000:00:05.0/numa_node", "1\n");
        write("class/mlx5_0/node_type", "1: CA\n");
        write("class/mlx5_0/ports/1/state", "4: ACTIVE\n");
        write("class/mlx5_0/ports/1/link_layer", "Ethernet\n");
        write("class/mlx5_0/ports/1/rate", "100 Gb/sec (4X EDR)\n");
        write("class/mlx5_0/ports/1/gids/0", "0000:0000:0000:0000:0000:0000:0000:0000\n");
        write("class/mlx5_0/ports/1/gids/3", "0000:0000:0000:0000:0000:ffff:0a4d:0001\n");
        write("class/mlx5_0/ports/1/gid_attrs/types/3", "RoCE v2\n");
        write("class/mlx5_0/ports/1/gid_attrs/ndevs/3", "eth0\n");
        write("class/siw0/node_type", "4: RNIC\n");
        std::os::unix::fs::symlink(
            root.path().join("bus/pci0000:00/0000:00:05.0"),
            root.path().join("class/mlx5_0/device"),
        )
        .unwrap();
        let devices = devices_in(&root.path().join("class")).unwrap();
        assert_eq!(devices.len(), 2);
        let mlx = &devices[0];
        assert_eq!((mlx.name.as_str(), mlx.kind, mlx.numa_node), ("mlx5_0", Kind::Ib, Some(1)));
        assert!(mlx.pci_path.as_ref().unwrap().ends_with("pci0000:00/0000:00:05.0"));
        assert_eq!((mlx.ports[0].state.as_str(), mlx.ports[0].gids.len()), ("ACTIVE", 1));
        assert_eq!(mlx.ports[0].gids[0].interface, "eth0");
        assert_eq!((devices[1].kind, devices[1].pci_path.is_some()), (Kind::Iwarp, false));
        assert_eq!(devices_in(&root.path().join("nothing")).unwrap(), []);
    }
}
