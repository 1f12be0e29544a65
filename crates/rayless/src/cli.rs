//! The command line: every argument that is a knob is built from its one declaration in `rayless_node::knobs`.

use crate::message::{Exit, Failure};
use clap::{
    Arg, ArgAction, ArgMatches, Command,
    builder::{BoolishValueParser, ValueParser},
    error::ErrorKind,
    parser::ValueSource,
    value_parser,
};
use rayless_node::{
    inventory::Wishes,
    knobs::{self, Knob},
    store::StoreAccess,
};
use rayless_proto::{
    ids::Rank,
    limits::{MAX_NAME, RDMA_PORTS},
    resources::Quantity,
    v1::link::{LinkPolicy, LinkSettings, LinkTransport},
};
use rayless_worker::links;
use std::{path::PathBuf, time::Duration};

/// What was asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    /// `--run-dir`.
    pub(crate) run_dir: Option<PathBuf>,
    /// The command.
    pub(crate) action: Action,
}

/// The command.
#[derive(Debug)]
pub(crate) enum Action {
    Head { store: Option<StoreOptions>, node: NodeOptions },
    Join { address: String, wait: Duration, node: NodeOptions },
    Status { json: bool, environment: bool },
    Stop(StopWhat),
    Token(TokenAction),
    Logs(LogOptions),
    Report { output: Option<PathBuf>, scope: ReportScope },
    BenchLink(Box<crate::bench::LinkOptions>),
    Keeper,
}

/// What `head` and `join` share.
#[derive(Debug)]
pub(crate) struct NodeOptions {
    pub(crate) port: u16,
    pub(crate) bind: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) wishes: Wishes,
    pub(crate) dead_after: Option<Duration>,
    pub(crate) step_deadline: Duration,
    pub(crate) host_id: Option<String>,
    pub(crate) links: LinkSettings,
    pub(crate) background: bool,
    /// Started by `--daemon`: token on stdin, readiness on stdout.
    pub(crate) child: bool,
    /// Started again by itself, without RAYLESS_TOKEN in its environment: that is on stdin.
    pub(crate) token_on_stdin: bool,
}

/// Where heads take turns.
#[derive(Debug)]
pub(crate) struct StoreOptions {
    pub(crate) address: String,
    pub(crate) lease: Duration,
    pub(crate) access: StoreAccess,
}

/// What `stop` ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum StopWhat {
    Daemon,
    Group(String),
    AllGroups,
}

/// What `token` does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum TokenAction {
    New,
    Show { file: Option<PathBuf> },
    Rotate { overlap: Option<Duration> },
    FinishRotation,
}

/// What a report is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReportScope {
    /// The cluster.
    Cluster,
    /// This host.
    Local,
    /// This host, for the daemon that asks for it by another node's wish: to stdout.
    Part,
}

/// What `logs` shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LogOptions {
    pub(crate) group: Option<String>,
    pub(crate) rank: Option<Rank>,
    pub(crate) all: bool,
    pub(crate) follow: bool,
}

/// Reads the process's arguments; help and version end the process.
pub(crate) fn parse() -> Result<Asked, Failure> {
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return Err(used_wrongly(&error));
        }
        // Help and version.
        Err(error) => error.exit(),
    };
    let run_dir = matches.get_one::<PathBuf>(knobs::RUN_DIR.flag).cloned();
    let action = match matches.subcommand() {
        Some(("head", found)) => Action::Head { store: store_options(found), node: node_options(found) },
        Some(("join", found)) => Action::Join {
            address: text(found, "address").unwrap_or_default(),
            wait: found.get_one::<Duration>(knobs::WAIT.flag).copied().unwrap_or_default(),
            node: node_options(found),
        },
        Some(("status", found)) => Action::Status { json: found.get_flag("json"), environment: found.get_flag("env") },
        Some(("stop", found)) => Action::Stop(match text(found, "group") {
            Some(group) => StopWhat::Group(group),
            None if found.get_flag("all") => StopWhat::AllGroups,
            None => StopWhat::Daemon,
        }),
        Some(("token", found)) => Action::Token(match found.subcommand() {
            Some(("show", found)) => {
                TokenAction::Show { file: found.get_one::<PathBuf>(knobs::TOKEN_FILE.flag).cloned() }
            }
            Some(("rotate", found)) if found.get_flag("finish") => TokenAction::FinishRotation,
            Some(("rotate", found)) => TokenAction::Rotate { overlap: found.get_one::<Duration>("overlap").copied() },
            _ => TokenAction::New,
        }),
        Some(("report", found)) => Action::Report {
            output: found.get_one::<PathBuf>("output").cloned(),
            scope: match (found.get_flag("part"), found.get_flag("local")) {
                (true, _) => ReportScope::Part,
                (false, true) => ReportScope::Local,
                (false, false) => ReportScope::Cluster,
            },
        },
        Some(("logs", found)) => Action::Logs(LogOptions {
            group: text(found, "group"),
            rank: found.get_one::<Rank>("rank").copied(),
            all: found.get_flag("all"),
            follow: found.get_flag("follow"),
        }),
        Some(("bench", found)) => Action::BenchLink(Box::new(crate::bench::link_options(
            found.subcommand().map_or(found, |(_, link)| link),
            knobs::TOKEN_FILE.flag,
        ))),
        _ => Action::Keeper,
    };
    Ok(Asked { run_dir, action })
}

/// What clap says, with a hint in place of its pointer to the help.
fn used_wrongly(error: &clap::Error) -> Failure {
    const CLAPS: &str = "\n\nFor more information, try '--help'.\n";
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    Failure::new(Exit::Usage, text.replace(CLAPS, "\nhint: `--help` behind the command shows what can be given"))
}

fn text(found: &ArgMatches, name: &str) -> Option<String> {
    found.get_one::<String>(name).cloned()
}

fn store_options(found: &ArgMatches) -> Option<StoreOptions> {
    let file = |knob: &Knob| found.get_one::<PathBuf>(knob.flag).cloned();
    Some(StoreOptions {
        address: text(found, knobs::STORE.flag)?,
        lease: found.get_one::<Duration>(knobs::STORE_LEASE.flag).copied().unwrap_or_default(),
        access: StoreAccess {
            ca: file(&knobs::STORE_CA),
            cert: file(&knobs::STORE_CERT),
            key: file(&knobs::STORE_KEY),
            user: text(found, knobs::STORE_USER.flag),
            password_file: file(&knobs::STORE_PASSWORD_FILE),
        },
    })
}

fn node_options(found: &ArgMatches) -> NodeOptions {
    NodeOptions {
        port: found.get_one::<u16>(knobs::PORT.flag).copied().unwrap_or(rayless_proto::limits::DEFAULT_PORT),
        bind: text(found, knobs::BIND.flag),
        name: text(found, knobs::NAME.flag),
        token_file: found.get_one::<PathBuf>(knobs::TOKEN_FILE.flag).cloned(),
        wishes: Wishes {
            gpus: found.get_one::<u32>(knobs::GPUS.flag).copied(),
            cpus: found.get_one::<Quantity>(knobs::CPUS.flag).copied(),
            custom: found
                .get_many::<(String, Quantity)>(knobs::RESOURCE.flag)
                .map(|all| all.cloned().collect())
                .unwrap_or_default(),
            shm_min_mib: found.get_one::<u64>(knobs::SHM_MIN.flag).copied(),
        },
        // `head` has a default here; `join` takes the cluster's unless told otherwise.
        dead_after: found.get_one::<Duration>(knobs::DEAD_AFTER.flag).copied(),
        step_deadline: found
            .get_one::<Duration>(knobs::STEP_DEADLINE.flag)
            .copied()
            .unwrap_or(rayless_proto::limits::STEP_DEADLINE),
        host_id: text(found, knobs::HOST_ID.flag),
        links: link_wishes(found),
        background: found.get_flag("daemon"),
        child: found.get_flag("daemon-child"),
        token_on_stdin: found.get_flag("token-on-stdin"),
    }
}

fn link_wishes(found: &ArgMatches) -> LinkSettings {
    let given = |knob: &Knob| found.get_one::<bool>(knob.flag).copied().unwrap_or_default();
    let said = found.value_source(knobs::ALLOW_TCP.flag).is_some_and(|source| source != ValueSource::DefaultValue);
    LinkSettings {
        policy: LinkPolicy {
            only: found.get_one::<Option<LinkTransport>>(knobs::TRANSPORT.flag).copied().flatten(),
            allow_tcp: said.then(|| given(&knobs::ALLOW_TCP)),
            encrypt: given(&knobs::ENCRYPT_TENSORS),
            verify: given(&knobs::VERIFY_LINKS),
        },
        rdma_ports: found.get_one::<(u16, u16)>(knobs::RDMA_PORTS.flag).copied().unwrap_or(RDMA_PORTS),
        rdma_devices: found
            .get_many::<String>(knobs::RDMA_DEVICE.flag)
            .map(|all| all.cloned().collect())
            .unwrap_or_default(),
    }
}

fn command() -> Command {
    let switch =
        |name: &'static str, help: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    Command::new("rayless")
        .version(rayless_proto::BUILD)
        .about("A few GPU hosts as one serving cluster: membership, placement, workers")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .arg(arg(&knobs::RUN_DIR, value_parser!(PathBuf)).global(true))
        .subcommand(
            node_command("head", "Start the head of a new cluster on this host")
                .arg(arg(&knobs::DEAD_AFTER, ValueParser::new(dead_after)))
                .arg(arg(&knobs::STORE, ValueParser::new(named)))
                .arg(arg(&knobs::STORE_LEASE, ValueParser::new(store_lease)))
                .args(
                    [&knobs::STORE_CA, &knobs::STORE_CERT, &knobs::STORE_KEY, &knobs::STORE_PASSWORD_FILE]
                        .map(|knob| arg(knob, value_parser!(PathBuf)).requires(knobs::STORE.flag)),
                )
                .arg(arg(&knobs::STORE_USER, ValueParser::new(named)).requires(knobs::STORE.flag)),
        )
        .subcommand(
            node_command("join", "Join this host to the cluster of a head, now or as soon as it is there")
                .arg(
                    Arg::new("address")
                        .value_name("ADDRESS")
                        .required(true)
                        .help("Head, as HOST[:PORT]; of several that take turns some or all, with commas"),
                )
                .arg(arg(&knobs::WAIT, ValueParser::new(seconds)))
                .arg(
                    arg(&knobs::DEAD_AFTER, ValueParser::new(dead_after)).default_value(None::<&str>).help(
                        "Silence that this node bears, of the head and of drivers [default: the head's value] (s)",
                    ),
                ),
        )
        .subcommand(
            Command::new("status")
                .about("Show nodes, GPUs with their holders, groups and what happened")
                .arg(switch("json", "For programs; its names are a contract"))
                .arg(
                    switch("env", "Show the environment that each node's workers get, and who set it")
                        .conflicts_with("json"),
                ),
        )
        .subcommand(
            Command::new("stop")
                .about("End the daemon of this host and its groups, or only groups")
                .arg(
                    Arg::new("group")
                        .long("group")
                        .value_name("GROUP")
                        .conflicts_with("all")
                        .help("Only this group, by its id, the beginning of it, or its name"),
                )
                .arg(switch("all", "Only groups, but all of the cluster")),
        )
        .subcommand(
            Command::new("token")
                .about("The secret that makes a host a member")
                .subcommand_required(true)
                .disable_help_subcommand(true)
                .subcommand(Command::new("new").about("Print a new token; nothing else is done with it"))
                .subcommand(
                    Command::new("show")
                        .about("Show this node's token on a terminal, elsewhere the path of its file")
                        .arg(arg(&knobs::TOKEN_FILE, value_parser!(PathBuf))),
                )
                .subcommand(
                    Command::new("rotate")
                        .about("Give all nodes a new token; the present one is accepted as well until `--finish`. On the head's host")
                        .arg(
                            Arg::new("overlap")
                                .long("overlap")
                                .value_name("SECONDS")
                                .value_parser(ValueParser::new(overlap))
                                .help("Refuse the present token after this time, without `--finish` (s)"),
                        )
                        .arg(switch("finish", "Refuse the token before the present one from here on").conflicts_with("overlap")),
                ),
        )
        .subcommand(
            Command::new("report")
                .about("Pack status, events, and of every node logs, stacks, links and what its host is like into one file to send to someone")
                .arg(
                    Arg::new("output")
                        .long("output")
                        .short('o')
                        .value_name("FILE")
                        .value_parser(value_parser!(PathBuf))
                        .help("Where to [default: rayless-report-HOST-TIME.tar.gz in this directory]"),
                )
                .arg(switch("local", "Only this host's part; no other node is asked"))
                .arg(switch("part", "Only this host's part, to stdout (started by the daemon)").hide(true)),
        )
        .subcommand(
            Command::new("logs")
                .about("Show what the workers on this host printed")
                .arg(
                    Arg::new("group")
                        .long("group")
                        .value_name("GROUP")
                        .help("Id of the group or the beginning of it [default: the newest]"),
                )
                .arg(
                    Arg::new("rank")
                        .long("rank")
                        .value_name("RANK")
                        .value_parser(value_parser!(Rank))
                        .help("Only this rank"),
                )
                .arg(switch("all", "All groups and the daemon").conflicts_with_all(["group", "rank"]))
                .arg(switch("follow", "Go on as lines come").short('f')),
        )
        .subcommand(crate::bench::command(arg(&knobs::TOKEN_FILE, value_parser!(PathBuf))))
        .subcommand(Command::new("keeper").hide(true).about("Run the workers of one group (started by the daemon)"))
}

fn node_command(name: &'static str, about: &'static str) -> Command {
    Command::new(name)
        .about(about)
        .arg(arg(&knobs::PORT, value_parser!(u16)))
        .arg(arg(&knobs::BIND, ValueParser::new(named)))
        .arg(arg(&knobs::NAME, ValueParser::new(named)))
        .arg(arg(&knobs::TOKEN_FILE, value_parser!(PathBuf)))
        .arg(arg(&knobs::GPUS, ValueParser::new(gpus)))
        .arg(arg(&knobs::CPUS, ValueParser::new(quantity)))
        .arg(arg(&knobs::RESOURCE, ValueParser::new(resource)).action(ArgAction::Append).value_delimiter(','))
        .arg(arg(&knobs::STEP_DEADLINE, ValueParser::new(seconds)))
        .arg(arg(&knobs::HOST_ID, ValueParser::new(named)))
        .arg(arg(&knobs::SHM_MIN, value_parser!(u64)))
        .arg(arg(&knobs::TRANSPORT, ValueParser::new(transport)))
        .arg(knob_switch(&knobs::ALLOW_TCP))
        .arg(knob_switch(&knobs::ENCRYPT_TENSORS))
        .arg(knob_switch(&knobs::VERIFY_LINKS))
        .arg(arg(&knobs::RDMA_PORTS, ValueParser::new(ports)))
        .arg(arg(&knobs::RDMA_DEVICE, ValueParser::new(named)).action(ArgAction::Append).value_delimiter(','))
        .arg(
            Arg::new("daemon")
                .long("daemon")
                .action(ArgAction::SetTrue)
                .help("Return once the node is ready (for `join`: taken by the head); it goes on in the background"),
        )
        .arg(Arg::new("daemon-child").long("daemon-child").action(ArgAction::SetTrue).hide(true))
        .arg(Arg::new("token-on-stdin").long("token-on-stdin").action(ArgAction::SetTrue).hide(true))
}

/// An argument from its knob.
fn arg(knob: &Knob, parser: impl clap::builder::IntoResettable<ValueParser>) -> Arg {
    let unit = if knob.unit.is_empty() { String::new() } else { format!(" ({})", knob.unit) };
    let arg = Arg::new(knob.flag)
        .long(knob.flag)
        .env(knob.env)
        .hide_env_values(true)
        .value_name(knob.value)
        .value_parser(parser)
        .help(format!("{}{unit}", knob.doc));
    if knob.default.is_empty() { arg } else { arg.default_value(knob.default) }
}

/// A switch from its knob; its variable takes 1, 0, true, false, yes, no, on, off.
fn knob_switch(knob: &Knob) -> Arg {
    arg(knob, BoolishValueParser::new()).value_name(None::<&str>).action(ArgAction::SetTrue)
}

fn transport(text: &str) -> Result<Option<LinkTransport>, String> {
    links::transport(text).ok_or_else(|| "not one of auto, rdma, shm, tcp".to_owned())
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let wrong = || "not of the form FIRST-LAST, with ports from 1 to 65535".to_owned();
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
    let (first, last) = (port(first)?, port(last)?);
    if first <= last { Ok((first, last)) } else { Err("the first port is above the last".to_owned()) }
}

fn named(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_NAME || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(format!("1 to {MAX_NAME} characters without white space"));
    }
    Ok(text.to_owned())
}

fn quantity(text: &str) -> Result<Quantity, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    Quantity::from_f64(number).map_err(|_| "not a quantity: a number from 0 up, in steps of 0.0001".to_owned())
}

fn resource(text: &str) -> Result<(String, Quantity), String> {
    let (name, amount) = text.split_once('=').ok_or("not of the form NAME=N")?;
    Ok((named(name)?, quantity(amount)?))
}

fn gpus(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(count) if count <= 1024 => Ok(count),
        _ => Err("not a number of GPUs, 0 to 1024".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if !(0.0..=31_536_000.0).contains(&number) {
        return Err("not a number of seconds from 0 to a year".to_owned());
    }
    Ok(Duration::from_secs_f64(number))
}

fn store_lease(text: &str) -> Result<Duration, String> {
    let lease = seconds(text)?;
    // etcd grants whole seconds, and none shorter.
    if lease < Duration::from_secs(2) || lease > Duration::from_secs(600) || lease.subsec_nanos() != 0 {
        return Err("2 to 600 whole seconds".to_owned());
    }
    Ok(lease)
}

fn overlap(text: &str) -> Result<Duration, String> {
    let overlap = seconds(text)?;
    if overlap < Duration::from_secs(1) {
        return Err("at least 1: the nodes must hear of the new one".to_owned());
    }
    Ok(overlap)
}

fn dead_after(text: &str) -> Result<Duration, String> {
    let limit = seconds(text)?;
    // Under two heartbeats a single lost packet would be a death.
    if limit < Duration::from_secs(1) {
        return Err("at least 1: heartbeats come each half second".to_owned());
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_holds_together() {
        command().debug_assert();
    }

    #[test]
    fn values_are_checked() {
        assert!(named("a b").is_err() && named("").is_err() && named("node-1").is_ok());
        assert!(resource("nvme=2").is_ok() && resource("nvme").is_err() && resource("=1").is_err());
        assert!(seconds("-1").is_err() && seconds("nan").is_err() && seconds("0").is_ok());
        assert!(dead_after("0.5").is_err() && dead_after("3").is_ok());
        assert!(
            ports("6400-6463") == Ok((6400, 6463))
                && ports("1-0").is_err()
                && ports("0-9").is_err()
                && ports("7").is_err()
        );
        assert!(
            transport("shm") == Ok(Some(LinkTransport::Shm))
                && transport("auto") == Ok(None)
                && transport("ib").is_err()
        );
        assert!(gpus("1025").is_err() && gpus("-1").is_err() && gpus("8").is_ok());
    }
}
