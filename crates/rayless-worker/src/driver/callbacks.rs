//! The thread on which a group calls its driver's code, so that code may block without keeping a session from its pings.

use super::{GroupFailure, LogLine, StuckReport};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
};

/// Lines that wait for a slow driver; more are dropped and counted.
const LINES: usize = 4096;

/// Calls that the life of a group makes on the driver. They run one after another on a thread of their own, never on the caller's
/// and never on the one that keeps the sessions alive, so that they may block.
#[derive(Default)]
pub struct Callbacks {
    /// Lines of the workers' output. Dropped (and counted) while this is slow.
    pub on_log: Option<Box<dyn Fn(LogLine) + Send>>,
    /// The group failed: once.
    pub on_failure: Option<Box<dyn FnOnce(GroupFailure) + Send>>,
    /// The group makes no progress: again and again, with growing pauses, while that is so.
    pub on_stuck: Option<Box<dyn Fn(StuckReport) + Send>>,
}

impl std::fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callbacks").finish_non_exhaustive()
    }
}

enum Job {
    Log(LogLine),
    Failure(GroupFailure),
    Stuck(StuckReport),
    Run(Box<dyn FnOnce() + Send>),
}

/// The sending end.
pub(super) struct CallbackThread {
    /// `None` once the group is over: the thread does what is left and ends.
    jobs: Option<Sender<Job>>,
    lines: Arc<AtomicUsize>,
    dropped: usize,
}

impl CallbackThread {
    pub(super) fn start(callbacks: Callbacks) -> io::Result<Self> {
        let (jobs, receiver) = channel();
        let lines = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&lines);
        std::thread::Builder::new().name("rayless-calls".into()).spawn(move || run(callbacks, &receiver, &counted))?;
        Ok(Self { jobs: Some(jobs), lines, dropped: 0 })
    }

    pub(super) fn log(&mut self, mut line: LogLine) {
        if self.lines.load(Ordering::Relaxed) >= LINES {
            self.dropped += 1;
            return;
        }
        if self.dropped > 0 {
            let text = format!("({} lines not shown here, see the log files of the ranks)", self.dropped);
            self.dropped = 0;
            self.push(Job::Log(LogLine { text, ..line.clone() }));
            self.lines.fetch_add(1, Ordering::Relaxed);
        }
        self.lines.fetch_add(1, Ordering::Relaxed);
        line.text.shrink_to_fit();
        self.push(Job::Log(line));
    }

    pub(super) fn failure(&self, failure: GroupFailure) {
        self.push(Job::Failure(failure));
    }

    pub(super) fn stuck(&self, report: StuckReport) {
        self.push(Job::Stuck(report));
    }

    /// `job` on that thread; after the end of the group on this one.
    pub(super) fn run(&self, job: Box<dyn FnOnce() + Send>) {
        self.push(Job::Run(job));
    }

    /// Nothing more comes.
    pub(super) fn close(&mut self) {
        self.jobs = None;
    }

    fn push(&self, job: Job) {
        match (&self.jobs, job) {
            (Some(jobs), job) => {
                let _ = jobs.send(job);
            }
            (None, Job::Run(job)) => job(),
            (None, Job::Log(_) | Job::Failure(_) | Job::Stuck(_)) => {}
        }
    }
}

fn run(callbacks: Callbacks, jobs: &Receiver<Job>, lines: &AtomicUsize) {
    let Callbacks { on_log, mut on_failure, on_stuck } = callbacks;
    for job in jobs {
        match job {
            Job::Log(line) => {
                lines.fetch_sub(1, Ordering::Relaxed);
                if let Some(on_log) = &on_log {
                    on_log(line);
                }
            }
            Job::Failure(failure) => {
                if let Some(on_failure) = on_failure.take() {
                    on_failure(failure);
                }
            }
            Job::Stuck(report) => {
                if let Some(on_stuck) = &on_stuck {
                    on_stuck(report);
                }
            }
            Job::Run(job) => job(),
        }
    }
}
