//! The cluster's tokens as a node keeps them on disk, once one of them was rotated.
//!
//! `tokens` in the run dir, mode 0600, a word and a value a line; replaced as a whole, so that a daemon that is started again at any
//! moment of a rotation finds the tokens from before or from after a step, never a mixture:
//!
//! ```text
//! current rl1_…
//! previous rl1_…       while both are accepted
//! until 1764000000     head only: when that ends, in seconds since the Unix epoch, if it was said
//! retired 0a1b2c3d4e5f6071     marks of tokens that were replaced
//! ```
//! Who starts the daemon may still give it one that was replaced (a file or a variable that nobody changed): it is known by its mark, and
//! the present one is used instead. Any other token means another cluster, and the file is removed.

use crate::run_dir::RunDir;
use rayless_net::token::{Token, write_secret};
use rayless_proto::{
    ids::TokenMark,
    v1::token::{MarkedToken, TokenSet},
};
use std::{
    fmt::Write as _,
    fs, io,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Marks of replaced tokens that are remembered.
const MAX_RETIRED: usize = 32;

/// The tokens could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The file is not one of ours.
    #[error(
        "{0} is damaged\nhint: remove it, and give this node the cluster's present token: `rayless token show` on the head"
    )]
    Damaged(PathBuf),
    /// The file system said no.
    #[error("cannot read {path}: {error}\nhint: choose another directory with `--run-dir` or RAYLESS_RUN_DIR")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// What a node accepts, and what it accepted before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    current: Token,
    previous: Option<Token>,
    until: Option<SystemTime>,
    retired: Vec<TokenMark>,
}

impl Tokens {
    /// The tokens of a daemon that was given `given`: those on disk if it is one of them or was replaced by them, else it alone.
    ///
    /// # Errors
    /// See [`TokensError`].
    pub fn load(run: &RunDir, given: &Token, now: SystemTime) -> Result<Self, TokensError> {
        let alone = Self { current: given.clone(), previous: None, until: None, retired: Vec::new() };
        let Some(mut kept) = Self::read(run)? else { return Ok(alone) };
        if !kept.knows(given) {
            // Nothing of that cluster is of use in this one.
            let _ = fs::remove_file(run.tokens());
            return Ok(alone);
        }
        if kept.until.is_some_and(|until| until <= now) {
            kept = kept.without_previous();
        }
        Ok(kept)
    }

    /// The token by which the one given was replaced in this run dir; `None` where it is still the present one or was never here.
    ///
    /// # Errors
    /// See [`TokensError`].
    pub fn successor(run: &RunDir, given: &Token) -> Result<Option<Token>, TokensError> {
        let kept = Self::read(run)?.filter(|kept| kept.knows(given) && kept.current != *given);
        Ok(kept.map(|kept| kept.current))
    }

    /// Puts them on disk: the record first, then the plain file for people, which names the current one.
    ///
    /// # Errors
    /// Those of the file system; what was on disk before then still is.
    pub fn save(&self, run: &RunDir) -> io::Result<()> {
        let mut text = format!("current {}\n", self.current.expose());
        if let Some(previous) = &self.previous {
            let _ = writeln!(text, "previous {}", previous.expose());
        }
        if let Some(until) = self.until.and_then(|until| until.duration_since(UNIX_EPOCH).ok()) {
            let _ = writeln!(text, "until {}", until.as_secs());
        }
        for mark in &self.retired {
            let _ = writeln!(text, "retired {mark}");
        }
        write_secret(&run.tokens(), text.as_bytes())?;
        self.save_plain(run)
    }

    /// Repairs the plain file after a crash between the two writes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save_plain(&self, run: &RunDir) -> io::Result<()> {
        if !self.was_rotated() || Token::read_file(&run.token()).is_ok_and(|token| token == self.current) {
            return Ok(());
        }
        write_secret(&run.token(), format!("{}\n", self.current.expose()).as_bytes())
    }

    /// These and a new one, which becomes the current one; `until`: when the present one is no longer accepted.
    #[must_use]
    pub fn rotated(&self, new: Token, until: Option<SystemTime>) -> Self {
        self.clone().replaced_by(new, Some(self.current.clone()), until)
    }

    /// The current one alone.
    #[must_use]
    pub fn without_previous(&self) -> Self {
        self.clone().replaced_by(self.current.clone(), None, None)
    }

    /// What a head says is in force.
    ///
    /// # Errors
    /// A line: it is not a set of tokens.
    pub fn told(&self, set: &TokenSet) -> Result<Self, String> {
        let read = |marked: &MarkedToken| {
            let token: Token =
                marked.text.parse().map_err(|_| "the head sent something that is no token".to_owned())?;
            if token.mark() == marked.mark {
                Ok(token)
            } else {
                Err("the head sent a token of another mark".to_owned())
            }
        };
        let previous = set.previous.as_ref().map(read).transpose()?;
        Ok(self.clone().replaced_by(read(&set.current)?, previous, None))
    }

    /// As they travel.
    pub fn set(&self) -> TokenSet {
        let marked = |token: &Token| MarkedToken { mark: token.mark(), text: token.expose() };
        TokenSet { current: marked(&self.current), previous: self.previous.as_ref().map(marked) }
    }

    /// The one to use.
    pub const fn current(&self) -> &Token {
        &self.current
    }

    /// The one before it, while it is still accepted.
    pub const fn previous(&self) -> Option<&Token> {
        self.previous.as_ref()
    }

    /// What is left of a stated overlap.
    pub fn overlap_left(&self, now: SystemTime) -> Option<Duration> {
        self.until.map(|until| until.duration_since(now).unwrap_or_default())
    }

    /// Whether there ever was another one.
    pub fn was_rotated(&self) -> bool {
        self.previous.is_some() || !self.retired.is_empty()
    }

    fn knows(&self, token: &Token) -> bool {
        self.current == *token || self.previous.as_ref() == Some(token) || self.retired.contains(&token.mark())
    }

    fn replaced_by(mut self, current: Token, previous: Option<Token>, until: Option<SystemTime>) -> Self {
        let accepted = |mark: &TokenMark| {
            *mark == current.mark() || previous.as_ref().is_some_and(|previous| previous.mark() == *mark)
        };
        let before = [Some(&self.current), self.previous.as_ref()].into_iter().flatten().map(Token::mark);
        self.retired.extend(before);
        self.retired.retain(|mark| !accepted(mark));
        self.retired.dedup();
        let surplus = self.retired.len().saturating_sub(MAX_RETIRED);
        self.retired.drain(..surplus);
        Self { current, previous, until, retired: self.retired }
    }

    fn read(run: &RunDir) -> Result<Option<Self>, TokensError> {
        let path = run.tokens();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(TokensError::Io { path, error }),
        };
        Self::parse(&text).map(Some).ok_or(TokensError::Damaged(path))
    }

    fn parse(text: &str) -> Option<Self> {
        let (mut current, mut previous, mut until, mut retired) = (None, None, None, Vec::new());
        for line in text.lines() {
            match line.split_once(' ')? {
                ("current", token) => current = Some(token.parse().ok()?),
                ("previous", token) => previous = Some(token.parse().ok()?),
                ("until", seconds) => until = Some(UNIX_EPOCH.checked_add(Duration::from_secs(seconds.parse().ok()?))?),
                ("retired", mark) => retired.push(mark.parse().ok()?),
                _ => return None,
            }
        }
        Some(Self { current: current?, previous, until, retired })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn fresh() -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::resolve(Some(dir.path().join("run")));
        run.create().unwrap();
        (dir, run)
    }

    #[test]
    fn a_daemon_that_is_given_a_replaced_token_uses_the_present_one() {
        let (_dir, run) = fresh();
        let now = SystemTime::now();
        let [first, second, third, other] = std::array::from_fn(|_| Token::generate().unwrap());
        let alone = Tokens::load(&run, &first, now).unwrap();
        assert!(!alone.was_rotated() && !run.tokens().exists());

        let both = alone.rotated(second.clone(), None);
        both.save(&run).unwrap();
        for file in [run.tokens(), run.token()] {
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(Token::read_file(&run.token()).unwrap(), second);
        assert_eq!(Tokens::load(&run, &first, now).unwrap(), both);
        assert_eq!(both.set().marks(), [second.mark(), first.mark()]);
        assert_eq!(Tokens::successor(&run, &first).unwrap(), Some(second.clone()));
        assert_eq!(Tokens::successor(&run, &second).unwrap(), None);

        both.without_previous().rotated(third.clone(), None).without_previous().save(&run).unwrap();
        for given in [&first, &second, &third] {
            let kept = Tokens::load(&run, given, now).unwrap();
            assert_eq!((kept.current(), kept.previous()), (&third, None));
        }
        // Another cluster's: the record of this one goes.
        assert_eq!(Tokens::successor(&run, &other).unwrap(), None);
        assert_eq!(Tokens::load(&run, &other, now).unwrap().current(), &other);
        assert!(!run.tokens().exists());
    }

    #[test]
    fn an_overlap_that_ended_while_the_head_was_down_is_over() {
        let (_dir, run) = fresh();
        let now = UNIX_EPOCH + Duration::from_secs(1_764_000_000);
        let [first, second] = std::array::from_fn(|_| Token::generate().unwrap());
        let until = now + Duration::from_secs(60);
        Tokens::load(&run, &first, now).unwrap().rotated(second, Some(until)).save(&run).unwrap();
        let kept = Tokens::load(&run, &first, now + Duration::from_secs(20)).unwrap();
        assert_eq!(kept.overlap_left(now + Duration::from_secs(20)), Some(Duration::from_secs(40)));
        assert_eq!(Tokens::load(&run, &first, until).unwrap().previous(), None);
    }

    #[test]
    fn a_crash_between_the_two_files_is_repaired_and_damage_is_told() {
        let (_dir, run) = fresh();
        let now = SystemTime::now();
        let [first, second] = std::array::from_fn(|_| Token::generate().unwrap());
        first.write_file(&run.token()).unwrap();
        Tokens::load(&run, &first, now).unwrap().rotated(second.clone(), None).save(&run).unwrap();
        first.write_file(&run.token()).unwrap();
        Tokens::load(&run, &first, now).unwrap().save_plain(&run).unwrap();
        assert_eq!(Token::read_file(&run.token()).unwrap(), second);
        for damaged in ["", "current rl1_x\n", "what is this\n"] {
            fs::write(run.tokens(), damaged).unwrap();
            let told = Tokens::load(&run, &first, now).unwrap_err().to_string();
            assert!(told.contains("is damaged\nhint: "), "{told}");
        }
    }

    #[test]
    fn a_head_may_say_what_is_in_force() {
        let [first, second] = std::array::from_fn(|_| Token::generate().unwrap());
        let (_dir, run) = fresh();
        let alone = Tokens::load(&run, &first, SystemTime::now()).unwrap();
        let mut set = alone.rotated(second.clone(), None).set();
        let told = alone.told(&set).unwrap();
        assert_eq!((told.current(), told.previous()), (&second, Some(&first)));
        set.current.mark = TokenMark([0; 8]);
        assert!(alone.told(&set).is_err());
        set.current.text = "rl1_".into();
        assert!(alone.told(&set).is_err());
    }
}
