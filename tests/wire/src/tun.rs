//! A TUN device in a network namespace named by `ip netns`.

use rustix::{
    fs::{Mode, OFlags, open as open_file},
    ioctl::{Setter, ioctl, opcode},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use std::{fs::File, io, os::fd::AsFd, path::Path};

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    padding: [u8; 22],
}

/// From `linux/if_tun.h`: IP packets (not Ethernet), no header before them.
const IFF_TUN: u16 = 0x0001;
const IFF_NO_PI: u16 = 0x1000;
/// `_IOW('T', 202, int)`: its declared size is not that of what it reads.
const TUNSETIFF: u32 = opcode::write::<i32>(b'T', 202);

/// Makes the device `interface` in the namespace; it goes when the file is closed. The calling thread is in its own namespace
/// again afterwards.
pub(crate) fn open(namespace: &str, interface: &str) -> io::Result<File> {
    let file = |path: &Path| open_file(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let home = file(Path::new("/proc/thread-self/ns/net"))?;
    let there = file(&Path::new("/run/netns").join(namespace))?;
    move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))?;
    let made = make(interface);
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))?;
    made
}

fn make(interface: &str) -> io::Result<File> {
    // A TUN device belongs to the namespace in which its file was opened.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = open_file("/dev/net/tun", flags, Mode::empty())?;
    let mut request = InterfaceRequest { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, padding: [0; 22] };
    let name = interface.as_bytes();
    // The last byte stays 0.
    request
        .name
        .get_mut(..15)
        .and_then(|to| to.get_mut(..name.len()))
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(name);
    // SAFETY: TUNSETIFF reads (and writes back) one `struct ifreq`; `InterfaceRequest` has its size and layout, and is owned by
    // the setter for the time of the call.
    unsafe { ioctl(&device, Setter::<TUNSETIFF, InterfaceRequest>::new(request)) }?;
    Ok(device.into())
}
