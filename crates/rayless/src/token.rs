//! The cluster token: where it comes from, and `rayless token`.

use crate::{
    cli::TokenAction,
    message::{Exit, Failure, data, talk},
    status,
};
use rayless_net::token::{TOKEN_VARIABLE, Token, TokenError};
use rayless_node::{run_dir::RunDir, tokens::Tokens};
use rayless_proto::v1::{local::ClientRequest, status::NodeState};
use std::{
    io::{IsTerminal as _, stdout},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Nodes take a new token within milliseconds; one that has not by then has a reason.
const SPREAD_LIMIT: Duration = Duration::from_secs(5);

/// A token and the file that holds it, if one does.
pub(crate) struct Found {
    pub(crate) token: Token,
    pub(crate) file: Option<PathBuf>,
}

/// `--token-file`, else `given` (RAYLESS_TOKEN), else the file in the run dir; `None` where there is none of them. One that was rotated away in
/// this run dir gives the one that replaced it.
fn find(run: &RunDir, file: Option<&Path>, given: Option<Token>) -> Result<Option<Found>, Failure> {
    let Some(given) = find_given(run, file, given)? else { return Ok(None) };
    let Some(token) = Tokens::successor(run, &given.token).map_err(Failure::failed)? else { return Ok(Some(given)) };
    let place = given.file.map_or_else(|| TOKEN_VARIABLE.to_owned(), |file| file.display().to_string());
    let present = run.token();
    talk(format_args!("the token in {place} was rotated away; the present one, in {}, is used", present.display()));
    Ok(Some(Found { token, file: Some(present) }))
}

fn find_given(run: &RunDir, file: Option<&Path>, given: Option<Token>) -> Result<Option<Found>, Failure> {
    if let Some(path) = file {
        let token = Token::read_file(path).map_err(failure)?;
        return Ok(Some(Found { token, file: Some(path.to_owned()) }));
    }
    if let Some(token) = given {
        return Ok(Some(Found { token, file: None }));
    }
    match Token::read_file(&run.token()) {
        Ok(token) => Ok(Some(Found { token, file: Some(run.token()) })),
        Err(TokenError::NoFile(_)) => Ok(None),
        Err(error) => Err(failure(error)),
    }
}

/// For a head: the one found, else a new one in the run dir.
pub(crate) fn find_or_make(run: &RunDir, file: Option<&Path>, given: Option<Token>) -> Result<Found, Failure> {
    if let Some(found) = find(run, file, given)? {
        return Ok(found);
    }
    let token = Token::generate().map_err(Failure::failed)?;
    token.write_file(&run.token()).map_err(failure)?;
    Ok(Found { token, file: Some(run.token()) })
}

/// For a node that joins: the one found, else an error that says where to get it.
pub(crate) fn required(run: &RunDir, file: Option<&Path>) -> Result<Found, Failure> {
    required_or(run, file, Token::from_env().map_err(failure)?)
}

/// The same where the variable was read already.
pub(crate) fn required_or(run: &RunDir, file: Option<&Path>, given: Option<Token>) -> Result<Found, Failure> {
    find(run, file, given)?.ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            "no cluster token\nhint: set RAYLESS_TOKEN or `--token-file`; on the head, `rayless token show` shows it",
        )
    })
}

/// `rayless token`
pub(crate) fn run(run: &RunDir, action: &TokenAction) -> Result<(), Failure> {
    match action {
        TokenAction::New => data(Token::generate().map_err(Failure::failed)?.expose()),
        TokenAction::Rotate { overlap } => return rotate(run, *overlap),
        TokenAction::FinishRotation => {
            status::request(run, ClientRequest::FinishRotation)?;
            talk("the token before the present one is refused from here on");
        }
        TokenAction::Show { file } => {
            let found = required(run, file.as_deref())?;
            match found.file {
                Some(path) if !stdout().is_terminal() => data(path.display()),
                None if !stdout().is_terminal() => {
                    return Err(Failure::failed(
                        "the token is in RAYLESS_TOKEN, not in a file, and stdout is no terminal\nhint: use the variable itself",
                    ));
                }
                _ => data(found.token.expose()),
            }
        }
    }
    Ok(())
}

/// Has the head make a new token, and waits until every living node has taken it, or for as long as one should have.
fn rotate(run: &RunDir, overlap: Option<Duration>) -> Result<(), Failure> {
    let overlap_ms = overlap.map(|overlap| u64::try_from(overlap.as_millis()).unwrap_or(u64::MAX));
    status::request(run, ClientRequest::RotateToken { overlap_ms })?;
    let end = Instant::now() + SPREAD_LIMIT;
    let report = loop {
        let report = status::report_of(run)?;
        if report.token.behind.is_empty() || Instant::now() >= end {
            break report;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let living = report.nodes.iter().filter(|node| matches!(node.state, NodeState::Alive | NodeState::Suspect)).count();
    let behind = report.token.behind.len();
    talk(format_args!("{} of {living} nodes have taken the new token", living.saturating_sub(behind)));
    if behind > 0 {
        talk("hint: `rayless status` says which have not, and why");
    }
    match overlap {
        Some(overlap) => talk(format_args!("the present one is refused in {} s", overlap.as_secs_f64())),
        None => talk("the present one is accepted as well until `rayless token rotate --finish`"),
    }
    if stdout().is_terminal() {
        data(Token::read_file(&run.token()).map_err(failure)?.expose());
    } else {
        data(run.token().display());
    }
    Ok(())
}

pub(crate) fn failure(error: TokenError) -> Failure {
    let exit = match &error {
        // A token of the wrong form is a token that does not let in.
        TokenError::Malformed { .. } => Exit::Refused,
        TokenError::NoFile(_) => Exit::Usage,
        TokenError::Io { .. } => Exit::Failed,
    };
    Failure::new(exit, error)
}
