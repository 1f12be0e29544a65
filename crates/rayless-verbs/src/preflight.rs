//! Why RDMA would not work here, by name, before anything is tried. For `doctor`, and for the reason that `status` shows.

use crate::{
    device::{Device, Kind, devices},
    load::{LoadError, available},
};
use rustix::process::{Resource, getrlimit};
use std::{fs, io, path::Path};

/// Registered memory of one link, per end, with some room: less memlock than this cannot be meant.
const MEMLOCK_NEEDED: u64 = 16 << 20;

/// Something that keeps RDMA from working, or may.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Finding {
    /// The libraries are missing.
    #[error("{0}")]
    Libraries(LoadError),
    /// The kernel shows no device.
    #[error("no RDMA device in /sys/class/infiniband")]
    NoDevice,
    /// There are devices, but every port is down.
    #[error("no port of {names} is ACTIVE")]
    NoActivePort {
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
    /// The limit of locked memory is too small.
    #[error("the memlock limit is {} KiB; RDMA needs it unlimited: `ulimit -l unlimited`, docker `--ulimit memlock=-1`", .bytes / 1024)]
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
        !matches!(self, Self::ErdmaCompat)
    }
}

/// Looks for all of it. Empty: nothing speaks against RDMA here.
pub fn preflight() -> Vec<Finding> {
    let limit = getrlimit(Resource::Memlock).current;
    findings(available(), devices(), limit, Path::new("/"))
}

fn findings(
    libraries: Result<(), LoadError>,
    devices: io::Result<Vec<Device>>,
    memlock: Option<u64>,
    root: &Path,
) -> Vec<Finding> {
    let mut found = Vec::new();
    let devices = devices.unwrap_or_default();
    if devices.is_empty() {
        // Whatever else is missing, without a device it does not matter.
        return vec![Finding::NoDevice];
    }
    if let Err(error) = libraries {
        found.push(Finding::Libraries(error));
    }
    if !devices.iter().flat_map(|device| &device.ports).any(|port| port.state == "ACTIVE") {
        let names = devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
        found.push(Finding::NoActivePort { names });
    }
    let verbs = fs::read_dir(root.join("dev/infiniband")).into_iter().flatten().flatten();
    let verbs = verbs.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("uverbs"));
    let manager = root.join("dev/infiniband/rdma_cm");
    for path in [verbs.unwrap_or_else(|| root.join("dev/infiniband/uverbs0")), manager] {
        if let Err(error) = fs::OpenOptions::new().read(true).write(true).open(&path) {
            let path = Path::new("/").join(path.strip_prefix(root).unwrap_or(&path));
            found.push(Finding::DeviceFile { path: path.display().to_string(), cause: error.to_string() });
        }
    }
    // No value: unlimited.
    if let Some(bytes) = memlock.filter(|bytes| *bytes < MEMLOCK_NEEDED) {
        found.push(Finding::Memlock { bytes });
    }
    let compat = fs::read_to_string(root.join("sys/module/erdma/parameters/compat_mode"));
    if devices.iter().any(|device| device.kind != Kind::Other) && compat.is_ok_and(|text| text.trim() == "Y") {
        found.push(Finding::ErdmaCompat);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Port;

    fn device(state: &str) -> Device {
        let port = Port {
            number: 1,
            state: state.to_owned(),
            link_layer: "Ethernet".to_owned(),
            rate: String::new(),
            gids: Vec::new(),
        };
        Device { name: "erdma_0".into(), numa_node: None, pci_path: None, kind: Kind::Iwarp, ports: vec![port] }
    }

    #[test]
    fn each_obstacle_is_named() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let look = |devices, memlock| findings(Ok(()), Ok(devices), memlock, root.path());

        assert_eq!(look(vec![], None), [Finding::NoDevice]);
        let found = look(vec![device("ACTIVE")], None);
        assert_eq!(found.len(), 2);
        assert!(found[0].to_string().starts_with("/dev/infiniband/uverbs0 cannot be opened"), "{}", found[0]);

        write("dev/infiniband/uverbs3", "");
        write("dev/infiniband/rdma_cm", "");
        assert_eq!(look(vec![device("ACTIVE")], None), []);
        assert_eq!(look(vec![device("DOWN")], None), [Finding::NoActivePort { names: "erdma_0".into() }]);
        let found = look(vec![device("ACTIVE")], Some(64 << 10));
        assert_eq!(found, [Finding::Memlock { bytes: 64 << 10 }]);
        assert!(found[0].to_string().starts_with("the memlock limit is 64 KiB"), "{}", found[0]);

        write("sys/module/erdma/parameters/compat_mode", "Y\n");
        let found = look(vec![device("ACTIVE")], None);
        assert_eq!(found, [Finding::ErdmaCompat]);
        assert!(!found[0].is_fatal());
        write("sys/module/erdma/parameters/compat_mode", "N\n");
        assert_eq!(look(vec![device("ACTIVE")], None), []);
    }
}
