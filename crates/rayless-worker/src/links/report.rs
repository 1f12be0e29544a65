//! What a worker tells of its links.

use super::{LinkFault, error::reasons};
use rayless_fabric::{Level, LinkName, Phase, Probe};
use rayless_proto::v1::link::{LinkReport, LinkState, LinkTransport};
use std::sync::Arc;

/// A link that is open, as it was last told.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) report: LinkReport,
    pub(super) probe: Arc<Probe>,
    /// Messages of the proof, and their bytes: nobody else's business.
    proof: (u64, u64),
}

impl Live {
    /// A link that was just proven.
    pub(super) fn new(report: LinkReport, probe: Arc<Probe>) -> Self {
        let proof = (probe.messages(), probe.bytes());
        Self { report, probe, proof }
    }

    /// Has `follower` told the number of each message that the caller moves.
    pub(super) fn follow(&self, follower: impl Fn(u64) + Send + Sync + 'static) {
        let proof = self.proof.0;
        self.probe.follow(move |messages| follower(messages - proof));
    }

    /// A new report where something changed since the last one.
    pub(super) fn look(&mut self) -> Option<&LinkReport> {
        let report = &mut self.report;
        let (messages, bytes) = (self.probe.messages() - self.proof.0, self.probe.bytes() - self.proof.1);
        let (state, cause) = match self.probe.phase() {
            Phase::Closed => (LinkState::Closed, String::new()),
            Phase::Lost => {
                let cause = self.probe.loss().unwrap_or_default();
                (LinkState::Failed, format!("lost after {messages} messages: {cause}"))
            }
            _ => (LinkState::Open, String::new()),
        };
        if report.state == state && (report.messages, report.bytes) == (messages, bytes) {
            return None;
        }
        (report.state, report.cause) = (state, cause);
        (report.messages, report.bytes) = (messages, bytes);
        Some(report)
    }

    pub(super) fn is_over(&self) -> bool {
        self.report.state != LinkState::Open
    }
}

/// With nothing settled yet.
pub(super) const fn plain(link: LinkName, by_sender: bool, state: LinkState) -> LinkReport {
    LinkReport::new(link.from, link.to, link.channel, by_sender, state)
}

/// Why there is none.
pub(super) fn failed(link: LinkName, by_sender: bool, fault: &LinkFault) -> LinkReport {
    let (cause, rejected) = match fault {
        LinkFault::NoTransport { rejected, .. } => (format!("no transport: {}", reasons(rejected)), rejected.clone()),
        other => (other.to_string().lines().next().unwrap_or_default().to_owned(), Vec::new()),
    };
    LinkReport { cause, rejected, ..plain(link, by_sender, LinkState::Failed) }
}

pub(super) const fn transport(level: Level) -> LinkTransport {
    match level {
        Level::Tcp => LinkTransport::Tcp,
        Level::Rdma => LinkTransport::Rdma,
        Level::Shm => LinkTransport::Shm,
    }
}
