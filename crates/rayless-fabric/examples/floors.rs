//! What a hop cannot be faster than, for benches/links.py: `floors tcp-listen ADDRESS`, `floors tcp-to ADDRESS BYTES SECONDS`,
//! `floors bulk-listen ADDRESS`, `floors bulk-to ADDRESS STREAMS BYTES SECONDS CONGESTION`, `floors shm BYTES SECONDS`.
//!
//! tcp: a ping-pong of plain blocking reads and writes over one connection; half of a round trip. bulk: so many streams one
//! way, all sent by one thread and read by one thread, from and to a buffer of so many bytes: what memory costs beside iperf3, whose
//! buffers stay in the cache. shm: a ping-pong over two
//! futex words between two processes, which sleep (`futex_us`) or look again and again first, as links do (`spin_us`);
//! and copying so many bytes (`memcpy_us`). Prints JSON.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program of measurements ends with the first error")]

use rayless_net::congestion::Congestion;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, BorrowedFd},
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap},
    thread::futex,
};
use std::{
    hint::black_box,
    io::{ErrorKind, Read, Write, stdin},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Command, Stdio},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tcp-listen", address] => tcp_listen(address),
        ["tcp-to", address, bytes, seconds] => tcp_to(address, bytes.parse().unwrap(), span(seconds)),
        ["bulk-listen", address] => bulk_listen(address),
        ["bulk-to", address, streams, bytes, seconds, congestion] => {
            bulk_to(address, streams.parse().unwrap(), bytes.parse().unwrap(), span(seconds), congestion);
        }
        ["futex-peer", spin_us] => answer(words_of(stdin().as_fd()), Duration::from_micros(spin_us.parse().unwrap())),
        ["shm", bytes, seconds] => shm(bytes.parse().unwrap(), span(seconds)),
        _ => panic!("usage: see the head of floors.rs"),
    }
}

fn span(seconds: &str) -> Duration {
    Duration::from_secs_f64(seconds.parse().unwrap())
}

/// p50 and p99 of what `once` takes, in microseconds, over this time.
fn measure(time: Duration, mut once: impl FnMut()) -> (f64, f64) {
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 20 || begin.elapsed() < time {
        let start = Instant::now();
        once();
        times.push(start.elapsed());
    }
    // The first tenth warms up.
    let mut times = times.split_off(times.len() / 10);
    times.sort_unstable();
    let at = |quantile: f64| times[((times.len() - 1) as f64 * quantile) as usize].as_secs_f64() * 1e6;
    (at(0.5), at(0.99))
}

/// Answers one caller after the other: 8 bytes of length, then as many bytes back and forth.
fn tcp_listen(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    println!("{}", listener.local_addr().unwrap());
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut length = [0; 8];
        stream.read_exact(&mut length).unwrap();
        let mut data = vec![0; u64::from_le_bytes(length) as usize];
        while stream.read_exact(&mut data).is_ok() {
            stream.write_all(&data).unwrap();
        }
    }
}

fn tcp_to(address: &str, bytes: usize, time: Duration) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(&(bytes as u64).to_le_bytes()).unwrap();
    let mut data = vec![1; bytes];
    let (p50, p99) = measure(time, || {
        stream.write_all(&data).unwrap();
        stream.read_exact(&mut data).unwrap();
    });
    println!("{{\"p50_us\":{:.3},\"p99_us\":{:.3}}}", p50 / 2.0, p99 / 2.0);
}

/// Bytes of one system call, as iperf3 has it.
const BULK: usize = 128 << 10;

/// Takes one caller after the other: on its first stream two numbers of 8 bytes, the streams and the buffer's size; then all that comes,
/// and the count of it back.
fn bulk_listen(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    println!("{}", listener.local_addr().unwrap());
    loop {
        let mut first = listener.accept().unwrap().0;
        let mut head = [0; 16];
        first.read_exact(&mut head).unwrap();
        let [streams, bytes] = [0, 8].map(|at| u64::from_le_bytes(head[at..at + 8].try_into().unwrap()) as usize);
        let mut streams: Vec<TcpStream> =
            std::iter::once(first).chain((1..streams).map(|_| listener.accept().unwrap().0)).collect();
        streams.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
        (&streams[0]).write_all(&[1]).unwrap();
        let (mut data, mut at, mut total) = (vec![0u8; bytes], 0, 0u64);
        let mut open = vec![true; streams.len()];
        while open.contains(&true) {
            ready(&streams, &open, PollFlags::IN);
            for (stream, open) in streams.iter_mut().zip(&mut open).filter(|(_, open)| **open) {
                at = if at + BULK > bytes { 0 } else { at };
                match stream.read(&mut data[at..(at + BULK).min(bytes)]) {
                    Ok(0) => *open = false,
                    Ok(count) => (at, total) = (at + count, total + count as u64),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
        }
        (&streams[0]).write_all(&total.to_le_bytes()).unwrap();
    }
}

fn bulk_to(address: &str, count: usize, bytes: usize, time: Duration, congestion: &str) {
    let congestion: Congestion = congestion.parse().unwrap();
    let dial = |_| congestion.connect(address.parse().unwrap(), Duration::from_secs(10)).unwrap();
    let mut streams: Vec<TcpStream> = (0..count).map(dial).collect();
    streams[0].write_all(&[count as u64, bytes as u64].map(u64::to_le_bytes).concat()).unwrap();
    streams[0].read_exact(&mut [0]).unwrap();
    streams.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
    let (data, mut at) = (vec![1u8; bytes], 0);
    let begin = Instant::now();
    while begin.elapsed() < time {
        ready(&streams, &vec![true; count], PollFlags::OUT);
        for stream in &mut streams {
            at = if at + BULK > bytes { 0 } else { at };
            match stream.write(&data[at..(at + BULK).min(bytes)]) {
                Ok(count) => at += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    }
    streams.iter().for_each(|stream| stream.shutdown(Shutdown::Write).unwrap());
    streams[0].set_nonblocking(false).unwrap();
    let mut total = [0; 8];
    streams[0].read_exact(&mut total).unwrap();
    println!("{{\"gb_s\":{:.3}}}", u64::from_le_bytes(total) as f64 / begin.elapsed().as_secs_f64() / 1e9);
}

/// Sleeps until one of the open ones is ready.
fn ready(streams: &[TcpStream], open: &[bool], flags: PollFlags) {
    let open = streams.iter().zip(open).filter(|(_, open)| **open);
    let mut fds: Vec<PollFd<'_>> = open.map(|(stream, _)| PollFd::new(stream, flags)).collect();
    poll(&mut fds, None).unwrap();
}

/// What the peer ends at.
const END: u32 = u32::MAX;

/// Two words of shared memory, a cache line apart.
fn words_of(fd: BorrowedFd<'_>) -> [&'static AtomicU32; 2] {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; it is never unmapped, aligned to a page, of 4096 bytes
    // (the memfd's size), and touched as atomics only.
    let words =
        unsafe { mmap(ptr::null_mut(), 4096, protection, MapFlags::SHARED, fd, 0).unwrap() }.cast::<AtomicU32>();
    // SAFETY: as above; word 64 is at byte 256.
    unsafe { [&*words, &*words.add(64)] }
}

fn signal(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    futex::wake(word, futex::Flags::empty(), 1).unwrap();
}

fn await_change(word: &AtomicU32, from: u32, spin: Duration) -> u32 {
    let begin = Instant::now();
    loop {
        let value = word.load(Ordering::Acquire);
        if value != from {
            return value;
        }
        if begin.elapsed() < spin {
            thread::yield_now();
        } else {
            // Every outcome makes it look again.
            let _ = futex::wait(word, futex::Flags::empty(), from, None);
        }
    }
}

fn answer([ping, pong]: [&AtomicU32; 2], spin: Duration) {
    let mut last = 0;
    while last != END {
        last = await_change(ping, last, spin);
        signal(pong, last);
    }
}

fn ping_pong(time: Duration, spin: Duration) -> (f64, f64) {
    let fd = memfd_create("floors", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 4096).unwrap();
    let [ping, pong] = words_of(fd.as_fd());
    let mut peer = Command::new(std::env::current_exe().unwrap())
        .args(["futex-peer", &spin.as_micros().to_string()])
        .stdin(Stdio::from(fd))
        .spawn()
        .unwrap();
    let mut round = 0;
    let measured = measure(time, || {
        signal(ping, round + 1);
        round = await_change(pong, round, spin);
    });
    signal(ping, END);
    peer.wait().unwrap();
    measured
}

fn shm(bytes: usize, time: Duration) {
    let (futex, futex99) = ping_pong(time / 3, Duration::ZERO);
    let (spin, spin99) = ping_pong(time / 3, Duration::from_micros(50));
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let (copy, copy99) = measure(time / 3, || {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    });
    println!(
        "{{\"futex_us\":{:.3},\"futex_p99_us\":{:.3},\"spin_us\":{:.3},\"spin_p99_us\":{:.3},\"memcpy_us\":{copy:.3},\"memcpy_p99_us\":{copy99:.3}}}",
        futex / 2.0,
        futex99 / 2.0,
        spin / 2.0,
        spin99 / 2.0
    );
}
