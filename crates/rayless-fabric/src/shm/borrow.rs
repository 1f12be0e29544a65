//! The receiver's half of one-copy payloads: reads the sender's memory where the kernel lets it.
//!
//! That the process read is the sender is proven, not believed: the sender keeps a secret in its private memory and says
//! where, and what is read there must be the nonce of the link's shared memory. The same look *after* the bytes were copied
//! proves that they came from there too: a process that has ended or has become another program does not come back, so if the secret is
//! still there, nobody else can have had the number (or the memory) in between. A pidfd would say less: it outlives an `exec`.

use super::{
    copier::{CHUNK, Chunk, Copier},
    lender::pid_namespace,
    memory::{NONCE, Words},
    record::{Part, Record},
};
use crate::scatter::ScatterMut;
use rustix::{io::Errno, process::Pid};
use std::sync::atomic::Ordering;

/// What one look copies at most, so that a cancellation is seen in the middle of a payload.
const LOOK: u64 = 16 << 20;

/// See the module.
pub(super) struct Borrower {
    secret_at: u64,
    secret: [u64; NONCE],
    copier: Copier,
    /// The loan in progress.
    pub(super) record: Record,
    /// How far the copying has come: the part and the bytes of it.
    at: (usize, u64),
}

impl Borrower {
    /// Reads the sender's secret once; an error says why its memory cannot be read.
    pub(super) fn prove(words: &Words) -> Result<Self, String> {
        let secret_at = words.secret_at.load(Ordering::Acquire);
        if secret_at == 0 {
            return Err("the sender does not lend its memory".to_owned());
        }
        let (theirs, ours) = (words.pid_namespace.load(Ordering::Relaxed), pid_namespace());
        if theirs != ours || ours == 0 {
            return Err("the two processes are in different PID namespaces".to_owned());
        }
        let pid = i32::try_from(words.sender_pid.load(Ordering::Relaxed)).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or("the sender's process id makes no sense")?;
        let secret = words.nonce.each_ref().map(|word| word.load(Ordering::Relaxed));
        let copier = Copier::new(pid.as_raw_nonzero().get());
        let mut borrower = Self { secret_at, secret, copier, record: Record::default(), at: (0, 0) };
        match borrower.is_the_sender() {
            Ok(true) => Ok(borrower),
            Ok(false) => Err("another process has the sender's number here".to_owned()),
            Err(errno) => Err(format!("process_vm_readv: {errno}")),
        }
    }

    /// Whether the process is (still) the one that made the link.
    pub(super) fn is_the_sender(&mut self) -> Result<bool, Errno> {
        let mut found = [0u8; NONCE * 8];
        self.copier.list().push(Chunk::new(&mut found, self.secret_at));
        // SAFETY: `found` is ours and lives on.
        unsafe { self.copier.run()? };
        Ok(found.as_chunks::<8>().0.iter().zip(self.secret).all(|(found, word)| *found == word.to_ne_bytes()))
    }

    /// Begins with what `record` lists.
    pub(super) const fn begin(&mut self) {
        self.at = (0, 0);
    }

    /// Copies on from `filled`, as much as one look may, and moves that.
    pub(super) fn copy(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<(), Errno> {
        let lent = body.len() - self.record.tail.len() as u64;
        let now = (lent - *filled).min(LOOK);
        let (mut at, parts, list) = (self.at, &self.record.parts, self.copier.list());
        body.walk(*filled, now, |mut slice| {
            while let Some(Part { address, len }) = parts.get(at.0).filter(|_| !slice.is_empty()) {
                let take = (len - at.1).min(slice.len() as u64).min(CHUNK);
                let (to, rest) = slice.split_at_mut(take as usize);
                if take > 0 {
                    list.push(Chunk::new(to, address + at.1));
                }
                slice = rest;
                at.1 += take;
                if at.1 == *len {
                    at = (at.0 + 1, 0);
                }
            }
            true
        });
        // SAFETY: the chunks are parts of `body`, which is borrowed for writing throughout this call.
        unsafe { self.copier.run()? };
        self.at = at;
        *filled += now;
        Ok(())
    }

    /// Puts the tail behind what was copied, once that is all there.
    pub(super) fn finish(&self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> bool {
        let tail = self.record.tail.as_slice();
        if body.len() - *filled != tail.len() as u64 {
            return false;
        }
        let mut from = tail;
        body.walk(*filled, tail.len() as u64, |slice| {
            let (now, later) = from.split_at(slice.len());
            slice.copy_from_slice(now);
            from = later;
            true
        });
        *filled += tail.len() as u64;
        true
    }
}
