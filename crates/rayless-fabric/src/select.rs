//! Which transports a link may try, in which order, and why it may not try the others: a pure function of both ends.
//!
//! Shared memory on one host, else RDMA where both ends have a device, each pair of devices being an attempt of its own; TCP only where it was
//! allowed, or where no node of the group has an RDMA device. What was asked for by name is never replaced by anything else.

use crate::transport::Level;
use rayless_proto::{
    ids::Rank,
    v1::{
        link::{LinkPolicy, LinkTransport},
        rdma::RdmaReach,
    },
};
use std::{collections::VecDeque, net::IpAddr};

/// Pairs of RDMA devices that are tried: where these all fail, more of the same will not help, and each costs its time-out.
const MAX_PAIRS: usize = 4;

/// One end of a link.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Its rank.
    pub rank: Rank,
    /// Name of its node.
    pub node: &'a str,
    /// Its ways out by RDMA, the preferred first.
    pub rdma: &'a [RdmaReach],
    /// Why RDMA cannot be used there; empty where it can.
    pub no_rdma: &'a str,
}

/// Where the two ends are.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// On one host, so that they could share memory.
    pub same_host: bool,
    /// Names of the group's nodes that have an RDMA device, whether or not it can be used.
    pub rdma_nodes: &'a [&'a str],
}

/// An attempt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Over what.
    pub level: Level,
    /// For RDMA the devices: the sender's, the receiver's.
    pub pair: Option<(RdmaReach, RdmaReach)>,
}

/// A transport that was not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejection {
    /// Which.
    pub level: Level,
    /// One line of cause.
    pub reason: String,
}

/// What is left to try for one link, and what was ruled out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    nodes: [String; 2],
    steps: VecDeque<Step>,
    rejected: Vec<Rejection>,
    /// What could be done if nothing is left.
    hint: &'static str,
}

/// The attempts that both ends' policy (made one before) allows.
pub fn plan(from: &End<'_>, to: &End<'_>, place: &Place<'_>, policy: &LinkPolicy) -> Plan {
    let mut plan = Plan {
        nodes: [from.node, to.node].map(str::to_owned),
        steps: VecDeque::new(),
        rejected: Vec::new(),
        hint: hint(from, to, place, policy),
    };
    for transport in [LinkTransport::Shm, LinkTransport::Rdma, LinkTransport::Tcp] {
        let level = Level::from(transport);
        let ruled_out = match policy.only {
            Some(only) if only != transport => {
                Some(format!("only {} is allowed (--transport, RAYLESS_TRANSPORT)", only.name()))
            }
            _ => match transport {
                LinkTransport::Shm => no_shm(from, to, place),
                LinkTransport::Rdma => no_rdma(from, to, policy),
                LinkTransport::Tcp => no_tcp(place, policy),
            },
        };
        match ruled_out {
            Some(reason) => plan.rejected.push(Rejection { level, reason }),
            None if transport == LinkTransport::Rdma => {
                let pairs = pairs(from.rdma, to.rdma).into_iter().take(MAX_PAIRS);
                plan.steps.extend(pairs.map(|pair| Step { level, pair: Some(pair) }));
            }
            None => plan.steps.push_back(Step { level, pair: None }),
        }
    }
    plan
}

impl Plan {
    /// What to try now; `None`: nothing is left.
    pub fn step(&self) -> Option<&Step> {
        self.steps.front()
    }

    /// Has `attempt` open and prove one step after the other, until one does. Its inner error is why a step came to nothing, which
    /// gives way to the next one; the outer one ends it all. `None`: nothing is left.
    pub fn first<L, E>(
        &mut self,
        mut attempt: impl FnMut(&Step) -> Result<Result<L, String>, E>,
    ) -> Result<Option<(Step, L)>, E> {
        while let Some(step) = self.steps.front() {
            match attempt(step)? {
                Ok(link) => return Ok(Some((step.clone(), link))),
                Err(reason) => self.failed(&reason),
            }
        }
        Ok(None)
    }

    /// The present step came to nothing, for this reason: the next one is the present one.
    pub fn failed(&mut self, reason: &str) {
        let Some(Step { level, pair }) = self.steps.pop_front() else { return };
        let reason = match &pair {
            None => reason.to_owned(),
            Some((from, to)) => {
                let mtu = mtu_note(&self.nodes, from, to);
                format!("{} to {}: {reason}{mtu}", from.device, to.device)
            }
        };
        match self.rejected.iter_mut().find(|known| known.level == level) {
            // Another pair of devices.
            Some(known) => known.reason = format!("{}; {reason}", known.reason),
            None => self.rejected.push(Rejection { level, reason }),
        }
    }

    /// What was not taken, with reasons, best first: all that is better than the present step, pairs of devices that gave way to
    /// its pair included, or everything where none is left.
    pub fn rejected(&self) -> Vec<Rejection> {
        let better = |known: &&Rejection| self.step().is_none_or(|step| known.level >= step.level);
        let mut all: Vec<Rejection> = self.rejected.iter().filter(better).cloned().collect();
        all.sort_by_key(|known| std::cmp::Reverse(known.level));
        all
    }

    /// What to do about it where nothing is left.
    pub const fn hint(&self) -> &'static str {
        self.hint
    }
}

fn no_shm(from: &End<'_>, to: &End<'_>, place: &Place<'_>) -> Option<String> {
    let ends = || format!("rank {} is on node {} and rank {} on node {}", from.rank, from.node, to.rank, to.node);
    (!place.same_host).then(|| format!("{}, which are two hosts", ends()))
}

fn no_rdma(from: &End<'_>, to: &End<'_>, policy: &LinkPolicy) -> Option<String> {
    if policy.encrypt {
        return Some("RDMA carries tensors in clear, and --encrypt-tensors was given".to_owned());
    }
    match (from.no_rdma, to.no_rdma) {
        ("", "") => {}
        (a, b) if a == b && from.node == to.node => return Some(format!("node {}: {a}", from.node)),
        (a, b) if a == b => return Some(format!("node {} and node {}: {a}", from.node, to.node)),
        (a, "") => return Some(format!("node {}: {a}", from.node)),
        ("", b) => return Some(format!("node {}: {b}", to.node)),
        (a, b) => return Some(format!("node {}: {a}; node {}: {b}", from.node, to.node)),
    }
    let has = |end: &End<'_>| match end.rdma {
        [] => format!("node {} has no RDMA device that is up", end.node),
        all => {
            let named = |way: &RdmaReach| format!("{} ({}, {})", way.device, way.protocol, way.address);
            format!("node {} has {}", end.node, all.iter().map(named).collect::<Vec<_>>().join(", "))
        }
    };
    pairs(from.rdma, to.rdma).is_empty().then(|| format!("no two devices can talk: {}, {}", has(from), has(to)))
}

fn no_tcp(place: &Place<'_>, policy: &LinkPolicy) -> Option<String> {
    match (policy.allow_tcp, policy.only, place.rdma_nodes) {
        (Some(false), ..) => Some("TCP is forbidden (RAYLESS_ALLOW_TCP=0)".to_owned()),
        // Asked for, allowed, or the only way that there is.
        (_, Some(LinkTransport::Tcp), _) | (Some(true), ..) | (_, _, []) => None,
        (None, _, nodes) => {
            let mut nodes = nodes.to_vec();
            nodes.sort_unstable();
            let have = if nodes.len() == 1 { "has an RDMA device" } else { "have RDMA devices" };
            Some(format!("node {} {have}, so TCP takes --allow-tcp (RAYLESS_ALLOW_TCP=1)", nodes.join(" and node ")))
        }
    }
}

fn hint(from: &End<'_>, to: &End<'_>, place: &Place<'_>, policy: &LinkPolicy) -> &'static str {
    match policy.only {
        Some(LinkTransport::Shm) if !place.same_host => {
            "place both ranks on one host, or allow another transport (`--transport auto` on both nodes, RAYLESS_TRANSPORT unset at the driver)"
        }
        Some(LinkTransport::Rdma) if !(from.no_rdma.is_empty() && to.no_rdma.is_empty()) => {
            "repair what is named above (`rayless status` shows each node's RDMA devices), or leave `--transport rdma` out"
        }
        Some(_) => "`--transport auto` allows the other transports",
        None if no_tcp(place, policy).is_some() => {
            "repair what keeps RDMA from working (`rayless status` shows each node's devices), or allow TCP with `--allow-tcp`"
        }
        None => "check that the nodes reach each other on the port that `rayless status` shows for each (a firewall?)",
    }
}

/// Devices that could talk. Equal places come first: there rails are cabled to their like, and each end's list begins near its GPU.
fn pairs(from: &[RdmaReach], to: &[RdmaReach]) -> Vec<(RdmaReach, RdmaReach)> {
    let is_v4 = |way: &RdmaReach| way.address.parse::<IpAddr>().is_ok_and(|address| address.is_ipv4());
    let fits = |a: &RdmaReach, b: &RdmaReach| a.protocol == b.protocol && a.protocol != "other" && is_v4(a) == is_v4(b);
    let mut found = Vec::new();
    for (i, a) in from.iter().enumerate() {
        for (j, b) in to.iter().enumerate().filter(|(_, b)| fits(a, b)) {
            found.push(((i.abs_diff(j), i + j), (a, b)));
        }
    }
    found.sort_by_key(|(order, _)| *order);
    found.into_iter().map(|(_, (a, b))| (a.clone(), b.clone())).collect()
}

/// A path whose ends have different MTUs carries small packets and drops large ones: the proof finds that, this names it.
fn mtu_note([from_node, to_node]: &[String; 2], from: &RdmaReach, to: &RdmaReach) -> String {
    if from.mtu == to.mtu || from.mtu == 0 || to.mtu == 0 {
        return String::new();
    }
    format!(
        " (the MTUs differ: {} on node {from_node} has {}, {} on node {to_node} has {}; set both to the same)",
        from.interface, from.mtu, to.interface, to.mtu
    )
}

impl From<LinkTransport> for Level {
    fn from(transport: LinkTransport) -> Self {
        match transport {
            LinkTransport::Tcp => Self::Tcp,
            LinkTransport::Rdma => Self::Rdma,
            LinkTransport::Shm => Self::Shm,
        }
    }
}

impl From<Level> for LinkTransport {
    fn from(level: Level) -> Self {
        match level {
            Level::Tcp => Self::Tcp,
            Level::Rdma => Self::Rdma,
            Level::Shm => Self::Shm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: &str = "no RDMA device in /sys/class/infiniband";
    const APART: Place<'_> = Place { same_host: false, rdma_nodes: &[] };

    fn way(device: &str, protocol: &str, address: &str, mtu: u32) -> RdmaReach {
        RdmaReach {
            device: device.to_owned(),
            protocol: protocol.to_owned(),
            interface: "eth1".to_owned(),
            address: address.to_owned(),
            mtu,
            gid: String::new(),
        }
    }

    fn end<'a>(rank: Rank, node: &'a str, rdma: &'a [RdmaReach], no_rdma: &'a str) -> End<'a> {
        End { rank, node, rdma, no_rdma }
    }

    fn levels(plan: &Plan) -> Vec<Level> {
        plan.steps.iter().map(|step| step.level).collect()
    }

    fn reasons(plan: &Plan) -> Vec<(&'static str, String)> {
        plan.rejected().into_iter().map(|known| (known.level.name(), known.reason)).collect()
    }

    fn only(transport: LinkTransport) -> LinkPolicy {
        LinkPolicy { only: Some(transport), ..LinkPolicy::default() }
    }

    #[test]
    fn without_any_device_it_is_shared_memory_on_one_host_and_else_tcp_and_that_is_said() {
        let auto = LinkPolicy::default();
        let (a, b) = (end(0, "a", &[], NONE), end(1, "b", &[], NONE));
        let apart = plan(&a, &b, &APART, &auto);
        assert_eq!(levels(&apart), [Level::Tcp]);
        assert_eq!(
            reasons(&apart),
            [
                ("shm", "rank 0 is on node a and rank 1 on node b, which are two hosts".to_owned()),
                ("rdma", format!("node a and node b: {NONE}")),
            ]
        );
        let together = plan(&a, &end(1, "a", &[], NONE), &Place { same_host: true, ..APART }, &auto);
        assert_eq!(levels(&together), [Level::Shm, Level::Tcp]);
        assert_eq!(reasons(&together), []);
    }

    #[test]
    fn rdma_does_not_turn_into_tcp_without_a_flag() {
        let ways = [way("erdma_0", "iwarp", "10.0.0.1", 1500)];
        let place = Place { same_host: false, rdma_nodes: &["b", "a"] };
        let (a, b) = (end(0, "a", &ways, ""), end(1, "b", &[], "the memlock limit is 64 KiB"));
        let mut none = plan(&a, &b, &place, &LinkPolicy::default());
        assert_eq!(none.step(), None);
        assert_eq!(
            reasons(&none)[1..],
            [
                ("rdma", "node b: the memlock limit is 64 KiB".to_owned()),
                (
                    "tcp",
                    "node a and node b have RDMA devices, so TCP takes --allow-tcp (RAYLESS_ALLOW_TCP=1)".to_owned()
                ),
            ]
        );
        assert!(none.hint().contains("--allow-tcp"));
        none.failed("nothing was tried");
        assert_eq!(reasons(&none).len(), 3);

        let allowed = plan(&a, &b, &place, &LinkPolicy { allow_tcp: Some(true), ..LinkPolicy::default() });
        assert_eq!((levels(&allowed), reasons(&allowed).len()), (vec![Level::Tcp], 2));
        assert_eq!(levels(&plan(&a, &b, &place, &only(LinkTransport::Tcp))), [Level::Tcp]);
        // One device anywhere in the group is enough to take the flag.
        let one = Place { same_host: false, rdma_nodes: &["c"] };
        let (a, b) = (end(0, "a", &[], NONE), end(1, "b", &[], NONE));
        let none = plan(&a, &b, &one, &LinkPolicy::default());
        assert_eq!(reasons(&none)[2].1, "node c has an RDMA device, so TCP takes --allow-tcp (RAYLESS_ALLOW_TCP=1)");
        // A no holds also where there is no other way.
        let no = LinkPolicy { allow_tcp: Some(false), ..LinkPolicy::default() };
        assert_eq!(reasons(&plan(&a, &b, &APART, &no))[2].1, "TCP is forbidden (RAYLESS_ALLOW_TCP=0)");
    }

    #[test]
    fn a_transport_asked_for_by_name_is_not_replaced() {
        let (a, b) = (end(0, "a", &[], NONE), end(1, "b", &[], NONE));
        let none = plan(&a, &b, &APART, &only(LinkTransport::Shm));
        assert_eq!(none.step(), None);
        let told = reasons(&none);
        assert_eq!(told[0].1, "rank 0 is on node a and rank 1 on node b, which are two hosts");
        assert_eq!(told[2].1, "only shm is allowed (--transport, RAYLESS_TRANSPORT)");
        assert!(none.hint().starts_with("place both ranks on one host"));

        let none = plan(&a, &b, &APART, &LinkPolicy { allow_tcp: Some(true), ..only(LinkTransport::Rdma) });
        assert_eq!((none.step(), reasons(&none)[1].1.clone()), (None, format!("node a and node b: {NONE}")));

        let on_one_host = Place { same_host: true, ..APART };
        let tcp = plan(&a, &b, &on_one_host, &only(LinkTransport::Tcp));
        assert_eq!((levels(&tcp), reasons(&tcp).len()), (vec![Level::Tcp], 2));
    }

    #[test]
    fn each_pair_of_devices_is_tried_like_with_like() {
        let a = [way("mlx5_0", "roce", "10.1.0.1", 9000), way("mlx5_1", "roce", "10.2.0.1", 9000)];
        let b = [
            way("mlx5_0", "roce", "10.1.0.2", 9000),
            way("mlx5_1", "roce", "10.2.0.2", 1500),
            way("siw0", "iwarp", "10.3.0.2", 1500),
        ];
        let place = Place { same_host: false, rdma_nodes: &["a", "b"] };
        let mut found = plan(&end(0, "a", &a, ""), &end(1, "b", &b, ""), &place, &LinkPolicy::default());
        let tried: Vec<_> = found.steps.iter().filter_map(|step| step.pair.as_ref()).collect();
        let tried: Vec<_> = tried.iter().map(|(a, b)| (a.device.as_str(), b.device.as_str())).collect();
        assert_eq!(tried, [("mlx5_0", "mlx5_0"), ("mlx5_1", "mlx5_1"), ("mlx5_0", "mlx5_1"), ("mlx5_1", "mlx5_0")]);
        found.failed("no answer within 5 s");
        found.failed("the proof's message of 28672 bytes did not arrive");
        assert_eq!(found.step().unwrap().level, Level::Rdma);
        assert_eq!(reasons(&found).len(), 2, "TCP may still be taken, so it is not rejected");
        found.failed("no");
        found.failed("no");
        assert_eq!(
            reasons(&found)[1].1,
            "mlx5_0 to mlx5_0: no answer within 5 s; mlx5_1 to mlx5_1: the proof's message of 28672 bytes did not arrive \
             (the MTUs differ: eth1 on node a has 9000, eth1 on node b has 1500; set both to the same); \
             mlx5_0 to mlx5_1: no (the MTUs differ: eth1 on node a has 9000, eth1 on node b has 1500; set both to the same); \
             mlx5_1 to mlx5_0: no"
        );
    }

    /// A prover that finds these pairs wanting: they connect, and then their transfer does not arrive.
    fn prover<'a>(drops: &'a [&'a str], tried: &'a mut Vec<String>) -> impl FnMut(&Step) -> Proof + 'a {
        move |step| {
            let pair = step.pair.as_ref().map(|(from, to)| format!("{} to {}", from.device, to.device));
            let what = pair.unwrap_or_else(|| step.level.name().to_owned());
            tried.push(what.clone());
            let drops = drops.contains(&what.as_str());
            Ok(if drops { Err("the proof's message of 28672 bytes did not arrive".to_owned()) } else { Ok(what) })
        }
    }

    type Proof = Result<Result<String, String>, &'static str>;

    #[test]
    fn a_pair_that_connects_and_fails_its_proof_gives_way_to_the_next_pair_and_then_to_tcp() {
        let a = [way("mlx5_0", "roce", "10.1.0.1", 9000), way("mlx5_1", "roce", "10.2.0.1", 9000)];
        let b = [way("mlx5_0", "roce", "10.1.0.2", 9000)];
        let place = Place { same_host: false, rdma_nodes: &["a", "b"] };
        let (auto, allow) = (LinkPolicy::default(), LinkPolicy { allow_tcp: Some(true), ..LinkPolicy::default() });
        let fresh = |policy| plan(&end(0, "a", &a, ""), &end(1, "b", &b, ""), &place, policy);
        let first = "mlx5_0 to mlx5_0: the proof's message of 28672 bytes did not arrive";

        let (mut plan, mut tried) = (fresh(&allow), Vec::new());
        let (step, link) = plan.first(prover(&["mlx5_0 to mlx5_0"], &mut tried)).unwrap().unwrap();
        assert_eq!((step.level, link.as_str()), (Level::Rdma, "mlx5_1 to mlx5_0"));
        assert_eq!(tried, ["mlx5_0 to mlx5_0", "mlx5_1 to mlx5_0"]);
        assert_eq!(reasons(&plan)[1..], [("rdma", first.to_owned())]);

        let both = ["mlx5_0 to mlx5_0", "mlx5_1 to mlx5_0"];
        let second = "mlx5_1 to mlx5_0: the proof's message of 28672 bytes did not arrive";
        let (mut plan, mut tried) = (fresh(&allow), Vec::new());
        let (step, link) = plan.first(prover(&both, &mut tried)).unwrap().unwrap();
        assert_eq!((step.level, link.as_str()), (Level::Tcp, "tcp"));
        assert_eq!(reasons(&plan)[1..], [("rdma", format!("{first}; {second}"))]);

        // Without the flag nothing is left, and all of it is told.
        let mut plan = fresh(&auto);
        assert_eq!(plan.first(prover(&both, &mut Vec::new())), Ok(None));
        let told = reasons(&plan);
        assert_eq!((told.len(), &told[1]), (3, &("rdma", format!("{first}; {second}"))));
        assert!(told[2].1.contains("--allow-tcp"), "{told:?}");

        // A peer that is gone is no reason to try the next.
        let mut plan = fresh(&allow);
        assert_eq!(plan.first(|_| Proof::Err("gone")), Err("gone"));
        assert_eq!((plan.steps.len(), reasons(&plan).len()), (3, 1));
    }

    #[test]
    fn devices_that_cannot_talk_are_named() {
        let (a, b) = ([way("mlx5_0", "roce", "10.1.0.1", 1500)], [way("erdma_0", "iwarp", "10.1.0.2", 1500)]);
        let place = Place { same_host: false, rdma_nodes: &["a", "b"] };
        let none = plan(&end(0, "a", &a, ""), &end(1, "b", &b, ""), &place, &LinkPolicy::default());
        assert_eq!(
            reasons(&none)[1].1,
            "no two devices can talk: node a has mlx5_0 (roce, 10.1.0.1), node b has erdma_0 (iwarp, 10.1.0.2)"
        );
    }

    #[test]
    fn encryption_rules_rdma_out() {
        let ways = [way("erdma_0", "iwarp", "10.0.0.1", 1500)];
        let place = Place { same_host: false, rdma_nodes: &["a", "b"] };
        let policy = LinkPolicy { encrypt: true, allow_tcp: Some(true), ..LinkPolicy::default() };
        let found = plan(&end(0, "a", &ways, ""), &end(1, "b", &ways, ""), &place, &policy);
        assert_eq!(levels(&found), [Level::Tcp]);
        assert_eq!(reasons(&found)[1].1, "RDMA carries tensors in clear, and --encrypt-tensors was given");
    }
}
