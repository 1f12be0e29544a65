//! Links between workers: what every rank knows of the others, how the two ends of a link agree, and what they report.
//!
//! The sender dials the receiver's node with the TLS server name `<rank>.<group>.link.rayless`; the worker of that rank shakes hands itself.
//! After a [`crate::hello::Hello`] of purpose `Link` from each side, all frames are length-prefixed rkyv:
//!
//! | sender | receiver |
//! |---|---|
//! | [`LinkOpening::Offer`] | [`LinkAnswer`]: `Try` a transport, or `Refused` |
//! | (opens the transport at the place and with the ticket of the `Try`, proves it by a transfer) [`LinkOutcome`] | the next `Try`, or `Settled`, or `Refused` |
//!
//! A `Try` of TCP is followed by connections of the same kind whose opening is [`LinkOpening::Stream`]; after it TLS ends and the link's own
//! bytes follow in clear, or stay within TLS where tensors are encrypted.

use super::rdma::RdmaReach;
use crate::ids::{GroupId, NodeId, Rank};
use rkyv::{Archive, Deserialize, Serialize};

/// Bytes of the largest frame of this conversation.
pub const MAX_LINK_FRAME: usize = 16 << 10;
/// TCP streams of one link.
pub const MAX_LINK_STREAMS: u8 = 16;

/// Characters of each text of a report that a head keeps.
const MAX_REPORT_TEXT: usize = 400;
/// Rejected transports of a report that a head keeps; there are no more of them.
const MAX_REJECTED: usize = 3;

/// What moves a link's bytes. In the order of preference, the best last.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LinkTransport {
    /// TCP streams.
    Tcp,
    /// RDMA writes.
    Rdma,
    /// Memory that two processes of one host share.
    Shm,
}

impl LinkTransport {
    /// As in `--transport` and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Shm => "shm",
        }
    }
}

/// What a node's user set for the links of its workers.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct LinkSettings {
    /// `--transport`, `--allow-tcp`, `--encrypt-tensors`, `--verify-links`
    pub policy: LinkPolicy,
    /// `--rdma-ports`: first and last.
    pub rdma_ports: (u16, u16),
    /// `--rdma-device`: these only; empty: all.
    pub rdma_devices: Vec<String>,
}

/// What a node (`--transport`, `--allow-tcp`, …) or a driver (the variables of the same names) wants of links.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct LinkPolicy {
    /// This transport or none; `None` is `auto`.
    pub only: Option<LinkTransport>,
    /// TCP although there are RDMA devices. `None`: not said, which counts as no.
    pub allow_tcp: Option<bool>,
    /// Tensors leave a host within TLS only.
    pub encrypt: bool,
    /// Payloads carry checksums.
    pub verify: bool,
}

/// A node with ranks of the group.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct LinkNode {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// IP address of its daemon.
    pub address: String,
    /// Port of its daemon.
    pub port: u16,
    /// See [`super::control::NodeInfo::host_id`].
    pub host_id: String,
    /// Whether it has an RDMA device, usable or not.
    pub has_rdma: bool,
}

/// What all ranks of a group know of each other: made by the driver, part of [`super::step::Launch`].
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Default)]
pub struct LinkTable {
    /// Of this group alone, at random: the tickets of its links follow from it.
    pub secret: [u8; 32],
    /// The nodes.
    pub nodes: Vec<LinkNode>,
    /// Place in `nodes` of each rank's node.
    pub ranks: Vec<u32>,
}

impl core::fmt::Debug for LinkTable {
    /// Never shows the secret.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LinkTable").field("nodes", &self.nodes).field("ranks", &self.ranks).finish_non_exhaustive()
    }
}

impl LinkTable {
    /// The node of `rank`.
    pub fn node_of(&self, rank: Rank) -> Option<&LinkNode> {
        self.nodes.get(*self.ranks.get(rank as usize)? as usize)
    }
}

/// A driver's part in the links of its group, see [`super::step::Launch`].
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct LaunchLinks {
    /// All ranks.
    pub table: LinkTable,
    /// What the driver's environment wants.
    pub policy: LinkPolicy,
}

/// What a worker needs for links: from its keeper, on the socket that brings its boot bytes.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct LinkBoot {
    /// Its group.
    pub group: GroupId,
    /// All ranks.
    pub table: LinkTable,
    /// Of node and driver together.
    pub policy: LinkPolicy,
    /// Identity for the handshakes of links.
    pub leaf: super::local::LeafBundle,
    /// Path of its keeper's socket: senders of the same host come through it.
    pub keeper_socket: String,
    /// First and last port for RDMA connections.
    pub rdma_ports: (u16, u16),
    /// The RDMA devices to use (`--rdma-device`); empty: all.
    pub rdma_devices: Vec<String>,
}

/// First frame of the sender on a connection.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum LinkOpening {
    /// A link is wanted.
    Offer(LinkOffer),
    /// A TCP stream of a link on which both ends have agreed; its place is told by the link's own greeting behind this.
    Stream {
        /// The sender.
        from: Rank,
        /// Which link of it.
        channel: u16,
        /// From the `Try`.
        ticket: [u8; 32],
    },
}

/// What the sender wants and can do.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct LinkOffer {
    /// The group.
    pub group: GroupId,
    /// The sender.
    pub from: Rank,
    /// The receiver.
    pub to: Rank,
    /// Which of the links between those two.
    pub channel: u16,
    /// Follows from the group's secret and the four above.
    pub ticket: [u8; 32],
    /// The sender's node, for people.
    pub node_name: String,
    /// Where equal, memory may be shared.
    pub host_id: String,
    /// What it may do.
    pub policy: LinkPolicy,
    /// Its ways out by RDMA, the preferred first.
    pub rdma: Vec<RdmaReach>,
    /// Why RDMA cannot be used at its end; empty where it can.
    pub no_rdma: String,
    /// Bytes of the largest payload.
    pub max_message: u64,
}

/// What the receiver says to an offer, and to the outcome of each attempt.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum LinkAnswer {
    /// Open this transport.
    Try(LinkTry),
    /// It is proven and is the link. All that was not taken, with reasons, best first.
    Settled {
        /// Transport and reason.
        rejected: Vec<(LinkTransport, String)>,
    },
    /// There will be no such link: one line.
    Refused(String),
    /// The receiver has not asked for the link yet. Comes at most once, before all others.
    Waiting,
}

/// An attempt.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct LinkTry {
    /// At random, for this attempt alone: it may be seen on the wire.
    pub ticket: [u8; 32],
    /// Whether payloads carry checksums, as both ends' policies together have it.
    pub verify: bool,
    /// Where.
    pub place: LinkPlace,
}

/// Where a transport is opened.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum LinkPlace {
    /// Through the keeper's socket at this path, with byte `T` and the rank.
    Shm {
        /// The path.
        keeper_socket: String,
    },
    /// By rdma_cm.
    Rdma {
        /// `IP:port`.
        address: String,
        /// The sender's way out.
        from: Box<RdmaReach>,
        /// The receiver's.
        to: Box<RdmaReach>,
    },
    /// As the bootstrap channel was.
    Tcp {
        /// How many streams.
        streams: u8,
        /// Within TLS.
        encrypt: bool,
    },
}

/// How an attempt went at the sender.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum LinkOutcome {
    /// Its transfer arrived, as far as it can tell.
    Proven,
    /// One line of cause.
    Failed(String),
}

/// How a link is.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// One end has asked for it.
    Opening,
    /// It moves tensors.
    Open,
    /// Ended in order.
    Closed,
    /// Could not be opened, or was lost: the report has a cause.
    Failed,
}

impl LinkState {
    /// As in `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Failed => "failed",
        }
    }
}

/// One end's view of one link: worker to keeper, keeper to daemon and driver. A later one of the same end replaces it.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct LinkReport {
    /// The sending rank.
    pub from: Rank,
    /// The receiving rank.
    pub to: Rank,
    /// Which of the links between those two.
    pub channel: u16,
    /// Whether the sending end says so.
    pub by_sender: bool,
    /// How it is.
    pub state: LinkState,
    /// Why it failed; empty otherwise.
    pub cause: String,
    /// What moves its bytes; `None` before that is settled.
    pub transport: Option<LinkTransport>,
    /// How, where the transport has several ways. shm: `cma` (long payloads take one copy), or `ring` (two) with `: ` and why; else empty.
    pub mode: String,
    /// RDMA device, else empty.
    pub device: String,
    /// Its GID, else empty.
    pub gid: String,
    /// Path MTU in bytes, 0 where it has none.
    pub mtu: u32,
    /// Transport and reason of each that was not taken, best first.
    pub rejected: Vec<(LinkTransport, String)>,
    /// Whether its bytes travel within TLS.
    pub encrypted: bool,
    /// Whether payloads carry checksums.
    pub verified: bool,
    /// Messages moved whole so far.
    pub messages: u64,
    /// Their payload in bytes.
    pub bytes: u64,
}

impl LinkReport {
    /// Of one end of a link, with nothing settled yet.
    pub const fn new(from: Rank, to: Rank, channel: u16, by_sender: bool, state: LinkState) -> Self {
        Self {
            from,
            to,
            channel,
            by_sender,
            state,
            cause: String::new(),
            transport: None,
            mode: String::new(),
            device: String::new(),
            gid: String::new(),
            mtu: 0,
            rejected: Vec::new(),
            encrypted: false,
            verified: false,
            messages: 0,
            bytes: 0,
        }
    }

    /// What one end of one link is known by.
    pub const fn key(&self) -> (Rank, Rank, u16, bool) {
        (self.from, self.to, self.channel, self.by_sender)
    }

    /// Cuts its texts to what a table of many links can hold.
    pub fn shorten(&mut self) {
        let cut = |text: &mut String| {
            if let Some((at, _)) = text.char_indices().nth(MAX_REPORT_TEXT) {
                text.truncate(at);
                text.push('…');
            }
        };
        self.rejected.truncate(MAX_REJECTED);
        cut(&mut self.cause);
        cut(&mut self.mode);
        self.rejected.iter_mut().for_each(|(_, reason)| cut(reason));
    }

    /// Puts it in the place of the end's earlier report; that of a closed end only takes the earlier one away. With `room` ends
    /// there no further one is taken. Whether more than counters changed.
    pub fn put_into(self, all: &mut Vec<Self>, room: usize) -> bool {
        let at = all.iter().position(|known| known.key() == self.key());
        match at {
            Some(at) if self.state == LinkState::Closed => {
                all.swap_remove(at);
                true
            }
            Some(at) => {
                let counters = Self { messages: self.messages, bytes: self.bytes, ..all[at].clone() };
                let told = counters != self;
                all[at] = self;
                told
            }
            None if self.state == LinkState::Closed || all.len() >= room => false,
            None => {
                all.push(self);
                true
            }
        }
    }
}
