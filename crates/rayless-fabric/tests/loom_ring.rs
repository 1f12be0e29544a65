//! Every interleaving, with up to two forced switches, of the ring's wake protocol: no wake-up is lost, and no byte is read before it was written.
#![allow(clippy::unwrap_used, reason = "a test's helpers are tests too")]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
};
use rayless_fabric::shm::bell::{ASLEEP, Bell, ring, sleep_unless};
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
