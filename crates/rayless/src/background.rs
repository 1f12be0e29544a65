//! `--daemon`: the same program again in a session of its own; its starter returns once it is ready.
//!
//! The child gets the token on stdin (never in its arguments or environment) and reports on stdout, a line each:
//! `t<talk>`, then `r<ready>` or `f<exit code><error>`; fields are separated by tabs, line ends inside by `\u{1f}`. Its
//! stderr is the daemon's log. Once ready it lets go of stdin and stdout.

use crate::message::{Exit, Failure, talk};
use rayless_net::token::{TOKEN_VARIABLE, Token};
use rayless_node::{daemon::Ready, run_dir::RunDir};
use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    process::{Command, Stdio},
};

const LINE_END: char = '\u{1f}';

/// What a child says.
pub(crate) enum Report<'a> {
    Talk(&'a str),
    Ready(&'a Ready),
}

/// Starts this command again as a daemon and relays what it says until it is ready.
pub(crate) fn start(run: &RunDir, token: &Token, mut relay: impl FnMut(Report<'_>)) -> Result<(), Failure> {
    let cannot = |what: &str, error: &dyn std::fmt::Display| Failure::failed(format_args!("cannot {what}: {error}"));
    let log = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(run.log())
        .map_err(|error| cannot(&format!("open {}", run.log().display()), &error))?;
    let exe = std::env::current_exe().map_err(|error| cannot("find this program", &error))?;
    let mut child = Command::new(exe)
        .args(std::env::args_os().skip(1))
        .arg("--daemon-child")
        .env_remove(TOKEN_VARIABLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(|error| cannot("start the daemon", &error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that ended already says why below.
        let _ = writeln!(stdin, "{}", token.expose());
    }
    let lines = BufReader::new(child.stdout.take().ok_or_else(|| cannot("start the daemon", &"no pipe"))?).lines();
    for line in lines.map_while(Result::ok) {
        match line.split_at_checked(1) {
            Some(("t", text)) => relay(Report::Talk(text)),
            Some(("r", text)) => {
                if let Some(ready) = parse_ready(text) {
                    relay(Report::Ready(&ready));
                }
                return Ok(());
            }
            Some(("f", text)) => {
                let (code, text) = text.split_at_checked(1).unwrap_or(("1", text));
                let exit = Exit::from_code(code.parse().unwrap_or(1));
                return Err(Failure::new(exit, text.replace(LINE_END, "\n")));
            }
            _ => talk(line),
        }
    }
    let status = child.wait().map_err(|error| cannot("wait for the daemon", &error))?;
    Err(Failure::failed(format_args!(
        "the daemon ended before it was ready ({status})\nhint: its last words are in {}",
        run.log().display()
    )))
}

fn parse_ready(text: &str) -> Option<Ready> {
    let mut fields = text.split('\t').map(str::to_owned);
    Some(Ready { name: fields.next()?, address: fields.next()?, head_address: fields.next()? })
}

/// Starts this process again, in its own place and with the same arguments, without RAYLESS_TOKEN: the kernel shows the environment that a
/// process began with for as long as it runs. The token goes through a pipe that is the new stdin. Returns only where that fails.
pub(crate) fn start_without_variable(token: &Token) -> Failure {
    let cannot = |error: io::Error| Failure::failed(format_args!("cannot start again without RAYLESS_TOKEN: {error}"));
    let prepared = || {
        let (read, mut write) = io::pipe()?;
        writeln!(write, "{}", token.expose())?;
        Ok((std::env::current_exe()?, read))
    };
    let (exe, read) = match prepared() {
        Ok(prepared) => prepared,
        Err(error) => return cannot(error),
    };
    let mut again = Command::new(exe);
    again.args(std::env::args_os().skip(1)).arg("--token-on-stdin").env_remove(TOKEN_VARIABLE).stdin(read);
    cannot(again.exec())
}

/// What it left there. Stdin then is /dev/null.
pub(crate) fn token_on_stdin() -> Result<Token, Failure> {
    let token = read_token();
    if let Ok(null) = fs::File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
    token
}

fn read_token() -> Result<Token, Failure> {
    let mut text = String::new();
    let read = io::stdin().take(256).read_to_string(&mut text);
    read.map_err(|error| Failure::failed(format_args!("no token from the starter: {error}")))?;
    text.trim().parse().map_err(|error| Failure::new(Exit::Refused, error))
}

/// The child's end of the pipes.
pub(crate) struct Starter {
    /// `None` once the starter has been told how it went.
    out: Option<io::Stdout>,
}

impl Starter {
    /// Leaves the starter's session and terminal.
    pub(crate) fn take() -> Result<Self, Failure> {
        // Fails only for a leader of a process group, which a process just started is not; then there is nothing to leave.
        let _ = rustix::process::setsid();
        std::env::set_current_dir("/").map_err(|error| Failure::failed(format_args!("cannot go to /: {error}")))?;
        Ok(Self { out: Some(io::stdout()) })
    }

    /// The token, from stdin.
    pub(crate) fn token(&self) -> Result<Token, Failure> {
        read_token()
    }

    /// Passes a line of talk on.
    pub(crate) fn talk(&mut self, line: &str) {
        self.send('t', line);
        if self.out.is_none() {
            tracing::info!("{line}");
        }
    }

    /// The node is ready: the starter returns.
    pub(crate) fn ready(&mut self, ready: &Ready) {
        let Ready { name, address, head_address } = ready;
        self.send('r', &format!("{name}\t{address}\t{head_address}"));
        self.let_go();
    }

    /// The daemon ends with this.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        self.send('f', &format!("{}{}", failure.exit as u8, failure.text));
        self.let_go();
    }

    fn send(&mut self, kind: char, text: &str) {
        if let Some(out) = &mut self.out {
            // A starter that went away (Ctrl-C) does not end the daemon: `rayless stop` does.
            let _ = writeln!(out, "{kind}{}", text.replace('\n', &LINE_END.to_string()));
            let _ = out.flush();
        }
    }

    fn let_go(&mut self) {
        if self.out.take().is_none() {
            return;
        }
        if let Ok(null) = fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    }
}
