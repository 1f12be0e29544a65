//! A `.tar.gz` of small texts: POSIX ustar, written whole into memory.

use flate2::{Compression, write::GzEncoder};
use std::io::{self, Write};

const BLOCK: usize = 512;

/// Files in the order in which they were added.
#[derive(Debug)]
pub(crate) struct Archive {
    out: GzEncoder<Vec<u8>>,
    folder: String,
    /// Seconds since the Unix epoch, of every file in it.
    time: u64,
}

impl Archive {
    /// All files will be in `folder` (at most 80 characters).
    pub(crate) fn new(folder: &str, time: u64) -> Self {
        Self { out: GzEncoder::new(Vec::new(), Compression::default()), folder: folder.to_owned(), time }
    }

    /// Adds a file. The full name may have at most 100 bytes; a longer one loses its beginning.
    pub(crate) fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut path = format!("{}/{name}", self.folder);
        if path.len() > 100 {
            let room = 100 - self.folder.len() - 1;
            let from = (name.len() - room..name.len()).find(|at| name.is_char_boundary(*at)).unwrap_or(name.len());
            path = format!("{}/{}", self.folder, &name[from..]);
        }
        let mut header = [0; BLOCK];
        let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, &path);
        put(100, "0000600\0");
        put(108, "0000000\0");
        put(116, "0000000\0");
        put(124, &format!("{:011o}\0", content.len()));
        put(136, &format!("{:011o}\0", self.time));
        put(148, "        ");
        put(156, "0");
        put(257, "ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.out.write_all(&header)?;
        self.out.write_all(content)?;
        self.out.write_all(&vec![0; content.len().next_multiple_of(BLOCK) - content.len()])
    }

    /// The bytes of the file.
    pub(crate) fn finish(mut self) -> io::Result<Vec<u8>> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.finish()
    }
}
