//! The worker's side: what runs inside a worker process.
//!
//! The keeper leaves five descriptors, named in `RAYLESS_WORKER_FDS`: the ring, the collector's eventfd, a control socket on which the keeper
//! sends the boot bytes and what links need and this side says `ready`, each once, framed by a u32 length, the socket of its links, and the page of
//! the mutex that tells the keeper of this process's death.

use crate::{
    links::Links,
    ring::{CallReader, ReplyWriter, Ring, Waited},
    robust,
    spin::{self, Spin},
};
use rayless_proto::{
    codec,
    ids::{CallId, Rank},
    limits::{MAX_CALL, MAX_LOCAL_MESSAGE},
    v1::control::WorkerState,
};
use std::{
    collections::HashSet,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Environment variable with the numbers of the descriptors.
pub(crate) const FDS_VARIABLE: &str = "RAYLESS_WORKER_FDS";

/// Why a worker cannot go on. Whatever the variant, the process should end with a line of it on stderr.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// This process was not started by a keeper.
    #[error(
        "not started by a rayless keeper: {0}\nhint: workers are started by `rayless.WorkerGroup.start`, not by hand"
    )]
    NotAWorker(String),
    /// The keeper is gone.
    #[error("the keeper is gone")]
    KeeperGone,
    /// What is in the ring breaks its rules (a gap in the call ids, impossible lengths).
    #[error("the ring is broken: {0}")]
    Broken(String),
    /// An answer larger than the limit.
    #[error("a reply of {0} bytes is over the limit of 1 GiB")]
    TooLarge(u64),
}

/// A call as a worker gets it.
#[derive(Debug)]
pub struct IncomingCall {
    /// Its id.
    pub id: CallId,
    /// Whether this rank's answer is waited for.
    pub asked: bool,
    /// The bytes the driver gave to `WorkerGroup::call`.
    pub payload: Vec<u8>,
}

/// What [`Worker::next_call`] came back with.
#[derive(Debug)]
pub enum Next {
    /// The next call.
    Call(IncomingCall),
    /// The group is over: leave.
    Closed,
    /// Nothing yet: the timeout passed or a signal arrived (a chance to run signal handlers).
    Nothing,
}

/// This process as a worker of a group. All methods take `&self` and may be called from any thread.
#[derive(Debug)]
pub struct Worker {
    rank: Rank,
    local_rank: u32,
    world_size: u32,
    boot: Vec<u8>,
    ring: Arc<Ring>,
    event: OwnedFd,
    control: Mutex<UnixStream>,
    calls: Mutex<Calls>,
    replies: Mutex<ReplyWriter>,
    links: Links,
    /// Calls that wait for this rank's answer.
    owed: Mutex<HashSet<CallId>>,
}

#[derive(Debug)]
struct Calls {
    reader: CallReader,
    last: CallId,
    /// Whether a call was handed out since the last sleep: only then does a spin pay.
    busy: bool,
    spin: Spin,
}

impl Worker {
    /// Takes over what the keeper left in the environment (`RAYLESS_WORKER_FDS`, `RAYLESS_RANK`, …) and waits for the boot bytes.
    /// To be called on the process's main thread: only of that one's end is the keeper told at once.
    /// The descriptors are made close-on-exec, so that programs this worker starts do not get them. At most once per process.
    ///
    /// # Errors
    /// [`HostError::NotAWorker`] where something is missing, [`HostError::KeeperGone`] where the keeper ended meanwhile.
    pub fn from_env() -> Result<Self, HostError> {
        let numbers = std::env::var(FDS_VARIABLE).map_err(|_| missing(FDS_VARIABLE))?;
        let mut fds = numbers.split(',').map(|number| number.parse::<RawFd>().ok().and_then(take_fd));
        let mut next = || fds.next().flatten().ok_or_else(|| missing(FDS_VARIABLE));
        let (ring, event) = (next()?, next()?);
        let (control, links) = (UnixStream::from(next()?), UnixStream::from(next()?));
        // Where there is none (a keeper of another version) or it cannot be had, the keeper hears of this process's death a little later.
        if let Some(page) = fds.next().flatten().filter(|_| robust::is_main_thread()) {
            let _ = robust::hold(&page);
        }
        let ring = Ring::open(ring.as_fd()).map_err(|error| HostError::NotAWorker(error.to_string()))?;
        let (rank, local_rank) = (number("RAYLESS_RANK")?, number("RAYLESS_LOCAL_RANK")?);
        if local_rank as usize >= ring.readers() {
            return Err(missing("RAYLESS_LOCAL_RANK"));
        }
        let boot = read_frame(&control).map_err(|_| HostError::KeeperGone)?;
        let link_boot = read_frame(&control).map_err(|_| HostError::KeeperGone)?;
        let link_boot = if link_boot.is_empty() {
            None
        } else {
            Some(codec::decode(&link_boot).map_err(|error| HostError::NotAWorker(error.to_string()))?)
        };
        let (ring, index) = (Arc::new(ring), local_rank as usize);
        Ok(Self {
            rank,
            local_rank,
            world_size: number("RAYLESS_WORLD_SIZE")?,
            boot,
            event,
            control: Mutex::new(control),
            calls: Mutex::new(Calls {
                reader: CallReader::new(Arc::clone(&ring), index),
                last: 0,
                busy: false,
                spin: spin::among(ring.readers() + 1),
            }),
            replies: Mutex::new(ReplyWriter::new(Arc::clone(&ring), index)),
            links: Links::new(rank, Arc::clone(&ring), index, links, link_boot),
            ring,
            owed: Mutex::new(HashSet::new()),
        })
    }

    /// Its rank.
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// Its place among the ranks of its node.
    pub const fn local_rank(&self) -> u32 {
        self.local_rank
    }

    /// Ranks of the group.
    pub const fn world_size(&self) -> u32 {
        self.world_size
    }

    /// `Launch::boot` as the driver gave it.
    pub fn boot(&self) -> &[u8] {
        &self.boot
    }

    /// Its links to other ranks.
    pub const fn links(&self) -> &Links {
        &self.links
    }

    /// Tells keeper and driver that this rank takes calls, with its `python`, `rayless`, `vllm`, … versions. Once, before the first call.
    ///
    /// # Errors
    /// [`HostError::KeeperGone`].
    pub fn ready(&self, versions: &[(String, String)]) -> Result<(), HostError> {
        let message = codec::encode(&versions.to_vec());
        let mut frame = (message.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&message);
        self.note(WorkerState::Ready, 0);
        lock(&self.control).write_all(&frame).map_err(|_| HostError::KeeperGone)
    }

    /// The next call, in the order the driver made them: first a short spin (only when the previous call was just finished), then a
    /// sleep until one comes, `timeout` passes or a signal arrives. One thread at a time.
    ///
    /// # Errors
    /// [`HostError::Broken`] for a gap or a repeat in the call ids: the process must end.
    pub fn next_call(&self, timeout: Option<Duration>) -> Result<Next, HostError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let calls = &mut *lock(&self.calls);
        if std::mem::take(&mut calls.busy) {
            self.note(WorkerState::Ready, calls.last);
            calls.reader.spin(&mut calls.spin);
        }
        loop {
            if self.ring.is_closed() {
                return Ok(Next::Closed);
            }
            let read = calls.reader.try_next(self.event.as_fd()).map_err(|what| HostError::Broken(what.to_owned()))?;
            if let Some(read) = read {
                if read.call != calls.last + 1 {
                    return Err(HostError::Broken(format!("call {} came after call {}", read.call, calls.last)));
                }
                calls.last = read.call;
                calls.busy = true;
                if read.asked {
                    lock(&self.owed).insert(read.call);
                }
                self.note(WorkerState::Busy, read.call);
                return Ok(Next::Call(IncomingCall { id: read.call, asked: read.asked, payload: read.payload }));
            }
            match calls.reader.sleep(deadline) {
                Waited::Changed => {}
                Waited::TimedOut | Waited::Interrupted => return Ok(Next::Nothing),
            }
        }
    }

    /// Answers `call`. `raised` tells that `payload` is an exception. Answers go out in the order of these calls, from whatever
    /// thread; a full reply ring makes it wait for the collector. A rank that was not asked may only raise: its plain answer is dropped.
    ///
    /// # Errors
    /// [`HostError::KeeperGone`] where the group ended meanwhile, [`HostError::TooLarge`].
    pub fn reply(&self, call: CallId, raised: bool, payload: &[u8]) -> Result<(), HostError> {
        if payload.len() as u64 > MAX_CALL {
            return Err(HostError::TooLarge(payload.len() as u64));
        }
        // Held throughout, so that the order of the answers is that of the calls of this method.
        let mut replies = lock(&self.replies);
        let asked = lock(&self.owed).remove(&call);
        if !asked && !raised {
            return Ok(());
        }
        if replies.write(call, asked, raised, payload, self.event.as_fd()) {
            Ok(())
        } else {
            Err(HostError::KeeperGone)
        }
    }

    /// Notes what this worker is in, for the line that is printed when nothing moves: the name of a method, or how far it is
    /// (`loading 3/61 shards`). Each call of this counts as progress. Cut to 64 bytes; costs about as much as a look at the clock.
    pub fn doing(&self, text: &str) {
        self.ring.set_doing(self.local_rank as usize, text);
    }

    fn note(&self, state: WorkerState, call: CallId) {
        self.ring.set_state(self.local_rank as usize, state, call);
    }
}

fn missing(what: &str) -> HostError {
    HostError::NotAWorker(format!("{what} is missing or wrong"))
}

fn number(name: &str) -> Result<u32, HostError> {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).ok_or_else(|| missing(name))
}

/// A lock whose holder cannot leave it in a bad state: a panic in it is passed on by the thread that panicked, not by this one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_frame(mut stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_LOCAL_MESSAGE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame)?;
    Ok(frame)
}

/// Owns the inherited descriptor `number`; `None` where there is none.
fn take_fd(number: RawFd) -> Option<OwnedFd> {
    if number <= 2 {
        return None;
    }
    // SAFETY: the keeper made this descriptor for this process alone and named it in a variable that is read once; whether it is
    // open at all is checked by the call that follows, and where it is not, the value is forgotten instead of closed.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => Some(fd),
        Err(_) => {
            std::mem::forget(fd);
            None
        }
    }
}
