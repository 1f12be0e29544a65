//! The layer on real verbs. Run by tests/rdma-vm/conformance, in a guest with soft-RoCE and soft-iWARP devices.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test's helpers are tests too")]

use rayless_verbs::{
    Access, Completion, Connected, Endpoint, Kind, Listener, MAX_BATCH, MAX_PRIVATE, Operation, Range, RegionId,
    Remote, Sizes, VerbsError, Work, devices,
};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    time::{Duration, Instant},
};

const SIZES: Sizes = Sizes { sends: 8, recvs: 4, inline: 64 };

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// The receiving and the sending device of a kind.
fn addresses(kind: &str) -> (IpAddr, IpAddr) {
    let net = if kind == "rxe" { 77 } else { 78 };
    (Ipv4Addr::new(10, net, 0, 1).into(), Ipv4Addr::new(10, net, 0, 2).into())
}

struct Pair {
    active: (Endpoint<Connected>, RegionId),
    passive: (Endpoint<Connected>, RegionId),
    told: Vec<u8>,
}

/// Two connected endpoints; each has a region of 64 KiB, and the passive one RECVs posted at its end.
fn pair(kind: &str, sizes: Sizes) -> Pair {
    let (to, from) = addresses(kind);
    let mut listener = Listener::bind(SocketAddr::new(to, 0)).unwrap();
    let address = listener.address();
    std::thread::scope(|scope| {
        let active = scope.spawn(move || {
            let mut endpoint = Endpoint::to(address, Some(from), sizes, deadline()).unwrap();
            let region = endpoint.allocate(64 << 10, Access::RemoteWrite).unwrap();
            assert_eq!(endpoint.device(), format!("{kind}1"));
            let (endpoint, told) = endpoint.connect(&[7; MAX_PRIVATE], deadline()).unwrap();
            ((endpoint, region), told)
        });
        let request = listener.accept(deadline()).unwrap();
        assert_eq!(request.private(), [7; MAX_PRIVATE]);
        let mut endpoint = Endpoint::for_request(request, sizes).unwrap();
        let region = endpoint.allocate(64 << 10, Access::RemoteReadWrite).unwrap();
        let recvs: Vec<_> =
            (0..4).map(|i| (Range { region, offset: (60 << 10) + 64 * i, len: 64 }, i as u64)).collect();
        endpoint.post_recvs(&recvs).unwrap();
        let Remote { address, rkey } = endpoint.remote(region);
        let private = [address.to_le_bytes().as_slice(), &rkey.to_le_bytes()].concat();
        let passive = (endpoint.accept(&private, deadline()).unwrap(), region);
        let (active, told) = active.join().unwrap();
        Pair { active, passive, told }
    })
}

/// Waits for one completion by its event.
fn take(endpoint: &mut Endpoint<Connected>) -> Completion {
    let mut out = [Completion::default(); MAX_BATCH];
    loop {
        endpoint.arm().unwrap();
        match endpoint.poll(&mut out).unwrap() {
            0 => {}
            1 => return out[0],
            n => panic!("{n} completions at once"),
        }
        let fd = endpoint.completion_fd().as_fd().try_clone_to_owned().unwrap();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "no completion");
        endpoint.acknowledge();
    }
}

fn writes_sends_and_reads_arrive(kind: &str) {
    for inline in [64, 0] {
        let Pair { active: (mut active, mine), passive: (mut passive, theirs), told } =
            pair(kind, Sizes { inline, ..SIZES });
        println!("{kind}: {} asked inline, {} granted", inline, active.max_inline());
        let address = u64::from_le_bytes(told[..8].try_into().unwrap());
        let rkey = u32::from_le_bytes(told[8..12].try_into().unwrap());
        active.copy_in(mine, 0, b"written").unwrap();
        active.copy_in(mine, 100, b"sent").unwrap();
        let write = Work {
            operation: Operation::Write(Remote { address: address + 1000, rkey }),
            local: Range { region: mine, offset: 0, len: 7 },
            signaled: false,
            id: 1,
        };
        let send = Work {
            operation: Operation::Send,
            local: Range { region: mine, offset: 100, len: 4 },
            signaled: true,
            id: 2,
        };
        let before = active.posted();
        active.post(&[write, send]).unwrap();
        let got = take(&mut passive);
        assert_eq!((got.is_recv, got.id, got.len, got.status), (true, 0, 4, 0));
        let mut bytes = [0; 7];
        passive.copy_out(theirs, 1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"written");
        passive.copy_out(theirs, 60 << 10, &mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"sent");
        let done = take(&mut active);
        assert_eq!((done.is_recv, done.id, done.status), (false, 2, 0));
        let after = active.posted();
        assert_eq!((after.work_requests - before.work_requests, after.doorbells - before.doorbells), (2, 1));

        let read = Work {
            operation: Operation::Read(Remote { address: address + 1000, rkey }),
            local: Range { region: mine, offset: 500, len: 7 },
            signaled: true,
            id: 3,
        };
        active.post(&[read]).unwrap();
        assert_eq!(take(&mut active).id, 3);
        active.copy_out(mine, 500, &mut bytes).unwrap();
        assert_eq!(&bytes, b"written");

        // The end is news at the other side.
        drop(active);
        let fd = passive.connection_fd().try_clone_to_owned().unwrap();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1, "no event");
        assert_eq!(passive.ended().unwrap(), Some("the connection was closed"));
    }
}

fn mistakes_are_typed_and_touch_nothing(kind: &str) {
    let Pair { active: (mut active, mine), passive: _passive, .. } = pair(kind, SIZES);
    let send = |offset, len| Work {
        operation: Operation::Send,
        local: Range { region: mine, offset, len },
        signaled: true,
        id: 0,
    };
    for (offset, len) in [(0, (64 << 10) + 1), (64 << 10, 1), (usize::MAX, 2)] {
        assert!(matches!(active.post(&[send(offset, len)]), Err(VerbsError::Misuse { .. })));
    }
    assert!(matches!(active.post(&[]), Err(VerbsError::Misuse { .. })));
    assert!(matches!(active.post(&[send(0, 1); MAX_BATCH + 1]), Err(VerbsError::Misuse { .. })));
    assert!(matches!(active.copy_in(mine, 64 << 10, b"x"), Err(VerbsError::Misuse { .. })));
    assert!(matches!(active.allocate(0, Access::Source), Err(VerbsError::Misuse { .. })));
    let memfd = rustix::fs::memfd_create("no dma-buf", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let refused = active.register_dmabuf(memfd.as_fd(), 0, 4096, Access::Source).unwrap_err();
    assert!(matches!(refused, VerbsError::Call { call: "ibv_reg_dmabuf_mr", .. }), "{refused}");
    // It still works.
    active.post(&[send(0, 1)]).unwrap();
    assert_eq!(take(&mut active).status, 0);
}

fn a_refusal_carries_its_reason_and_nobody_listening_is_an_error(kind: &str) {
    let (to, from) = addresses(kind);
    let mut listener = Listener::bind(SocketAddr::new(to, 0)).unwrap();
    let address = listener.address();
    std::thread::scope(|scope| {
        let active = scope.spawn(move || {
            Endpoint::to(address, Some(from), SIZES, deadline()).unwrap().connect(b"me", deadline()).map(drop)
        });
        listener.accept(deadline()).unwrap().reject("not you");
        assert_eq!(active.join().unwrap(), Err(VerbsError::Refused { reason: "not you".to_owned() }));
    });
    drop(listener);
    let endpoint = Endpoint::to(address, Some(from), SIZES, deadline()).unwrap();
    let nobody = endpoint.connect(b"me", deadline()).map(drop).unwrap_err();
    // iWARP connects a TCP socket first, and tells at once.
    assert!(matches!(nobody, VerbsError::Event { .. } | VerbsError::Call { call: "rdma_connect", .. }), "{nobody}");
    let elsewhere = Listener::bind("203.0.113.1:0".parse().unwrap()).map(drop).unwrap_err();
    assert!(elsewhere.to_string().contains("no RDMA device has this address"), "{elsewhere}");
}

macro_rules! on_both {
    ($($test:ident),*) => {
        mod rxe { $(#[test] #[ignore = "needs soft-RoCE devices: tests/rdma-vm/conformance"] fn $test() { super::$test("rxe"); })* }
        mod siw { $(#[test] #[ignore = "needs soft-iWARP devices: tests/rdma-vm/conformance"] fn $test() { super::$test("siw"); })* }
    };
}

on_both!(
    writes_sends_and_reads_arrive,
    mistakes_are_typed_and_touch_nothing,
    a_refusal_carries_its_reason_and_nobody_listening_is_an_error,
    sysfs_shows_the_devices
);

fn sysfs_shows_the_devices(kind: &str) {
    let (to, _) = addresses(kind);
    let devices = devices().unwrap();
    let device = devices.iter().find(|device| device.name == format!("{kind}0")).unwrap();
    println!("{device:?}");
    assert_eq!(device.kind, if kind == "rxe" { Kind::Ib } else { Kind::Iwarp });
    assert_eq!((device.ports[0].state.as_str(), device.pci_path.as_ref()), ("ACTIVE", None));
    if kind == "rxe" {
        let IpAddr::V4(v4) = to else { panic!("{to}") };
        let hex: Vec<String> = v4.to_ipv6_mapped().segments().map(|s| format!("{s:04x}")).into();
        let gid = device.ports[0].gids.iter().find(|gid| gid.gid == hex.join(":")).unwrap();
        assert_eq!((gid.kind.as_str(), gid.interface.as_str()), ("RoCE v2", "re_a"));
    }
}
