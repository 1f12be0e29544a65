//! The arguments of `rayless bench`.

use super::{DEFAULT_PORT, DEFAULT_SIZES, LinkOptions, Side, sizes};
use clap::{Arg, ArgAction, ArgMatches, Command, builder::ValueParser, value_parser};
use rayless_fabric::{Level, MAX_STREAMS};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

const LISTEN_ANYWHERE: &str = "0.0.0.0";

const EXAMPLES: &str = "On one host:        rayless bench link
Between two hosts:  rayless bench link --listen                     (on the one)
                    rayless bench link --to 10.0.0.1 --plot links.svg   (on the other)

A hop is half of a round trip: a message of two tensors there, and one of the same size back. The bandwidth is that of such messages one
way, one after the other. Both hosts need the cluster's token, as `head` and `join` do.";

/// `bench`, with its subcommands.
pub(crate) fn command(token_file: Arg) -> Command {
    let switch =
        |name: &'static str, help: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    let link = Command::new("link")
        .about("Measure links, as tensors between pipeline stages travel: latency and bandwidth by size")
        .after_help(EXAMPLES)
        .arg(
            Arg::new("listen")
                .long("listen")
                .value_name("ADDRESS[:PORT]")
                .num_args(0..=1)
                .default_missing_value(LISTEN_ANYWHERE)
                .value_parser(ValueParser::new(listen_address))
                .conflicts_with_all(["to", "peer"])
                .help(format!("Be the other side of measurements from other hosts [default port: {DEFAULT_PORT}]")),
        )
        .arg(Arg::new("to").long("to").value_name("HOST[:PORT]").help("Measure with a host on which `--listen` waits"))
        .arg(
            Arg::new("transport")
                .long("transport")
                .value_name("TRANSPORT")
                .value_delimiter(',')
                .action(ArgAction::Append)
                .value_parser(ValueParser::new(transport))
                .help("shm, rdma, tcp, or several [default: all that there are]"),
        )
        .arg(
            Arg::new("sizes")
                .long("sizes")
                .value_name("SIZES")
                .value_delimiter(',')
                .value_parser(ValueParser::new(sizes))
                .default_value(DEFAULT_SIZES)
                .hide_default_value(true)
                .help("Sizes of a message, 1 B to 1 GiB [default: 13 from 1 B to 256 MiB]"),
        )
        .arg(
            Arg::new("seconds")
                .long("seconds")
                .value_name("S")
                .value_parser(ValueParser::new(time))
                .default_value("1")
                .help("For each size, for latency and again for bandwidth (s)"),
        )
        .arg(
            Arg::new("streams")
                .long("streams")
                .value_name("N")
                .value_parser(value_parser!(u16).range(1..=MAX_STREAMS as i64))
                .default_value("4")
                .help("TCP streams of a link; payloads from 1 MiB on use all of them"),
        )
        .arg(switch("verify", "With a checksum over each payload, as --verify-links does it"))
        .arg(
            Arg::new("stall")
                .long("stall")
                .value_name("S")
                .value_parser(ValueParser::new(time))
                .default_value("60")
                .help("Give up when one message takes longer than this (s)"),
        )
        .arg(
            Arg::new("rdma-address")
                .long("rdma-address")
                .value_name("IP")
                .value_parser(value_parser!(IpAddr))
                .help("Address of this host's RDMA device [default: of one towards the other host, else of the first]"),
        )
        .arg(switch("json", "All results as one JSON document").conflicts_with("listen"))
        .arg(
            Arg::new("plot")
                .long("plot")
                .value_name("FILE.svg")
                .value_parser(value_parser!(PathBuf))
                .conflicts_with("listen")
                .help("Also draw latency and bandwidth over size, as SVG"),
        )
        .arg(token_file)
        .arg(switch("peer", "The other side, started by the command itself").hide(true));
    Command::new("bench")
        .about("Measure what this host, or two of them, can do")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(link)
}

/// What `bench link` was given.
pub(crate) fn link_options(found: &ArgMatches, token_file: &'static str) -> LinkOptions {
    let side = match (found.get_one::<SocketAddr>("listen"), found.get_one::<String>("to")) {
        (Some(address), _) => Side::Listen(*address),
        (None, Some(to)) => Side::To(to.clone()),
        (None, None) if found.get_flag("peer") => Side::Child,
        (None, None) => Side::OneHost,
    };
    LinkOptions {
        side,
        transports: found.get_many::<Level>("transport").map(|all| all.copied().collect()).unwrap_or_default(),
        sizes: found.get_many::<u64>("sizes").map(|all| all.copied().collect()).unwrap_or_default(),
        time: found.get_one::<Duration>("seconds").copied().unwrap_or_default(),
        streams: found.get_one::<u16>("streams").copied().map_or(1, usize::from),
        verify: found.get_flag("verify"),
        stall: found.get_one::<Duration>("stall").copied().unwrap_or_default(),
        rdma_address: found.get_one::<IpAddr>("rdma-address").copied(),
        json: found.get_flag("json"),
        plot: found.get_one::<PathBuf>("plot").cloned(),
        token_file: found.get_one::<PathBuf>(token_file).cloned(),
    }
}

fn transport(text: &str) -> Result<Level, String> {
    let all = [Level::Shm, Level::Rdma, Level::Tcp];
    all.into_iter().find(|level| level.name() == text).ok_or_else(|| "not shm, rdma or tcp".to_owned())
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, DEFAULT_PORT));
    }
    let port = text.parse().map_err(|_| "not ADDRESS, PORT or ADDRESS:PORT".to_owned())?;
    Ok(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
}

fn time(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if !(0.001..=3600.0).contains(&seconds) {
        return Err("not from 0.001 to 3600 seconds".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> LinkOptions {
        let command = command(Arg::new("token-file").long("token-file").value_parser(value_parser!(PathBuf)));
        let matches = command.try_get_matches_from([&["bench", "link"], words].concat()).unwrap();
        link_options(matches.subcommand().unwrap().1, "token-file")
    }

    #[test]
    fn sides_and_lists_read_as_they_are_meant() {
        let plain = options(&[]);
        assert!(matches!(plain.side, Side::OneHost) && plain.transports.is_empty() && plain.sizes.len() == 13);
        for (words, expected) in [
            (&["--listen"][..], "0.0.0.0:6390"),
            (&["--listen", "10.0.0.1"], "10.0.0.1:6390"),
            (&["--listen", "7000"], "0.0.0.0:7000"),
            (&["--listen", "[::1]:7000"], "[::1]:7000"),
        ] {
            assert!(matches!(options(words).side, Side::Listen(at) if at.to_string() == expected), "{words:?}");
        }
        let asked = options(&["--to", "host", "--transport", "tcp,rdma", "--sizes", "1,28KiB", "--seconds", "0.1"]);
        assert!(matches!(asked.side, Side::To(host) if host == "host"));
        assert_eq!(asked.transports, [Level::Tcp, Level::Rdma]);
        assert_eq!((asked.sizes, asked.time), (vec![1, 28 << 10], Duration::from_millis(100)));
    }
}
