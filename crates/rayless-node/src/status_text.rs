//! `rayless status` for people: nodes, GPUs with holders, groups with ranks, last events.
//!
//! For programs there is `rayless status --json` ([`StatusReport::to_json`]); this text may change in any release.

use rayless_proto::{
    ids::{GroupId, NodeId},
    resources::{CPU, GPU, MEMORY, Resources},
    v1::{
        link::LinkTransport,
        rdma::{RdmaDevice, RdmaFinding, RdmaPort},
        status::{GpuState, GroupStatus, LinkStatus, NodeState, NodeStatus, StatusReport, TokenStatus},
    },
};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::Ipv6Addr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Events shown to people; all that are kept are in `--json`.
const EVENTS: usize = 8;

/// The page. `now` is the reader's clock, for the age of events.
pub fn status(report: &StatusReport, now: SystemTime) -> String {
    let mut out = String::new();
    let uptime = age(Duration::from_millis(report.uptime_ms));
    let _ = write!(out, "cluster {}  up {uptime}  protocol {}", short(&report.cluster), report.protocol);
    if report.term.0 > 0 {
        let standbys: Vec<String> =
            report.heads.iter().filter(|seat| !seat.active).map(|seat| label(&seat.name, &short(&seat.node))).collect();
        let standbys = if standbys.is_empty() { "none".to_owned() } else { standbys.join(", ") };
        let _ = write!(out, "  term {}  standby {standbys}", report.term.0);
    }
    if report.refused_handshakes > 0 {
        let _ = write!(out, "  refused handshakes {}", report.refused_handshakes);
    }
    out.push_str("\n\n");
    let mut rows =
        vec![["node", "state", "address", "seen", "rtt", "cpu", "gpu", "memory", "other"].map(str::to_owned)];
    rows.extend(report.nodes.iter().map(node_row));
    table(&mut out, &rows);
    rotation(&mut out, report);
    gpus(&mut out, report);
    groups(&mut out, report);
    if !report.placement_groups.is_empty() {
        let names = node_names(report);
        let mut rows = vec![["placement group", "strategy", "bundles"].map(str::to_owned)];
        rows.extend(report.placement_groups.iter().map(|group| {
            let bundles =
                group.bundles.iter().map(|(what, node)| format!("{} on {}", quantities(what), name_of(&names, node)));
            [label(&group.name, &short(&group.id)), group.strategy.clone(), bundles.collect::<Vec<_>>().join("; ")]
        }));
        out.push('\n');
        table(&mut out, &rows);
    }
    links(&mut out, report);
    rdma(&mut out, report);
    if !report.events.is_empty() {
        out.push_str("\nlast events\n");
        let newest = report.events.len().saturating_sub(EVENTS);
        for event in &report.events[newest..] {
            let then = UNIX_EPOCH + Duration::from_micros(event.time_us);
            let ago = age(now.duration_since(then).unwrap_or_default());
            let _ = writeln!(out, "  {ago:>6} ago  {}: {}", event.kind, event.cause);
        }
    }
    out
}

/// `rayless status --env`: what the workers of each node get, and who said so.
pub fn environment(report: &StatusReport) -> String {
    let mut rows = vec![["node", "variable", "value", "from"].map(str::to_owned)];
    for node in &report.nodes {
        let name = label(&node.name, &short(&node.id));
        rows.extend(
            node.node_env.iter().map(|env| [name.clone(), env.name.clone(), env.value.clone(), env.source.clone()]),
        );
    }
    let mut out = String::new();
    table(&mut out, &rows);
    out
}

fn node_row(node: &NodeStatus) -> [String; 9] {
    let is_gone = matches!(node.state, NodeState::Dead | NodeState::Left);
    let used = |name: &str| {
        let total = node.resources.get(name);
        if total.is_zero() || is_gone {
            return "-".to_owned();
        }
        let free = node.available.get(name);
        format!("{}/{total}", total.minus(free).unwrap_or_default())
    };
    let gib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 30));
    let memory = node.resources.get(MEMORY);
    let memory_used = memory.minus(node.available.get(MEMORY)).unwrap_or_default();
    let other: Vec<String> = node
        .resources
        .iter()
        .filter(|(name, _)| ![CPU, GPU, MEMORY].contains(name))
        .map(|(name, _)| format!("{name} {}", used(name)))
        .collect();
    [
        format!("{}{}", label(&node.name, &short(&node.id)), if node.is_head { " (head)" } else { "" }),
        node.state.name().to_owned(),
        node.address.clone(),
        if node.is_head { "-".to_owned() } else { format!("{} ms", node.last_seen_ms) },
        if node.rtt_us == 0 { "-".to_owned() } else { format!("{} us", node.rtt_us) },
        used(CPU),
        used(GPU),
        if is_gone { "-".to_owned() } else { format!("{}/{} GiB", gib(memory_used.as_f64()), gib(memory.as_f64())) },
        other.join(", "),
    ]
}

/// Nothing where no rotation of the token is under way.
fn rotation(out: &mut String, report: &StatusReport) {
    let TokenStatus { rotating, left_ms, behind, .. } = &report.token;
    if !rotating && behind.is_empty() {
        return;
    }
    out.push('\n');
    if *rotating {
        let end = match left_ms {
            Some(left) => format!("for {} more", age(Duration::from_millis(*left))),
            None => "until `rayless token rotate --finish`".to_owned(),
        };
        let _ = writeln!(out, "the cluster's token is being rotated: the one before it is accepted {end}");
    }
    let names = node_names(report);
    for (node, problem) in behind {
        let why = if problem.is_empty() { String::new() } else { format!(": {problem}") };
        let _ = writeln!(out, "{} has not taken the new token{why}", name_of(&names, node));
    }
}

fn gpus(out: &mut String, report: &StatusReport) {
    let group_names: BTreeMap<GroupId, &str> =
        report.groups.iter().map(|group| (group.id, group.name.as_str())).collect();
    let mut rows = vec![["gpu", "model", "state", "held by"].map(str::to_owned)];
    for node in &report.nodes {
        for gpu in &node.gpus {
            let holders =
                gpu.held_by.iter().map(|id| label(group_names.get(id).copied().unwrap_or_default(), &short(id)));
            let holders = holders.collect::<Vec<_>>().join(", ");
            let at = format!("{}:{}", label(&node.name, &short(&node.id)), gpu.index);
            // A row per free GPU of a thousand would hide the held ones.
            if gpu.state != GpuState::Free || report.nodes.len() <= 8 {
                rows.push([at, gpu.name.clone(), gpu.state.name().to_owned(), holders]);
            }
        }
    }
    if rows.len() > 1 {
        out.push('\n');
        table(out, &rows);
    }
}

fn groups(out: &mut String, report: &StatusReport) {
    let names = node_names(report);
    for group in &report.groups {
        let name = if group.name.is_empty() { String::new() } else { format!("{}  ", group.name) };
        let _ = write!(out, "\ngroup {name}{}  {}", group.id, group.state.name());
        let _ = write!(out, "  driver pid {} on {}", group.driver_pid, name_of(&names, &group.driver_node));
        if !group.cause.is_empty() {
            let _ = write!(out, "  cause: {}", group.cause);
        }
        out.push('\n');
        table(out, &worker_rows(group, &names));
    }
}

fn worker_rows(group: &GroupStatus, names: &BTreeMap<NodeId, String>) -> Vec<[String; 5]> {
    let mut rows = vec![["rank", "node", "pid", "state", "gpus"].map(str::to_owned)];
    rows.extend(group.workers.iter().map(|worker| {
        let gpus = worker.gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let pid = if worker.pid == 0 { "-".to_owned() } else { worker.pid.to_string() };
        [worker.rank.to_string(), name_of(names, &worker.node), pid, worker.state.name().to_owned(), gpus]
    }));
    rows
}

fn links(out: &mut String, report: &StatusReport) {
    if report.links.is_empty() {
        return;
    }
    let titles = ["link", "transport", "state", "device", "gid", "mtu", "moved", "not taken"];
    let mut rows = vec![titles.map(str::to_owned)];
    rows.extend(report.links.iter().map(link_row));
    out.push('\n');
    table(out, &rows);
}

fn link_row(link: &LinkStatus) -> [String; 8] {
    let channel = if link.channel == 0 { String::new() } else { format!(" #{}", link.channel) };
    let transport = link.transport.map_or("-", LinkTransport::name);
    // `ring: why`: only the first word belongs to the transport's column.
    let (mode, why) = link.mode.split_once(": ").unwrap_or((&link.mode, ""));
    let mode = if mode.is_empty() { String::new() } else { format!("/{mode}") };
    let marks = [(link.encrypted, "+tls"), (link.verified, "+checksums")];
    let marks: String = marks.iter().filter(|(set, _)| *set).map(|(_, mark)| *mark).collect();
    let both = |ours: &str, theirs: &str| {
        if ours.is_empty() || ours == theirs { theirs.to_owned() } else { format!("{ours} -> {theirs}") }
    };
    let rejected = link.rejected.iter().map(|(transport, reason)| format!("{}: {reason}", transport.name()));
    let two_copies = (!why.is_empty()).then(|| format!("one copy: {why}"));
    let cause = (!link.cause.is_empty()).then(|| format!("failed: {}", link.cause));
    [
        format!("{} {} -> {}{channel}", short(&link.group), link.from, link.to),
        format!("{transport}{mode}{marks}"),
        link.state.name().to_owned(),
        both(&link.device, &link.peer_device),
        both(&gid(&link.gid), &gid(&link.peer_gid)),
        if link.mtu == 0 { String::new() } else { link.mtu.to_string() },
        format!("{} ({})", link.messages, bytes(link.bytes)),
        cause.into_iter().chain(two_copies).chain(rejected).collect::<Vec<_>>().join("; "),
    ]
}

/// What the nodes have for RDMA, and what is wrong with it. Where none has anything, one line says what follows from that.
fn rdma(out: &mut String, report: &StatusReport) {
    let there: Vec<&NodeStatus> =
        report.nodes.iter().filter(|node| matches!(node.state, NodeState::Alive | NodeState::Suspect)).collect();
    if there.iter().all(|node| node.rdma.devices.is_empty()) {
        out.push_str("\nno node has an RDMA device: tensors between hosts go over TCP\n");
    } else {
        let titles = ["rdma", "protocol", "state", "rate", "interface", "mtu", "gids", "numa", "gpus"];
        let mut rows = vec![titles.map(str::to_owned)];
        for node in &there {
            let of_node =
                node.rdma.devices.iter().flat_map(|device| device.ports.iter().map(move |port| (device, port)));
            let name = label(&node.name, &short(&node.id));
            rows.extend(of_node.map(|(device, port)| rdma_row(&name, device, port)));
        }
        out.push('\n');
        table(out, &rows);
    }
    for node in there {
        let named = |finding: &&RdmaFinding| !node.rdma.devices.is_empty() || finding.is_fatal;
        // That it has no device is said above where it holds for all.
        let worth = report.nodes.iter().any(|node| !node.rdma.devices.is_empty()) || node.rdma.findings.len() > 1;
        for finding in node.rdma.findings.iter().filter(named).filter(|_| worth) {
            let _ = writeln!(out, "rdma on {}: {}", label(&node.name, &short(&node.id)), finding.what);
        }
    }
}

fn rdma_row(node: &str, device: &RdmaDevice, port: &RdmaPort) -> [String; 9] {
    let steps = |(index, steps): &(u32, Option<u32>)| match steps {
        Some(steps) => format!("{index}:{steps}"),
        None => format!("{index}:far"),
    };
    [
        format!("{node}:{}/{}", device.name, port.number),
        format!("{} {}", device.protocol, device.mode).trim_end().to_owned(),
        port.state.clone(),
        port.rate.clone(),
        format!("{} {}", port.interface, port.address).trim().to_owned(),
        if port.mtu == 0 { String::new() } else { port.mtu.to_string() },
        port.gids.iter().map(|it| format!("{}={}", it.index, gid(&it.gid))).collect::<Vec<_>>().join(" "),
        device.numa.map(|numa| numa.to_string()).unwrap_or_default(),
        device.gpu_steps.iter().map(steps).collect::<Vec<_>>().join(" "),
    ]
}

/// A GID as people write it: `::ffff:10.0.0.1`.
fn gid(text: &str) -> String {
    text.parse::<Ipv6Addr>().map_or_else(|_| text.to_owned(), |address| address.to_string())
}

/// `0 B`, `28.0 KiB`, `3.5 GiB`.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn node_names(report: &StatusReport) -> BTreeMap<NodeId, String> {
    report.nodes.iter().map(|node| (node.id, label(&node.name, &short(&node.id)))).collect()
}

fn name_of(names: &BTreeMap<NodeId, String>, id: &NodeId) -> String {
    names.get(id).cloned().unwrap_or_else(|| id.short())
}

fn label(name: &str, id: &str) -> String {
    if name.is_empty() { id.to_owned() } else { name.to_owned() }
}

fn short(id: &impl ToString) -> String {
    id.to_string().chars().take(8).collect()
}

fn quantities(resources: &Resources) -> String {
    resources.iter().map(|(name, quantity)| format!("{name} {quantity}")).collect::<Vec<_>>().join(" ")
}

/// Columns as wide as their widest cell, two spaces between; empty columns are left out.
fn table<const N: usize>(out: &mut String, rows: &[[String; N]]) {
    let body = rows.get(1..).unwrap_or_default();
    let shown: Vec<usize> = (0..N).filter(|column| body.iter().any(|row| !row[*column].is_empty())).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = shown.iter().map(|column| width(*column)).collect();
    for row in rows {
        let cells = shown.iter().zip(&widths).map(|(column, width)| format!("{:width$}", row[*column]));
        let _ = writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// `850 ms`, `12 s`, `5 min`, `3 h`, `2 d`.
pub fn age(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 => format!("{} ms", span.as_millis()),
        1..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::{
        ids::ClusterId,
        resources::Quantity,
        v1::{
            control::{NodeEnv, WorkerState},
            link::{LinkSettings, LinkState},
            rdma::{RdmaGid, RdmaInventory},
            status::{Event, GpuStatus, GroupState, WorkerStatus},
        },
    };

    fn report() -> StatusReport {
        let [head, worker] = [NodeId([1; 32]), NodeId([2; 32])];
        let group = GroupId([3; 8]);
        let has = Resources::new()
            .with(CPU, Quantity::whole(8))
            .with(GPU, Quantity::whole(1))
            .with(MEMORY, Quantity::whole(64 << 30));
        let node = |id, name: &str, is_head| NodeStatus {
            id,
            name: name.to_owned(),
            address: format!("{name}:6379"),
            is_head,
            state: NodeState::Alive,
            incarnation: 1,
            last_seen_ms: 120,
            rtt_us: if is_head { 0 } else { 85 },
            resources: has.clone(),
            available: has.clone(),
            gpus: Vec::new(),
            versions: Vec::new(),
            interface: "eth0".to_owned(),
            node_env: vec![NodeEnv { name: "VLLM_HOST_IP".into(), value: "10.0.0.1".into(), source: "join".into() }],
            links: LinkSettings::default(),
            rdma: RdmaInventory::default(),
        };
        let mut second = node(worker, "b", false);
        assert!(second.available.take(&Resources::new().with(GPU, Quantity::ONE)));
        second.gpus.push(GpuStatus {
            index: 0,
            uuid: "GPU-1".into(),
            name: "NVIDIA H20".into(),
            memory_bytes: 1,
            state: GpuState::Held,
            held_by: vec![group],
        });
        StatusReport {
            cluster: ClusterId([9; 16]),
            head,
            term: rayless_proto::ids::Term(0),
            heads: Vec::new(),
            protocol: 1,
            uptime_ms: 65_000,
            refused_handshakes: 1,
            token: TokenStatus::default(),
            nodes: vec![node(head, "a", true), second],
            groups: vec![GroupStatus {
                id: group,
                name: "vllm".into(),
                state: GroupState::Running,
                cause: String::new(),
                driver_node: head,
                driver_pid: 77,
                workers: vec![WorkerStatus {
                    rank: 0,
                    node: worker,
                    pid: 78,
                    state: WorkerState::Ready,
                    gpus: vec![0],
                }],
            }],
            placement_groups: Vec::new(),
            links: Vec::new(),
            events: vec![Event { time_us: 5_000_000, kind: "node-joined".into(), cause: "b joined".into() }],
        }
    }

    #[test]
    fn shows_who_holds_what() {
        let page = status(&report(), UNIX_EPOCH + Duration::from_secs(10));
        assert_eq!(
            page,
            "cluster 09090909  up 65 s  protocol 1  refused handshakes 1\n\
             \n\
             node      state  address  seen    rtt    cpu  gpu  memory\n\
             a (head)  alive  a:6379   -       -      0/8  0/1  0.0/64.0 GiB\n\
             b         alive  b:6379   120 ms  85 us  0/8  1/1  0.0/64.0 GiB\n\
             \n\
             gpu  model       state  held by\n\
             b:0  NVIDIA H20  held   vllm\n\
             \n\
             group vllm  0303030303030303  running  driver pid 77 on a\n\
             rank  node  pid  state  gpus\n\
             0     b     78   ready  0\n\
             \n\
             no node has an RDMA device: tensors between hosts go over TCP\n\
             \n\
             last events\n\
             \x20    5 s ago  node-joined: b joined\n"
        );
    }

    #[test]
    fn shows_links_and_what_was_not_taken() {
        let mut report = report();
        report.groups.clear();
        report.events.clear();
        report.nodes.iter_mut().for_each(|node| node.gpus.clear());
        let gid = |last| format!("0000:0000:0000:0000:0000:ffff:0a00:000{last}");
        let device = |last| RdmaDevice {
            name: format!("mlx5_{last}"),
            protocol: "roce".into(),
            mode: String::new(),
            numa: Some(1),
            gpu_steps: vec![(0, Some(4)), (1, None)],
            ports: vec![RdmaPort {
                number: 1,
                state: "ACTIVE".into(),
                rate: "100 Gb/sec (4X EDR)".into(),
                interface: "eth1".into(),
                address: format!("10.0.0.{last}"),
                mtu: 9000,
                gids: vec![RdmaGid { index: 3, gid: gid(last), kind: "RoCE v2".into() }],
            }],
        };
        report.nodes[0].rdma.devices.push(device(1));
        report.nodes[1]
            .rdma
            .findings
            .push(RdmaFinding { what: "no RDMA device in /sys/class/infiniband".into(), is_fatal: true });
        let link = LinkStatus {
            group: GroupId([3; 8]),
            from: 0,
            to: 8,
            channel: 1,
            state: LinkState::Open,
            cause: String::new(),
            transport: Some(LinkTransport::Rdma),
            mode: String::new(),
            device: "mlx5_1".into(),
            gid: gid(1),
            mtu: 4096,
            peer_device: "mlx5_2".into(),
            peer_gid: gid(2),
            rejected: vec![(LinkTransport::Shm, "the ranks are on two hosts".into())],
            encrypted: false,
            verified: true,
            messages: 12,
            bytes: 12 * 28 * 1024,
        };
        let failed = LinkStatus {
            channel: 0,
            state: LinkState::Failed,
            cause: "no transport".into(),
            transport: None,
            device: String::new(),
            gid: String::new(),
            mtu: 0,
            peer_device: String::new(),
            peer_gid: String::new(),
            verified: false,
            messages: 0,
            bytes: 0,
            ..link.clone()
        };
        let shared = LinkStatus {
            to: 1,
            transport: Some(LinkTransport::Shm),
            mode: "ring: process_vm_readv: not permitted".into(),
            mtu: 0,
            rejected: Vec::new(),
            ..failed.clone()
        };
        let shared = LinkStatus { state: LinkState::Open, cause: String::new(), gid: String::new(), ..shared };
        report.links = vec![link, failed, shared];
        let page = status(&report, UNIX_EPOCH);
        let page = page.split_once("GiB\n\n").unwrap().1;
        assert_eq!(
            page,
            "link                transport       state   device            gid                                 mtu   moved           not taken\n\
             03030303 0 -> 8 #1  rdma+checksums  open    mlx5_1 -> mlx5_2  ::ffff:10.0.0.1 -> ::ffff:10.0.0.2  4096  12 (336.0 KiB)  shm: the ranks are on two hosts\n\
             03030303 0 -> 8     -               failed                                                              0 (0 B)         failed: no transport; shm: the ranks are on two hosts\n\
             03030303 0 -> 1     shm/ring        open                                                                0 (0 B)         one copy: process_vm_readv: not permitted\n\
             \n\
             rdma        protocol  state   rate                 interface      mtu   gids               numa  gpus\n\
             a:mlx5_1/1  roce      ACTIVE  100 Gb/sec (4X EDR)  eth1 10.0.0.1  9000  3=::ffff:10.0.0.1  1     0:4 1:far\n\
             rdma on b: no RDMA device in /sys/class/infiniband\n"
        );
    }

    #[test]
    fn sizes_are_told_in_the_unit_that_fits() {
        assert_eq!([0, 1023, 28 << 10, 3 << 30].map(bytes), ["0 B", "1023 B", "28.0 KiB", "3.0 GiB"]);
    }

    #[test]
    fn shows_a_rotation_and_who_is_behind() {
        let mut report = report();
        report.token.rotating = true;
        report.token.behind = vec![(NodeId([2; 32]), "no space".into())];
        let page = status(&report, UNIX_EPOCH);
        let told = "\nthe cluster's token is being rotated: the one before it is accepted until `rayless token rotate --finish`\n\
                    b has not taken the new token: no space\n\n";
        assert!(page.contains(told), "{page}");
        report.token.left_ms = Some(90_000);
        assert!(status(&report, UNIX_EPOCH).contains("is accepted for 90 s more\n"));
    }

    #[test]
    fn shows_where_the_environment_came_from() {
        assert_eq!(
            environment(&report()),
            "node  variable      value     from\n\
             a     VLLM_HOST_IP  10.0.0.1  join\n\
             b     VLLM_HOST_IP  10.0.0.1  join\n"
        );
    }
}
