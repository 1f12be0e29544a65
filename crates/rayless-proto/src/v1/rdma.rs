//! RDMA on one node: what `status` shows of it, and what one end of a link tells the other.

use rkyv::{Archive, Deserialize, Serialize};

/// What a node has for RDMA, and what keeps it from working.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct RdmaInventory {
    /// All devices that the kernel shows.
    pub devices: Vec<RdmaDevice>,
    /// Empty: nothing speaks against RDMA there.
    pub findings: Vec<RdmaFinding>,
}

impl RdmaInventory {
    /// Why RDMA cannot be used there, as one line; `None` where it can.
    pub fn obstacle(&self) -> Option<String> {
        let fatal: Vec<&str> = self.findings.iter().filter(|f| f.is_fatal).map(|f| f.what.as_str()).collect();
        (!fatal.is_empty()).then(|| fatal.join("; "))
    }
}

/// An RDMA device.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RdmaDevice {
    /// As in /sys/class/infiniband.
    pub name: String,
    /// `infiniband`, `roce`, `iwarp`, `other`.
    pub protocol: String,
    /// `standard` or `compat` for Alibaba's eRDMA, else empty.
    pub mode: String,
    /// The NUMA node that it hangs on, where the machine says.
    pub numa: Option<u32>,
    /// Steps in the PCIe tree to each GPU by its index; `None`: the way leads through the processor.
    pub gpu_steps: Vec<(u32, Option<u32>)>,
    /// Its ports.
    pub ports: Vec<RdmaPort>,
}

/// A port of an RDMA device.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RdmaPort {
    /// From 1.
    pub number: u32,
    /// `ACTIVE`, `DOWN`, ….
    pub state: String,
    /// As the kernel words it: `100 Gb/sec (4X EDR)`.
    pub rate: String,
    /// The network interface behind it; empty where there is none.
    pub interface: String,
    /// The interface's IP address, by which rdma_cm finds the device; empty where it has none.
    pub address: String,
    /// The interface's MTU in bytes, 0 where unknown.
    pub mtu: u32,
    /// Its addresses, the first [`MAX_GIDS`] of them.
    pub gids: Vec<RdmaGid>,
}

/// GIDs of a port that are told; some devices have hundreds.
pub const MAX_GIDS: usize = 8;

/// An address of a port.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RdmaGid {
    /// Its place in the port's table.
    pub index: u32,
    /// As the kernel writes it.
    pub gid: String,
    /// `IB/RoCE v1`, `RoCE v2`, …; empty where the kernel does not say.
    pub kind: String,
}

/// Something that keeps RDMA from working on a node, or may.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RdmaFinding {
    /// One line, with what to do about it.
    pub what: String,
    /// Whether RDMA cannot work with it.
    pub is_fatal: bool,
}

/// A way out of a host by RDMA: what an end of a link can be reached by.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RdmaReach {
    /// The device.
    pub device: String,
    /// As in [`RdmaDevice::protocol`]; only equal ones can talk.
    pub protocol: String,
    /// The network interface behind it.
    pub interface: String,
    /// Its IP address, for rdma_cm.
    pub address: String,
    /// Its MTU in bytes, 0 where unknown.
    pub mtu: u32,
    /// The GID that goes with the address; empty where there is none.
    pub gid: String,
}
