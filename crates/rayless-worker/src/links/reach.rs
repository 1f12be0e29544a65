//! This worker's ways out by RDMA, looked up when a link is opened: what was wrong at the launch may have been repaired.

use rayless_net::interfaces;
use rayless_proto::v1::rdma::RdmaReach;
use rayless_verbs::{Reach, pci_distance, preflight};
use std::{
    env, fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// The ways out, the preferred first, and why RDMA cannot be used here (empty where it can). `only`: `--rdma-device`.
pub(super) fn reaches(only: &[String], node_address: &str) -> (Vec<RdmaReach>, String) {
    let addresses: Vec<(String, IpAddr)> =
        interfaces::list().unwrap_or_default().into_iter().map(|found| (found.name, found.address)).collect();
    let found = preflight(only, &addresses);
    let obstacle = found.obstacle().unwrap_or_default();
    let gpu = env::var("RAYLESS_GPU_UUIDS").ok().and_then(|uuids| place_of_gpu(uuids.split(',').next()?));
    let place = |way: &Reach| found.devices.iter().find(|device| device.name == way.device)?.pci_path.clone();
    let mut ways = found.reaches.clone();
    if only.is_empty() {
        // Near the rank's GPU, else the network that the cluster is on.
        ways.sort_by_key(|way| {
            let steps = gpu.as_ref().and_then(|gpu| pci_distance(&place(way)?, gpu));
            (steps.unwrap_or(usize::MAX), way.address.to_string() != node_address, way.device.clone())
        });
    }
    (ways.into_iter().map(told).collect(), obstacle)
}

fn told(way: Reach) -> RdmaReach {
    RdmaReach {
        device: way.device,
        protocol: way.protocol.name().to_owned(),
        interface: way.interface,
        address: way.address.to_string(),
        mtu: way.mtu,
        gid: way.gid,
    }
}

/// Where a GPU of NVIDIA is in the PCIe tree.
fn place_of_gpu(uuid: &str) -> Option<PathBuf> {
    let gpus = fs::read_dir("/proc/driver/nvidia/gpus").ok()?;
    let place = gpus.flatten().find(|entry| {
        let about = fs::read_to_string(entry.path().join("information")).unwrap_or_default();
        about.lines().any(|line| line.strip_prefix("GPU UUID:").is_some_and(|found| found.trim() == uuid))
    })?;
    fs::canonicalize(Path::new("/sys/bus/pci/devices").join(place.file_name())).ok()
}
