//! Where a receiver takes a connection by rdma_cm: a listener that is open for one attempt only.

use rayless_fabric::{GreetError, Greeted, greet_rdma};
use rayless_proto::{ids::Rank, v1::rdma::RdmaReach};
use rayless_verbs::{Listener, VerbsError};
use rustix::io::Errno;
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// How long one look for a caller takes at most.
const SLICE: Duration = Duration::from_millis(50);

/// A listener on one way out of this host.
pub(super) struct Door(Listener);

impl Door {
    /// Listens on the address of `way`, on the first free one of `ports` (0 to 0: any). Ranks begin at different ones, so that those of one
    /// host seldom meet.
    pub(super) fn open(way: &RdmaReach, (first, last): (u16, u16), rank: Rank) -> Result<Self, String> {
        let ip: IpAddr = way.address.parse().map_err(|_| format!("`{}` is no address", way.address))?;
        let count = u32::from(last.saturating_sub(first)) + 1;
        for step in 0..count {
            let port = first + (rank.wrapping_add(step) % count) as u16;
            match Listener::bind(SocketAddr::new(ip, port)) {
                Ok(listener) => return Ok(Self(listener)),
                Err(VerbsError::Call { errno: Errno::ADDRINUSE, .. }) => {}
                Err(error) => return Err(format!("listening on {ip}:{port} ({}): {error}", way.device)),
            }
        }
        Err(format!("all ports from {first} to {last} are in use on {ip}; give more with --rdma-ports"))
    }

    /// `IP:port`
    pub(super) fn address(&self) -> String {
        self.0.address().to_string()
    }

    /// The next caller that greets as a link does; `None` where none came within a moment.
    pub(super) fn next(&mut self) -> Result<Option<Greeted>, String> {
        match greet_rdma(&mut self.0, SLICE) {
            Ok(greeted) => Ok(Some(greeted)),
            // A stranger has been refused.
            Err(GreetError::TimedOut(_) | GreetError::Malformed) => Ok(None),
            Err(GreetError::Broken(cause)) => Err(cause),
        }
    }
}

/// The smaller MTU of two ways out: what fits through both.
pub(super) fn mtu(from: &RdmaReach, to: &RdmaReach) -> u32 {
    match (from.mtu, to.mtu) {
        (0, known) | (known, 0) => known,
        (a, b) => a.min(b),
    }
}
