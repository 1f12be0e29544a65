//! A local client, and what it has asked of the head.

use super::event::ClientId;
use rayless_proto::{
    ids::{PlacementGroupId, RequestId},
    limits::{MAX_CLIENT_BACKLOG, WAIT_REPORT_PERIOD},
    v1::{
        control::{GroupSpec, ToHead},
        local::{ClientRequest, DaemonMessage},
    },
};
use std::{
    collections::{BTreeSet, VecDeque},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// A connected command or driver.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) pid: u32,
    /// `None` once it was given up: its connection closes when the writer sees that.
    pub(crate) outbox: Option<mpsc::Sender<DaemonMessage>>,
    /// Whether a group was placed for it: it then is told of nodes.
    pub(crate) is_driver: bool,
    /// The last launches whose placement it was told of, by this node's numbers: a head that takes over asks for them.
    pub(crate) launches: VecDeque<RequestId>,
    /// Its placement groups: they go when it goes, for they have no process of their own that could end.
    pub(crate) placement_groups: BTreeSet<PlacementGroupId>,
}

impl Client {
    pub(crate) const fn new(pid: u32, outbox: mpsc::Sender<DaemonMessage>) -> Self {
        Self {
            pid,
            outbox: Some(outbox),
            is_driver: false,
            launches: VecDeque::new(),
            placement_groups: BTreeSet::new(),
        }
    }

    /// A group was placed for it, and it is told so.
    pub(crate) fn is_told(&mut self, launch: RequestId) {
        self.is_driver = true;
        if self.launches.len() >= MAX_CLIENT_BACKLOG {
            self.launches.pop_front();
        }
        self.launches.push_back(launch);
    }

    /// Closes its connection once what was answered is written.
    pub(crate) fn close(&mut self) {
        self.outbox = None;
    }
}

/// A request that the head has not answered yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) client: ClientId,
    /// The client's own number for it.
    pub(crate) request: RequestId,
    pub(crate) wants: Wants,
    pub(crate) since: Instant,
    /// When the client was last told that there is no head.
    pub(crate) told: Option<Instant>,
}

/// What it is about.
#[derive(Debug)]
pub(crate) enum Wants {
    /// Waits for a head if there is none.
    Group(GroupSpec),
    /// Needs a head now.
    Now(ClientRequest),
}

impl Pending {
    pub(crate) const fn is_launch(&self) -> bool {
        matches!(self.wants, Wants::Group(_))
    }

    /// The request as the head gets it; a launch has waited for part of its time already.
    pub(crate) fn message(&self, request: RequestId, now: Instant) -> ToHead {
        match &self.wants {
            Wants::Group(spec) => {
                let waited = u64::try_from(now.duration_since(self.since).as_millis()).unwrap_or(u64::MAX);
                let spec = GroupSpec { wait_ms: spec.wait_ms.saturating_sub(waited), ..spec.clone() };
                ToHead::CreateGroup { request, spec }
            }
            Wants::Now(ClientRequest::CreatePlacementGroup { name, bundles, strategy, wait_ms }) => {
                ToHead::CreatePlacementGroup {
                    request,
                    name: name.clone(),
                    bundles: bundles.clone(),
                    strategy: *strategy,
                    wait_ms: *wait_ms,
                }
            }
            Wants::Now(ClientRequest::RemovePlacementGroup(id)) => ToHead::RemovePlacementGroup { request, id: *id },
            Wants::Now(ClientRequest::StopGroup(group)) => ToHead::StopGroup { request, group: *group },
            Wants::Now(ClientRequest::Report(node)) => ToHead::AskReport { request, node: *node },
            // `Identify`, `Stop` and `CreateGroup` never get here: see `client_said`.
            Wants::Now(_) => ToHead::Status { request },
        }
    }

    /// While there is no head: when to speak to the client again.
    pub(crate) fn next_report(&self) -> Option<Instant> {
        let Wants::Group(spec) = &self.wants else { return None };
        let end = self.since + Duration::from_millis(spec.wait_ms);
        let again = self.told.map_or(self.since, |told| told + WAIT_REPORT_PERIOD);
        Some(again.min(end))
    }
}
