//! A worker's output: from its two pipes to its log file, to the driver, and into the memory of its last lines.
//!
//! A worker is never blocked by any of them for longer than a write to a file takes: on a full disk lines are dropped and counted, and a
//! driver that prints slowly gets fewer of them.

use super::step::LogSender;
use rayless_proto::ids::Rank;
use std::{
    cell::RefCell,
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    rc::Rc,
};
use tokio::{io::Interest, net::unix::pipe};

/// Bytes of a log file; then it becomes `.1` (taking the place of the one before) and a new one begins.
const FILE_BYTES: u64 = 64 << 20;
/// Lines remembered for the cause of a death.
const TAIL: usize = 20;
/// Characters of a remembered or forwarded line.
const LINE: usize = 4096;
/// Bytes without a newline that are held back for one.
const HELD: usize = 16 << 10;
const READ: usize = 16 << 10;

/// One rank's log.
pub(super) struct RankLog {
    rank: Rank,
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
    /// Lines that the disk did not take.
    lost: u64,
    /// Lines that the driver did not take.
    skipped: u64,
    tail: VecDeque<String>,
    last_stderr: String,
    forward: LogSender,
}

impl RankLog {
    pub(super) fn open(directory: &Path, rank: Rank, forward: LogSender) -> Self {
        let path = directory.join(format!("rank-{rank}.log"));
        let (file, bytes) = match open(&path) {
            Ok(file) => {
                let bytes = file.metadata().map_or(0, |meta| meta.len());
                (Some(file), bytes)
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no log file");
                (None, 0)
            }
        };
        Self {
            rank,
            path,
            file,
            bytes,
            lost: 0,
            skipped: 0,
            tail: VecDeque::new(),
            last_stderr: String::new(),
            forward,
        }
    }

    /// The last lines, newest last.
    pub(super) fn tail(&self) -> String {
        self.tail.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// The last line on stderr that says something; empty where there was none.
    pub(super) fn last_stderr(&self) -> &str {
        &self.last_stderr
    }

    /// A line of the keeper's own.
    pub(super) fn note(&mut self, text: &str) {
        self.line(format!("rayless: {text}\n").as_bytes(), true);
        self.forward.wake();
    }

    /// Text for the file alone: the driver gets it by another way.
    pub(super) fn keep(&mut self, text: &str) {
        self.write(text.as_bytes());
    }

    fn line(&mut self, bytes: &[u8], stderr: bool) {
        self.write(bytes);
        let text = String::from_utf8_lossy(bytes);
        let text = text.trim_end_matches(['\n', '\r']);
        // Of a progress bar that draws over itself only the last state is news.
        let text = text.rsplit('\r').next().unwrap_or_default();
        let text: String = text.chars().take(LINE).collect();
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(text.clone());
        if self.skipped > 0 {
            let told = format!("({} lines not shown here, see {})", self.skipped, self.path.display());
            if self.forward.send(self.rank, true, &told) {
                self.skipped = 0;
            }
        }
        if self.skipped > 0 || !self.forward.send(self.rank, stderr, &text) {
            self.skipped += 1;
        }
        if stderr && !text.trim().is_empty() {
            self.last_stderr = text;
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.bytes > 0 && self.bytes + bytes.len() as u64 > FILE_BYTES {
            let _ = fs::rename(&self.path, self.path.with_extension("log.1"));
            self.file = open(&self.path).ok();
            self.bytes = 0;
        }
        let Some(file) = &mut self.file else { return };
        if self.lost > 0 {
            let told = format!("rayless: {} lines lost, the disk was full\n", self.lost);
            if file.write_all(told.as_bytes()).is_ok() {
                self.lost = 0;
            }
        }
        match file.write_all(bytes) {
            Ok(()) => self.bytes += bytes.len() as u64,
            Err(_) => self.lost += 1,
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// One of a worker's two pipes.
pub(super) struct Pipe {
    receiver: pipe::Receiver,
    held: RefCell<Vec<u8>>,
    log: Rc<RefCell<RankLog>>,
    stderr: bool,
}

impl Pipe {
    pub(super) fn new(fd: impl Into<OwnedFd>, log: Rc<RefCell<RankLog>>, stderr: bool) -> io::Result<Self> {
        let receiver = pipe::Receiver::from_owned_fd(fd.into())?;
        Ok(Self { receiver, held: RefCell::default(), log, stderr })
    }

    /// Reads until the last holder of the other end is gone.
    pub(super) async fn follow(&self) {
        while self.receiver.ready(Interest::READABLE).await.is_ok() {
            if !self.drain() {
                return;
            }
            // One pipe that never runs dry must not starve the rest of the keeper.
            tokio::task::yield_now().await;
        }
    }

    /// Takes in what is there now (a bounded amount); `false` at the end.
    pub(super) fn drain(&self) -> bool {
        let mut buffer = [0; READ];
        let mut open = true;
        for _ in 0..8 {
            match self.receiver.try_read(&mut buffer) {
                Ok(0) => {
                    open = false;
                    break;
                }
                Ok(count) => self.take(&buffer[..count]),
                Err(error) => {
                    open = error.kind() == io::ErrorKind::WouldBlock;
                    break;
                }
            }
        }
        if !open {
            self.give_up_held();
        }
        self.log.borrow().forward.wake();
        open
    }

    /// Takes in what a worker that ends wrote last: also a line that has no end, though others (or the kernel) hold the pipe still.
    pub(super) fn last_words(&self) {
        if self.drain() {
            self.give_up_held();
            self.log.borrow().forward.wake();
        }
    }

    fn give_up_held(&self) {
        let rest = std::mem::take(&mut *self.held.borrow_mut());
        if !rest.is_empty() {
            self.log.borrow_mut().line(&rest, self.stderr);
        }
    }

    fn take(&self, bytes: &[u8]) {
        let mut held = self.held.borrow_mut();
        let mut log = self.log.borrow_mut();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            held.extend_from_slice(part);
            if part.ends_with(b"\n") || held.len() > HELD {
                log.line(&held, self.stderr);
                held.clear();
            }
        }
    }
}
