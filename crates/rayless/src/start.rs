//! `rayless head` and `rayless join`, in the foreground or (`--daemon`) in the background.

use crate::{
    background::{self, Report},
    cli::{NodeOptions, StoreOptions},
    message::{Exit, Failure, data, talk},
    token,
};
use rayless_net::token::Token;
use rayless_node::{
    daemon::{self, DaemonConfig, DaemonError, Ready, Role, Talk},
    knobs,
    run_dir::RunDir,
    store::StoreConfig,
};
use std::{
    fs,
    io::{IsTerminal as _, stdout},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};
use tracing_subscriber::{filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// A log longer than this is put aside at a start, so that the two together stay bounded by what happens in one life.
const LOG_LIMIT: u64 = 16 << 20;

/// What the node is to be.
pub(crate) enum As {
    /// The head, or with a store one of several.
    Head(Option<StoreOptions>),
    /// A node of the cluster of the head at this address.
    Node { address: String, wait: Duration },
}

/// Runs the node until it is stopped, or until it is ready where it goes on in the background.
pub(crate) fn run(run: &RunDir, what: As, options: NodeOptions) -> Result<(), Failure> {
    if options.child {
        return child(run, what, options);
    }
    run.create().map_err(Failure::failed)?;
    if let Some(pid) = run.daemon_pid() {
        // Checked again under the lock; here so that no token is made for nothing.
        let path = run.path().to_owned();
        return Err(Failure::failed(rayless_node::run_dir::RunDirError::Busy { path, pid }));
    }
    let given = if options.token_on_stdin {
        Some(background::token_on_stdin()?)
    } else {
        let given = Token::from_env().map_err(token::failure)?;
        match &given {
            Some(token) if !options.background => return Err(background::start_without_variable(token)),
            _ => given,
        }
    };
    let is_head = matches!(what, As::Head(_));
    let found = if is_head {
        token::find_or_make(run, options.token_file.as_deref(), given)?
    } else {
        token::required_or(run, options.token_file.as_deref(), given)?
    };
    let file = found.file;
    let on_ready = |ready: &Ready| {
        if is_head && !ready.head_address.is_empty() {
            let Ready { name, address, head_address } = ready;
            talk(format_args!(
                "{name} stands by at {address}; the head is at {head_address}; join from other hosts with:"
            ));
            data(join_line(&format!("{head_address},{address}"), &found.token, file.as_deref()));
        } else if is_head {
            talk(format_args!("head {} is ready at {}; join from the other hosts with:", ready.name, ready.address));
            data(join_line(&ready.address, &found.token, file.as_deref()));
        } else {
            talk(format_args!("{} ({}) has joined the cluster of {}", ready.name, ready.address, ready.head_address));
        }
    };
    if options.background {
        return background::start(run, &found.token, |report| match report {
            Report::Talk(line) => talk(line),
            Report::Ready(ready) => on_ready(ready),
        });
    }
    log_to(&run.log());
    let config = config(run, what, options, found.token.clone())?;
    daemon::run(config, &mut |said| match said {
        Talk::Line(line) => talk(line),
        Talk::Ready(ready) => on_ready(&ready),
    })
    .map_err(failure)
}

/// The background process: its words go to the one who started it until it is ready.
fn child(run: &RunDir, what: As, options: NodeOptions) -> Result<(), Failure> {
    let mut starter = background::Starter::take()?;
    log_to(&run.log());
    let outcome = match starter.token() {
        Ok(token) => config(run, what, options, token).and_then(|config| {
            daemon::run(config, &mut |said| match said {
                Talk::Line(line) => starter.talk(&line),
                Talk::Ready(ready) => starter.ready(&ready),
            })
            .map_err(failure)
        }),
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        tracing::error!("{}", error.text.replace('\n', "; "));
        starter.failed(error);
    }
    outcome
}

/// What to type on another host. The token itself goes to a terminal only.
fn join_line(address: &str, token: &Token, file: Option<&Path>) -> String {
    if stdout().is_terminal() {
        return format!("RAYLESS_TOKEN={} rayless join {address}", token.expose());
    }
    match file {
        Some(path) => format!("rayless join {address} --token-file {}", path.display()),
        None => format!("rayless join {address}"),
    }
}

fn config(run: &RunDir, what: As, options: NodeOptions, token: Token) -> Result<DaemonConfig, Failure> {
    let name = match options.name {
        Some(name) => name,
        None => fs::read_to_string("/proc/sys/kernel/hostname")
            .map_or_else(|_| "node".to_owned(), |name| name.trim().to_owned()),
    };
    let exe: PathBuf = std::env::current_exe()
        .map_err(|error| Failure::failed(format_args!("cannot find this program: {error}\nhint: is /proc mounted?")))?;
    Ok(DaemonConfig {
        run_dir: run.clone(),
        role: match what {
            As::Head(None) => Role::Head,
            As::Head(Some(StoreOptions { address, lease, access })) => {
                let store = StoreConfig::new(&address, &access).map_err(|error| Failure::new(Exit::Usage, error))?;
                Role::OneOfSeveral { store, lease }
            }
            As::Node { address, wait } => Role::Node { head: address, wait },
        },
        token,
        port: options.port,
        bind: options.bind,
        name,
        wishes: options.wishes,
        dead_after: options.dead_after,
        step_deadline: options.step_deadline,
        host_id: options.host_id,
        links: options.links,
        exe,
    })
}

fn failure(error: DaemonError) -> Failure {
    let exit = match &error {
        DaemonError::Usage(_) => Exit::Usage,
        DaemonError::Failed(_) => Exit::Failed,
        DaemonError::NoHead(_) => Exit::NoCluster,
        DaemonError::Refused(_) => Exit::Refused,
    };
    Failure::new(exit, error)
}

/// Sends `tracing` to the daemon's log. Without a log the daemon runs all the same.
fn log_to(path: &Path) {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > LOG_LIMIT) {
        let _ = fs::rename(path, path.with_extension("log.old"));
    }
    let opened = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            talk(format_args!("no log: cannot open {}: {error}", path.display()));
            return;
        }
    };
    let wanted = std::env::var(knobs::LOG.env).unwrap_or_else(|_| knobs::LOG.default.to_owned());
    let filter: Targets = wanted.parse().unwrap_or_else(|_| {
        talk(format_args!("{}=`{wanted}` is no filter; `info` is used", knobs::LOG.env));
        Targets::new().with_default(tracing::Level::INFO)
    });
    // QUIC and TLS speak of every packet at `info` and below; that is not news of a cluster.
    let filter = ["quinn", "quinn_proto", "quinn_udp", "rustls"].into_iter().fold(filter, |filter, target| {
        if wanted.contains(target) { filter } else { filter.with_target(target, tracing::Level::WARN) }
    });
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Mutex::new(file))
        .with_ansi(false)
        // It would say on stderr that the disk is full, and end the process where that fails too.
        .log_internal_errors(false);
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
}
