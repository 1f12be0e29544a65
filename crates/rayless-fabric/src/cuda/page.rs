//! The page that both processes of a link over shared memory map for their GPUs: the offer of slots, and the slots' words.
//!
//! The sender offers once, when it first has a message in device memory; the receiver answers when it first takes one. Until
//! then, and if it refuses, payloads travel staged. Nothing here waits.

use super::ring::Words;
use crate::transport::SharedPage;
use std::{
    mem::offset_of,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
};

/// Bytes of a page, on every machine that has NVIDIA's driver for x86-64; a 64 KiB page of aarch64 holds it too.
pub(crate) const PAGE: usize = 4096;
const REASON: usize = 200;

/// What has become of the offer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum State {
    Nothing = 0,
    Offered = 1,
    Accepted = 2,
    Refused = 3,
    /// The receiver has accepted, and has given its mapping back since.
    Closed = 4,
    /// The sender has taken an offer back that nobody had answered.
    Withdrawn = 5,
}

/// What the sender offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Offer {
    pub(super) process: Process,
    pub(super) address: u64,
    pub(super) handle: [u8; 64],
}

/// A process of this host: its id, and the namespace that the id is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Process {
    id: u32,
    namespace: u64,
}

impl Process {
    pub(super) fn own() -> Self {
        use std::os::unix::fs::MetadataExt;
        let namespace = std::fs::metadata("/proc/self/ns/pid").map_or(0, |metadata| metadata.ino());
        Self { id: std::process::id(), namespace }
    }

    /// Whether it has certainly ended. One of another namespace cannot be asked about.
    pub(super) fn has_ended(self) -> bool {
        let known = self.namespace != 0 && self.namespace == Self::own().namespace;
        known && !std::path::Path::new(&format!("/proc/{}", self.id)).exists()
    }
}

#[repr(C)]
struct Layout {
    words: Words,
    state: AtomicU32,
    sender_id: AtomicU32,
    sender_namespace: AtomicU64,
    address: AtomicU64,
    handle: [AtomicU64; 8],
    receiver_namespace: AtomicU64,
    receiver_id: AtomicU32,
    reason_len: AtomicU32,
    reason: [AtomicU8; REASON],
}

const _: () = assert!(size_of::<Layout>() <= PAGE);
pub(super) const WORDS_AT: usize = offset_of!(Layout, words);

/// One end's view of the page.
#[derive(Clone)]
pub(super) struct Page(pub(super) SharedPage);

impl Page {
    fn layout(&self) -> &Layout {
        // SAFETY: a shared page is mapped while `self.0` lives, aligned, at least `PAGE` long, zeroed at first and written
        // by both ends only as this layout; any bits are valid atomics.
        unsafe { self.0.host.cast::<Layout>().as_ref() }
    }

    pub(super) fn state(&self) -> State {
        match self.layout().state.load(Ordering::Acquire) {
            1 => State::Offered,
            2 => State::Accepted,
            3 => State::Refused,
            4 => State::Closed,
            5 => State::Withdrawn,
            _ => State::Nothing,
        }
    }

    pub(super) fn offer(&self, offer: &Offer) {
        let page = self.layout();
        page.sender_id.store(offer.process.id, Ordering::Relaxed);
        page.sender_namespace.store(offer.process.namespace, Ordering::Relaxed);
        page.address.store(offer.address, Ordering::Relaxed);
        for (word, bytes) in page.handle.iter().zip(offer.handle.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        page.state.store(State::Offered as u32, Ordering::Release);
    }

    /// The offer, while it stands unanswered.
    pub(super) fn offered(&self) -> Option<Offer> {
        let page = self.layout();
        (self.state() == State::Offered).then(|| {
            let mut handle = [0; 64];
            for (word, bytes) in page.handle.iter().zip(handle.as_chunks_mut::<8>().0) {
                *bytes = word.load(Ordering::Relaxed).to_le_bytes();
            }
            let process = Process {
                id: page.sender_id.load(Ordering::Relaxed),
                namespace: page.sender_namespace.load(Ordering::Relaxed),
            };
            Offer { process, address: page.address.load(Ordering::Relaxed), handle }
        })
    }

    /// Accepts. False: the offer was withdrawn meanwhile.
    pub(super) fn accept(&self) -> bool {
        let (page, own) = (self.layout(), Process::own());
        page.receiver_id.store(own.id, Ordering::Relaxed);
        page.receiver_namespace.store(own.namespace, Ordering::Relaxed);
        self.answer(State::Accepted)
    }

    pub(super) fn refuse(&self, reason: &str) {
        let page = self.layout();
        let bytes = &reason.as_bytes()[..reason.len().min(REASON)];
        page.reason.iter().zip(bytes).for_each(|(to, from)| to.store(*from, Ordering::Relaxed));
        page.reason_len.store(bytes.len() as u32, Ordering::Relaxed);
        self.answer(State::Refused);
    }

    /// Takes an offer back; false: it has been answered.
    pub(super) fn withdraw(&self) -> bool {
        self.answer(State::Withdrawn)
    }

    fn answer(&self, answer: State) -> bool {
        let (from, to) = (State::Offered as u32, answer as u32);
        self.layout().state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The receiver has given its mapping back.
    pub(super) fn close(&self) {
        self.layout().state.store(State::Closed as u32, Ordering::Release);
    }

    pub(super) fn receiver(&self) -> Process {
        let page = self.layout();
        Process {
            id: page.receiver_id.load(Ordering::Relaxed),
            namespace: page.receiver_namespace.load(Ordering::Relaxed),
        }
    }

    pub(super) fn reason(&self) -> String {
        let page = self.layout();
        let len = (page.reason_len.load(Ordering::Relaxed) as usize).min(REASON);
        let bytes: Vec<u8> = page.reason[..len].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{ptr::NonNull, sync::Arc};

    fn page() -> Page {
        let memory: Arc<Box<[AtomicU64]>> = Arc::new((0..PAGE / 8 + 8).map(|_| AtomicU64::new(0)).collect());
        let start = memory.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: 64 bytes more than a page were allocated.
        let aligned = unsafe { start.add(start.align_offset(64)) };
        Page(SharedPage { host: NonNull::new(aligned).unwrap(), keep: memory })
    }

    #[test]
    fn an_offer_reads_back_and_is_answered_once() {
        let page = page();
        assert_eq!((page.state(), page.offered()), (State::Nothing, None));
        let offer = Offer { process: Process::own(), address: 1 << 40, handle: std::array::from_fn(|i| i as u8) };
        page.offer(&offer);
        assert_eq!(page.offered(), Some(offer));
        page.refuse(&"no peer access ".repeat(20));
        assert_eq!(page.state(), State::Refused);
        assert!(page.reason().starts_with("no peer access") && page.reason().len() == REASON);
        assert!(!page.accept() && !page.withdraw());
        assert_eq!(page.offered(), None);
    }

    #[test]
    fn a_withdrawn_offer_cannot_be_accepted() {
        let page = page();
        page.offer(&Offer { process: Process::own(), address: 0, handle: [0; 64] });
        assert!(page.withdraw() && !page.accept());
        assert_eq!(page.state(), State::Withdrawn);
    }

    #[test]
    fn only_a_process_that_can_be_asked_about_is_known_to_have_ended() {
        assert!(!Process::own().has_ended());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let ended = Process { id: child.id(), ..Process::own() };
        child.wait().unwrap();
        assert!(ended.has_ended());
        assert!(!Process { namespace: 1, ..ended }.has_ended());
    }
}
