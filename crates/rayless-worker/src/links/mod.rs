//! Links between workers: which transport each gets, and how its two ends find each other.
//!
//! The sender calls the receiver's node on its one port, by the TLS server name `<rank>.<group>.link.rayless`. Daemon and keeper pass the
//! connection on unread, so the two workers shake hands themselves ([`rayless_net::link`]); on this channel they agree on a transport
//! (`sender`, `receiver`; the messages are in [`rayless_proto::v1::link`]), open it beside the channel, prove it by a transfer, and let the channel go.
//!
//! A level that fails its proof gives way to the next one that policy allows, and both ends learn why; where none is left, both fail with all reasons.
//! Nothing of this runs before the first link is asked for; from then on one thread waits for what the keeper passes on (`shared`).

mod error;
mod policy;
mod rdma;
mod reach;
mod receiver;
mod report;
mod sender;
mod shared;
mod ticket;

pub use error::{LinkError, LinkFault};
pub use policy::{BadWish, Contradiction, together, transport, wishes_of};

use crate::ring::Ring;
use rayless_fabric::{LinkConfig, LinkName, RecvLink, SendLink};
use rayless_net::link::Patience;
use rayless_proto::{
    ids::Rank,
    v1::link::{LinkBoot, LinkState},
};
use report::Live;
use shared::Shared;
use std::{
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

/// What a byte on a worker's socket for links carries: a TCP connection of which nothing was read,
pub(crate) const TCP_ARRIVAL: u8 = b'L';
/// or a connection of this host, past the bytes that name the rank.
pub(crate) const UNIX_ARRIVAL: u8 = b'T';

/// TCP streams of a link: clouds limit a single flow, and the kernel spreads flows over cores.
const STREAMS: u8 = 4;
/// How long opening a transport at a peer that is there may take, and its proof.
const ATTEMPT: Duration = Duration::from_secs(5);
const PROOF: Duration = Duration::from_secs(10);

/// A worker's links to other workers of its group.
#[derive(Debug)]
pub struct Links {
    shared: Arc<Shared>,
}

impl Links {
    /// `reader`: the worker's slot in the ring.
    pub(crate) fn new(rank: Rank, ring: Arc<Ring>, reader: usize, socket: UnixStream, boot: Option<LinkBoot>) -> Self {
        Self { shared: Arc::new(Shared::new(rank, ring, reader, socket, boot)) }
    }

    /// Opens the sending end of the link of that `channel` to rank `to`, whenever the other end asks for it within `within`. Blocks; the two
    /// ends may be asked for in any order and from any thread.
    ///
    /// # Errors
    /// See [`LinkFault`].
    pub fn send_link(&self, to: Rank, channel: u16, within: Duration) -> Result<SendLink, LinkError> {
        self.send_link_unless(to, channel, within, &|| false)
    }

    /// [`Self::send_link`] that also ends when `interrupted` says so: it is asked every 50 ms.
    ///
    /// # Errors
    /// See [`LinkFault`].
    pub fn send_link_unless(
        &self,
        to: Rank,
        channel: u16,
        within: Duration,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<SendLink, LinkError> {
        let link = self.shared.name(self.shared.rank, to, channel);
        self.open(link, true, within, interrupted, sender::open)
    }

    /// Opens the receiving end of the link of that `channel` from rank `from`; otherwise as [`Self::send_link`].
    ///
    /// # Errors
    /// See [`LinkFault`].
    pub fn recv_link(&self, from: Rank, channel: u16, within: Duration) -> Result<RecvLink, LinkError> {
        self.recv_link_unless(from, channel, within, &|| false)
    }

    /// [`Self::recv_link`] that also ends when `interrupted` says so: it is asked every 50 ms.
    ///
    /// # Errors
    /// See [`LinkFault`].
    pub fn recv_link_unless(
        &self,
        from: Rank,
        channel: u16,
        within: Duration,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<RecvLink, LinkError> {
        let link = self.shared.name(from, self.shared.rank, channel);
        self.open(link, false, within, interrupted, receiver::open)
    }

    /// What is the same for both ends: the caller's mistakes, the reports, the error's names.
    fn open<L>(
        &self,
        link: LinkName,
        by_sender: bool,
        within: Duration,
        interrupted: &dyn Fn() -> bool,
        run: impl FnOnce(&Asked<'_>) -> Result<(L, Live), LinkFault>,
    ) -> Result<L, LinkError> {
        let shared = &self.shared;
        let is_over = || shared.is_over() || interrupted();
        let now = Instant::now();
        // A year: what is longer could not be added to a point in time.
        let deadline = now + within.min(Duration::from_secs(365 * 24 * 3600));
        let asked = Asked { shared, link, within, patience: Patience::new(deadline, &is_over), interrupted };
        let opened = shared.claim(link, by_sender).and_then(|claim| {
            shared.listen()?;
            shared.tell(&report::plain(link, by_sender, LinkState::Opening));
            let (ready, live) =
                run(&asked).inspect_err(|fault| shared.tell(&report::failed(link, by_sender, fault)))?;
            shared.keep(live);
            drop(claim);
            Ok(ready)
        });
        opened.map_err(|fault| LinkError {
            link,
            from_node: shared.node_name(link.from),
            to_node: shared.node_name(link.to),
            fault: Box::new(fault),
        })
    }
}

/// One call for one end of a link.
struct Asked<'a> {
    shared: &'a Arc<Shared>,
    link: LinkName,
    within: Duration,
    patience: Patience<'a>,
    interrupted: &'a dyn Fn() -> bool,
}

impl Asked<'_> {
    /// Why the patience is over. `what` was waited for, `last` went wrong at the last try.
    fn stopped(&self, what: String, last: &str, hint: String) -> LinkFault {
        if self.shared.is_over() {
            return LinkFault::Over("the group is over".to_owned());
        }
        if (self.interrupted)() {
            return LinkFault::Interrupted;
        }
        let last = if last.is_empty() { String::new() } else { format!(" (last: {last})") };
        LinkFault::TimedOut { what, within: self.within, last, hint }
    }

    /// `rank 3 on node b`
    fn named(&self, rank: Rank) -> String {
        format!("rank {rank} on node {}", self.shared.node_name(rank))
    }

    /// How an end opens its transport.
    fn config(&self, verify: bool) -> LinkConfig {
        let left = self.patience.left().unwrap_or_default();
        LinkConfig { verify, spin: self.shared.spin, handshake: ATTEMPT.min(left), ..LinkConfig::default() }
    }
}
