//! What a host is like, as far as it matters to a cluster: kernel, limits, interfaces, RDMA, GPUs, processes. All from /proc and /sys.

use super::scrub::is_secret;
use rayless_net::interfaces;
use std::{fmt::Write as _, fs, path::Path};

/// Kernel, distribution, processors, memory, shared memory, and the limits of process `daemon` (else of this one).
pub(crate) fn host(daemon: Option<u32>) -> String {
    let mut out = String::new();
    for (title, path) in [
        ("kernel", "/proc/version"),
        ("distribution", "/etc/os-release"),
        ("command line of the kernel", "/proc/cmdline"),
        ("load", "/proc/loadavg"),
        ("uptime", "/proc/uptime"),
        ("memory", "/proc/meminfo"),
        ("pressure of memory", "/proc/pressure/memory"),
        ("cgroup", "/proc/self/cgroup"),
    ] {
        section(&mut out, title, &read(path));
    }
    let processors = read("/proc/cpuinfo");
    let model = processors.lines().find(|line| line.starts_with("model name")).unwrap_or("model name: unknown");
    let count = processors.lines().filter(|line| line.starts_with("processor")).count();
    section(&mut out, "processors", &format!("{count} of {model}"));
    section(&mut out, "/dev/shm", &shared_memory());
    let (whose, path) = daemon.map_or_else(
        || ("limits of this command".to_owned(), "/proc/self/limits".to_owned()),
        |pid| (format!("limits of the daemon (pid {pid})"), format!("/proc/{pid}/limits")),
    );
    section(&mut out, &whose, &read(&path));
    out
}

fn shared_memory() -> String {
    rustix::fs::statvfs("/dev/shm").map_or_else(
        |error| format!("cannot be looked at: {error}"),
        |stat| {
            format!(
                "{} MiB free of {} MiB",
                (stat.f_bavail * stat.f_frsize) >> 20,
                (stat.f_blocks * stat.f_frsize) >> 20
            )
        },
    )
}

/// Interfaces with state, MTU and speed; routes; listening sockets.
pub(crate) fn network() -> String {
    let mut out = String::new();
    for name in names("/sys/class/net") {
        let of = |what: &str| read(&format!("/sys/class/net/{name}/{what}")).trim().to_owned();
        let _ = writeln!(
            out,
            "{name}: {}, mtu {}, {} Mbit/s, received {} bytes ({} errors, {} dropped), sent {} bytes ({} errors)",
            of("operstate"),
            of("mtu"),
            of("speed"),
            of("statistics/rx_bytes"),
            of("statistics/rx_errors"),
            of("statistics/rx_dropped"),
            of("statistics/tx_bytes"),
            of("statistics/tx_errors"),
        );
    }
    for path in ["/proc/net/fib_trie", "/proc/net/route", "/proc/net/if_inet6", "/proc/net/snmp", "/proc/net/udp"] {
        section(&mut out, path, &read(path));
    }
    for (title, path) in [("listening TCP sockets", "/proc/net/tcp"), ("listening TCP sockets, IPv6", "/proc/net/tcp6")]
    {
        let listening: String = read(path)
            .lines()
            .filter(|line| line.split_whitespace().nth(3).is_none_or(|state| state == "0A" || state == "st"))
            .fold(String::new(), |all, line| all + line + "\n");
        section(&mut out, title, &listening);
    }
    out
}

/// What RDMA devices there are, and what keeps them from working.
pub(crate) fn rdma() -> String {
    let mut out = String::new();
    let addresses: Vec<_> =
        interfaces::list().unwrap_or_default().into_iter().map(|found| (found.name, found.address)).collect();
    let found = rayless_verbs::preflight(&[], &addresses);
    if found.findings.is_empty() {
        out.push_str("nothing keeps RDMA from working, as far as can be seen without trying\n");
    }
    for finding in found.findings {
        let _ = writeln!(out, "{finding}");
    }
    for reach in found.reaches {
        let _ = writeln!(out, "{reach:?}");
    }
    for device in names("/sys/class/infiniband") {
        let root = format!("/sys/class/infiniband/{device}");
        let of = |what: &str| read(&format!("{root}/{what}")).trim().to_owned();
        let _ = writeln!(out, "{device}: firmware {}, node type {}", of("fw_ver"), of("node_type"));
        for port in names(&format!("{root}/ports")) {
            let _ = writeln!(
                out,
                "  port {port}: {}, {}, {}, {}",
                of(&format!("ports/{port}/state")),
                of(&format!("ports/{port}/phys_state")),
                of(&format!("ports/{port}/rate")),
                of(&format!("ports/{port}/link_layer")),
            );
            for counter in names(&format!("{root}/ports/{port}/hw_counters")) {
                let value = of(&format!("ports/{port}/hw_counters/{counter}"));
                if value != "0" {
                    let _ = writeln!(out, "    {counter}: {value}");
                }
            }
        }
    }
    section(&mut out, "/dev/infiniband", &names("/dev/infiniband").join("\n"));
    out
}

/// Driver and GPUs, without asking NVML, which may hang.
pub(crate) fn gpus() -> String {
    let mut out = String::new();
    section(&mut out, "driver", &read("/proc/driver/nvidia/version"));
    for name in names("/proc/driver/nvidia/gpus") {
        section(&mut out, &name, &read(&format!("/proc/driver/nvidia/gpus/{name}/information")));
    }
    section(
        &mut out,
        "devices",
        &names("/dev").into_iter().filter(|name| name.starts_with("nvidia")).collect::<Vec<_>>().join("\n"),
    );
    out
}

/// Memory, threads and descriptors of processes.
pub(crate) fn processes(pids: &[(String, u32)]) -> String {
    let mut out = String::new();
    for (what, pid) in pids {
        let status = read(&format!("/proc/{pid}/status"));
        if status.is_empty() {
            let _ = writeln!(out, "{what} (pid {pid}): is gone");
            continue;
        }
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let of = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(":?");
            value.trim_start_matches(':').trim().to_owned()
        };
        let _ = writeln!(
            out,
            "{what} (pid {pid}): {}, memory {} (at most {}), {} threads, {fds} descriptors, locked {}",
            of("State"),
            of("VmRSS"),
            of("VmHWM"),
            of("Threads"),
            of("VmLck"),
        );
    }
    out
}

/// Variables of this command that matter here; values of secrets are not shown.
pub(crate) fn variables() -> String {
    let matters =
        ["RAYLESS_", "VLLM_", "NCCL_", "GLOO_", "CUDA_", "NVIDIA_", "TORCH_", "OMP_", "LD_LIBRARY", "HOME", "PATH"];
    let mut all: Vec<String> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            matters.iter().any(|prefix| name.starts_with(prefix)).then(|| {
                let secret = is_secret(&name) && name != "RAYLESS_TOKEN_FILE";
                let value = if secret { "[set, not shown]".into() } else { value.to_string_lossy().into_owned() };
                format!("{name}={value}\n")
            })
        })
        .collect();
    all.sort();
    all.concat()
}

fn section(out: &mut String, title: &str, text: &str) {
    let text = if text.trim().is_empty() { "(nothing)" } else { text.trim_end() };
    let _ = writeln!(out, "--- {title}\n{text}");
}

fn read(path: &str) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(directory)).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
