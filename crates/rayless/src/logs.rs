//! `rayless logs`: the files in `logs/<group>/rank-<n>.log`, each line with its rank in front.

use crate::{
    cli::LogOptions,
    message::{Exit, Failure, talk},
};
use rayless_node::run_dir::RunDir;
use rayless_proto::{ids::Rank, limits::MAX_FRAGMENT};
use std::{
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// How often `-f` looks for more.
const FOLLOW_PERIOD: Duration = Duration::from_millis(200);

/// A file that is shown, and how far.
struct Shown {
    path: PathBuf,
    prefix: String,
    offset: u64,
    /// Read, but without its line end so far.
    rest: Vec<u8>,
}

/// `rayless logs`
pub(crate) fn run(run: &RunDir, options: &LogOptions) -> Result<(), Failure> {
    let mut shown = select(run, options)?;
    if shown.is_empty() && !options.follow {
        return Err(nothing(run, options));
    }
    loop {
        let mut any = false;
        for file in &mut shown {
            match file.show_more() {
                Ok(more) => any |= more,
                // A reader that had enough (`| head`) is no error.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => {
                    return Err(Failure::failed(format_args!("cannot show {}: {error}", file.path.display())));
                }
            }
        }
        if !any {
            if !options.follow {
                break;
            }
            thread::sleep(FOLLOW_PERIOD);
            // Ranks (with `--all`: groups) may have come meanwhile; a named group stays the one chosen at first.
            for found in select(run, options).unwrap_or_default() {
                if !shown.iter().any(|known| known.path == found.path) {
                    shown.push(found);
                }
            }
        }
    }
    for file in &mut shown {
        let _ = file.show_rest();
    }
    Ok(())
}

fn select(run: &RunDir, options: &LogOptions) -> Result<Vec<Shown>, Failure> {
    let groups = groups_by_age(&run.logs());
    if options.all {
        let mut all: Vec<Shown> = Vec::new();
        if run.log().exists() {
            all.push(Shown::new(run.log(), "daemon | ".to_owned()));
        }
        for dir in groups {
            let name: String = file_name(&dir).chars().take(8).collect();
            let keeper = dir.join("keeper.log");
            if keeper.exists() {
                all.push(Shown::new(keeper, format!("{name} keeper | ")));
            }
            all.extend(ranks(&dir).into_iter().map(|(rank, path)| Shown::new(path, format!("{name} rank {rank} | "))));
        }
        return Ok(all);
    }
    let chosen = match &options.group {
        None => groups.last(),
        Some(wanted) => {
            let mut matching = groups.iter().filter(|dir| file_name(dir).starts_with(wanted.as_str()));
            let first = matching.next();
            if matching.next().is_some() {
                return Err(Failure::new(
                    Exit::Usage,
                    format_args!("`{wanted}` may be several groups\nhint: give the id in full, see `rayless status`"),
                ));
            }
            first
        }
    };
    let Some(dir) = chosen else { return Ok(Vec::new()) };
    Ok(ranks(dir)
        .into_iter()
        .filter(|(rank, _)| options.rank.is_none_or(|wanted| wanted == *rank))
        .map(|(rank, path)| Shown::new(path, format!("rank {rank} | ")))
        .collect())
}

fn nothing(run: &RunDir, options: &LogOptions) -> Failure {
    let what = match (&options.group, options.rank) {
        (Some(group), Some(rank)) => format!("of rank {rank} of group `{group}` "),
        (Some(group), None) => format!("of group `{group}` "),
        (None, Some(rank)) => format!("of rank {rank} "),
        (None, None) => String::new(),
    };
    Failure::failed(format_args!(
        "no log {what}in {}\nhint: a rank's log is on the host it runs on, see `rayless status`; `--run-dir` names another daemon's",
        run.logs().display()
    ))
}

/// Log directories of groups, oldest first.
fn groups_by_age(logs: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(logs)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let meta = entry.metadata().ok().filter(fs::Metadata::is_dir)?;
            Some((meta.created().or_else(|_| meta.modified()).ok()?, entry.path()))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, path)| path).collect()
}

fn ranks(dir: &Path) -> Vec<(Rank, PathBuf)> {
    let mut found: Vec<(Rank, PathBuf)> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let rank = path.file_name()?.to_str()?.strip_prefix("rank-")?.strip_suffix(".log")?.parse().ok()?;
            Some((rank, path))
        })
        .collect();
    found.sort_unstable();
    found
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Shown {
    const fn new(path: PathBuf, prefix: String) -> Self {
        Self { path, prefix, offset: 0, rest: Vec::new() }
    }

    /// Shows the complete lines that came since; whether there were new bytes.
    fn show_more(&mut self) -> io::Result<bool> {
        let mut file = match fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() < self.offset {
            talk(format_args!("{}{} was cut short, from its beginning:", self.prefix, self.path.display()));
            self.offset = 0;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        // In pieces: a log may be larger than memory.
        let read = file.take(MAX_FRAGMENT as u64).read_to_end(&mut self.rest)?;
        self.offset += read as u64;
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut out = io::stdout().lock();
        for line in self.rest[..whole].split_inclusive(|byte| *byte == b'\n') {
            out.write_all(self.prefix.as_bytes())?;
            out.write_all(line)?;
        }
        out.flush()?;
        self.rest.drain(..whole);
        Ok(read > 0)
    }

    fn show_rest(&mut self) -> io::Result<()> {
        if self.rest.is_empty() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(self.prefix.as_bytes())?;
        out.write_all(&self.rest)?;
        out.write_all(b"\n")?;
        self.rest.clear();
        out.flush()
    }
}
