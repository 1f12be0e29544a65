//! Links over RDMA, where there is a device: `stories rdma DEVICE DEVICE ADDRESS`, run in the guest of tests/rdma-vm.

use crate::world::{Shape, World, texts};
use rayless_proto::v1::link::{LinkPolicy, LinkState, LinkTransport};
use rayless_worker::driver::{Asked, WorkerGroup};
use std::{
    net::{IpAddr, TcpListener},
    time::Duration,
};

/// Ends the process with a panic where something is not as it should be.
pub(crate) fn main(arguments: &[String]) {
    let [a, b, address] = arguments else { panic!("not two devices and the address of the second: {arguments:?}") };
    let devices = [a.clone(), b.clone()];
    proven(&devices);
    falls_through(&devices, address.parse().unwrap());
    println!("ok  links from {a} to {b}");
}

/// What every rank says. The guest is emulated: what takes a moment elsewhere takes seconds there.
fn told(group: &WorkerGroup, payload: &str) -> Vec<String> {
    texts(&group.call(payload.as_bytes(), &Asked::All, Some(Duration::from_secs(120))).unwrap().wait().unwrap())
}

fn proven(devices: &[String; 2]) {
    let mut world = World::of(&Shape { rdma: Some((devices.clone(), (6400, 6463))), ..Shape::new(1, 2) });
    let group = world.start();
    assert_eq!(told(&group, "link 0 1 0 3 100"), ["sent by rdma", "received by rdma", ""]);
    assert_eq!(told(&group, "link 2 0 0 3 100"), ["received by rdma", "", "sent by rdma"]);
    assert_eq!(told(&group, "link 1 2 0 3 100"), ["", "sent by shm", "received by shm"]);
    for index in [0, 1] {
        let report = world.report(index, |r| r.state == LinkState::Open && r.transport == Some(LinkTransport::Rdma));
        assert_eq!(report.device, devices[index]);
        assert!(report.mtu > 0 && !report.gid.is_empty(), "{report:?}");
        assert!(report.rejected[0].1.contains("two hosts"), "{report:?}");
    }
}

/// A device that does not do gives way only where that is allowed, and both ends know why.
fn falls_through(devices: &[String; 2], address: IpAddr) {
    // On iWARP the port is one of the kernel's TCP ports, so it can be taken; elsewhere what is listened on is found closed.
    let taken = TcpListener::bind((address, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let held = rayless_verbs::Listener::bind((address, port).into());
    let allow = LinkPolicy { allow_tcp: Some(true), ..LinkPolicy::default() };
    for (wishes, moved) in [(allow, true), (LinkPolicy::default(), false)] {
        let mut world = World::of(&Shape {
            rdma: Some((devices.clone(), (port, port))),
            wishes: [wishes, LinkPolicy::default()],
            ..Shape::new(1, 1)
        });
        let group = world.start();
        let told = told(&group, "link 0 1 0 3 100");
        if moved {
            assert_eq!(told, ["sent by tcp", "received by tcp"]);
            for index in [0, 1] {
                let report = world.report(index, |report| report.state == LinkState::Open);
                let (transport, why) = &report.rejected[1];
                assert_eq!(*transport, LinkTransport::Rdma);
                assert!(why.contains("are in use") && why.contains("at rank 1 on node b"), "{report:?}");
            }
        } else {
            for told in told {
                assert!(told.contains("are in use") && told.contains("--allow-tcp"), "{told}");
            }
        }
    }
    drop(held);
}
