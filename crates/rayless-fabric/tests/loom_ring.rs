//! Every interleaving, with up to two forced switches, of what the two ends of shared memory do with its words. The ring: no wake-up is lost, and no
//! byte is read before it was written. Loans: bytes count only if they were copied before the sender let go of them.
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests too")]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
};
use rayless_fabric::shm::{
    bell::{ASLEEP, Bell, ring, sleep_unless},
    loan::{self, Fate, Word},
};
use std::time::Duration;

/// A futex: the look at the word and the sleep are one step for whoever wakes. It never times out, so that a
/// lost wake-up is a deadlock, which loom reports.
struct ModelBell {
    word: AtomicU32,
    kernel: Mutex<()>,
    sleepers: Condvar,
}

impl ModelBell {
    fn new() -> Self {
        Self { word: AtomicU32::new(0), kernel: Mutex::new(()), sleepers: Condvar::new() }
    }
}

impl Bell for ModelBell {
    fn swap(&self, to: u32) -> u32 {
        self.word.swap(to, Ordering::AcqRel)
    }

    fn sleep(&self, _: Duration) {
        let kernel = self.kernel.lock().unwrap();
        if self.word.load(Ordering::Relaxed) == ASLEEP {
            drop(self.sleepers.wait(kernel).unwrap());
        }
    }

    fn wake(&self) {
        let _kernel = self.kernel.lock().unwrap();
        self.sleepers.notify_all();
    }
}

/// A ring of one slot: the tightest there is, so both sides have to wait for each other.
struct Model {
    slot: UnsafeCell<u64>,
    tail: AtomicU64,
    head: AtomicU64,
    data: ModelBell,
    room: ModelBell,
}

#[test]
fn both_sides_always_wake_and_read_only_what_was_written() {
    const ITEMS: u64 = 2;
    let mut builder = loom::model::Builder::new();
    // All interleavings with up to this many forced switches; without a bound the search takes hours.
    builder.preemption_bound = Some(2);
    builder.check(|| {
        let model = Arc::new(Model {
            slot: UnsafeCell::new(0),
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            data: ModelBell::new(),
            room: ModelBell::new(),
        });
        let sender = {
            let model = Arc::clone(&model);
            thread::spawn(move || {
                for item in 0..ITEMS {
                    let is_room = || model.head.load(Ordering::Acquire) == item;
                    while !is_room() {
                        sleep_unless(&model.room, Duration::ZERO, is_room);
                    }
                    // SAFETY: the counters say that the slot is the sender's; loom checks that nobody else touches it.
                    model.slot.with_mut(|slot| unsafe { *slot = 100 + item });
                    model.tail.store(item + 1, Ordering::Release);
                    ring(&model.data);
                }
            })
        };
        for item in 0..ITEMS {
            let has_come = || model.tail.load(Ordering::Acquire) == item + 1;
            while !has_come() {
                sleep_unless(&model.data, Duration::ZERO, has_come);
            }
            // SAFETY: the counters say that the slot is the receiver's; loom checks that nobody else touches it.
            model.slot.with(|slot| assert_eq!(unsafe { *slot }, 100 + item));
            model.head.store(item + 1, Ordering::Release);
            ring(&model.room);
        }
        sender.join().unwrap();
    });
}

struct ModelWord(AtomicU64);

impl Word for ModelWord {
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    fn store(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }

    fn replace(&self, from: u64, to: u64) -> bool {
        self.0.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// The sender's tensor, as the kernel copies it: a read that may see anything that is written meanwhile.
struct Lending {
    tensor: AtomicU64,
    loan: ModelWord,
    announced: AtomicU64,
    room: ModelBell,
}

const LENT: u64 = 7;
const REUSED: u64 = 8;

fn lend(run: fn(&Lending) -> bool) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let model = Arc::new(Lending {
            tensor: AtomicU64::new(0),
            loan: ModelWord(AtomicU64::new(0)),
            announced: AtomicU64::new(0),
            room: ModelBell::new(),
        });
        let sender = {
            let model = Arc::clone(&model);
            thread::spawn(move || {
                model.tensor.store(LENT, Ordering::Relaxed);
                loan::offer(&model.loan, 1);
                model.announced.store(1, Ordering::Release);
                let taken = run(&model);
                // The caller has its tensor back, and writes to it.
                model.tensor.store(REUSED, Ordering::Relaxed);
                taken
            })
        };
        while model.announced.load(Ordering::Acquire) == 0 {
            thread::yield_now();
        }
        let copied = model.tensor.load(Ordering::Relaxed);
        let counts = loan::take(&model.loan, 1);
        ring(&model.room);
        assert!(!counts || copied == LENT, "bytes that were written after the sender had let go");
        assert_eq!(sender.join().unwrap(), counts, "the two ends disagree");
    });
}

#[test]
fn a_loan_counts_only_if_it_was_copied_before_the_sender_revoked_it() {
    lend(|model| !loan::revoke(&model.loan, 1));
}

#[test]
fn a_sender_that_waits_for_its_loan_is_woken_when_it_is_taken() {
    lend(|model| {
        let decided = || loan::fate(&model.loan, 1) != Some(Fate::Offered);
        while !decided() {
            sleep_unless(&model.room, Duration::ZERO, decided);
        }
        loan::fate(&model.loan, 1) == Some(Fate::Taken)
    });
}
