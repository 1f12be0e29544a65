//! `rayless status` and `rayless stop`: the commands that talk to the daemon of this host.

use crate::{
    cli::StopWhat,
    message::{Exit, Failure, data, talk},
};
use rayless_node::{run_dir::RunDir, status_text};
use rayless_proto::{
    ids::GroupId,
    v1::{
        control::RefusalKind,
        local::ClientRequest,
        status::{GroupState, StatusReport},
    },
};
use rayless_worker::client::{ClientError, LocalClient};
use std::time::{Duration, Instant, SystemTime};

/// How long `stop` waits for a daemon to reap its groups and end; its own limit for that is shorter.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// `rayless status`
pub(crate) fn status(run: &RunDir, json: bool, environment: bool) -> Result<(), Failure> {
    let report = connect(run)?.status().map_err(failure)?;
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
    match what {
        StopWhat::Daemon => stop_daemon(run),
        StopWhat::AllGroups => connect(run)?.stop_group(None).map_err(failure),
        StopWhat::Group(named) => {
            let mut client = connect(run)?;
            let report = client.status().map_err(failure)?;
            client.stop_group(Some(group_named(&report, named)?)).map_err(failure)
        }
    }
}

fn stop_daemon(run: &RunDir) -> Result<(), Failure> {
    let mut client = connect(run)?;
    let pid = run.daemon_pid();
    match client.request(ClientRequest::Stop, &mut |_| {}) {
        // The daemon may be gone before its answer is read: that is what was asked for.
        Ok(_) | Err(ClientError::Lost { .. }) => {}
        Err(error) => return Err(failure(error)),
    }
    // Done means that its groups are ended; the run dir is free only when the process is gone.
    let end = Instant::now() + STOP_LIMIT;
    while run.daemon_pid().is_some() {
        if Instant::now() > end {
            let pid = pid.unwrap_or_default();
            return Err(Failure::failed(format_args!(
                "the daemon (pid {pid}) has not ended within {} s\nhint: `kill {pid}`, and look into {}",
                STOP_LIMIT.as_secs(),
                run.log().display()
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if let Some(pid) = pid {
        talk(format_args!("stopped (pid {pid})"));
    }
    Ok(())
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
