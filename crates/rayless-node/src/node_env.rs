//! The environment that every worker of this node gets, from the one address chosen at join (promise 8).
//!
//! A value set by hand in the daemon's environment wins; each carries where it came from, for `rayless status --env`.

use rayless_proto::v1::control::NodeEnv;
use std::{
    fs,
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
};

/// Set by hand on a node, variables with these prefixes are passed on as they are.
const PASSED_ON: &[&str] = &["NCCL_", "GLOO_", "TP_SOCKET_", "CUDA_DEVICE_ORDER"];

/// Variables of this node. `hand_set` is the daemon's own environment, `has_cuda` tells whether a driver of NVIDIA is there.
pub fn node_env(
    address: IpAddr,
    interface: &str,
    has_cuda: bool,
    hand_set: impl Iterator<Item = (String, String)>,
) -> Vec<NodeEnv> {
    derived(address, interface, has_cuda, hand_set, Path::new("/sys/class/infiniband"))
}

fn derived(
    address: IpAddr,
    interface: &str,
    has_cuda: bool,
    hand_set: impl Iterator<Item = (String, String)>,
    infiniband: &Path,
) -> Vec<NodeEnv> {
    let mut all: Vec<NodeEnv> = hand_set
        .filter(|(name, _)| name == "VLLM_HOST_IP" || PASSED_ON.iter().any(|prefix| name.starts_with(prefix)))
        // Images say so which NCCL they carry; it sets nothing.
        .filter(|(name, _)| name != "NCCL_VERSION")
        .map(|(name, value)| NodeEnv { name, value, source: "set by hand on this node".to_owned() })
        .collect();
    let mut offer = |name: &str, value: String, source: String| {
        if !all.iter().any(|known| known.name == name) {
            all.push(NodeEnv { name: name.to_owned(), value, source });
        }
    };
    offer("VLLM_HOST_IP", address.to_string(), "address chosen at join".to_owned());
    if has_cuda {
        // NVML, by which GPUs are given out, counts so; CUDA by itself would put the fastest first.
        offer("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned(), "GPUs are numbered as NVML does".to_owned());
    }
    if !interface.is_empty() {
        let source = format!("interface of {address}");
        offer("GLOO_SOCKET_IFNAME", interface.to_owned(), source.clone());
        offer("TP_SOCKET_IFNAME", interface.to_owned(), source.clone());
        // NCCL matches prefixes: plain `eth1` would also take `eth10`.
        offer("NCCL_SOCKET_IFNAME", format!("={interface}"), source);
        if let Some(rdma) = only_rdma_device(infiniband, interface, address) {
            let source = format!("the only RDMA device, on {interface}");
            offer("NCCL_IB_HCA", format!("={}:{}", rdma.device, rdma.port), source.clone());
            if let Some(gid) = rdma.gid_index {
                offer("NCCL_IB_GID_INDEX", gid.to_string(), source);
            }
        }
    }
    all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    all
}

#[derive(Debug, PartialEq, Eq)]
struct RdmaDevice {
    device: String,
    port: u32,
    gid_index: Option<u32>,
}

/// The RDMA device behind `interface`, where it is the host's only one. Where there are several (a rail per GPU), naming
/// one would take the others from NCCL, so nothing is said.
fn only_rdma_device(root: &Path, interface: &str, address: IpAddr) -> Option<RdmaDevice> {
    let mut devices: Vec<PathBuf> = fs::read_dir(root).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let device = devices.pop().filter(|_| devices.is_empty())?;
    let mut ports: Vec<PathBuf> =
        fs::read_dir(device.join("ports")).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    ports.sort_unstable();
    ports.into_iter().find_map(|port| {
        let on_interface = |index: &str| {
            fs::read_to_string(port.join("gid_attrs/ndevs").join(index)).is_ok_and(|name| name.trim() == interface)
        };
        let mut indices: Vec<u32> = fs::read_dir(port.join("gids"))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|index: &u32| on_interface(&index.to_string()))
            .collect();
        indices.sort_unstable();
        if indices.is_empty() {
            return None;
        }
        let ours = indices.iter().copied().filter(|index| {
            fs::read_to_string(port.join("gids").join(index.to_string())).is_ok_and(|gid| gid_is(&gid, address))
        });
        // The same address stands there as RoCE v1 and v2; v1 does not cross routers.
        let is_v1 = |index: &u32| {
            fs::read_to_string(port.join("gid_attrs/types").join(index.to_string()))
                .is_ok_and(|kind| kind.contains("v1"))
        };
        Some(RdmaDevice {
            device: device.file_name()?.to_str()?.to_owned(),
            port: port.file_name()?.to_str()?.parse().ok()?,
            gid_index: ours.min_by_key(|index| (is_v1(index), *index)),
        })
    })
}

fn gid_is(gid: &str, address: IpAddr) -> bool {
    let Ok(gid) = gid.trim().parse::<Ipv6Addr>() else { return false };
    match address {
        IpAddr::V4(v4) => gid.to_ipv4_mapped() == Some(v4),
        IpAddr::V6(v6) => gid == v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value<'a>(all: &'a [NodeEnv], name: &str) -> Option<&'a str> {
        all.iter().find(|env| env.name == name).map(|env| env.value.as_str())
    }

    fn rdma_device(root: &Path, name: &str, interface: &str) {
        let port = root.join(name).join("ports/1");
        for dir in ["gids", "gid_attrs/ndevs", "gid_attrs/types"] {
            fs::create_dir_all(port.join(dir)).unwrap();
        }
        let gids = [
            ("0", "fe80:0000:0000:0000:0000:0000:0000:0001", "IB/RoCE v1"),
            ("1", "0000:0000:0000:0000:0000:ffff:0a00:0001", "IB/RoCE v1"),
            ("2", "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2"),
        ];
        for (index, gid, kind) in gids {
            fs::write(port.join("gids").join(index), gid).unwrap();
            fs::write(port.join("gid_attrs/types").join(index), kind).unwrap();
            fs::write(port.join("gid_attrs/ndevs").join(index), format!("{interface}\n")).unwrap();
        }
    }

    #[test]
    fn all_names_follow_from_the_address_and_a_hand_set_one_wins() {
        let root = tempfile::tempdir().unwrap();
        let hand = [
            ("NCCL_VERSION", "2.28"),
            ("NCCL_SOCKET_IFNAME", "bond0"),
            ("NCCL_DEBUG", "INFO"),
            ("HOME", "/x"),
            ("RAYLESS_TOKEN", "secret"),
        ];
        let hand = hand.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let all = derived("10.0.0.1".parse().unwrap(), "eth0", true, hand.into_iter(), root.path());
        assert_eq!(value(&all, "VLLM_HOST_IP"), Some("10.0.0.1"));
        assert_eq!(value(&all, "GLOO_SOCKET_IFNAME"), Some("eth0"));
        assert_eq!(value(&all, "TP_SOCKET_IFNAME"), Some("eth0"));
        assert_eq!(value(&all, "NCCL_SOCKET_IFNAME"), Some("bond0"));
        assert_eq!(value(&all, "NCCL_DEBUG"), Some("INFO"));
        assert_eq!(value(&all, "NCCL_IB_HCA"), None);
        assert_eq!(value(&all, "CUDA_DEVICE_ORDER"), Some("PCI_BUS_ID"));
        assert_eq!(value(&all, "NCCL_VERSION"), None);
        assert_eq!(value(&all, "RAYLESS_TOKEN"), None);
        let by_hand = all.iter().find(|env| env.name == "NCCL_SOCKET_IFNAME").unwrap();
        assert_eq!(by_hand.source, "set by hand on this node");
    }

    #[test]
    fn the_only_rdma_device_is_named_with_its_gid() {
        let root = tempfile::tempdir().unwrap();
        rdma_device(root.path(), "erdma_0", "eth0");
        let all = derived("10.0.0.1".parse().unwrap(), "eth0", false, std::iter::empty(), root.path());
        assert_eq!(value(&all, "NCCL_IB_HCA"), Some("=erdma_0:1"));
        assert_eq!(value(&all, "NCCL_IB_GID_INDEX"), Some("2"));
        let other = derived("10.0.0.1".parse().unwrap(), "eth1", false, std::iter::empty(), root.path());
        assert_eq!(value(&other, "NCCL_IB_HCA"), None);
        assert_eq!(value(&other, "CUDA_DEVICE_ORDER"), None);
    }

    #[test]
    fn of_several_rails_none_is_named() {
        let root = tempfile::tempdir().unwrap();
        rdma_device(root.path(), "mlx5_0", "eth0");
        rdma_device(root.path(), "mlx5_1", "eth1");
        let all = derived("10.0.0.1".parse().unwrap(), "eth0", false, std::iter::empty(), root.path());
        assert_eq!(value(&all, "NCCL_IB_HCA"), None);
    }
}
