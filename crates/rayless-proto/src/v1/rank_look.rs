//! What a rank does, as people read it.

use super::{control::WorkerState, step::RankLook};
use std::fmt::Write as _;

impl RankLook {
    /// Whether it runs something and has made no progress for `still_ms` milliseconds.
    pub fn is_stuck(&self, still_ms: u64) -> bool {
        matches!(self.state, WorkerState::Busy | WorkerState::Starting) && self.still_ms >= still_ms
    }

    /// `12 s in execute_model (call 17), last received message 33 from rank 0`.
    pub fn sentence(&self) -> String {
        let seconds = self.still_ms / 1000;
        let mut text = match self.state {
            WorkerState::Ready => format!("waits for call {}", self.call + 1),
            WorkerState::Dead => "is dead".to_owned(),
            WorkerState::Starting if self.pid == 0 => "is not started".to_owned(),
            WorkerState::Starting => format!("{seconds} s in its start"),
            WorkerState::Busy => {
                let doing = if self.doing.is_empty() { "a method" } else { &self.doing };
                format!("{seconds} s in {doing} (call {})", self.call)
            }
        };
        if let Some(link) = self.link {
            let (verb, preposition) = if link.receiving { ("received", "from") } else { ("sent", "to") };
            let channel = if link.channel == 0 { String::new() } else { format!(" on channel {}", link.channel) };
            let _ = write!(text, ", last {verb} message {} {preposition} rank {}{channel}", link.sequence, link.peer);
        }
        text
    }

    /// The stack of the thread that runs the calls, at most `lines` lines of it, innermost first; of another program than a rayless worker, of
    /// its first thread.
    pub fn excerpt(&self, lines: usize) -> Vec<&str> {
        let threads: Vec<&str> =
            self.stack.split("\n\n").filter(|part| part.contains("(most recent call first)")).collect();
        let runs_calls = |part: &&&str| part.contains("_worker.py\", line") && part.contains(" in _handle");
        // Python names its threads newest first.
        let thread = threads.iter().find(runs_calls).or_else(|| threads.last()).copied().unwrap_or(&self.stack);
        let frames = thread.lines().filter(|line| !line.is_empty() && !line.contains("(most recent call first)"));
        frames.filter(|line| !line.starts_with("kernel: ") || threads.is_empty()).take(lines).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::step::LinkMoved, *};

    fn rank() -> RankLook {
        RankLook {
            rank: 3,
            pid: 7,
            state: WorkerState::Busy,
            call: 17,
            doing: "execute_model".into(),
            still_ms: 12_345,
            link: Some(LinkMoved { peer: 0, channel: 0, receiving: true, sequence: 33 }),
            stack: String::new(),
        }
    }

    #[test]
    fn a_sentence_names_method_call_link_and_time() {
        let mut rank = rank();
        assert_eq!(rank.sentence(), "12 s in execute_model (call 17), last received message 33 from rank 0");
        assert!(rank.is_stuck(12_345) && !rank.is_stuck(12_346));
        (rank.state, rank.link) = (WorkerState::Ready, None);
        assert_eq!(rank.sentence(), "waits for call 18");
        assert!(!rank.is_stuck(0));
    }

    #[test]
    fn an_excerpt_is_of_the_thread_that_runs_the_calls() {
        let mut rank = rank();
        rank.stack = concat!(
            "Thread 0x2 (most recent call first):\n  File \"threading.py\", line 1 in wait\n\n",
            "Current thread 0x1 (most recent call first):\n  File \"model.py\", line 9 in forward\n",
            "  File \"rayless/_worker.py\", line 80 in _handle\n",
            "kernel: thread 7 (python) sleeps\n",
        )
        .into();
        assert_eq!(rank.excerpt(1), ["  File \"model.py\", line 9 in forward"]);
        assert_eq!(rank.excerpt(9).len(), 2);
        rank.stack = "kernel: thread 7 (worker) sleeps in nanosleep\n".into();
        assert_eq!(rank.excerpt(9), ["kernel: thread 7 (worker) sleeps in nanosleep"]);
    }
}
