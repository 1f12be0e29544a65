//! `rayless report`: all that is needed to understand what goes wrong, in one file to send to someone.
//!
//! Every part is asked for on its own and with a limit: a head, node or daemon that is dead or hangs costs its part, not the report. Keepers of this
//! host are asked directly, so its ranks' stacks and links come without any daemon; other nodes make their own part (`nodes`).

mod archive;
mod nodes;
mod scrub;
mod system;

use crate::{
    cli::ReportScope,
    message::{Failure, data, talk},
    status,
};
use archive::Archive;
use rayless_node::{run_dir::RunDir, status_text};
use rayless_proto::{
    BUILD,
    limits::{MAX_ENDED_GROUPS, MAX_REPORT_PART},
    v1::{link::LinkReport, status::StatusReport},
};
use rayless_worker::keeper::{self, Answer};
use std::{
    cmp::Reverse,
    fmt::Write as _,
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Bytes of the file.
const WHOLE: usize = 32 << 20;
/// Of each log the last bytes; where there is no room for so much, half of it, and so on down to the shortest that is worth a file.
const LOG_TAIL: u64 = 512 << 10;
const SHORTEST_TAIL: u64 = 8 << 10;
/// Of all logs of this host together, newest groups first.
const ALL_LOGS: u64 = 24 << 20;
/// Bytes of the file that says what is missing: packed it always has room.
const LONGEST_README: usize = 12 << 10;
/// A keeper answers within this, stacks of 256 ranks included.
const KEEPER_LIMIT: Duration = Duration::from_secs(6);
/// All keepers together, of which more than one may hang.
const KEEPERS_LIMIT: Duration = Duration::from_secs(8);

/// What is put together.
struct Report {
    archive: Archive,
    /// What could not be had, a line each.
    missing: Vec<String>,
}

/// `rayless report`
pub(crate) fn run(run: &RunDir, output: Option<PathBuf>, scope: ReportScope) -> Result<(), Failure> {
    let now = SystemTime::now();
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if scope == ReportScope::Part {
        return part(run, now, seconds);
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
    let folder = format!("rayless-report-{host}-{seconds}");
    let path = output.unwrap_or_else(|| PathBuf::from(format!("{folder}.tar.gz")));
    // Before the work: where it cannot be written, nothing of it is of use.
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(|error| {
        Failure::failed(format_args!(
            "cannot make {}: {error}\nhint: name a new file in a directory that you may write to with `--output`",
            path.display()
        ))
    })?;
    let mut report = Report { archive: Archive::new(&folder, seconds, WHOLE), missing: Vec::new() };
    let written = report
        .gather(run, now, scope)
        .and_then(|()| report.finish(seconds))
        .and_then(|bytes| file.write_all(&bytes).and_then(|()| file.sync_all()));
    if let Err(error) = written {
        let _ = fs::remove_file(&path);
        return Err(Failure::failed(format_args!(
            "cannot write {}: {error}\nhint: is its disk full? name another place with `--output`",
            path.display()
        )));
    }
    data(path.display());
    Ok(())
}

/// This host's part, to stdout.
fn part(run: &RunDir, now: SystemTime, seconds: u64) -> Result<(), Failure> {
    let mut report = Report { archive: Archive::new("", seconds, MAX_REPORT_PART), missing: Vec::new() };
    let made = report.gather(run, now, ReportScope::Part).and_then(|()| report.finish(seconds));
    let written = made.and_then(|bytes| {
        let mut out = io::stdout().lock();
        out.write_all(&bytes).and_then(|()| out.flush())
    });
    written.map_err(|error| Failure::failed(format_args!("cannot write this host's part: {error}")))
}

impl Report {
    fn gather(&mut self, run: &RunDir, now: SystemTime, scope: ReportScope) -> io::Result<()> {
        let daemon = run.daemon_pid();
        // Who asks for a part has the cluster's state.
        let status = if scope == ReportScope::Part { None } else { self.status(run, now)? };
        let answers = self.keepers(run)?;
        let mut pids: Vec<(String, u32)> = daemon.map(|pid| ("daemon".to_owned(), pid)).into_iter().collect();
        for answer in &answers {
            let keeper = fs::read_to_string(run.keeper_pid(answer.held.group)).ok();
            if let Some(pid) = keeper.and_then(|text| text.trim().parse().ok()) {
                pids.push((format!("keeper of group {}", answer.held.group), pid));
            }
            pids.extend(
                answer.ranks.iter().map(|rank| (format!("rank {} of {}", rank.rank, answer.held.group), rank.pid)),
            );
        }
        self.text("processes.txt", &system::processes(&pids))?;
        self.text("versions.txt", &versions(status.as_ref()))?;
        self.text("host.txt", &system::host(daemon))?;
        self.text("network.txt", &system::network())?;
        self.text("rdma.txt", &system::rdma())?;
        self.text("gpus.txt", &system::gpus())?;
        self.text("variables.txt", &system::variables())?;
        self.text("run-dir.txt", &listing(run.path()))?;
        self.logs(run)?;
        match (scope, status) {
            (ReportScope::Cluster, Some(status)) => self.nodes(run, &status),
            _ => Ok(()),
        }
    }

    /// The cluster as the head sees it.
    fn status(&mut self, run: &RunDir, now: SystemTime) -> io::Result<Option<StatusReport>> {
        match status::look(run) {
            Ok(report) => {
                // Its names are ours: only what looks like a token by itself is taken out, or it would be no JSON any more.
                self.add("status.json", scrub::known_forms(&report.to_json().to_string()).as_bytes())?;
                self.text("status.txt", &status_text::status(&report, now))?;
                self.text("environment.txt", &status_text::environment(&report))?;
                Ok(Some(report))
            }
            Err(failure) => {
                let cause = failure.cause().to_owned();
                self.missing.push(format!("status, events and the other nodes: {cause}"));
                Ok(None)
            }
        }
    }

    /// What the other nodes have to say.
    fn nodes(&mut self, run: &RunDir, status: &StatusReport) -> io::Result<()> {
        match status::own_node(run) {
            Ok(own) => nodes::gather(self, run, status, own),
            Err(failure) => {
                let cause = failure.cause().to_owned();
                self.missing.push(format!("the other nodes: {cause}"));
                Ok(())
            }
        }
    }

    /// What the ranks of this host do, and their links.
    fn keepers(&mut self, run: &RunDir) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::new();
        let end = Instant::now() + KEEPERS_LIMIT;
        for group in run.groups_with_keeper() {
            let left = end.saturating_duration_since(Instant::now());
            match keeper::ask(&run.keeper_socket(group), KEEPER_LIMIT.min(left)) {
                Ok(answer) => {
                    self.text(&format!("stacks-{group}.txt"), &stacks(&answer))?;
                    answers.push(answer);
                }
                Err(error) => self.missing.push(format!("stacks and links of group {group}: {error}")),
            }
        }
        let links: String =
            answers.iter().flat_map(|answer| answer.links.iter().map(|link| link_line(answer, link))).collect();
        self.text("links.txt", &links)?;
        Ok(answers)
    }

    fn logs(&mut self, run: &RunDir) -> io::Result<()> {
        let mut left = ALL_LOGS;
        self.log(&run.log(), "logs/daemon.log", &mut left)?;
        let mut groups: Vec<(SystemTime, PathBuf)> = fs::read_dir(run.logs())
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        groups.sort_by_key(|(changed, _)| Reverse(*changed));
        for (_, group) in groups.into_iter().take(MAX_ENDED_GROUPS) {
            let name = group.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let mut files: Vec<PathBuf> =
                fs::read_dir(&group).into_iter().flatten().flatten().map(|e| e.path()).collect();
            files.sort();
            for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "log")) {
                let log = file.file_name().unwrap_or_default().to_string_lossy();
                self.log(file, &format!("logs/{name}/{log}"), &mut left)?;
            }
        }
        Ok(())
    }

    fn log(&mut self, path: &Path, name: &str, left: &mut u64) -> io::Result<()> {
        let mut length = LOG_TAIL.min(*left);
        while length >= SHORTEST_TAIL {
            match tail(path, length) {
                Ok((text, cut)) => {
                    let head = if cut > 0 { format!("(the first {cut} bytes are left out)\n") } else { String::new() };
                    if self.archive.add(name, scrub::scrub(&format!("{head}{text}")).as_bytes())? {
                        *left -= (text.len() as u64).min(*left);
                        return Ok(());
                    }
                    length = (text.len() as u64).min(length) / 2;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => {
                    self.missing.push(format!("{name}: {error}"));
                    return Ok(());
                }
            }
        }
        self.large_enough(name);
        Ok(())
    }

    /// Adds a text, without the secrets that may be in it.
    fn text(&mut self, name: &str, text: &str) -> io::Result<()> {
        self.add(name, scrub::scrub(text).as_bytes())
    }

    fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        if !self.archive.add(name, content)? {
            self.large_enough(name);
        }
        Ok(())
    }

    fn large_enough(&mut self, name: &str) {
        self.missing.push(format!("{name}: the report is large enough without it"));
    }

    fn finish(&mut self, seconds: u64) -> io::Result<Vec<u8>> {
        let mut readme = format!("made by `rayless report` of rayless {BUILD}, {seconds} s after the Unix epoch\n");
        readme.push_str(
            "no tokens and no keys are in it; look through the logs before you give it away all the same\n\n",
        );
        if self.missing.is_empty() {
            readme.push_str("nothing is missing\n");
        }
        for line in &self.missing {
            talk(format_args!("missing: {line}"));
            let _ = writeln!(readme, "missing: {line}");
        }
        let end = (0..=readme.len().min(LONGEST_README)).rev().find(|at| readme.is_char_boundary(*at));
        readme.truncate(end.unwrap_or(0));
        self.archive.add_last("README.txt", scrub::scrub(&readme).as_bytes())?;
        let empty = Archive::new("", 0, 0);
        std::mem::replace(&mut self.archive, empty).finish()
    }
}

fn versions(status: Option<&StatusReport>) -> String {
    let mut out = format!("rayless (this command): {BUILD}\n");
    for node in status.map(|status| status.nodes.as_slice()).unwrap_or_default() {
        let all: Vec<String> = node.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        let _ = writeln!(out, "{}: {}", node.name, all.join(", "));
    }
    out
}

fn stacks(answer: &Answer) -> String {
    let mut out = format!("group {} ({}), {} ranks\n", answer.held.group, answer.held.name, answer.held.world_size);
    for rank in &answer.ranks {
        let _ = writeln!(out, "\n=== rank {} (pid {}): {}\n{}", rank.rank, rank.pid, rank.sentence(), rank.stack);
    }
    out
}

fn link_line(answer: &Answer, link: &LinkReport) -> String {
    let end = if link.by_sender { "sender" } else { "receiver" };
    let transport =
        link.transport.map_or_else(|| "none".to_owned(), |transport| format!("{transport:?}").to_lowercase());
    format!(
        "group {} rank {} -> rank {} channel {} ({end}): {:?} over {transport}, {} messages, {} bytes, mode {:?}, device {:?}, mtu {}, encrypted {}, verified {}, rejected {:?} {}\n",
        answer.held.group,
        link.from,
        link.to,
        link.channel,
        link.state,
        link.messages,
        link.bytes,
        link.mode,
        link.device,
        link.mtu,
        link.encrypted,
        link.verified,
        link.rejected,
        link.cause
    )
}

/// Names, sizes and modes of what is in the run dir. Contents of `token`, `node.key` and the like are never read.
fn listing(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let mut out = format!("{}\n", path.display());
    let mut left = vec![path.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten().take(1000) {
            let Ok(meta) = entry.metadata() else { continue };
            let name = entry.path();
            let shown = name.strip_prefix(path).unwrap_or(&name);
            let _ = writeln!(out, "{:06o} {:10} {}", meta.mode(), meta.len(), shown.display());
            if meta.is_dir() {
                left.push(name.clone());
            }
        }
    }
    out
}

/// The last bytes of a file as text, from the beginning of a line, and how many were left out before them.
fn tail(path: &Path, limit: u64) -> io::Result<(String, u64)> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    let cut = length.saturating_sub(limit);
    file.seek(SeekFrom::Start(cut))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    let begin =
        if cut == 0 { 0 } else { bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1) };
    Ok((String::from_utf8_lossy(&bytes[begin..]).into_owned(), cut + begin as u64))
}
