//! A ring of slots that a producer fills and a consumer drains, each of them a GPU's stream or a host thread.
//!
//! Chunk `n` uses slot `n % SLOTS`. Each slot has two words in pinned host memory, which streams wait for and write, and
//! threads load and store: `full` becomes `n + 1` when chunk `n` is in the slot, `free` becomes `n + 1` when it has been
//! taken out. So chunk `n` may be filled once `free` is at least `n + 1 - SLOTS`, and drained once `full` is at least
//! `n + 1`; both wrap, and are compared as such. A word per slot, and not one for all, lets messages on different streams
//! pass each other. A producer's bytes are visible before its word is: a stream's write waits for all before it to be
//! visible to the system, a thread's store releases.

use super::{
    device::{Device, DeviceMemory, Event, Operation, PeerMemory, Pinned},
    ffi::Address,
};
use std::{
    mem::offset_of,
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

/// Slots of a ring: a power of two, so that numbers that wrap keep their slots.
pub(super) const SLOTS: u32 = 8;

/// The words of a slot, in a line of their own.
#[repr(C, align(64))]
struct SlotWords {
    full: AtomicU32,
    free: AtomicU32,
}

/// The words of a ring.
#[repr(C)]
pub(super) struct Words([SlotWords; SLOTS as usize]);

/// Where a ring's slots are.
pub(super) enum Slots {
    /// In pinned host memory: the host is one of the two sides.
    Host(Pinned),
    /// In device memory of this process.
    Own(DeviceMemory),
    /// In device memory of the peer's process.
    Peer(PeerMemory),
    /// In device memory of this process that the other end of the link owns: both ends are in one process.
    Same(Address),
}

/// One end's view of a ring.
pub(super) struct Ring {
    pub(super) device: Arc<Device>,
    /// The page that the words lie in, and where in it.
    page: Pinned,
    words_at: usize,
    slots: Slots,
    slot_bytes: usize,
}

/// A part of a chunk: an address of a tensor, where in the slot, and how much.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) address: Address,
    pub(super) at: usize,
    pub(super) bytes: usize,
}

impl Ring {
    /// # Safety
    /// `words_at` in `page` must be zeroed, or words of the same ring that its other end uses as such, aligned; and the
    /// slots must be `SLOTS * slot_bytes` long.
    pub(super) unsafe fn new(
        device: &Arc<Device>,
        page: Pinned,
        words_at: usize,
        slots: Slots,
        slot_bytes: usize,
    ) -> Self {
        Self { device: Arc::clone(device), page, words_at, slots, slot_bytes }
    }

    /// Chunks of a payload.
    pub(super) fn chunks(&self, bytes: u64) -> u32 {
        // A payload of more chunks than this counts is over every limit of a message.
        u32::try_from(bytes.div_ceil(self.slot_bytes as u64)).unwrap_or(u32::MAX)
    }

    pub(super) const fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    fn words(&self, chunk: u32) -> &SlotWords {
        // SAFETY: by the contract of `new` there are words here, which live as long as the page; any bits are words.
        let words = unsafe { self.page.host.add(self.words_at).cast::<Words>().as_ref() };
        &words.0[(chunk % SLOTS) as usize]
    }

    fn word_address(&self, chunk: u32, field: usize) -> Address {
        let slot = (chunk % SLOTS) as usize;
        self.page.address + (self.words_at + slot * size_of::<SlotWords>() + field) as Address
    }

    fn full_address(&self, chunk: u32) -> Address {
        self.word_address(chunk, offset_of!(SlotWords, full))
    }

    fn free_address(&self, chunk: u32) -> Address {
        self.word_address(chunk, offset_of!(SlotWords, free))
    }

    fn slot_offset(&self, chunk: u32) -> usize {
        (chunk % SLOTS) as usize * self.slot_bytes
    }

    fn slot_address(&self, chunk: u32) -> Address {
        let base = match &self.slots {
            Slots::Host(pinned) => pinned.address,
            Slots::Own(memory) => memory.address,
            Slots::Peer(memory) => memory.address,
            Slots::Same(address) => *address,
        };
        base + self.slot_offset(chunk) as Address
    }

    /// The slot as host memory, of a ring that has it there.
    pub(super) fn slot_host(&self, chunk: u32) -> Option<NonNull<u8>> {
        match &self.slots {
            // SAFETY: the slot lies in the allocation, by the contract of `new`.
            Slots::Host(pinned) => Some(unsafe { pinned.host.add(self.slot_offset(chunk)) }),
            _ => None,
        }
    }

    /// Whether chunk `chunk` may be put into its slot.
    pub(super) fn is_free(&self, chunk: u32) -> bool {
        reached(self.words(chunk).free.load(Ordering::Acquire), free_for(chunk))
    }

    /// Whether chunk `chunk` is in its slot.
    pub(super) fn is_full(&self, chunk: u32) -> bool {
        reached(self.words(chunk).full.load(Ordering::Acquire), chunk.wrapping_add(1))
    }

    /// The host has put the chunk in.
    pub(super) fn set_full(&self, chunk: u32) {
        self.words(chunk).full.store(chunk.wrapping_add(1), Ordering::Release);
    }

    /// The host has taken the chunk out.
    pub(super) fn set_free(&self, chunk: u32) {
        self.words(chunk).free.store(chunk.wrapping_add(1), Ordering::Release);
    }

    /// What a stream does to put a chunk in.
    pub(super) fn fill(&self, chunk: u32, pieces: impl Iterator<Item = Piece>, out: &mut Vec<Operation>) {
        if !self.is_free(chunk) {
            out.push(Operation::WaitFor { word: self.free_address(chunk), value: free_for(chunk) });
        }
        self.copy_in(chunk, pieces, out);
        out.push(Operation::Write { word: self.full_address(chunk), value: chunk.wrapping_add(1) });
    }

    /// What a stream does to take a chunk out.
    pub(super) fn drain(&self, chunk: u32, pieces: impl Iterator<Item = Piece>, out: &mut Vec<Operation>) {
        if !self.is_full(chunk) {
            out.push(Operation::WaitFor { word: self.full_address(chunk), value: chunk.wrapping_add(1) });
        }
        self.copy_out(chunk, pieces, out);
        out.push(Operation::Write { word: self.free_address(chunk), value: chunk.wrapping_add(1) });
    }

    /// The copies alone, where the host does the waiting.
    pub(super) fn copy_in(&self, chunk: u32, pieces: impl Iterator<Item = Piece>, out: &mut Vec<Operation>) {
        let slot = self.slot_address(chunk);
        out.extend(pieces.map(|p| Operation::Copy { to: slot + p.at as Address, from: p.address, bytes: p.bytes }));
    }

    /// As [`Ring::copy_in`], the other way.
    pub(super) fn copy_out(&self, chunk: u32, pieces: impl Iterator<Item = Piece>, out: &mut Vec<Operation>) {
        let slot = self.slot_address(chunk);
        out.extend(pieces.map(|p| Operation::Copy { to: p.address, from: slot + p.at as Address, bytes: p.bytes }));
    }

    /// Fills a chunk's slot with ones: not a number, as far as floats go.
    pub(super) fn poison(&self, chunk: u32) -> Operation {
        Operation::Fill { at: self.slot_address(chunk), byte: 0xff, bytes: self.slot_bytes }
    }
}

/// What `free` must have reached before a chunk may be put into its slot.
const fn free_for(chunk: u32) -> u32 {
    chunk.wrapping_add(1).wrapping_sub(SLOTS)
}

/// Whether a counter that wraps has come to `value`.
const fn reached(word: u32, value: u32) -> bool {
    word.wrapping_sub(value).cast_signed() >= 0
}

/// The parts of tensors that make up bytes `start..end` of their payload.
pub(super) fn pieces(tensors: &[(Address, u64)], start: u64, end: u64) -> impl Iterator<Item = Piece> {
    let mut before = 0u64;
    tensors.iter().filter_map(move |&(address, bytes)| {
        let (from, to) = (start.max(before), end.min(before + bytes));
        let piece = (from < to).then(|| Piece {
            address: address + (from - before),
            // Both lie within a slot.
            at: (from - start) as usize,
            bytes: (to - from) as usize,
        });
        before += bytes;
        piece
    })
}

/// What streams still use a ring for.
#[derive(Default)]
pub(super) struct Uses(Vec<Use>);

/// Until the event, the ring and what is kept are in use.
struct Use {
    until: Arc<Event>,
    _keep: Option<Box<dyn Send>>,
}

/// All that streams of this process still do for any link.
static UNFINISHED: Mutex<Vec<Arc<Event>>> = Mutex::new(Vec::new());

/// Whether streams of this process still do, or wait for, something of ours. The driver waits for all streams before it frees
/// memory; with one that waits for a peer it would wait for the peer too.
pub(super) fn any_unfinished() -> bool {
    let mut all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|event| matches!(event.is_done(), Ok(false)));
    !all.is_empty()
}

impl Uses {
    /// Until `event`, the ring and `keep` are in use.
    pub(super) fn add(&mut self, event: &Arc<Event>, keep: Option<Box<dyn Send>>) {
        self.settle();
        self.0.push(Use { until: Arc::clone(event), _keep: keep });
        let mut all = UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner);
        // Streams finish in order, so the oldest tell enough; what is left over goes with the next sweep.
        while all.first().is_some_and(|oldest| !matches!(oldest.is_done(), Ok(false))) {
            all.swap_remove(0);
        }
        all.push(Arc::clone(event));
    }

    /// Lets go of what is done with; true: of everything. An event that cannot be asked belongs to a context that is
    /// broken or gone, and with it all its work.
    pub(super) fn settle(&mut self) -> bool {
        self.0.retain(|one| matches!(one.until.is_done(), Ok(false)));
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_cut_into_chunks_without_gap_or_overlap() {
        let tensors = [(1000, 10), (5000, 0), (2000, 25), (3000, 1)];
        for slot in 1..40u64 {
            let mut bytes = Vec::new();
            for chunk in 0..36u64.div_ceil(slot) {
                let (start, end) = (chunk * slot, 36.min((chunk + 1) * slot));
                let mut at = 0;
                for piece in pieces(&tensors, start, end) {
                    assert_eq!(piece.at, at, "slot {slot}, chunk {chunk}");
                    at += piece.bytes;
                    bytes.extend((0..piece.bytes as u64).map(|i| piece.address + i));
                }
                assert_eq!(at as u64, end - start);
            }
            let all = (1000..1010).chain(2000..2025).chain([3000]);
            assert!(bytes.iter().copied().eq(all), "slot {slot}");
        }
    }

    #[test]
    fn counters_keep_their_order_when_they_wrap() {
        assert!(reached(0, free_for(0)) && reached(0, free_for(SLOTS - 1)) && !reached(0, free_for(SLOTS)));
        for base in [0u32, 1, i32::MAX as u32, u32::MAX - 3, u32::MAX] {
            assert!(reached(base, base) && reached(base.wrapping_add(1), base) && !reached(base, base.wrapping_add(1)));
            assert_eq!(base % SLOTS, base.wrapping_add(SLOTS) % SLOTS);
            // A slot's chunk before the one that wants it sets `free` to just what that one asks for.
            assert_eq!(free_for(base.wrapping_add(SLOTS)), base.wrapping_add(1));
        }
    }

    #[test]
    fn words_of_two_slots_share_no_line() {
        assert_eq!(size_of::<SlotWords>(), 64);
        assert_eq!(size_of::<Words>(), 64 * SLOTS as usize);
    }
}
