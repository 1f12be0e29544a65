//! What this process has, as the kernel counts it.

use std::{fs, process::Command, thread, time::Duration};

/// Resident memory may grow by this much and no more, however many links there were: what malloc keeps, of the longest
/// messages above all. (Up to 0.65 MiB was seen.)
const SLACK_KIB: u64 = 2 << 10;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Counts {
    descriptors: usize,
    memfds: usize,
    mappings: usize,
    threads: usize,
    /// Queue pairs, memory regions and so on, of every device of the machine.
    rdma: String,
    resident_kib: u64,
}

impl Counts {
    pub(crate) fn now() -> Self {
        let links: Vec<_> = fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let value = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            descriptors: links.len(),
            memfds: links.iter().filter(|link| link.starts_with("/memfd:")).count(),
            mappings: maps.lines().filter(|line| line.contains("rayless-link")).count(),
            threads: value("Threads:") as usize,
            rdma: rdma(),
            resident_kib: value("VmRSS:"),
        }
    }

    /// Waits until everything is back (the kernel takes what was a killed process's a moment after its death), and shows
    /// the counts; fails the test when it does not come back.
    pub(crate) fn are_back(&self, after: &str) {
        // Memory apart, and threads: the harness's own come and go, so there may be fewer.
        let rest = |counts: &Self| Self { resident_kib: 0, threads: 0, ..counts.clone() };
        let mut now = Self::now();
        for _ in 0..500 {
            if rest(&now) == rest(self) && now.threads <= self.threads {
                break;
            }
            thread::sleep(Duration::from_millis(10));
            now = Self::now();
        }
        println!("after {after}:\n  before {self:?}\n  now    {now:?}");
        assert_eq!(rest(&now), rest(self), "after {after}");
        assert!(now.threads <= self.threads, "after {after}: {self:?}, now {now:?}");
        assert!(now.resident_kib <= self.resident_kib + SLACK_KIB, "after {after}: {self:?}, now {now:?}");
    }
}

/// `rdma resource`; empty where there is no device.
fn rdma() -> String {
    if !fs::exists("/sys/class/infiniband").unwrap() {
        return String::new();
    }
    let program =
        ["/usr/bin/rdma", "/bin/rdma", "/usr/sbin/rdma", "/sbin/rdma"].into_iter().find(|p| fs::exists(p).unwrap());
    let shown = Command::new(program.unwrap()).arg("resource").output().unwrap();
    assert!(shown.status.success(), "{shown:?}");
    String::from_utf8(shown.stdout).unwrap()
}
