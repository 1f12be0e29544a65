//! A `.tar.gz` of small texts: POSIX ustar, held whole in memory. Each file is a gzip member of its own, so that it is known how large the whole is
//! before a file is taken; every `tar` reads that.

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use std::io::{self, Read as _, Write as _};

const BLOCK: usize = 512;
/// Room for the two empty blocks at the end, and for the last file, which says what is missing.
const RESERVED: usize = 16 << 10;

/// Files in the order in which they were added.
#[derive(Debug)]
pub(crate) struct Archive {
    out: Vec<u8>,
    folder: String,
    /// Seconds since the Unix epoch, of every file in it.
    time: u64,
    /// Bytes that the whole may have.
    limit: usize,
}

impl Archive {
    /// All files will be in `folder` (at most 80 characters; empty: in none). The whole has at most `limit` bytes.
    pub(crate) fn new(folder: &str, time: u64, limit: usize) -> Self {
        Self { out: Vec::new(), folder: folder.to_owned(), time, limit }
    }

    /// Adds a file; `false` where it is too large for the room that is left.
    pub(crate) fn add(&mut self, name: &str, content: &[u8]) -> io::Result<bool> {
        self.add_within(name, content, self.limit.saturating_sub(RESERVED))
    }

    /// Adds the last file, for which there is room kept (16 KiB).
    pub(crate) fn add_last(&mut self, name: &str, content: &[u8]) -> io::Result<bool> {
        self.add_within(name, content, self.limit.saturating_sub(2 * BLOCK))
    }

    fn add_within(&mut self, name: &str, content: &[u8], limit: usize) -> io::Result<bool> {
        let path = if self.folder.is_empty() { name.to_owned() } else { format!("{}/{name}", self.folder) };
        let (prefix, name) = split(&path);
        let mut header = [0; BLOCK];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, "0000600\0");
        put(108, "0000000\0");
        put(116, "0000000\0");
        put(124, &format!("{:011o}\0", content.len()));
        put(136, &format!("{:011o}\0", self.time));
        put(148, "        ");
        put(156, "0");
        put(257, "ustar\x0000");
        put(345, prefix);
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let padding = vec![0; content.len().next_multiple_of(BLOCK) - content.len()];
        let member = member(&[&header, content, &padding])?;
        if self.out.len() + member.len() > limit {
            return Ok(false);
        }
        self.out.extend_from_slice(&member);
        Ok(true)
    }

    /// The bytes of the file.
    pub(crate) fn finish(mut self) -> io::Result<Vec<u8>> {
        self.out.extend_from_slice(&member(&[&[0; 2 * BLOCK]])?);
        Ok(self.out)
    }
}

fn member(parts: &[&[u8]]) -> io::Result<Vec<u8>> {
    let mut out = GzEncoder::new(Vec::new(), Compression::default());
    for part in parts {
        out.write_all(part)?;
    }
    out.finish()
}

/// A path as the two fields that hold it: up to 155 bytes, and up to 100 after the slash. One that is longer loses its beginning.
fn split(path: &str) -> (&str, &str) {
    if path.len() <= 100 {
        return ("", path);
    }
    let fits = |at: &usize| path.len() - at - 1 <= 100 && *at <= 155;
    match path.match_indices('/').map(|(at, _)| at).find(fits) {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => {
            let from = (path.len() - 100..path.len()).find(|at| path.is_char_boundary(*at)).unwrap_or(path.len());
            ("", &path[from..])
        }
    }
}

/// The files of an archive that [`Archive`] has made: names without surprises, and contents. `limit`: bytes of all of them; what goes beyond is an
/// error, as is whatever else such an archive does not have.
pub(crate) fn unpack(bytes: &[u8], limit: u64) -> io::Result<Vec<(String, Vec<u8>)>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut all = Vec::new();
    MultiGzDecoder::new(bytes).take(limit + 1).read_to_end(&mut all)?;
    if all.len() as u64 > limit {
        return Err(bad("it is too large when unpacked"));
    }
    let mut files = Vec::new();
    let mut rest = all.as_slice();
    while let Some((header, after)) = rest.split_first_chunk::<BLOCK>() {
        if header.iter().all(|byte| *byte == 0) {
            return Ok(files);
        }
        let field = |from: usize, length: usize| {
            let bytes = &header[from..from + length];
            String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
        };
        let size = usize::from_str_radix(field(124, 12).trim(), 8).map_err(|_| bad("a file without a size"))?;
        let (prefix, name) = (field(345, 155), field(0, 100));
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let content = after.get(..size).ok_or_else(|| bad("it ends within a file"))?;
        let parts: Vec<String> = path.split('/').map(plain).filter(|part| !part.is_empty()).collect();
        if !parts.is_empty() {
            files.push((parts.join("/"), content.to_vec()));
        }
        rest = after.get(size.next_multiple_of(BLOCK)..).unwrap_or_default();
    }
    Err(bad("it has no end"))
}

/// A part of a path that leads nowhere else, and that every shell takes as it is.
pub(crate) fn plain(part: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    let part: String = part.chars().take(80).map(kept).collect();
    if part.chars().all(|c| c == '.') { String::new() } else { part }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let mut archive = Archive::new("", 7, 1 << 20);
        let long = format!("{}/{}/rank-0.log", "d".repeat(70), "e".repeat(60));
        for (name, content) in [("a.txt", "one"), (long.as_str(), "two"), ("empty", "")] {
            assert!(archive.add(name, content.as_bytes()).unwrap());
        }
        let files = unpack(&archive.finish().unwrap(), 1 << 20).unwrap();
        let expected = [("a.txt", "one"), (long.as_str(), "two"), ("empty", "")];
        assert_eq!(files, expected.map(|(name, content)| (name.to_owned(), content.as_bytes().to_vec())));
    }

    #[test]
    fn it_never_grows_over_its_limit() {
        let noise: Vec<u8> =
            (0_u32..20_000).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ (n >> 3) as u8).collect();
        let mut archive = Archive::new("folder", 7, 40 << 10);
        assert!(archive.add("one", &noise).unwrap());
        assert!(!archive.add("two", &noise).unwrap());
        assert!(archive.add("small", b"there is room for this").unwrap());
        assert!(archive.add_last("last", &noise[..10_000]).unwrap());
        let bytes = archive.finish().unwrap();
        assert!(bytes.len() <= 40 << 10);
        let names: Vec<_> = unpack(&bytes, 1 << 20).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["folder/one", "folder/small", "folder/last"]);
    }

    #[test]
    fn what_a_stranger_packed_does_no_harm() {
        let mut archive = Archive::new("", 7, 1 << 20);
        assert!(archive.add("../../etc/pass wd", b"x").unwrap());
        assert!(archive.add("/root", b"y").unwrap());
        assert!(archive.add("zeros", &vec![0; 500_000]).unwrap());
        let bytes = archive.finish().unwrap();
        let names: Vec<_> = unpack(&bytes, 1 << 20).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["etc/pass_wd", "root", "zeros"]);
        assert!(unpack(&bytes, 400_000).is_err(), "a small file that becomes a large one");
        assert!(unpack(&bytes[..bytes.len() - 30], 1 << 20).is_err());
        assert!(unpack(b"not gzip", 1 << 20).is_err());
    }
}
