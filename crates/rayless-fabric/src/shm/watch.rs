//! Notices that a peer's process has ended, for all links over shared memory of this process.
//!
//! Their ends sleep on futexes, which no death rings. Each link's socket ends with the peer, however it dies; one
//! thread, started with the first link, sleeps on all those sockets and ends the sleep on the bell of the link whose socket
//! ended. It costs the links nothing while they move. A process forked from one that has links has a watcher of its own if it
//! makes links of its own.

use super::Poke;
use crate::{fork::NotInChildren, wait::Wake};
use rustix::{
    event::epoll,
    fd::{AsFd, OwnedFd},
    io::Errno,
};
use std::{
    collections::HashMap,
    os::{fd::AsRawFd, unix::net::UnixStream},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicPtr, Ordering},
    },
};

struct Watcher {
    // Before the descriptor: see `NotInChildren`.
    _held: NotInChildren,
    sockets: OwnedFd,
    links: Mutex<Links>,
    started: OnceLock<Result<(), Errno>>,
}

#[derive(Default)]
struct Links {
    last: u64,
    ends: HashMap<u64, Weak<Poke>>,
}

/// An end's place with the watcher; dropping it takes the end away.
pub(super) struct Watched {
    watcher: &'static Watcher,
    number: u64,
    socket: UnixStream,
}

/// Has `poke` end its sleep when the peer's end of `socket` is gone.
pub(super) fn watch(socket: UnixStream, poke: &Arc<Poke>) -> Result<Watched, Errno> {
    let watcher = watcher()?;
    let mut links = watcher.links();
    links.last += 1;
    let number = links.last;
    // Nothing is sent over it after the handshake: only its end is news, and that once.
    let news = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
    epoll::add(&watcher.sockets, &socket, epoll::EventData::new_u64(number), news)?;
    links.ends.insert(number, Arc::downgrade(poke));
    Ok(Watched { watcher, number, socket })
}

impl Watched {
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watcher.links().ends.remove(&self.number);
        // The socket is closed right after, which would take it away too.
        let _ = epoll::delete(&self.watcher.sockets, self.socket.as_fd());
    }
}

/// This process's watcher, once it has links.
static WATCHER: AtomicPtr<Watcher> = AtomicPtr::new(ptr::null_mut());

/// A forked child has neither the thread nor, soon, the descriptor: it makes a watcher of its own, should it make links of its own.
pub(crate) fn forget_watcher() {
    WATCHER.store(ptr::null_mut(), Ordering::Release);
}

fn watcher() -> Result<&'static Watcher, Errno> {
    // SAFETY: what the pointer ever pointed to was leaked, and is never written but through its own locks.
    let found = || unsafe { WATCHER.load(Ordering::Acquire).as_ref() };
    let watcher = match found() {
        Some(watcher) => watcher,
        None => {
            let sockets = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let held = NotInChildren::new(vec![sockets.as_raw_fd()]);
            let fresh = Box::new(Watcher { sockets, _held: held, links: Mutex::default(), started: OnceLock::new() });
            let fresh = Box::into_raw(fresh);
            match WATCHER.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: made a moment ago, and leaked from here on.
                Ok(_) => unsafe { &*fresh },
                Err(_) => {
                    // SAFETY: made a moment ago, and nobody else knows it.
                    drop(unsafe { Box::from_raw(fresh) });
                    found().ok_or(Errno::AGAIN)?
                }
            }
        }
    };
    let start = || {
        let thread = std::thread::Builder::new().name("rl-link-watch".to_owned());
        let started = thread.spawn(move || watcher.run());
        started.map(drop).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
    };
    watcher.started.get_or_init(start).map(|()| watcher)
}

impl Watcher {
    fn links(&self) -> MutexGuard<'_, Links> {
        // A map is whole between any two statements.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
        loop {
            let ended = match epoll::wait(&self.sockets, &mut events[..], None) {
                Ok(count) => &events[..count],
                Err(Errno::INTR) => continue,
                // No error that can occur here goes away; ends then notice at the end of a slice.
                Err(_) => return,
            };
            for event in ended {
                let end = self.links().ends.remove(&event.data.u64());
                if let Some(poke) = end.and_then(|poke| poke.upgrade()) {
                    poke.wake();
                }
            }
        }
    }
}
