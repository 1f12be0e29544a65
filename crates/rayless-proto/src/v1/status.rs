//! The state of a cluster: the fields of `rayless status --json` (names are a contract; fields may be added).

use super::{
    control::{NodeEnv, WorkerState},
    link::{LinkReport, LinkSettings, LinkState, LinkTransport},
    rdma::RdmaInventory,
};
use crate::{
    ids::{ClusterId, GroupId, NodeId, PlacementGroupId, Rank, Term, TokenMark},
    resources::Resources,
};
use rkyv::{Archive, Deserialize, Serialize};
use std::collections::BTreeMap;

/// Everything.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct StatusReport {
    /// `cluster.id`
    pub cluster: ClusterId,
    /// `cluster.head`
    pub head: NodeId,
    /// `cluster.term`; 0 without a store
    pub term: Term,
    /// `cluster.heads`: the active one first; empty without a store
    pub heads: Vec<HeadSeat>,
    /// `cluster.protocol`
    pub protocol: u16,
    /// `cluster.uptime_s`, here in milliseconds
    pub uptime_ms: u64,
    /// Handshakes refused since the head started (wrong token, malformed, too many at once).
    pub refused_handshakes: u64,
    /// `cluster.token`, and `has_token` of each node
    pub token: TokenStatus,
    /// `nodes`
    pub nodes: Vec<NodeStatus>,
    /// `groups`
    pub groups: Vec<GroupStatus>,
    /// `placement_groups`
    pub placement_groups: Vec<PlacementGroupStatus>,
    /// `links`
    pub links: Vec<LinkStatus>,
    /// `events`, oldest first
    pub events: Vec<Event>,
}

/// A daemon that is the head, or stands by to be.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct HeadSeat {
    /// Its node.
    pub node: NodeId,
    /// Its node's name.
    pub name: String,
    /// `IP:port` of its daemon.
    pub address: String,
    /// Whether it is the head now.
    pub active: bool,
}

/// The cluster's token as people see it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug, Default)]
pub struct TokenStatus {
    /// Mark of the current one.
    pub mark: Option<TokenMark>,
    /// Whether the one before it is still accepted.
    pub rotating: bool,
    /// Milliseconds until it no longer is, where an overlap was given.
    pub left_ms: Option<u64>,
    /// Living nodes that do not accept what the head accepts, each with its reason where it gave one.
    pub behind: Vec<(NodeId, String)>,
}

/// What the head holds a node for.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeState {
    /// Heard of in time.
    Alive,
    /// Silent for longer than half the limit.
    Suspect,
    /// Silent for longer than the limit, or its connection was lost for good.
    Dead,
    /// Left of its own will.
    Left,
}

impl NodeState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Left => "left",
        }
    }
}

impl WorkerState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Dead => "dead",
        }
    }
}

/// One node.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct NodeStatus {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// `IP:port` of its daemon.
    pub address: String,
    /// Whether it is the head.
    pub is_head: bool,
    /// What the head holds it for.
    pub state: NodeState,
    /// Which life of it.
    pub incarnation: u64,
    /// Milliseconds since it was last heard of; 0 for the head itself.
    pub last_seen_ms: u64,
    /// Last measured round trip in microseconds; 0 before the first and for the head itself.
    pub rtt_us: u64,
    /// All it has.
    pub resources: Resources,
    /// What is free.
    pub available: Resources,
    /// Its GPUs.
    pub gpus: Vec<GpuStatus>,
    /// Component to version.
    pub versions: Vec<(String, String)>,
    /// Interface in use.
    pub interface: String,
    /// Environment that its workers get, with sources.
    pub node_env: Vec<NodeEnv>,
    /// What its user set for links.
    pub links: LinkSettings,
    /// Its RDMA devices, and what is wrong with them.
    pub rdma: RdmaInventory,
}

/// State of a GPU.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum GpuState {
    /// Nothing of ours on it.
    Free,
    /// Some or all of it is held.
    Held,
    /// Given back, but its memory is not free yet.
    Draining,
}

impl GpuState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Held => "held",
            Self::Draining => "draining",
        }
    }
}

/// One GPU.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct GpuStatus {
    /// Index on its node.
    pub index: u32,
    /// UUID.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Total memory in bytes, 0 where unknown.
    pub memory_bytes: u64,
    /// Its state.
    pub state: GpuState,
    /// Groups with a share of it.
    pub held_by: Vec<GroupId>,
}

/// Life of a group.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum GroupState {
    /// Placed; its keepers or workers are starting.
    Starting,
    /// All workers took their first call.
    Running,
    /// Ended by a fault.
    Failed,
    /// Ended in order.
    Stopped,
}

impl GroupState {
    /// As in `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

/// One group.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct GroupStatus {
    /// Its id.
    pub id: GroupId,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: GroupState,
    /// Why it ended; empty otherwise.
    pub cause: String,
    /// Node of its driver.
    pub driver_node: NodeId,
    /// Process of its driver.
    pub driver_pid: u32,
    /// Its workers in ascending rank.
    pub workers: Vec<WorkerStatus>,
}

/// One worker.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct WorkerStatus {
    /// Its rank.
    pub rank: Rank,
    /// Its node.
    pub node: NodeId,
    /// Its process; 0 before its start.
    pub pid: u32,
    /// Its state.
    pub state: WorkerState,
    /// Indices of its GPUs.
    pub gpus: Vec<u32>,
}

/// One placement group.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct PlacementGroupStatus {
    /// Its id.
    pub id: PlacementGroupId,
    /// Its name.
    pub name: String,
    /// Its strategy, in Ray's spelling.
    pub strategy: String,
    /// Resources and node of each bundle.
    pub bundles: Vec<(Resources, NodeId)>,
}

/// One tensor link, as its two ends report it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct LinkStatus {
    /// Its group.
    pub group: GroupId,
    /// Sending rank.
    pub from: Rank,
    /// Receiving rank.
    pub to: Rank,
    /// Which of the links between those two.
    pub channel: u16,
    /// How it is.
    pub state: LinkState,
    /// Why it failed; empty otherwise.
    pub cause: String,
    /// What moves its bytes; `None` before that is settled.
    pub transport: Option<LinkTransport>,
    /// How, where the transport has several ways; see [`LinkReport::mode`].
    pub mode: String,
    /// The sender's RDMA device, else empty. (The receiver's, while only that one has reported.)
    pub device: String,
    /// That device's GID, else empty.
    pub gid: String,
    /// Path MTU in bytes, 0 where it has none.
    pub mtu: u32,
    /// The receiver's RDMA device, else empty.
    pub peer_device: String,
    /// That device's GID, else empty.
    pub peer_gid: String,
    /// Transport and reason of each that was not taken, best first.
    pub rejected: Vec<(LinkTransport, String)>,
    /// Whether its bytes travel within TLS.
    pub encrypted: bool,
    /// Whether payloads carry checksums.
    pub verified: bool,
    /// Messages moved, as last reported.
    pub messages: u64,
    /// Their payload in bytes.
    pub bytes: u64,
}

impl LinkStatus {
    /// A group's links, each made of what its ends report, in the order of ranks and channels.
    pub fn of_group<'a>(group: GroupId, reports: impl IntoIterator<Item = &'a LinkReport>) -> Vec<Self> {
        let mut links: BTreeMap<_, (Option<&LinkReport>, Option<&LinkReport>)> = BTreeMap::new();
        for report in reports {
            let ends = links.entry((report.from, report.to, report.channel)).or_default();
            *(if report.by_sender { &mut ends.0 } else { &mut ends.1 }) = Some(report);
        }
        links
            .into_values()
            .filter_map(|(sender, receiver)| {
                let one = sender.or(receiver)?;
                let other = sender.and(receiver);
                // The worse of both is the truth about the link; of two that failed the sender knows more, for a
                // receiver tells it why it gives up.
                let worst = [other, Some(one)].into_iter().flatten().max_by_key(|report| match report.state {
                    LinkState::Open => 0,
                    LinkState::Opening => 1,
                    LinkState::Closed => 2,
                    LinkState::Failed => 3,
                })?;
                Some(Self {
                    group,
                    from: one.from,
                    to: one.to,
                    channel: one.channel,
                    state: worst.state,
                    cause: worst.cause.clone(),
                    transport: one.transport.or_else(|| other?.transport),
                    // The receiver is who reads the other's memory, and knows why it cannot.
                    mode: receiver.unwrap_or(one).mode.clone(),
                    device: one.device.clone(),
                    gid: one.gid.clone(),
                    mtu: one.mtu,
                    peer_device: receiver.map(|end| end.device.clone()).unwrap_or_default(),
                    peer_gid: receiver.map(|end| end.gid.clone()).unwrap_or_default(),
                    rejected: if one.rejected.is_empty() {
                        other.unwrap_or(one).rejected.clone()
                    } else {
                        one.rejected.clone()
                    },
                    encrypted: one.encrypted,
                    verified: one.verified,
                    messages: other.map_or(one.messages, |other| other.messages.max(one.messages)),
                    bytes: other.map_or(one.bytes, |other| other.bytes.max(one.bytes)),
                })
            })
            .collect()
    }
}

/// Something that happened.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Microseconds since the Unix epoch on the head's clock.
    pub time_us: u64,
    /// For example `node-dead`, `group-failed`, `handshake-refused`.
    pub kind: String,
    /// One line.
    pub cause: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(by_sender: bool, state: LinkState, device: &str) -> LinkReport {
        LinkReport {
            from: 1,
            to: 0,
            channel: 3,
            by_sender,
            state,
            cause: if state == LinkState::Failed { "the peer's process ended".into() } else { String::new() },
            transport: Some(LinkTransport::Rdma),
            mode: if by_sender { "ring".into() } else { "ring: not allowed".into() },
            device: device.into(),
            gid: format!("gid of {device}"),
            mtu: 1024,
            rejected: if by_sender { Vec::new() } else { vec![(LinkTransport::Shm, "two hosts".into())] },
            encrypted: false,
            verified: true,
            messages: if by_sender { 7 } else { 6 },
            bytes: 100,
        }
    }

    #[test]
    fn what_the_two_ends_say_is_one_link() {
        let group = GroupId([1; 8]);
        let (sender, receiver) = (report(true, LinkState::Open, "siw1"), report(false, LinkState::Failed, "siw0"));
        let other = LinkReport { channel: 4, ..receiver.clone() };
        let links = LinkStatus::of_group(group, [&other, &receiver, &sender]);
        assert_eq!(links.iter().map(|link| link.channel).collect::<Vec<_>>(), [3, 4]);
        let both = &links[0];
        assert_eq!(
            (both.device.as_str(), both.peer_device.as_str(), both.peer_gid.as_str()),
            ("siw1", "siw0", "gid of siw0")
        );
        assert_eq!(
            (both.state, both.cause.as_str(), both.messages),
            (LinkState::Failed, "the peer's process ended", 7)
        );
        assert_eq!(both.mode, "ring: not allowed");
        assert_eq!(both.rejected, [(LinkTransport::Shm, "two hosts".to_owned())]);
        assert_eq!((links[1].device.as_str(), links[1].peer_device.as_str()), ("siw0", "siw0"));
    }

    #[test]
    fn a_report_replaces_that_of_its_end_and_a_closed_end_is_forgotten() {
        let mut all = Vec::new();
        assert!(report(true, LinkState::Opening, "").put_into(&mut all, 2));
        assert!(report(true, LinkState::Open, "siw1").put_into(&mut all, 2));
        assert!(report(false, LinkState::Open, "siw0").put_into(&mut all, 2));
        assert!(!LinkReport { channel: 9, ..report(true, LinkState::Open, "siw1") }.put_into(&mut all, 2));
        assert!(!LinkReport { messages: 99, ..report(true, LinkState::Open, "siw1") }.put_into(&mut all, 2));
        assert_eq!((all.len(), all[0].messages), (2, 99));
        assert!(report(true, LinkState::Closed, "siw1").put_into(&mut all, 2));
        assert!(!report(true, LinkState::Closed, "siw1").put_into(&mut all, 2));
        assert_eq!(all.iter().map(|end| end.by_sender).collect::<Vec<_>>(), [false]);
    }
}
