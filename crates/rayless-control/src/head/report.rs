//! `status`, and the audit of the books.

use super::{
    Head,
    model::{Keeper, Node, Part},
};
use crate::pool::Pool;
use rayless_proto::{
    PROTOCOL_MAX,
    ids::{GroupId, NodeId},
    resources::{Quantity, Resources},
    v1::{
        control::{GpuInfo, WorkerState},
        status::{
            GpuState, GpuStatus, GroupStatus, LinkStatus, NodeState, NodeStatus, PlacementGroupStatus, StatusReport,
            WorkerStatus,
        },
    },
};
use std::{collections::BTreeMap, time::Instant};

impl Head {
    /// The state of the cluster as people see it: living nodes first, then by name; groups that are live, then the last ended.
    pub fn status(&self, now: Instant) -> StatusReport {
        let mut nodes: Vec<_> = self.nodes.iter().collect();
        nodes.sort_by(|a, b| (a.1.is_gone(), &a.1.info.name, a.0).cmp(&(b.1.is_gone(), &b.1.info.name, b.0)));
        let holders = self.holders_of_gpus();
        let mut groups: Vec<_> = self.groups.iter().collect();
        groups.sort_by_key(|(id, g)| (g.phase.is_over(), g.ended, **id));
        StatusReport {
            cluster: self.config.cluster,
            head: self.config.node,
            term: self.config.term,
            heads: self.config.heads.clone(),
            protocol: PROTOCOL_MAX,
            uptime_ms: millis(self.started, now),
            refused_handshakes: self.refused_handshakes,
            token: self.token_status(now),
            nodes: nodes.into_iter().map(|(id, node)| self.node_status(*id, node, &holders, now)).collect(),
            groups: groups.into_iter().map(|(id, group)| group_status(*id, group)).collect(),
            placement_groups: self
                .placement_groups
                .iter()
                .map(|(id, group)| PlacementGroupStatus {
                    id: *id,
                    name: group.name.clone(),
                    strategy: group.strategy.name().to_owned(),
                    bundles: group.bundles.values().map(|b| (b.allocation.resources.clone(), b.node)).collect(),
                })
                .collect(),
            links: self
                .groups
                .iter()
                .flat_map(|(id, group)| LinkStatus::of_group(*id, group.parts.values().flat_map(|part| &part.links)))
                .collect(),
            events: self.events.iter().cloned().collect(),
        }
    }

    fn holders_of_gpus(&self) -> BTreeMap<(NodeId, u32), Vec<GroupId>> {
        let mut holders: BTreeMap<(NodeId, u32), Vec<GroupId>> = BTreeMap::new();
        for (id, group) in &self.groups {
            for (node, part) in group.parts.iter().filter(|(_, p)| p.keeper != Keeper::Gone) {
                for share in part.ranks.iter().flat_map(|r| &r.allocation.gpus) {
                    let of_gpu = holders.entry((*node, share.index)).or_default();
                    if of_gpu.last() != Some(id) {
                        of_gpu.push(*id);
                    }
                }
            }
        }
        holders
    }

    fn node_status(
        &self,
        id: NodeId,
        node: &Node,
        holders: &BTreeMap<(NodeId, u32), Vec<GroupId>>,
        now: Instant,
    ) -> NodeStatus {
        let is_head = id == self.config.node;
        let gpu = |info: &GpuInfo| {
            let held_by = holders.get(&(id, info.index)).cloned().unwrap_or_default();
            let device = node.pool.devices().iter().find(|d| d.index == info.index);
            let state = match device {
                Some(d) if d.free < d.total => GpuState::Held,
                Some(d) if d.draining => GpuState::Draining,
                _ if held_by.is_empty() => GpuState::Free,
                _ => GpuState::Held,
            };
            GpuStatus {
                index: info.index,
                uuid: info.uuid.clone(),
                name: info.name.clone(),
                memory_bytes: info.memory_bytes,
                state,
                held_by,
            }
        };
        NodeStatus {
            id,
            name: node.info.name.clone(),
            address: socket_address(&node.info.address, node.info.port),
            is_head,
            state: node.state,
            incarnation: node.incarnation.0,
            last_seen_ms: if is_head { 0 } else { node.heard.map_or(0, |at| millis(at, now)) },
            rtt_us: if is_head { 0 } else { node.rtt_us },
            resources: node.pool.total().clone(),
            available: if node.state == NodeState::Alive { node.pool.available() } else { Resources::new() },
            gpus: node.info.gpus.iter().map(gpu).collect(),
            versions: node.info.versions.clone(),
            interface: node.info.interface.clone(),
            node_env: node.info.node_env.clone(),
            links: node.info.links.clone(),
            rdma: node.info.rdma.clone(),
        }
    }

    /// Recounts every book (invariants R1 to R3 of the module): for tests, and for a daemon that wants to be sure.
    ///
    /// # Errors
    /// The first contradiction, as a line for engineers.
    pub fn audit(&self) -> Result<(), String> {
        for (id, node) in &self.nodes {
            let mut fresh = node.pool.emptied();
            for device in node.pool.devices() {
                fresh.set_draining(device.index, device.draining);
            }
            for (pg, group) in &self.placement_groups {
                for bundle in group.bundles.values().filter(|b| b.node == *id) {
                    if !fresh.take_exactly(&bundle.allocation) {
                        return Err(format!("{}: given twice: a bundle of {pg:?}", node.info.name));
                    }
                }
            }
            for (group_id, group) in &self.groups {
                let Some(part) = group.parts.get(id) else { continue };
                if part.keeper == Keeper::Gone && part.counted_ranks().next().is_some() {
                    return Err(format!("{}: a part of {group_id:?} that is gone still counts", node.info.name));
                }
                for rank in part.counted_ranks().filter(|r| r.placement_group.is_none()) {
                    if !fresh.take_exactly(&rank.allocation) {
                        return Err(format!("{}: given twice: rank {} of {group_id:?}", node.info.name, rank.rank));
                    }
                }
            }
            same_pool(&node.info.name, &fresh, &node.pool)?;
        }
        self.audit_bundles()?;
        for (id, group) in &self.groups {
            let kept = group.parts.values().any(|p| !matches!(p.keeper, Keeper::Stopping | Keeper::Gone));
            if group.phase.is_over() && kept {
                return Err(format!("{id:?} is over, but a part of it was not told to stop"));
            }
            if group.phase.is_live() && !group.cause.is_empty() {
                return Err(format!("{id:?} is live, but has a cause of death"));
            }
        }
        Ok(())
    }

    fn audit_bundles(&self) -> Result<(), String> {
        let mut fresh: BTreeMap<_, Pool> = BTreeMap::new();
        for (pg, group) in &self.placement_groups {
            for (index, bundle) in &group.bundles {
                fresh.insert((*pg, *index), Pool::of_allocation(&bundle.allocation));
            }
        }
        for (id, group) in &self.groups {
            for rank in group.parts.values().flat_map(Part::counted_ranks) {
                let Some(from) = rank.placement_group else { continue };
                if !fresh.get_mut(&from).is_some_and(|pool| pool.take_exactly(&rank.allocation)) {
                    return Err(format!("carved twice, or out of nothing: rank {} of {id:?} from {from:?}", rank.rank));
                }
            }
        }
        for (pg, group) in &self.placement_groups {
            for (index, bundle) in &group.bundles {
                if let Some(fresh) = fresh.get(&(*pg, *index)) {
                    same_pool(&group.name, fresh, &bundle.pool)?;
                }
            }
        }
        Ok(())
    }
}

fn same_pool(name: &str, counted: &Pool, kept: &Pool) -> Result<(), String> {
    if counted == kept {
        return Ok(());
    }
    let free = |p: &Pool| p.devices().iter().fold(Quantity::ZERO, |sum, d| sum.plus(d.free));
    Err(format!(
        "{name}: the books say {:?} free ({} of GPUs), a recount {:?} ({})",
        kept.free(),
        free(kept),
        counted.free(),
        free(counted)
    ))
}

fn group_status(id: GroupId, group: &super::Group) -> GroupStatus {
    let mut workers: Vec<WorkerStatus> = Vec::new();
    for (node, part) in &group.parts {
        for (at, rank) in part.ranks.iter().enumerate() {
            workers.push(WorkerStatus {
                rank: rank.rank,
                node: *node,
                pid: part.pids.get(at).copied().unwrap_or(0),
                state: part.states.get(at).copied().unwrap_or(WorkerState::Dead),
                gpus: rank.allocation.gpus.iter().map(|g| g.index).collect(),
            });
        }
    }
    workers.sort_by_key(|w| w.rank);
    GroupStatus {
        id,
        name: group.name.clone(),
        state: group.phase.shown(),
        cause: group.cause.clone(),
        driver_node: group.driver_node,
        driver_pid: group.driver_pid,
        workers,
    }
}

fn millis(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_millis()).unwrap_or(u64::MAX)
}

/// `IP:port`, with brackets for IPv6.
fn socket_address(ip: &str, port: u16) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}
