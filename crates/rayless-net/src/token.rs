//! The cluster token: the one secret by which a cluster knows its own.
//!
//! Text form: `rl1_` and 32 characters of Crockford's base 32 in lower case (no `i`, `l`, `o`, `u`): 128 random bits,
//! then the first 32 bits of SHA-256 over `rl1` and those. A double click selects all of it, it needs no quotes
//! in a shell, and a slip of the hand is found before anything is sent.

use rayless_proto::ids::TokenMark;
use ring::{
    digest,
    rand::{SecureRandom, SystemRandom},
};
use std::{
    fmt, fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Name of the environment variable that carries a token. It is taken out of every child's environment.
pub const TOKEN_VARIABLE: &str = "RAYLESS_TOKEN";

const PREFIX: &str = "rl1_";
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const SECRET: usize = 16;
const CHECKSUM: usize = 4;
const CHARACTERS: usize = (SECRET + CHECKSUM) * 8 / 5;
/// A token file holds a token and a newline; anything longer is another file.
const MAX_FILE: u64 = 256;

/// The secret. Neither `Debug` nor any error shows it; [`Token::expose`] does.
#[derive(Clone, PartialEq, Eq)]
pub struct Token([u8; SECRET]);

/// The text is not a token. It is not repeated in the message: it may be one with a slip in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "malformed cluster token: {0}\nhint: copy all of it, `rl1_` and 32 characters, from the file that `rayless head` names, or make one with `rayless token new`"
)]
pub struct MalformedToken(&'static str);

/// A token could not be read from, or written to, a file or the environment.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// There is no such file (a head then makes one).
    #[error("no token file {0}\nhint: copy the head's token file to this host, or set RAYLESS_TOKEN")]
    NoFile(PathBuf),
    /// The file or variable holds something else.
    #[error("{source_name}: {error}")]
    Malformed {
        /// The file or variable.
        source_name: String,
        /// What is wrong with it.
        error: MalformedToken,
    },
    /// The file could not be read or written.
    #[error("token file {path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
}

impl Token {
    /// A new token from the system's random numbers.
    ///
    /// # Errors
    /// The system has none to give.
    pub fn generate() -> io::Result<Self> {
        let mut secret = [0; SECRET];
        SystemRandom::new().fill(&mut secret).map_err(|_| io::Error::other("no random numbers from the system"))?;
        Ok(Self(secret))
    }

    /// The text form. Show it on a terminal only, never in a log, an argument or an error.
    pub fn expose(&self) -> String {
        let mut bytes = [0; SECRET + CHECKSUM];
        bytes[..SECRET].copy_from_slice(&self.0);
        bytes[SECRET..].copy_from_slice(&checksum(&self.0));
        let mut text = String::with_capacity(PREFIX.len() + CHARACTERS);
        text.push_str(PREFIX);
        for five in bytes.chunks_exact(5) {
            let word = five.iter().fold(0u64, |all, b| all << 8 | u64::from(*b));
            text.extend((0..8).rev().map(|i| char::from(ALPHABET[(word >> (5 * i) & 31) as usize])));
        }
        text
    }

    /// Tells it from others without showing it: the first bytes of a hash of 128 random bits.
    pub fn mark(&self) -> TokenMark {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"rayless token mark");
        context.update(&self.0);
        let mut mark = [0; 8];
        mark.copy_from_slice(&context.finish().as_ref()[..8]);
        TokenMark(mark)
    }

    /// The secret bits, for key derivation.
    pub(crate) fn secret(&self) -> &[u8; SECRET] {
        &self.0
    }

    /// Reads a token file; white space around the token is dropped.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn read_file(path: &Path) -> Result<Self, TokenError> {
        let error = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => TokenError::NoFile(path.to_owned()),
            _ => TokenError::Io { path: path.to_owned(), error },
        };
        let malformed = |error| TokenError::Malformed { source_name: format!("token file {}", path.display()), error };
        let file = fs::File::open(path).map_err(error)?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_FILE), &mut bytes).map_err(error)?;
        let text = str::from_utf8(&bytes).map_err(|_| malformed(MalformedToken("it is not text")))?;
        text.trim().parse().map_err(malformed)
    }

    /// The token in `RAYLESS_TOKEN`; `None` where that is not set or empty.
    ///
    /// # Errors
    /// [`TokenError::Malformed`].
    pub fn from_env() -> Result<Option<Self>, TokenError> {
        match std::env::var_os(TOKEN_VARIABLE) {
            None => Ok(None),
            Some(text) if text.is_empty() => Ok(None),
            Some(text) => text
                .to_str()
                .ok_or(MalformedToken("it is not text"))
                .and_then(|text| text.trim().parse())
                .map(Some)
                .map_err(|error| TokenError::Malformed { source_name: TOKEN_VARIABLE.to_owned(), error }),
        }
    }

    /// Writes the token file, mode 0600, all of it or nothing: a reader never sees half a token.
    ///
    /// # Errors
    /// [`TokenError::Io`].
    pub fn write_file(&self, path: &Path) -> Result<(), TokenError> {
        write_secret(path, format!("{}\n", self.expose()).as_bytes())
            .map_err(|error| TokenError::Io { path: path.to_owned(), error })
    }
}

impl FromStr for Token {
    type Err = MalformedToken;

    fn from_str(text: &str) -> Result<Self, MalformedToken> {
        let body = text.strip_prefix(PREFIX).ok_or(MalformedToken("it does not start with `rl1_`"))?;
        if body.len() != CHARACTERS {
            return Err(MalformedToken("it has not the right length"));
        }
        let mut bytes = [0; SECRET + CHECKSUM];
        for (eight, out) in body.as_bytes().chunks_exact(8).zip(bytes.chunks_exact_mut(5)) {
            let mut word = 0u64;
            for character in eight {
                let digit = ALPHABET
                    .iter()
                    .position(|c| c == character)
                    .ok_or(MalformedToken("it has a character that no token has"))?;
                word = word << 5 | digit as u64;
            }
            out.copy_from_slice(&word.to_be_bytes()[3..]);
        }
        let mut secret = [0; SECRET];
        secret.copy_from_slice(&bytes[..SECRET]);
        if bytes[SECRET..] != checksum(&secret) {
            return Err(MalformedToken("its checksum is wrong, a character was changed"));
        }
        Ok(Self(secret))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

fn checksum(secret: &[u8; SECRET]) -> [u8; CHECKSUM] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"rl1");
    context.update(secret);
    let mut out = [0; CHECKSUM];
    out.copy_from_slice(&context.finish().as_ref()[..CHECKSUM]);
    out
}

/// Writes `bytes` to `path` with mode 0600 by way of a file beside it, renamed when it is complete and on the disk.
///
/// # Errors
/// Those of the file system; `path` then is as it was.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.new", std::process::id()));
    let beside = PathBuf::from(beside);
    // A file left by a killed process of the same pid would keep its mode.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_text_form_reads_back_and_stays_as_it_is() {
        let token = Token(*b"0123456789abcdef");
        assert_eq!(token.expose(), "rl1_60rk4csm6mv3ee1sc5h66s35csrgesv7");
        assert_eq!(token.expose().parse(), Ok(token));
        let fresh = Token::generate().unwrap();
        assert_eq!(fresh.expose().parse(), Ok(fresh));
    }

    #[test]
    fn anything_else_is_refused_and_not_repeated() {
        let good = Token::generate().unwrap().expose();
        let mut texts =
            vec![String::new(), "hunter2".into(), good[4..].into(), format!("{good}0"), good.to_uppercase()];
        for at in 4..good.len() {
            let mut other = good.clone().into_bytes();
            other[at] = if other[at] == b'0' { b'1' } else { b'0' };
            texts.push(String::from_utf8(other).unwrap());
            texts.push(good[..at].to_owned());
            texts.push(good.replacen(&good[at..=at], "é", 1));
        }
        for text in texts {
            let error = text.parse::<Token>().unwrap_err().to_string();
            assert!(error.contains("hint: "), "{error}");
            assert!(text.len() <= PREFIX.len() || !error.contains(&text), "{error}");
        }
    }

    #[test]
    fn debug_shows_nothing() {
        let token = Token::generate().unwrap();
        assert!(!format!("{token:?}").contains(&token.expose()[4..]));
    }

    #[test]
    fn a_file_is_private_and_reads_back_with_or_without_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(matches!(Token::read_file(&path), Err(TokenError::NoFile(_))));
        let token = Token::generate().unwrap();
        token.write_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Token::read_file(&path).unwrap(), token);
        fs::write(&path, format!("  {} \r\n\n", token.expose())).unwrap();
        assert_eq!(Token::read_file(&path).unwrap(), token);
        fs::write(&path, [0xff; 40]).unwrap();
        assert!(matches!(Token::read_file(&path), Err(TokenError::Malformed { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no file left beside it");
    }
}
