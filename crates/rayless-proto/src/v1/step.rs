//! A driver and a keeper: launch, calls, replies, death.
//!
//! Every frame starts with a fixed header, so that the hot path decodes nothing. After the header come
//! `length` bytes. All integers are little endian:
//!
//! ```text
//! 0   4  length of what follows the header
//! 4   1  kind
//! 5   1  flags: bit 0 LAST (last fragment of its call or reply), bit 1 ERROR (reply: the method raised; log: from stderr)
//! 6   2  reserved, zero
//! 8   4  rank (reply, log) or 0
//! 12  4  zero, or for the first fragment of a call the number of asked ranks that follow as u32s before the payload
//! 16  8  call id (call, reply) or 0
//! ```
//!
//! On TLS sessions the frozen [`crate::hello::Hello`] of each side comes first, framed by a u32 length.
//! A local session is the same conversation over a Unix socket; there the keeper's `Launched` carries the descriptors of the
//! ring and of the collector's eventfd (SCM_RIGHTS), and calls and replies go through the ring instead of frames.

use super::{
    control::WorkerState,
    link::{LaunchLinks, LinkReport},
};
use crate::ids::{CallId, Rank};
use rkyv::{Archive, Deserialize, Serialize};

/// Bytes of a header.
pub const HEADER: usize = 24;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Driver to keeper: rkyv [`Launch`].
    Launch = 1,
    /// Driver to keeper: a fragment of a call.
    Call = 2,
    /// Keeper to driver: a fragment of a reply.
    Reply = 3,
    /// Keeper to driver: rkyv [`KeeperEvent`].
    Event = 4,
    /// Either way, each half second when nothing else was sent.
    Ping = 5,
    /// Driver to keeper: kill the workers and end; the payload is the cause, empty for an orderly stop.
    Stop = 6,
    /// Keeper to driver: a line of a rank's output.
    Log = 7,
    /// Driver to keeper: rkyv [`Look`]. Answered with [`KeeperEvent::Looked`].
    Look = 8,
}

/// Last fragment of its call or reply.
pub const FLAG_LAST: u8 = 1;
/// The method raised: the payload is the pickled exception.
pub const FLAG_ERROR: u8 = 2;

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes after the header.
    pub length: u32,
    /// What it is.
    pub kind: Kind,
    /// `FLAG_*`.
    pub flags: u8,
    /// Rank of a reply or log line.
    pub rank: Rank,
    /// Asked ranks before the payload (first fragment of a call).
    pub asked: u32,
    /// Call of a call or reply.
    pub call: CallId,
}

impl Header {
    /// The bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[..4].copy_from_slice(&self.length.to_le_bytes());
        out[4] = self.kind as u8;
        out[5] = self.flags;
        out[8..12].copy_from_slice(&self.rank.to_le_bytes());
        out[12..16].copy_from_slice(&self.asked.to_le_bytes());
        out[16..].copy_from_slice(&self.call.to_le_bytes());
        out
    }

    /// Reads a header; `None` for an unknown kind or flag.
    pub fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let kind = match bytes[4] {
            1 => Kind::Launch,
            2 => Kind::Call,
            3 => Kind::Reply,
            4 => Kind::Event,
            5 => Kind::Ping,
            6 => Kind::Stop,
            7 => Kind::Log,
            8 => Kind::Look,
            _ => return None,
        };
        if bytes[5] & !(FLAG_LAST | FLAG_ERROR) != 0 || bytes[6..8] != [0, 0] {
            return None;
        }
        Some(Self {
            length: word(0),
            kind,
            flags: bytes[5],
            rank: word(8),
            asked: word(12),
            call: u64::from(word(16)) | u64::from(word(20)) << 32,
        })
    }
}

/// How to start the workers of one host. Values of the node win over `env`.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub struct Launch {
    /// Program of every worker, normally the driver's `sys.executable`.
    pub program: String,
    /// Its arguments, normally `-m rayless._worker`.
    pub arguments: Vec<String>,
    /// Working directory; where it is missing on that node the run dir is used and a log line says so.
    pub directory: String,
    /// The driver's environment less the published list.
    pub env: Vec<(String, String)>,
    /// More of it for single ranks.
    pub rank_env: Vec<(Rank, Vec<(String, String)>)>,
    /// What every worker needs before its first call (for Python: pickled sys.path), passed on unread.
    pub boot: Vec<u8>,
    /// What its workers need for links to each other: put in by the driver's session, from the placement and `env`.
    pub links: Option<LaunchLinks>,
}

/// A question: what do the ranks of this host do? Asked when a call makes no progress.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Look {
    /// A rank without progress for so long counts as stuck, in milliseconds; 0: stacks are wanted of every rank.
    pub still_ms: u64,
    /// Whether to have these ranks write their stacks.
    pub stacks: bool,
}

/// What one rank does, by its own notes in shared memory: for people, since a worker may note what it likes.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct RankLook {
    /// The rank.
    pub rank: Rank,
    /// Its process; 0 before its start.
    pub pid: u32,
    /// What it is.
    pub state: WorkerState,
    /// The call that it runs, or the last one that it ran; 0 before the first.
    pub call: CallId,
    /// What it is in, for example `execute_model`; empty where it did not say.
    pub doing: String,
    /// Milliseconds since it last made progress: took a call, ended one, noted something new, moved a message over a link.
    pub still_ms: u64,
    /// The link that last moved a message; `None` where none has.
    pub link: Option<LinkMoved>,
    /// Stacks of its threads as Python wrote them, then what the kernel has them wait for; empty where not asked for.
    pub stack: String,
}

/// The last whole message that a rank moved over any of its links.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkMoved {
    /// Rank at the other end.
    pub peer: Rank,
    /// Channel of the link.
    pub channel: u16,
    /// Whether this end receives.
    pub receiving: bool,
    /// Number of the message on its link, from 1.
    pub sequence: u64,
}

/// What a keeper tells its driver.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum KeeperEvent {
    /// Workers are started; on a local session the descriptors come with it.
    Launched {
        /// Process of each rank.
        pids: Vec<(Rank, u32)>,
    },
    /// A rank can take calls.
    Ready {
        /// The rank.
        rank: Rank,
        /// `python`, `rayless`, `vllm`, `torch`, … to version, as that process sees them.
        versions: Vec<(String, String)>,
    },
    /// A rank changed state otherwise.
    Changed {
        /// The rank.
        rank: Rank,
        /// What it is now.
        state: WorkerState,
    },
    /// A link of a rank of this host changed.
    Link(LinkReport),
    /// The group is over here: a worker died, or a start failed. All others are being killed.
    Failed {
        /// The rank that began it, if one did.
        rank: Option<Rank>,
        /// One line.
        cause: String,
        /// Last lines of that rank's output.
        tail: String,
    },
    /// Answer to a [`Look`]: all ranks of this host.
    Looked {
        /// In the order of the keeper's ranks.
        ranks: Vec<RankLook>,
    },
    /// All processes are reaped.
    Ended,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_reads_back() {
        let header = Header {
            length: 7,
            kind: Kind::Reply,
            flags: FLAG_LAST | FLAG_ERROR,
            rank: 15,
            asked: 0,
            call: 0x1_0000_0002,
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
    }

    #[test]
    fn unknown_kinds_and_flags_are_refused() {
        let good = Header { length: 0, kind: Kind::Ping, flags: 0, rank: 0, asked: 0, call: 0 }.encode();
        for (at, value) in [(4, 0), (4, 9), (5, 4), (6, 1)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Header::decode(&bad), None);
        }
    }
}
