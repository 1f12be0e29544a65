//! Who holds a port: for the message only, when it could not be had. Reads `/proc`.

use std::{fs, net::SocketAddr};

/// `name (pid 12)` of a process with a socket on that port that this user may look at; the first of several.
pub(crate) fn holder_of(port: u16, tables: &[&str], listening_only: bool) -> Option<String> {
    let inodes: Vec<String> = tables
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/net/{table}")).ok())
        .flat_map(|table| table.lines().skip(1).filter_map(|l| inode(l, port, listening_only)).collect::<Vec<_>>())
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    for process in processes.filter(|p| p.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit)) {
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = |link: std::path::PathBuf| inodes.iter().any(|inode| link.as_os_str() == inode.as_str());
        if descriptors.flatten().filter_map(|d| fs::read_link(d.path()).ok()).any(holds) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (pid {})", name.trim(), process.file_name().to_string_lossy()));
        }
    }
    None
}

/// The inode in a line of `/proc/net/{tcp,udp}`, if it is about that port.
fn inode(line: &str, port: u16, listening_only: bool) -> Option<String> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace();
    let local = fields.nth(1)?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?;
    let is_port = u16::from_str_radix(local.rsplit(':').next()?, 16).is_ok_and(|p| p == port);
    (is_port && (!listening_only || state == LISTEN)).then(|| inode.to_owned())
}

/// The tables that show a socket in the way of `address`.
pub(crate) fn tables(address: SocketAddr, tcp: bool) -> [&'static str; 2] {
    match (tcp, address.is_ipv4()) {
        (true, true) => ["tcp", "tcp6"],
        (true, false) => ["tcp6", "tcp"],
        (false, true) => ["udp", "udp6"],
        (false, false) => ["udp6", "udp"],
    }
}
