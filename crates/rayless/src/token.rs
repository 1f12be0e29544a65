//! The cluster token: where it comes from, and `rayless token`.

use crate::{
    cli::TokenAction,
    message::{Exit, Failure, data},
};
use rayless_net::token::{Token, TokenError};
use rayless_node::run_dir::RunDir;
use std::{
    io::{IsTerminal as _, stdout},
    path::{Path, PathBuf},
};

/// A token and the file that holds it, if one does.
pub(crate) struct Found {
    pub(crate) token: Token,
    pub(crate) file: Option<PathBuf>,
}

/// `--token-file`, else RAYLESS_TOKEN, else the file in the run dir; `None` where there is none of them.
pub(crate) fn find(run: &RunDir, file: Option<&Path>) -> Result<Option<Found>, Failure> {
    if let Some(path) = file {
        let token = Token::read_file(path).map_err(failure)?;
        return Ok(Some(Found { token, file: Some(path.to_owned()) }));
    }
    if let Some(token) = Token::from_env().map_err(failure)? {
        return Ok(Some(Found { token, file: None }));
    }
    match Token::read_file(&run.token()) {
        Ok(token) => Ok(Some(Found { token, file: Some(run.token()) })),
        Err(TokenError::NoFile(_)) => Ok(None),
        Err(error) => Err(failure(error)),
    }
}

/// For a head: the one found, else a new one in the run dir.
pub(crate) fn find_or_make(run: &RunDir, file: Option<&Path>) -> Result<Found, Failure> {
    if let Some(found) = find(run, file)? {
        return Ok(found);
    }
    let token = Token::generate().map_err(Failure::failed)?;
    token.write_file(&run.token()).map_err(failure)?;
    Ok(Found { token, file: Some(run.token()) })
}

/// For a node that joins: the one found, else an error that says where to get it.
pub(crate) fn required(run: &RunDir, file: Option<&Path>) -> Result<Found, Failure> {
    find(run, file)?.ok_or_else(|| {
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

fn failure(error: TokenError) -> Failure {
    let exit = match &error {
        // A token of the wrong form is a token that does not let in.
        TokenError::Malformed { .. } => Exit::Refused,
        TokenError::NoFile(_) => Exit::Usage,
        TokenError::Io { .. } => Exit::Failed,
    };
    Failure::new(exit, error)
}
