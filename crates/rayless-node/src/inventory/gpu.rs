//! GPUs through NVML, loaded at run time: a host without the driver simply has none.
//!
//! NVML is opened for each probe and closed after it: loaded, it costs a resting daemon more memory than the daemon
//! itself. Opening takes up to seconds on a host without persistence mode, so callers probe on a thread of their own.

use super::rdma::Places;
use nvml_wrapper::{Nvml, enums::device::UsedGpuMemory, error::NvmlError, struct_wrappers::device::ProcessInfo};
use rayless_proto::v1::control::GpuInfo;
use std::{collections::BTreeMap, env, ffi::OsStr, fs, path::Path};

/// The name that a driver installs; the one without the version comes with development packages only.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// What a GPU's memory is used for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// In use, in bytes.
    pub used_bytes: u64,
    /// Process to bytes that it holds: those that compute, also as MPS clients, and the MPS server itself. `None` where NVML
    /// does not tell, or not for all of them.
    pub processes: Option<BTreeMap<u32, u64>>,
}

/// What NVML says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probe {
    /// The GPUs that this process may use, in NVML's order (that of the PCI bus).
    pub gpus: Vec<GpuInfo>,
    /// `driver` and `cuda` to version.
    pub versions: Vec<(String, String)>,
    /// Where each GPU is on the PCI bus, by index.
    pub places: Places,
    /// What could not be found out, one line each.
    pub notes: Vec<String>,
}

/// Number of GPUs that the kernel driver shows, without opening NVML (microseconds); `None` where it is not loaded.
pub fn count_in_proc() -> Option<u32> {
    let entries = fs::read_dir("/proc/driver/nvidia/gpus").ok()?;
    u32::try_from(entries.filter_map(Result::ok).count()).ok()
}

/// Whether a driver of NVIDIA is there (microseconds). In a container `/proc` may not show it, but the device does.
pub fn has_driver() -> bool {
    count_in_proc().is_some_and(|count| count > 0) || Path::new("/dev/nvidiactl").exists()
}

/// Asks NVML. A host without driver or GPU gives an empty probe.
pub fn probe() -> Probe {
    let mut out = Probe::default();
    let nvml = match open() {
        Ok(nvml) => nvml,
        Err(NvmlError::LibloadingError(_) | NvmlError::DriverNotLoaded) => return out,
        Err(error) => {
            out.notes.push(format!("cannot open NVML: {error}"));
            return out;
        }
    };
    if let Ok(version) = nvml.sys_driver_version() {
        out.versions.push(("driver".to_owned(), version));
    }
    if let Ok(version) = nvml.sys_cuda_driver_version() {
        out.versions.push(("cuda".to_owned(), format!("{}.{}", version / 1000, version % 1000 / 10)));
    }
    for index in 0..nvml.device_count().unwrap_or(0) {
        let read = || -> Result<(GpuInfo, Option<String>), NvmlError> {
            let device = nvml.device_by_index(index)?;
            let info = GpuInfo {
                index,
                uuid: device.uuid()?,
                name: device.name()?,
                // Missing on some integrated and MIG devices; a GPU without it is still a GPU.
                memory_bytes: device.memory_info().map_or(0, |memory| memory.total),
            };
            let place = device.pci_info().ok().and_then(|pci| sysfs_place(&pci.bus_id));
            Ok((info, place))
        };
        match read() {
            Ok((info, place)) => {
                out.gpus.push(info);
                out.places.extend(place.map(|place| (index, place)));
            }
            Err(error) => out.notes.push(format!("GPU {index} is left out: {error}")),
        }
    }
    if let Ok(visible) = env::var("CUDA_VISIBLE_DEVICES") {
        out.gpus = visible_only(out.gpus, &visible);
    }
    out
}

/// What uses the memory of these GPUs now, by index; without those of which NVML does not tell.
pub fn memory(gpus: &[u32]) -> BTreeMap<u32, Memory> {
    let Ok(nvml) = open() else { return BTreeMap::new() };
    let read = |index: u32| -> Result<(u32, Memory), NvmlError> {
        let device = nvml.device_by_index(index)?;
        let mut processes = Some(BTreeMap::new());
        add_processes(&mut processes, device.running_compute_processes().ok());
        // NVML lists the clients of an MPS server apart from it, where the GPU knows MPS.
        let clients = match device.mps_running_compute_processes() {
            Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => Some(Vec::new()),
            list => list.ok(),
        };
        add_processes(&mut processes, clients);
        Ok((index, Memory { used_bytes: device.memory_info()?.used, processes }))
    };
    gpus.iter().filter_map(|index| read(*index).ok()).collect()
}

/// Adds a list; one that is missing, or that lacks a process's memory, makes the sum useless.
fn add_processes(sum: &mut Option<BTreeMap<u32, u64>>, list: Option<Vec<ProcessInfo>>) {
    let mut whole = sum.take().zip(list);
    if let Some((known, list)) = &mut whole {
        for process in list.iter() {
            let UsedGpuMemory::Used(bytes) = process.used_gpu_memory else { return };
            let held = known.entry(process.pid).or_default();
            // In both lists it is the same memory.
            *held = bytes.max(*held);
        }
    }
    *sum = whole.map(|(known, _)| known);
}

fn open() -> Result<Nvml, NvmlError> {
    Nvml::builder().lib_path(OsStr::new(LIBRARY)).init()
}

/// NVML writes the domain with eight digits and in capitals, sysfs with four and small: `0000:3b:00.0`.
fn sysfs_place(bus_id: &str) -> Option<String> {
    let (domain, rest) = bus_id.split_once(':')?;
    let domain = u32::from_str_radix(domain, 16).ok()?;
    Some(format!("{domain:04x}:{}", rest.to_ascii_lowercase()))
}

/// The GPUs that CUDA_VISIBLE_DEVICES leaves: it was set by hand for this daemon, so it is obeyed, never rewritten.
/// As in CUDA, the list ends at the first entry that names no GPU.
fn visible_only(gpus: Vec<GpuInfo>, visible: &str) -> Vec<GpuInfo> {
    let mut kept: Vec<GpuInfo> = Vec::new();
    for entry in visible.split(',').map(str::trim) {
        let found = gpus.iter().find(|gpu| match entry.parse::<u32>() {
            Ok(index) => gpu.index == index,
            Err(_) => !entry.is_empty() && gpu.uuid.starts_with(entry),
        });
        let Some(gpu) = found else { break };
        if !kept.contains(gpu) {
            kept.push(gpu.clone());
        }
    }
    kept.sort_unstable_by_key(|gpu| gpu.index);
    kept
}

/// `count` GPUs that exist because someone says so: where NVML is not there (other makers, tests).
pub fn declared(count: u32) -> Vec<GpuInfo> {
    (0..count)
        .map(|index| GpuInfo { index, uuid: format!("declared-{index}"), name: "declared".to_owned(), memory_bytes: 0 })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_on_the_bus_is_written_as_sysfs_does() {
        assert_eq!(sysfs_place("00000000:3B:00.0").as_deref(), Some("0000:3b:00.0"));
        assert_eq!(sysfs_place("00010001:0A:00.0").as_deref(), Some("10001:0a:00.0"));
        assert_eq!(sysfs_place("nonsense"), None);
    }

    #[test]
    fn a_process_in_two_lists_counts_once_and_one_without_its_memory_spoils_the_sum() {
        let process = |pid, used_gpu_memory| ProcessInfo {
            pid,
            used_gpu_memory,
            gpu_instance_id: None,
            compute_instance_id: None,
        };
        let mut sum = Some(BTreeMap::new());
        add_processes(&mut sum, Some(vec![process(1, UsedGpuMemory::Used(5)), process(2, UsedGpuMemory::Used(7))]));
        add_processes(&mut sum, Some(vec![process(2, UsedGpuMemory::Used(9))]));
        assert_eq!(sum, Some(BTreeMap::from([(1, 5), (2, 9)])));
        let mut spoilt = sum.clone();
        add_processes(&mut spoilt, Some(vec![process(3, UsedGpuMemory::Unavailable)]));
        assert_eq!(spoilt, None);
        add_processes(&mut sum, None);
        assert_eq!(sum, None);
        add_processes(&mut sum, Some(Vec::new()));
        assert_eq!(sum, None, "what is missing stays missing");
    }

    #[test]
    fn visible_devices_are_obeyed_like_cuda_does() {
        let indices =
            |visible| -> Vec<u32> { visible_only(declared(4), visible).iter().map(|gpu| gpu.index).collect() };
        assert_eq!(indices("2,0"), [0, 2]);
        assert_eq!(indices("1,-1,2"), [1]);
        assert_eq!(indices("declared-3"), [3]);
        assert!(indices("").is_empty());
        assert!(indices("9").is_empty());
    }

    #[test]
    fn a_host_without_driver_has_no_gpus_and_nothing_to_say() {
        if count_in_proc().is_none() {
            assert_eq!(probe(), Probe::default());
        }
    }
}
