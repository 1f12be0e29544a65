//! How the command speaks: data to stdout, talk to stderr, an error as one line of cause and a hint.
//!
//! A reader that went away or a full disk behind a redirection must not end a daemon, so a failed write is dropped.

use std::{
    fmt,
    io::{self, Write as _},
    process::ExitCode,
};

/// Why a command ends without success; the exit codes are a contract (see `STYLE.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Tried and failed.
    Failed = 1,
    /// Used wrongly.
    Usage = 2,
    /// No cluster reachable.
    NoCluster = 3,
    /// Refused by policy: token, version, address.
    Refused = 4,
}

impl Exit {
    /// From its number; unknown ones count as `Failed`.
    pub(crate) const fn from_code(code: u8) -> Self {
        match code {
            2 => Self::Usage,
            3 => Self::NoCluster,
            4 => Self::Refused,
            _ => Self::Failed,
        }
    }
}

/// An error for people: a line of cause, then perhaps `hint: …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Decides the exit code.
    pub(crate) exit: Exit,
    /// Cause and hint, as the libraries word them.
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, text: impl fmt::Display) -> Self {
        Self { exit, text: text.to_string() }
    }

    pub(crate) fn failed(text: impl fmt::Display) -> Self {
        Self::new(Exit::Failed, text)
    }

    /// The cause alone, in one line.
    pub(crate) fn cause(&self) -> &str {
        self.text.lines().next().unwrap_or_default()
    }

    /// Shows it and gives the process's exit code.
    pub(crate) fn report(&self) -> ExitCode {
        talk(format_args!("error: {}", self.text));
        ExitCode::from(self.exit as u8)
    }
}

/// A line (or several) of data.
pub(crate) fn data(text: impl fmt::Display) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// A line of talk.
pub(crate) fn talk(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
