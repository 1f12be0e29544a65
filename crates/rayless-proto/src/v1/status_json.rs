//! `rayless status --json`, the same for the command, the status page and Python. Its names are a contract:
//! fields may be added, never renamed.

use super::{
    link::{LinkSettings, LinkTransport},
    rdma::{RdmaInventory, RdmaPort},
    status::{GroupStatus, LinkStatus, NodeState, NodeStatus, PlacementGroupStatus, StatusReport},
};
use crate::resources::{Quantity, Resources};
use serde_json::{Map, Value, json};

impl StatusReport {
    /// The report as `rayless status --json` shows it. Times are in the unit that each name ends in, `time` of an
    /// event in seconds since the Unix epoch.
    pub fn to_json(&self) -> Value {
        json!({
            "cluster": {
                "id": self.cluster.to_string(),
                "head": self.head.to_string(),
                "term": self.term.0,
                "heads": self.heads.iter().map(|head| json!({
                    "node": head.node.to_string(),
                    "name": head.name,
                    "address": head.address,
                    "state": if head.active { "active" } else { "standby" },
                })).collect::<Vec<_>>(),
                "protocol": self.protocol,
                "uptime_s": self.uptime_ms as f64 / 1e3,
                "refused_handshakes": self.refused_handshakes,
                "token": {
                    "mark": self.token.mark.map(|mark| mark.to_string()),
                    "rotating": self.token.rotating,
                    "ends_in_s": self.token.left_ms.map(|left| left as f64 / 1e3),
                },
            },
            "nodes": self.nodes.iter().map(|one| node(one, self)).collect::<Vec<_>>(),
            "groups": self.groups.iter().map(group).collect::<Vec<_>>(),
            "placement_groups": self.placement_groups.iter().map(placement_group).collect::<Vec<_>>(),
            "links": self.links.iter().map(LinkStatus::to_json).collect::<Vec<_>>(),
            "events": self.events.iter().map(|event| json!({
                "time": event.time_us as f64 / 1e6,
                "kind": event.kind,
                "cause": event.cause,
            })).collect::<Vec<_>>(),
        })
    }
}

impl Resources {
    /// Name to number; whole quantities are whole numbers.
    pub fn to_json(&self) -> Value {
        Value::Object(self.iter().map(|(name, quantity)| (name.to_owned(), quantity.to_json())).collect())
    }
}

impl Quantity {
    /// A whole number where it is one.
    pub fn to_json(self) -> Value {
        if self.is_whole() { json!(self.raw() / Self::SCALE) } else { json!(self.as_f64()) }
    }
}

fn node(node: &NodeStatus, report: &StatusReport) -> Value {
    let is_gone = matches!(node.state, NodeState::Dead | NodeState::Left);
    let behind = report.token.behind.iter().any(|(id, _)| *id == node.id);
    json!({
        "id": node.id.to_string(),
        "name": node.name,
        "address": node.address,
        "role": if node.is_head { "head" } else { "worker" },
        "state": node.state.name(),
        "incarnation": node.incarnation,
        "last_seen_ms": node.last_seen_ms,
        "rtt_us": node.rtt_us,
        "resources": node.resources.to_json(),
        "available": node.available.to_json(),
        "gpus": node.gpus.iter().map(|gpu| json!({
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "memory_bytes": gpu.memory_bytes,
            "state": gpu.state.name(),
            "held_by": gpu.held_by.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "versions": node.versions.iter().map(|(name, version)| (name.clone(), json!(version))).collect::<Map<_, _>>(),
        "interface": node.interface,
        "has_token": if is_gone { Value::Null } else { json!(!behind) },
        "env": node.node_env.iter().map(|env| json!({
            "name": env.name,
            "value": env.value,
            "source": env.source,
        })).collect::<Vec<_>>(),
        "links": link_settings(&node.links),
        "rdma": rdma(&node.rdma),
    })
}

fn group(group: &GroupStatus) -> Value {
    json!({
        "id": group.id.to_string(),
        "name": group.name,
        "state": group.state.name(),
        "cause": group.cause,
        "driver": { "node": group.driver_node.to_string(), "pid": group.driver_pid },
        "workers": group.workers.iter().map(|worker| json!({
            "rank": worker.rank,
            "node": worker.node.to_string(),
            "pid": worker.pid,
            "state": worker.state.name(),
            "gpus": worker.gpus,
        })).collect::<Vec<_>>(),
    })
}

fn placement_group(group: &PlacementGroupStatus) -> Value {
    json!({
        "id": group.id.to_string(),
        "name": group.name,
        "strategy": group.strategy,
        "bundles": group.bundles.iter().map(|(resources, node)| json!({
            "resources": resources.to_json(),
            "node": node.to_string(),
        })).collect::<Vec<_>>(),
    })
}

impl LinkStatus {
    /// An entry of `links`.
    pub fn to_json(&self) -> Value {
        json!({
            "group": self.group.to_string(),
            "from": self.from,
            "to": self.to,
            "channel": self.channel,
            "state": self.state.name(),
            "cause": self.cause,
            "transport": self.transport.map_or("", LinkTransport::name),
            "mode": self.mode,
            "device": self.device,
            "gid": self.gid,
            "mtu": self.mtu,
            "peer_device": self.peer_device,
            "peer_gid": self.peer_gid,
            "rejected": self.rejected.iter().map(|(transport, reason)| json!({
                "transport": transport.name(),
                "reason": reason,
            })).collect::<Vec<_>>(),
            "encrypted": self.encrypted,
            "verified": self.verified,
            "messages": self.messages,
            "bytes": self.bytes,
        })
    }
}

fn link_settings(links: &LinkSettings) -> Value {
    json!({
        "transport": links.policy.only.map_or("auto", LinkTransport::name),
        "allow_tcp": links.policy.allow_tcp,
        "encrypt_tensors": links.policy.encrypt,
        "verify_links": links.policy.verify,
        "rdma_ports": [links.rdma_ports.0, links.rdma_ports.1],
        "rdma_devices": links.rdma_devices,
    })
}

fn rdma(rdma: &RdmaInventory) -> Value {
    let port = |port: &RdmaPort| {
        json!({
            "number": port.number,
            "state": port.state,
            "rate": port.rate,
            "interface": port.interface,
            "address": port.address,
            "mtu": port.mtu,
            "gids": port.gids.iter().map(|gid| json!({
                "index": gid.index,
                "gid": gid.gid,
                "type": gid.kind,
            })).collect::<Vec<_>>(),
        })
    };
    json!({
        "devices": rdma.devices.iter().map(|device| json!({
            "name": device.name,
            "protocol": device.protocol,
            "mode": device.mode,
            "numa": device.numa,
            "gpus": device.gpu_steps.iter().map(|(index, steps)| json!({ "index": index, "steps": steps })).collect::<Vec<_>>(),
            "ports": device.ports.iter().map(port).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "findings": rdma.findings.iter().map(|finding| json!({
            "what": finding.what,
            "fatal": finding.is_fatal,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{
        control::WorkerState,
        status::{Event, GpuState, GpuStatus, GroupState, HeadSeat, NodeState, TokenStatus, WorkerStatus},
    };
    use super::*;
    use crate::{
        ids::{ClusterId, GroupId, NodeId, Term, TokenMark},
        resources::{CPU, GPU},
    };

    #[test]
    fn has_the_fields_of_the_contract() {
        let id = NodeId([7; 32]);
        let report = StatusReport {
            cluster: ClusterId([1; 16]),
            head: id,
            term: Term(4),
            heads: vec![HeadSeat { node: id, name: "a".into(), address: "10.0.0.1:6379".into(), active: true }],
            protocol: 1,
            uptime_ms: 1500,
            refused_handshakes: 2,
            token: TokenStatus {
                mark: Some(TokenMark([0xab; 8])),
                rotating: true,
                left_ms: Some(1500),
                behind: vec![(id, "its disk is full".into())],
            },
            nodes: vec![NodeStatus {
                id,
                name: "a".into(),
                address: "10.0.0.1:6379".into(),
                is_head: true,
                state: NodeState::Alive,
                incarnation: 3,
                last_seen_ms: 0,
                rtt_us: 0,
                resources: Resources::new().with(CPU, Quantity::whole(2)).with(GPU, Quantity::from_f64(0.5).unwrap()),
                available: Resources::new(),
                gpus: vec![GpuStatus {
                    index: 0,
                    uuid: "declared-0".into(),
                    name: "declared".into(),
                    memory_bytes: 0,
                    state: GpuState::Held,
                    held_by: vec![GroupId([2; 8])],
                }],
                versions: vec![("rayless".into(), "0.1.0".into())],
                interface: "eth0".into(),
                node_env: Vec::new(),
                links: LinkSettings::default(),
                rdma: RdmaInventory::default(),
            }],
            groups: vec![GroupStatus {
                id: GroupId([2; 8]),
                name: "g".into(),
                state: GroupState::Running,
                cause: String::new(),
                driver_node: id,
                driver_pid: 9,
                workers: vec![WorkerStatus { rank: 0, node: id, pid: 10, state: WorkerState::Busy, gpus: vec![0] }],
            }],
            placement_groups: Vec::new(),
            links: Vec::new(),
            events: vec![Event { time_us: 1_500_000, kind: "node-joined".into(), cause: "a".into() }],
        };
        let shown = report.to_json();
        assert_eq!(shown["cluster"]["uptime_s"], 1.5);
        assert_eq!((&shown["cluster"]["term"], &shown["cluster"]["heads"][0]["state"]), (&json!(4), &json!("active")));
        assert_eq!(
            shown["cluster"]["token"],
            json!({ "mark": "abababababababab", "rotating": true, "ends_in_s": 1.5 })
        );
        assert_eq!(shown["nodes"][0]["has_token"], false);
        assert_eq!(shown["nodes"][0]["role"], "head");
        assert_eq!(shown["nodes"][0]["resources"], json!({ "CPU": 2, "GPU": 0.5 }));
        assert_eq!(shown["nodes"][0]["gpus"][0]["state"], "held");
        assert_eq!(shown["nodes"][0]["versions"]["rayless"], "0.1.0");
        assert_eq!(shown["groups"][0]["workers"][0]["state"], "busy");
        assert_eq!(shown["events"][0]["time"], 1.5);
        for name in ["cluster", "nodes", "groups", "placement_groups", "links", "events"] {
            assert!(!shown[name].is_null(), "{name}");
        }
    }
}
