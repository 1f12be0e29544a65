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
