//! What the other nodes have to say: each makes its part by itself, and the parts come through the head.
//!
//! A few are asked at a time, those first that hold ranks. One that is dead, does not answer, or has more to say than there is room for costs its own part
//! only, and is named.

use super::{
    Report,
    archive::{plain, unpack},
};
use crate::status;
use rayless_node::run_dir::RunDir;
use rayless_proto::{
    ids::NodeId,
    limits::REPORT_TIMEOUT,
    v1::{
        control::ReportPart,
        status::{GroupState, GroupStatus, NodeState, NodeStatus, StatusReport},
    },
};
use std::{
    cmp::Reverse,
    collections::VecDeque,
    io,
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Nodes that are asked at the same time.
const AT_ONCE: usize = 4;
/// All of them together. Of more than a few dozen nodes that hang the last are not asked.
const ALL: Duration = Duration::from_secs(60);
/// One: the time that it has itself, and the way.
const ONE: Duration = REPORT_TIMEOUT.saturating_add(Duration::from_secs(3));
/// Bytes of a part when it is unpacked.
const UNPACKED: u64 = 32 << 20;

/// Asks all nodes but this one, and adds their parts in folders of their own.
pub(super) fn gather(report: &mut Report, run: &RunDir, status: &StatusReport, own: NodeId) -> io::Result<()> {
    let mut others: Vec<&NodeStatus> = status.nodes.iter().filter(|node| node.id != own).collect();
    others.sort_by_key(|node| Reverse(ranks(status, node).len()));
    let mut left = VecDeque::new();
    for node in others {
        match node.state {
            NodeState::Alive | NodeState::Suspect => left.push_back(node),
            NodeState::Dead => report.without(status, node, "it is dead"),
            // Of its own will: nobody misses it.
            NodeState::Left => {}
        }
    }
    let end = Instant::now() + ALL;
    let left = Mutex::new(left);
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        for _ in 0..AT_ONCE {
            let (left, tell) = (&left, tell.clone());
            scope.spawn(move || {
                loop {
                    let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(node) = next else { return };
                    let now = Instant::now();
                    let answer = if now >= end {
                        Err("there was no time left for it".to_owned())
                    } else {
                        status::ask_report(run, node.id, ONE.min(end - now))
                    };
                    if tell.send((node, answer)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        for (node, answer) in told {
            match answer {
                Ok(ReportPart { archive, cause }) if cause.is_empty() => report.add_part(status, node, &archive)?,
                Ok(ReportPart { cause, .. }) | Err(cause) => report.without(status, node, &cause),
            }
        }
        Ok(())
    })
}

/// `rank 1, 3 of group 0123…` for each group that is not over.
fn ranks(status: &StatusReport, node: &NodeStatus) -> Vec<String> {
    let of_group = |group: &GroupStatus| {
        let lives = matches!(group.state, GroupState::Starting | GroupState::Running);
        let here = group.workers.iter().filter(|worker| worker.node == node.id);
        let ranks: Vec<String> = here.map(|worker| worker.rank.to_string()).collect();
        (lives && !ranks.is_empty()).then(|| format!("rank {} of group {}", ranks.join(", "), group.id))
    };
    status.groups.iter().filter_map(of_group).collect()
}

impl Report {
    fn without(&mut self, status: &StatusReport, node: &NodeStatus, cause: &str) {
        let ranks = ranks(status, node);
        let with = if ranks.is_empty() { String::new() } else { format!(" (with {})", ranks.join("; ")) };
        let name = &node.name;
        self.missing.push(format!("node {name}{with}: {cause}; `rayless report --local` there makes its part"));
    }

    fn add_part(&mut self, status: &StatusReport, node: &NodeStatus, archive: &[u8]) -> io::Result<()> {
        let files = match unpack(archive, UNPACKED) {
            Ok(files) => files,
            Err(error) => {
                self.without(status, node, &format!("what it sent cannot be read: {error}"));
                return Ok(());
            }
        };
        // Names need not be unique.
        let folder = format!("nodes/{}-{}", plain(&node.name), node.id.short());
        for (name, content) in files {
            self.add(&format!("{folder}/{name}"), &content)?;
        }
        Ok(())
    }
}
