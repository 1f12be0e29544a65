//! `rayless status` and `rayless stop`: the commands that talk to the daemon of this host.

use crate::{
    cli::StopWhat,
    message::{Exit, Failure, data, talk},
};
use rayless_node::{run_dir::RunDir, status_text};
use rayless_proto::{
    ids::{GroupId, NodeId},
    v1::{
        control::{RefusalKind, ReportPart},
        local::{ClientReply, ClientRequest},
        status::{GroupState, StatusReport},
    },
};
use rayless_worker::client::{ClientError, LocalClient};
use std::time::{Duration, Instant, SystemTime};

/// A daemon answers within milliseconds, the head of another host within its `--dead-after`; with neither something hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// A report does without sooner: that something hangs is what it is made for.
const REPORT_LIMIT: Duration = Duration::from_secs(4);
/// How long `stop` waits for groups to be reaped and a daemon to end; their own limits are shorter.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// `rayless status`
pub(crate) fn status(run: &RunDir, json: bool, environment: bool) -> Result<(), Failure> {
    let report = report(&mut connect(run)?, run)?;
    if json {
        data(report.to_json());
    } else if environment {
        data(status_text::environment(&report).trim_end());
    } else {
        data(status_text::status(&report, SystemTime::now()).trim_end());
    }
    Ok(())
}

/// `rayless stop`
pub(crate) fn stop(run: &RunDir, what: &StopWhat) -> Result<(), Failure> {
    let mut client = connect(run)?;
    let group = match what {
        StopWhat::Daemon => return stop_daemon(&mut client, run),
        StopWhat::AllGroups => None,
        StopWhat::Group(named) => Some(group_named(&report(&mut client, run)?, named)?),
    };
    ask(&mut client, run, ClientRequest::StopGroup(group), STOP_LIMIT)?.map_err(failure).map(drop)
}

/// One request to the daemon of this host, answered without data.
pub(crate) fn request(run: &RunDir, body: ClientRequest) -> Result<(), Failure> {
    ask(&mut connect(run)?, run, body, ANSWER_LIMIT)?.map_err(failure).map(drop)
}

/// The state of the cluster.
pub(crate) fn report_of(run: &RunDir) -> Result<StatusReport, Failure> {
    report(&mut connect(run)?, run)
}

fn stop_daemon(client: &mut LocalClient, run: &RunDir) -> Result<(), Failure> {
    let pid = run.daemon_pid();
    match ask(client, run, ClientRequest::Stop, STOP_LIMIT)? {
        // The daemon may be gone before its answer is read: that is what was asked for.
        Ok(_) | Err(ClientError::Lost { .. }) => {}
        Err(error) => return Err(failure(error)),
    }
    // Done means that its groups are ended; the run dir is free only when the process is gone.
    let end = Instant::now() + STOP_LIMIT;
    while run.daemon_pid().is_some() {
        if Instant::now() > end {
            return Err(hangs(run));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if let Some(pid) = pid {
        talk(format_args!("stopped (pid {pid})"));
    }
    Ok(())
}

/// The state of the cluster, for a report.
pub(crate) fn look(run: &RunDir) -> Result<StatusReport, Failure> {
    report_within(&mut connect(run)?, run, REPORT_LIMIT)
}

fn report(client: &mut LocalClient, run: &RunDir) -> Result<StatusReport, Failure> {
    report_within(client, run, ANSWER_LIMIT)
}

fn report_within(client: &mut LocalClient, run: &RunDir, limit: Duration) -> Result<StatusReport, Failure> {
    match ask(client, run, ClientRequest::Status, limit)?.map_err(failure)? {
        ClientReply::Status(report) => Ok(report),
        _ => Err(Failure::failed("the daemon answered another question\nhint: is it of the same version?")),
    }
}

/// Another node's part of a report; in one line why there is none.
pub(crate) fn ask_report(run: &RunDir, node: NodeId, limit: Duration) -> Result<ReportPart, String> {
    let first = |failure: Failure| failure.cause().to_owned();
    let mut client = connect(run).map_err(first)?;
    let end = Instant::now() + limit;
    let tick = Some(Duration::from_millis(100));
    match client.request_while(ClientRequest::Report(node), tick, &mut |_| Instant::now() < end) {
        Ok(Some(ClientReply::Report(part))) => Ok(part),
        Ok(Some(_)) => Err("the daemon answered another question".to_owned()),
        Ok(None) => Err(format!("no answer within {} s", limit.as_secs())),
        Err(error) => Err(first(failure(error))),
    }
}

/// This host's node, by its daemon.
pub(crate) fn own_node(run: &RunDir) -> Result<NodeId, Failure> {
    match ask(&mut connect(run)?, run, ClientRequest::Identify, REPORT_LIMIT)?.map_err(failure)? {
        ClientReply::Identity(identity) => Ok(identity.node),
        _ => Err(Failure::failed("the daemon answered another question\nhint: is it of the same version?")),
    }
}

/// The daemon's answer; an error where none comes within `limit`.
fn ask(
    client: &mut LocalClient,
    run: &RunDir,
    body: ClientRequest,
    limit: Duration,
) -> Result<Result<ClientReply, ClientError>, Failure> {
    let end = Instant::now() + limit;
    let answer = client.request_while(body, Some(Duration::from_millis(100)), &mut |_| Instant::now() < end);
    answer.transpose().ok_or_else(|| hangs(run))
}

fn hangs(run: &RunDir) -> Failure {
    let log = run.log();
    let log = log.display();
    match run.daemon_pid() {
        Some(pid) => Failure::failed(format_args!(
            "the daemon (pid {pid}) does not answer\nhint: is it stopped (SIGSTOP) or its host overloaded? see {log}; `kill -9 {pid}` ends it and leaves its groups running"
        )),
        None => Failure::failed(format_args!("the daemon ended without an answer\nhint: see {log}")),
    }
}

/// The living group meant by an id, the beginning of one, or a name.
fn group_named(report: &StatusReport, named: &str) -> Result<GroupId, Failure> {
    let alive = |state| matches!(state, GroupState::Starting | GroupState::Running);
    let matching: Vec<_> = report
        .groups
        .iter()
        .filter(|group| alive(group.state) && (group.name == named || group.id.to_string().starts_with(named)))
        .collect();
    match matching.as_slice() {
        [one] => Ok(one.id),
        [] => Err(Failure::new(
            Exit::Usage,
            format_args!("no group `{named}` runs on this cluster\nhint: `rayless status` lists them"),
        )),
        several => {
            let ids = several.iter().map(|group| group.id.to_string()).collect::<Vec<_>>().join(", ");
            Err(Failure::new(Exit::Usage, format_args!("`{named}` may be any of {ids}\nhint: give the id in full")))
        }
    }
}

fn connect(run: &RunDir) -> Result<LocalClient, Failure> {
    LocalClient::connect(run.path()).map_err(failure)
}

fn failure(error: ClientError) -> Failure {
    let exit = match &error {
        ClientError::NoDaemon { .. } => Exit::NoCluster,
        ClientError::Refused { refusal, .. } => match refusal.kind {
            RefusalKind::Policy => Exit::Refused,
            RefusalKind::NoHead => Exit::NoCluster,
            RefusalKind::Invalid => Exit::Usage,
            RefusalKind::Resources | RefusalKind::Failed => Exit::Failed,
        },
        ClientError::Lost { .. } | ClientError::Io(_) => Exit::Failed,
    };
    Failure::new(exit, error)
}
