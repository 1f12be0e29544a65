//! A robust mutex between a worker and its keeper: how the kernel tells of a death before it takes the memory down.
//!
//! A pidfd becomes readable when all of a process is gone, and gigabytes of memory (or the contexts of a GPU) take the kernel a tenth of a
//! second. A robust mutex is given back on the owner's behalf *before* that: it is the first thing that a thread which ends does with its memory.
//! So each worker's main thread takes one for life, in a page that it shares with its keeper alone, and the keeper waits for it.
//!
//! The worker takes it through libc, which has the thread's list of robust mutexes; the keeper never does. It looks at the one word that is the
//! kernel's business (`futex(2)`: owner's thread id, a bit for waiters, a bit for a dead owner) and sleeps on it. A worker can write what it likes there:
//! the word is a hint to look at `/proc`, no more, and one that makes no sense ends the wait.

use crate::ring::Map;
use rustix::{
    io::{Errno, retry_on_intr},
    mm::Advice,
    thread::{futex, gettid},
};
use std::{
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering,
};

/// The page: all of it is for the mutex.
const PAGE: usize = 4096;
/// glibc keeps the word of a mutex in front of all else of it; `hold` looks whether it is so.
const AT_WORD: usize = 0;
/// The bits of the word that name its owner.
const OWNER: u32 = !(futex::WAITERS | futex::OWNER_DIED);
/// Changes of the word in the life of a worker are three; one that writes to it all the time must not keep a core busy here.
const LOOKS: usize = 64;

/// The keeper's end of one worker's mutex.
#[derive(Debug)]
pub(crate) struct RobustMutex {
    map: Map,
}

impl RobustMutex {
    /// A new one, and the descriptor for the worker.
    pub(crate) fn create() -> io::Result<(OwnedFd, Self)> {
        let (fd, map) = Map::create("rayless-life", PAGE)?;
        Ok((fd, Self { map }))
    }

    /// Sleeps until `owner` (a thread id) gave the mutex back or the keeper wants no more; `true` where the kernel may have done so for
    /// an owner that ended or that runs another program now (exec gives it back, too).
    pub(crate) fn wait_for_end_of(&self, owner: u32) -> bool {
        let word = self.map.word32(AT_WORD);
        for _ in 0..LOOKS {
            let value = word.load(Ordering::Acquire);
            if value & futex::OWNER_DIED != 0 {
                return true;
            }
            // Zero until the worker has come so far; it wakes us then.
            if value != 0 {
                if value & OWNER != owner {
                    return false;
                }
                // The kernel wakes nobody where this bit says that nobody waits.
                let waited_for = value | futex::WAITERS;
                if value != waited_for {
                    let _ = word.compare_exchange(value, waited_for, Ordering::AcqRel, Ordering::Relaxed);
                    continue;
                }
            }
            let sleep = || futex::wait(word, futex::Flags::empty(), value, None);
            match retry_on_intr(sleep) {
                Ok(()) | Err(Errno::AGAIN) => {}
                Err(_) => return false,
            }
        }
        false
    }

    /// Ends the wait of another thread: the worker is gone, or nobody wants to know.
    pub(crate) fn let_go(&self) {
        let word = self.map.word32(AT_WORD);
        // Who is about to sleep finds the word changed.
        word.fetch_or(futex::OWNER_DIED, Ordering::AcqRel);
        let _ = futex::wake(word, futex::Flags::empty(), u32::MAX >> 1);
    }
}

/// The worker's end: the calling thread takes the mutex in `page` and has it until it ends.
pub(crate) fn hold(page: &OwnedFd) -> io::Result<()> {
    // Never unmapped: glibc and the kernel have the mutex in a list of this thread's.
    let map = ManuallyDrop::new(Map::open(page.as_fd())?);
    let start = map.at(0, PAGE);
    // SAFETY: the whole of a mapping of ours. A child forked from here has no part in it: glibc (from 2.25)
    // empties the list of it.
    unsafe { rustix::mm::madvise(start.as_ptr().cast(), PAGE, Advice::LinuxDontFork) }?;
    let mutex = start.cast::<libc::pthread_mutex_t>().as_ptr();
    let mut attributes = std::mem::MaybeUninit::<libc::pthread_mutexattr_t>::uninit();
    let attributes = attributes.as_mut_ptr();
    // SAFETY: `attributes` is room for them and initialised before use. The mutex lies at the start of a page that stays mapped for good, with
    // more room than it needs; nobody but this thread uses it as a mutex: this is called once for a page, and the keeper only sets the waiters'
    // bit of its word, as any waiter does. What it holds of pointers is of this process, which alone has the page besides its keeper.
    unsafe {
        done(libc::pthread_mutexattr_init(attributes))?;
        let made = done(libc::pthread_mutexattr_setrobust(attributes, libc::PTHREAD_MUTEX_ROBUST))
            .and_then(|()| done(libc::pthread_mutexattr_setpshared(attributes, libc::PTHREAD_PROCESS_SHARED)))
            .and_then(|()| done(libc::pthread_mutex_init(mutex, attributes)));
        libc::pthread_mutexattr_destroy(attributes);
        made?;
        done(libc::pthread_mutex_lock(mutex))?;
    }
    let word = map.word32(AT_WORD);
    if word.load(Ordering::Acquire) & OWNER != own_thread() {
        return Err(io::Error::other("a mutex of another make"));
    }
    let _ = futex::wake(word, futex::Flags::empty(), u32::MAX >> 1);
    Ok(())
}

/// Whether the calling thread is the one that the process began with, whose id is the process's.
pub(crate) fn is_main_thread() -> bool {
    gettid() == rustix::process::getpid()
}

fn own_thread() -> u32 {
    gettid().as_raw_nonzero().get().unsigned_abs()
}

/// What a function of pthread says.
fn done(error: i32) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{Arc, mpsc::channel},
        thread,
    };

    /// A thread that holds the mutex until the sender is dropped, and its id.
    fn holder(page: OwnedFd) -> (u32, std::sync::mpsc::Sender<()>) {
        let (until, end) = channel::<()>();
        let (told, id) = channel();
        thread::spawn(move || {
            hold(&page).unwrap();
            told.send(own_thread()).unwrap();
            let _ = end.recv();
        });
        (id.recv().unwrap(), until)
    }

    /// Whether somebody sleeps on the word, or is about to.
    fn is_waited_for(mutex: &RobustMutex) -> bool {
        mutex.map.word32(AT_WORD).load(Ordering::Acquire) & futex::WAITERS != 0
    }

    #[test]
    fn the_end_of_the_owner_ends_the_wait() {
        let (page, mutex) = RobustMutex::create().unwrap();
        let mutex = Arc::new(mutex);
        let (owner, until) = holder(page);
        let waiter = thread::spawn({
            let mutex = Arc::clone(&mutex);
            move || mutex.wait_for_end_of(owner)
        });
        while !is_waited_for(&mutex) {
            thread::yield_now();
        }
        assert!(!waiter.is_finished());
        drop(until);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn who_waits_before_there_is_an_owner_waits_for_its_end() {
        let (page, mutex) = RobustMutex::create().unwrap();
        let mutex = Arc::new(mutex);
        let (to_wait, to_be_owner) = channel();
        let waiter = thread::spawn({
            let mutex = Arc::clone(&mutex);
            move || {
                let owner = to_be_owner.recv().unwrap();
                mutex.wait_for_end_of(owner)
            }
        });
        // The owner's id is known before it takes the mutex, as a worker's is to its keeper.
        let (go, may_hold) = channel::<()>();
        let owner = thread::spawn(move || {
            to_wait.send(own_thread()).unwrap();
            may_hold.recv().unwrap();
            hold(&page).unwrap();
        });
        go.send(()).unwrap();
        owner.join().unwrap();
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn an_owner_that_ended_before_is_seen_at_once() {
        let (page, mutex) = RobustMutex::create().unwrap();
        let owner = thread::spawn(move || {
            hold(&page).unwrap();
            own_thread()
        });
        let owner = owner.join().unwrap();
        assert!(mutex.wait_for_end_of(owner));
    }

    #[test]
    fn the_keeper_can_end_the_wait() {
        // Nobody ever takes it, as with a program that knows nothing of rayless.
        let (_page, mutex) = RobustMutex::create().unwrap();
        let mutex = Arc::new(mutex);
        let waiter = thread::spawn({
            let mutex = Arc::clone(&mutex);
            move || mutex.wait_for_end_of(1)
        });
        mutex.let_go();
        waiter.join().unwrap();
    }

    #[test]
    fn a_word_that_makes_no_sense_ends_the_wait() {
        let (_page, mutex) = RobustMutex::create().unwrap();
        for nonsense in [7, futex::WAITERS, futex::WAITERS | 7, 0x3fff_ffff] {
            mutex.map.word32(AT_WORD).store(nonsense, Ordering::Release);
            assert!(!mutex.wait_for_end_of(42), "{nonsense:x}");
        }
        mutex.map.word32(AT_WORD).store(u32::MAX, Ordering::Release);
        assert!(mutex.wait_for_end_of(42), "a hint to look, no more");
    }

    #[test]
    fn a_word_that_changes_all_the_time_ends_the_wait() {
        let (_page, mutex) = RobustMutex::create().unwrap();
        let mutex = Arc::new(mutex);
        let waiter = thread::spawn({
            let mutex = Arc::clone(&mutex);
            move || mutex.wait_for_end_of(42)
        });
        let word = mutex.map.word32(AT_WORD);
        while !waiter.is_finished() {
            word.store(42, Ordering::Release);
            let _ = futex::wake(word, futex::Flags::empty(), 1);
        }
        assert!(!waiter.join().unwrap());
    }

    #[test]
    fn a_page_that_is_none_of_ours_is_refused() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(hold(&file).is_err());
    }
}
