//! A death is told as soon as it is certain: before the kernel has taken the process down, and never where it is none.

use crate::{
    Story,
    world::{World, all, ask, signal, texts, wait_gone},
};
use rayless_worker::driver::{CallError, GroupFailure};
use rustix::process::Signal;
use std::{fs, os::unix::fs::FileExt, thread, time::Duration};

pub(crate) const STORIES: &[Story] = &[
    ("a killed worker is told of before the kernel is done with it", told_while_dying),
    ("a worker that ends in the middle of a line is told with it", half_a_line),
    ("a worker whose main thread alone ended is not dead", main_thread_left),
    ("a worker that runs another program is not dead", another_program),
    ("a worker that spoils its mutex is told of all the same", spoilt),
];

const SOON: Duration = Duration::from_secs(6);

/// A thread whose end is held up, so that its process cannot end: a tracer is asked before.
struct HeldThread(i32);

impl HeldThread {
    fn new(id: i32) -> Self {
        let options = libc::PTRACE_O_TRACEEXIT as usize;
        // SAFETY: this request reads and writes no memory of ours.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, id, 0_usize, options) };
        assert_eq!(seized, 0, "{}", std::io::Error::last_os_error());
        Self(id)
    }
}

impl Drop for HeldThread {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: `status` is ours; the thread is traced by this one, and stops when it is about to end.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, &raw mut status, libc::__WALL);
            libc::ptrace(libc::PTRACE_DETACH, self.0, 0_usize, 0_usize);
        }
    }
}

fn told_while_dying() {
    for rank in [0, 1] {
        let mut world = World::new(1, 1);
        let group = world.start();
        let pid = group.pids()[rank as usize].1;
        let thread = texts(&ask(&group, "thread", &[rank]).wait().unwrap())[0].parse().unwrap();
        let pending = ask(&group, "sleep 10000", &[0, 1]);
        let held = HeldThread::new(thread);
        signal(pid, Signal::KILL);
        let told = pending.wait().unwrap_err().to_string();
        let still_there = !wait_gone(pid, Duration::ZERO);
        drop(held);
        let node = ["a", "b"][rank as usize];
        assert_eq!(told, format!("rank {rank} on node {node} (pid {pid}) was killed by SIGKILL"));
        assert!(still_there, "told after the process was gone");
        assert!(wait_gone(pid, SOON));
        // One cause, at the daemons, too: the later end of the process is no second one.
        let causes = world.assert_nothing_left();
        assert!(causes.iter().all(|cause| cause.contains(&told)), "{causes:?}");
        assert_eq!(all(&group, "echo").unwrap_err().to_string(), told);
    }
}

fn half_a_line() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let CallError::Failed(GroupFailure::WorkerDied { cause, tail, .. }) = all(&group, "on 1 mutter").unwrap_err()
    else {
        panic!()
    };
    assert!(cause.ends_with("exited with code 3: it ends in the middle of"), "{cause}");
    assert!(tail.ends_with("it ends in the middle of"), "{tail}");
    world.assert_nothing_left();
}

fn main_thread_left() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let pid = group.pids()[1].1;
    ask(&group, "thread", &[1]).wait().unwrap();
    let pending = ask(&group, "on 1 leave 3", &[1]);
    // The process shows the state of its first thread.
    wait_until(|| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")));
    assert!(!wait_gone(pid, Duration::ZERO), "its other thread lives");
    assert_eq!(texts(&ask(&group, "echo", &[0]).wait().unwrap()), [""]);
    signal(pid, Signal::KILL);
    let told = pending.wait().unwrap_err().to_string();
    assert_eq!(told, format!("rank 1 on node b (pid {pid}) was killed by SIGKILL"));
    world.assert_nothing_left();
}

fn another_program() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let pid = group.pids()[1].1;
    let pending = ask(&group, "on 1 become", &[1]);
    wait_until(|| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n"));
    assert_eq!(texts(&ask(&group, "echo", &[0]).wait().unwrap()), [""]);
    signal(pid, Signal::KILL);
    let told = pending.wait().unwrap_err().to_string();
    assert_eq!(told, format!("rank 1 on node b (pid {pid}) was killed by SIGKILL"));
    world.assert_nothing_left();
}

fn spoilt() {
    // The bits of a dead owner, another owner, a free mutex with waiters.
    for nonsense in [u32::MAX, 1, 1 << 31] {
        let mut world = World::new(1, 1);
        let group = world.start();
        let pid = group.pids()[1].1;
        all(&group, &format!("on 1 spoil {nonsense}")).unwrap();
        assert_eq!(all(&group, "echo").unwrap().len(), 2);
        signal(pid, Signal::KILL);
        let told = group.wait_failed(Some(SOON)).unwrap().to_string();
        assert_eq!(told, format!("rank 1 on node b (pid {pid}) was killed by SIGKILL"));
        world.assert_nothing_left();
    }
}

/// In the worker: ends this thread with `code`, and no other.
pub(crate) fn leave_alone(code: i32) -> ! {
    // SAFETY: the thread is not returned to; what its stack holds is never dropped, and the others use none of it.
    unsafe { libc::syscall(libc::SYS_exit, code) };
    unreachable!("the thread has ended")
}

/// In the worker: writes to the word that its keeper watches, and wakes who sleeps on it.
pub(crate) fn spoil(word: u32) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("/memfd:rayless-life")).expect("the mutex is mapped");
    let start = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/mem")
        .unwrap()
        .write_all_at(&word.to_le_bytes(), start)
        .unwrap();
    // SAFETY: the kernel takes the address for the name of a futex, and neither reads nor writes there.
    unsafe { libc::syscall(libc::SYS_futex, start, libc::FUTEX_WAKE, i32::MAX) };
}

/// Until something is so that no event tells of.
fn wait_until(is_so: impl Fn() -> bool) {
    while !is_so() {
        thread::yield_now();
    }
}
