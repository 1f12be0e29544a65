//! What this host has: CPUs, memory, GPUs, shared memory, versions.
//!
//! [`quick`] takes microseconds and runs before the daemon listens; [`gpu::probe`] may take seconds and runs after it.

pub mod gpu;
pub mod rdma;

use rayless_proto::{
    BUILD,
    limits::{MAX_NAME, MAX_RESOURCES},
    resources::{CPU, GPU, MEMORY, Quantity, Resources},
    v1::control::GpuInfo,
};
use std::{fs, path::Path, thread};

/// What the user said about this node's resources.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wishes {
    /// `--gpus`
    pub gpus: Option<u32>,
    /// `--cpus`
    pub cpus: Option<Quantity>,
    /// `--resource`
    pub custom: Vec<(String, Quantity)>,
    /// `--shm-min` in MiB
    pub shm_min_mib: Option<u64>,
}

/// The node cannot offer what it was told to, or lacks what every group needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InventoryError {
    /// `--gpus` beyond what is there.
    #[error(
        "--gpus {wanted}, but this node has {found}\nhint: leave --gpus out to offer all that are found; CUDA_VISIBLE_DEVICES of the daemon limits them too"
    )]
    TooManyGpus {
        /// Told.
        wanted: u32,
        /// Found.
        found: u32,
    },
    /// `/dev/shm` is missing, full or too small.
    #[error(
        "/dev/shm has {free_mib} MiB free of {total_mib} MiB, {need_mib} MiB are needed (NCCL and vLLM share memory there)\nhint: free it, or start the container with `--shm-size=1g` or `--ipc=host`; `--shm-min` sets another limit"
    )]
    SharedMemory {
        /// Free, in MiB.
        free_mib: u64,
        /// Size, in MiB; 0 where it is not there.
        total_mib: u64,
        /// Needed, in MiB.
        need_mib: u64,
    },
    /// Too many or too long names, or a name that rayless sets itself.
    #[error(
        "--resource {name}: {reason}\nhint: give NAME=N with a short name of your own, for example `--resource nvme=2`"
    )]
    Resource {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// What a host has, as far as known.
#[derive(Debug, Clone, PartialEq)]
pub struct Inventory {
    /// All that the node offers.
    pub resources: Resources,
    /// Its GPUs.
    pub gpus: Vec<GpuInfo>,
    /// Component to version.
    pub versions: Vec<(String, String)>,
    /// Whether NVML still has to be asked.
    pub gpus_unknown: bool,
    /// Where the GPUs are on the PCI bus, as far as known.
    pub gpu_places: rdma::Places,
}

/// All that is found out at once.
///
/// # Errors
/// [`InventoryError`], for wishes that this host cannot fulfil.
pub fn quick(wishes: &Wishes) -> Result<Inventory, InventoryError> {
    let in_proc = gpu::count_in_proc();
    let driver = gpu::has_driver();
    let mut versions = vec![("rayless".to_owned(), BUILD.to_owned())];
    if let Ok(kernel) = fs::read_to_string("/proc/sys/kernel/osrelease") {
        versions.push(("kernel".to_owned(), kernel.trim().to_owned()));
    }
    let mut found = Inventory {
        resources: Resources::new(),
        gpus: Vec::new(),
        versions,
        gpus_unknown: false,
        gpu_places: rdma::Places::new(),
    };
    let cpus = wishes.cpus.unwrap_or_else(|| Quantity::whole(usable_cpus()));
    found.resources.set(CPU, cpus);
    found.resources.set(MEMORY, Quantity::whole(usable_memory()));
    let declared = custom_resources(&wishes.custom)?;
    found.resources.add(&declared);
    match wishes.gpus {
        Some(wanted) if driver => {
            // Told a number on a host with a driver: it is checked before anyone counts on it.
            let probe = gpu::probe();
            found.take_gpus(&probe, Some(wanted))?;
        }
        Some(wanted) => {
            found.gpus = gpu::declared(wanted);
            found.resources.set(GPU, Quantity::whole(u64::from(wanted)));
        }
        None => found.gpus_unknown = driver,
    }
    // NCCL takes about 10 MiB for each neighbour; GPUs that are only declared are not its business.
    let expected = in_proc.map_or(0, |found| wishes.gpus.unwrap_or(found));
    let shm_need = wishes.shm_min_mib.unwrap_or_else(|| 16 + 16 * u64::from(expected));
    check_shared_memory(Path::new("/dev/shm"), shm_need)?;
    Ok(found)
}

impl Inventory {
    /// Adds what NVML found; `wanted` of them where a number was told.
    ///
    /// # Errors
    /// [`InventoryError::TooManyGpus`] where fewer are there.
    pub fn take_gpus(&mut self, probe: &gpu::Probe, wanted: Option<u32>) -> Result<(), InventoryError> {
        let found = u32::try_from(probe.gpus.len()).unwrap_or(u32::MAX);
        if let Some(wanted) = wanted.filter(|wanted| *wanted > found) {
            return Err(InventoryError::TooManyGpus { wanted, found });
        }
        let count = wanted.unwrap_or(found) as usize;
        self.gpus = probe.gpus.iter().take(count).cloned().collect();
        add_gpus(&mut self.resources, &mut self.versions, probe, count);
        self.gpus_unknown = false;
        self.gpu_places.clone_from(&probe.places);
        Ok(())
    }
}

/// Adds `count` of the GPUs found, and the versions of what found them.
pub(crate) fn add_gpus(
    resources: &mut Resources,
    versions: &mut Vec<(String, String)>,
    probe: &gpu::Probe,
    count: usize,
) {
    resources.set(GPU, Quantity::whole(count as u64));
    for (name, version) in &probe.versions {
        versions.retain(|(known, _)| known != name);
        versions.push((name.clone(), version.clone()));
    }
}

fn custom_resources(custom: &[(String, Quantity)]) -> Result<Resources, InventoryError> {
    let mut out = Resources::new();
    for (name, quantity) in custom {
        let reason = if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            Some("the name is empty, too long or has control characters")
        } else if [CPU, GPU, MEMORY].contains(&name.as_str()) {
            Some("rayless finds that one itself (see --cpus and --gpus)")
        } else if !out.get(name).is_zero() {
            Some("given twice")
        } else if out.len() + 3 >= MAX_RESOURCES {
            Some("too many resources")
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(InventoryError::Resource { name: name.clone(), reason });
        }
        out.set(name, *quantity);
    }
    Ok(out)
}

/// CPUs that this process may use: its affinity and its cgroup's quota, rounded down, at least one.
fn usable_cpus() -> u64 {
    thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

/// Bytes of memory: what the machine has, or what the cgroup allows if that is less.
fn usable_memory() -> u64 {
    let installed = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total(&text)).unwrap_or(0);
    // v2 at the root of a container's namespace, then v1; "max" and absurdly large numbers mean no limit.
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    limit.map_or(installed, |limit| limit.min(installed))
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Refuses a missing, full or too small `dir`: found here in microseconds, found by NCCL after minutes of loading.
fn check_shared_memory(dir: &Path, need_mib: u64) -> Result<(), InventoryError> {
    if need_mib == 0 {
        return Ok(());
    }
    let (free_mib, total_mib) = match rustix::fs::statvfs(dir) {
        Ok(stat) => ((stat.f_bavail * stat.f_frsize) >> 20, (stat.f_blocks * stat.f_frsize) >> 20),
        Err(_) => (0, 0),
    };
    if free_mib < need_mib {
        return Err(InventoryError::SharedMemory { free_mib, total_mib, need_mib });
    }
    Ok(())
}

/// Raises this process's limit of locked memory, and so that of the workers to come, as far as it may: RDMA and the heartbeat
/// thread want none.
pub fn raise_memlock() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Memlock);
    if limit.current != limit.maximum {
        // Where it is refused, what is there stays; too little of it is found by name where RDMA is looked at.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_this_host() {
        let found = quick(&Wishes::default()).unwrap();
        assert!(found.resources.get(CPU) >= Quantity::ONE);
        assert!(found.resources.get(MEMORY) > Quantity::whole(1 << 20));
        assert!(found.versions.iter().any(|(name, version)| name == "rayless" && version == BUILD));
    }

    #[test]
    fn declared_gpus_count_as_resource_and_devices() {
        if gpu::count_in_proc().is_some() {
            return;
        }
        let found = quick(&Wishes { gpus: Some(8), ..Wishes::default() }).unwrap();
        assert_eq!(found.resources.get(GPU), Quantity::whole(8));
        assert_eq!(found.gpus.len(), 8);
        assert!(!found.gpus_unknown);
    }

    #[test]
    fn more_gpus_than_there_are_is_an_error_with_both_numbers() {
        let probe = gpu::Probe { gpus: gpu::declared(2), ..gpu::Probe::default() };
        let mut found = quick(&Wishes::default()).unwrap();
        let told = found.take_gpus(&probe, Some(3)).unwrap_err().to_string();
        assert!(told.contains("--gpus 3") && told.contains("has 2") && told.contains("hint:"), "{told}");
        found.take_gpus(&probe, Some(1)).unwrap();
        assert_eq!(found.resources.get(GPU), Quantity::ONE);
    }

    #[test]
    fn too_little_shared_memory_is_refused() {
        let told = check_shared_memory(Path::new("/dev/shm"), u64::MAX >> 20).unwrap_err().to_string();
        assert!(told.contains("--shm-size") && told.contains("hint:"), "{told}");
        assert!(check_shared_memory(Path::new("/no/such/dir"), 1).is_err());
        check_shared_memory(Path::new("/no/such/dir"), 0).unwrap();
    }

    #[test]
    fn resources_that_are_ours_or_twice_there_are_refused() {
        let one = |name: &str| (name.to_owned(), Quantity::ONE);
        custom_resources(&[one("nvme"), one("rack")]).unwrap();
        for bad in [vec![one("GPU")], vec![one("a"), one("a")], vec![one("")], vec![one("a\nb")]] {
            assert!(custom_resources(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn meminfo_is_in_kib() {
        assert_eq!(mem_total("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
    }
}
