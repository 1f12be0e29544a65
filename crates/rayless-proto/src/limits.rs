//! Every size, count and default time of rayless, with unit and reason.

use std::time::Duration;

/// The one port: UDP for membership, TCP for steps and tensors.
pub const DEFAULT_PORT: u16 = 6379;

/// Ports of RDMA connections, of which iWARP needs one per listening worker; `--rdma-ports`.
pub const RDMA_PORTS: (u16, u16) = (6400, 6463);

/// Bytes of the largest membership message. A 1,000-node status report stays under it.
pub const MAX_CONTROL_MESSAGE: usize = 4 << 20;
/// Bytes of the largest message on a node's own Unix sockets (a driver's environment travels there).
pub const MAX_LOCAL_MESSAGE: usize = 16 << 20;
/// Bytes of the largest `Hello`, read before anything is trusted.
pub const MAX_HELLO: usize = 512;
/// Bytes of call payload in one frame or ring record; more travels in fragments, so that a keeper never holds more.
pub const MAX_FRAGMENT: usize = 1 << 20;
/// Bytes of the largest call or reply.
pub const MAX_CALL: u64 = 1 << 30;
/// Bytes of a host's ring.
pub const RING_BYTES: usize = 8 << 20;
/// Bytes of one worker's reply ring.
pub const REPLY_RING_BYTES: usize = 2 << 20;
/// Calls in flight in one group; one more is an error that names the slowest rank.
pub const MAX_CALLS_IN_FLIGHT: usize = 64;
/// Workers of one group on one host.
pub const MAX_WORKERS_PER_HOST: usize = 256;
/// Workers of one group.
pub const MAX_WORLD_SIZE: usize = 4096;
/// Characters of a node, group or resource name.
pub const MAX_NAME: usize = 128;
/// Resources one node may declare.
pub const MAX_RESOURCES: usize = 64;
/// Handshakes in progress on one daemon; more are refused before they cost memory.
pub const MAX_HALF_OPEN: usize = 128;
/// Launches and placement groups that may wait at once; one more is refused.
pub const MAX_WAITING: usize = 1024;
/// Ended groups that `status` keeps; of older ones only the id is remembered.
pub const MAX_ENDED_GROUPS: usize = 64;
/// Bytes of the logs of ended groups that a node keeps, those of the last one not counted: a run dir is in memory where it is in `/run`.
pub const MAX_ENDED_LOGS: u64 = 1 << 30;
/// Dead and left nodes that `status` keeps.
pub const MAX_GONE_NODES: usize = 256;
/// Ids of ended groups and placement groups that a head remembers, so that a node that returns late is told to end them.
pub const MAX_TOMBSTONES: usize = 4096;
/// Commands and drivers connected to one daemon at once.
pub const MAX_LOCAL_CLIENTS: usize = 512;
/// Unanswered requests of one of them, and answers that wait to be read by it; a client that does not read is dropped.
pub const MAX_CLIENT_BACKLOG: usize = 64;
/// Characters of a line of cause that one process tells others of its own making.
pub const MAX_CAUSE: usize = 1024;
/// Bytes of the note of what a worker is in.
pub const MAX_DOING: usize = 64;
/// Bytes of one rank's stacks.
pub const MAX_STACK: usize = 64 << 10;
/// Bytes of a node's part of a report, as it travels through the head: eight of them are half of what may wait for one node.
pub const MAX_REPORT_PART: usize = 512 << 10;
/// Parts of a report that one node has asked for and not yet got, and those that one node makes at once; one more is refused.
pub const MAX_REPORTS: usize = 8;
/// Events that `status` keeps; older ones are in the log.
pub const MAX_EVENTS: usize = 256;

/// Groups that are over in one message of a head to its standby: each may name 4,096 ranks on 1,000 nodes, 50 kB.
pub const MAX_STORY_GROUPS: usize = 16;

/// Ends of links that a node tells of one group; further ones work, but are not shown.
pub const MAX_LINK_ENDS: usize = 1024;

/// Between two heartbeats.
pub const HEARTBEAT_PERIOD: Duration = Duration::from_millis(500);
/// Silence after which a node or session counts as dead; `--dead-after`.
pub const DEAD_AFTER: Duration = Duration::from_secs(3);
/// An observer whose own timer ran later than this restarts the window: it was the one asleep.
pub const OBSERVER_LATE: Duration = Duration::from_millis(300);
/// How long a handshake may take before its connection is dropped.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Shortest time between two messages of a head to its standbys about what has happened; what happens in the last of them
/// before a head dies may be missing from the next one's story.
pub const STORY_PERIOD: Duration = Duration::from_millis(250);
/// How long a head holds the nodes of a launch that another head began, for the missing ones to join and for whoever asked to
/// ask again; nodes dial once a second at least.
pub const RESUME_WITHIN: Duration = Duration::from_secs(5);
/// How long a launch waits for nodes and GPUs; `--wait`.
pub const WAIT: Duration = Duration::from_secs(600);
/// How long a restarted head waits for the nodes that it remembers before it takes one for dead. Longer than `--dead-after`, for it
/// was the head that was away: a node may take its connections' idle time to notice.
pub const REJOIN_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two repeats of the need/have table of a waiting launch.
pub const WAIT_REPORT_PERIOD: Duration = Duration::from_secs(10);
/// How long a node may take to start a keeper before the launch fails: a process start, on a saturated machine.
pub const KEEPER_START_TIMEOUT: Duration = Duration::from_secs(20);
/// After this long without an answer a node is told again to end its part of a group.
pub const STOP_REPEAT_PERIOD: Duration = Duration::from_secs(5);
/// A call without progress for this long is looked into, then again after twice as long; `RAYLESS_STUCK_AFTER`.
pub const STUCK_AFTER: Duration = Duration::from_secs(10);
/// A step that takes longer ends its group; `--step-deadline`. Prefill of the longest prompts takes a minute; Ray's and vLLM's own limit is the same.
pub const STEP_DEADLINE: Duration = Duration::from_secs(300);
/// A node makes its part of a report within this, else says that it could not.
pub const REPORT_TIMEOUT: Duration = Duration::from_secs(12);
/// A failed group's processes are reaped within this.
pub const REAP_TIMEOUT: Duration = Duration::from_secs(5);
/// A GPU whose memory is not back within this is `draining`.
pub const GPU_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// A GPU's memory counts as back when within this many bytes of what it was before the launch, what other processes hold left out on both
/// sides.
pub const GPU_DRAIN_SLACK: u64 = 64 << 20;
/// As many bytes more for each process that came meanwhile: NVML does not tell all that it takes (on an H100 8 MiB of an MPS server's and 1 MiB of
/// each client's).
pub const GPU_DRAIN_SLACK_PER_PROCESS: u64 = 8 << 20;
