//! This node's part of a report that somebody makes on another one: `rayless report` again, in a process of its own. What hangs there, or takes
//! memory, does so there, and is ended.

use super::{
    asked::Wants,
    core::Core,
    event::{ClientId, Event},
};
use crate::run_dir::RunDir;
use rayless_proto::{
    ids::RequestId,
    limits::{MAX_REPORT_PART, MAX_REPORTS, REPORT_TIMEOUT},
    v1::{
        control::{Refusal, RefusalKind, ReportPart, Requester, ToHead},
        local::{ClientReply, ClientRequest},
    },
};
use std::{path::Path, process::Stdio};
use tokio::{io::AsyncReadExt as _, process::Command, time::timeout};

impl Core {
    /// Whether one more part may be asked for; the client is told where not.
    pub(crate) fn may_ask_for_report(&mut self, client: ClientId, request: RequestId) -> bool {
        let is_report = |wants: &Wants| matches!(wants, Wants::Now(ClientRequest::Report(_)));
        if self.requests.values().filter(|pending| is_report(&pending.wants)).count() < MAX_REPORTS {
            return true;
        }
        let refusal = Refusal {
            kind: RefusalKind::Failed,
            cause: format!("{MAX_REPORTS} nodes are being asked for their part of a report already"),
            hint: "wait for the other report to be made".to_owned(),
        };
        self.answer(client, request, ClientReply::Refused { refusal, table: None });
        false
    }

    /// The head passes on that another node wants this one's part.
    pub(crate) fn make_report(&mut self, by: Requester) {
        if self.reports >= MAX_REPORTS {
            let cause = format!("{} makes {MAX_REPORTS} others already", self.info.name);
            self.tell_head(ToHead::ReportMade { by, part: without(cause) });
            return;
        }
        self.reports += 1;
        tracing::info!(node = %by.node.short(), "making this node's part of a report");
        let (exe, run, events) = (self.exe.clone(), self.run.clone(), self.events.clone());
        tokio::spawn(async move {
            let part = match timeout(REPORT_TIMEOUT, made(&exe, &run)).await {
                Ok(part) => part,
                Err(_) => without(format!("it was not made within {} s", REPORT_TIMEOUT.as_secs())),
            };
            let _ = events.send(Event::ReportMade { by, part }).await;
        });
    }

    pub(crate) fn report_made(&mut self, by: Requester, part: ReportPart) {
        self.reports = self.reports.saturating_sub(1);
        self.tell_head(ToHead::ReportMade { by, part });
    }
}

const fn without(cause: String) -> ReportPart {
    ReportPart { archive: Vec::new(), cause }
}

/// Runs `exe report --part` and takes what it writes to its stdout. Dropped, it ends the process.
async fn made(exe: &Path, run: &RunDir) -> ReportPart {
    let started = Command::new(exe)
        .args(["report", "--part", "--run-dir"])
        .arg(run.path())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => return without(format!("cannot start {}: {error}", exe.display())),
    };
    let mut archive = Vec::new();
    let Some(stdout) = child.stdout.take() else { return without("its pipe is missing".to_owned()) };
    // One byte more: what is too long is not taken for what is whole.
    let read = stdout.take(MAX_REPORT_PART as u64 + 1).read_to_end(&mut archive).await;
    let ended = child.wait().await;
    match (read, ended) {
        (Err(error), _) | (_, Err(error)) => without(format!("lost the process that makes it: {error}")),
        (Ok(_), Ok(status)) if !status.success() => without(format!("the process that makes it ended with {status}")),
        (Ok(count), Ok(_)) if count > MAX_REPORT_PART => without(format!("it has more than {MAX_REPORT_PART} bytes")),
        (Ok(_), Ok(_)) => ReportPart { archive, cause: String::new() },
    }
}
