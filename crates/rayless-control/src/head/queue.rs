//! Who waits for nodes or resources, and in which order who is served.
//!
//! # Fairness
//! Requests are looked at in order of arrival, whenever something became free or somebody joined. The first that fits is
//! started; one that does not fit yet does not stop those behind it, with one exception: a later request may not take what an earlier one
//! is waiting for. That is, where the earlier one could run on this cluster at all, no node may lose capacity for its bundles. So
//!
//! - a large launch is not starved by a stream of small ones: what becomes free and suits it stays free until it starts;
//! - nobody is held up by a launch that this cluster could never run, nor by one that waits for other resources;
//! - the price is that GPUs may stay idle for an earlier launch, at most until its `--wait` ends.
//!
//! Groups that are carved out of a placement group compete only with each other.

use super::{
    Head,
    groups::Seat,
    model::{Node, Requester, Waiting, Want},
};
use crate::{
    placement,
    pool::{self, Pool},
};
use rayless_proto::{
    ids::{NodeId, PlacementGroupId},
    limits::{MAX_NAME, MAX_RESOURCES, MAX_WAITING, MAX_WORKERS_PER_HOST, MAX_WORLD_SIZE, WAIT_REPORT_PERIOD},
    resources::Resources,
    v1::control::{GroupSpec, Refusal, RefusalKind, ToNode},
};
use std::time::{Duration, Instant};

/// No launch waits longer, whatever it asks for; also keeps the arithmetic of time from overflowing.
const MAX_WAIT: Duration = Duration::from_secs(365 * 24 * 3600);
/// How long after its welcome a node may take to ask again for what it still wants.
const ASK_AGAIN_WITHIN: Duration = Duration::from_secs(5);
/// What to do when resources are short.
pub(super) const SHORT_HINT: &str = "`rayless status` shows who holds what: add a node with `rayless join`, end a group with `rayless stop --group ID`, or wait longer with `--wait S`";

/// What an earlier request that could run here waits for.
struct Claim {
    source: Option<PlacementGroupId>,
    bundles: Vec<Resources>,
}

/// Where a request stands.
enum Answer {
    Seats(Vec<Seat>),
    Wait,
    Never(Refusal),
}

impl Head {
    pub(super) fn on_create_group(&mut self, requester: Requester, spec: GroupSpec, now: Instant) {
        if let Some(node) = self.nodes.get_mut(&requester.node) {
            node.launches.asks.remove(&requester.request);
        }
        let known = self.groups.iter().find(|(_, g)| g.requester == Some(requester)).map(|(id, _)| *id);
        if let Some(id) = known {
            if self.groups.get(&id).is_some_and(|g| g.resumed.is_some()) {
                self.asked_again(id, spec, now);
                self.settle_launch(id, now);
            }
            return self.answer_again(id);
        }
        let wait_ms = spec.wait_ms;
        self.enqueue(requester, Want::Group(spec), wait_ms, now);
    }

    pub(super) fn enqueue(&mut self, requester: Requester, want: Want, wait_ms: u64, now: Instant) {
        if let Some(again) = self.queue.iter_mut().find(|w| w.requester == requester) {
            again.next_report = now;
            again.doubted = None;
            again.tried = false;
            self.arrived = true;
            return;
        }
        if let Some((cause, hint)) = bad_request(&want) {
            return self.refuse(requester, RefusalKind::Invalid, cause, hint);
        }
        if self.queue.len() >= MAX_WAITING {
            let cause = format!("{MAX_WAITING} launches wait already");
            return self.refuse(requester, RefusalKind::Resources, cause, "`rayless status` shows what holds the GPUs");
        }
        let until = now + Duration::from_millis(wait_ms).min(MAX_WAIT);
        self.queue.push_back(Waiting {
            requester,
            want,
            since: now,
            until,
            next_report: now,
            doubted: None,
            tried: false,
            feasible: None,
        });
        self.arrived = true;
    }

    /// Serves whom it can, and tells the others, when it is time.
    pub(super) fn run_queue(&mut self, now: Instant) {
        loop {
            if std::mem::take(&mut self.stirred) {
                self.queue.iter_mut().for_each(|w| w.tried = false);
                self.arrived = true;
            }
            if std::mem::take(&mut self.arrived) {
                self.serve(now);
            }
            // Who gives up makes way for those behind.
            self.give_up(now);
            if !self.stirred {
                break;
            }
        }
        for at in 0..self.queue.len() {
            if self.queue[at].next_report > now || self.queue[at].doubted.is_some() {
                continue;
            }
            self.queue[at].next_report = now + WAIT_REPORT_PERIOD;
            let table = self.need_have(at);
            let requester = self.queue[at].requester;
            self.reply(requester, ToNode::Waiting { request: requester.request, table });
        }
    }

    /// A node joined (again): what its clients wait for is served when it asks for it again, which it does at once after its
    /// welcome, or forgotten. A client may have gone away while nobody could say so.
    pub(super) fn doubt_requests(&mut self, node: NodeId, now: Instant) {
        for waiting in self.queue.iter_mut().filter(|w| w.requester.node == node) {
            waiting.doubted = Some(now);
        }
    }

    fn give_up(&mut self, now: Instant) {
        let before = self.queue.len();
        self.queue.retain(|w| w.doubted.is_none_or(|since| now < doubt_ends(since)));
        self.stirred |= self.queue.len() != before;
        let mut at = 0;
        while at < self.queue.len() {
            if self.queue[at].until > now || self.queue[at].doubted.is_some() {
                at += 1;
                continue;
            }
            let table = self.need_have(at);
            let Some(waiting) = self.queue.remove(at) else { return };
            let waited = now.saturating_duration_since(waiting.since);
            let cause = if waited.is_zero() {
                table.cause.clone()
            } else {
                format!("{}; waited {} s", table.cause, waited.as_secs())
            };
            let refusal = Refusal { kind: RefusalKind::Resources, cause, hint: SHORT_HINT.to_owned() };
            let request = waiting.requester.request;
            self.reply(waiting.requester, ToNode::RequestRefused { request, refusal, table: Some(table) });
            self.stirred = true;
        }
    }

    fn serve(&mut self, now: Instant) {
        let mut claims: Vec<Claim> = Vec::new();
        let mut at = 0;
        while at < self.queue.len() {
            let waiting = &self.queue[at];
            if waiting.doubted.is_some() {
                at += 1;
                continue;
            }
            let answer = if waiting.tried { Answer::Wait } else { self.seats_for(waiting, &claims) };
            match answer {
                Answer::Wait => {
                    self.queue[at].tried = true;
                    if self.is_feasible(at) {
                        let want = &self.queue[at].want;
                        let mut bundles: Vec<Resources> = Vec::new();
                        for bundle in want.bundles() {
                            if !bundles.contains(bundle) {
                                bundles.push(bundle.clone());
                            }
                        }
                        claims.push(Claim { source: want.placement_group(), bundles });
                    }
                    at += 1;
                }
                Answer::Never(refusal) => {
                    let Some(waiting) = self.queue.remove(at) else { return };
                    let request = waiting.requester.request;
                    self.reply(waiting.requester, ToNode::RequestRefused { request, refusal, table: None });
                }
                Answer::Seats(seats) => {
                    let Some(waiting) = self.queue.remove(at) else { return };
                    match waiting.want {
                        Want::Group(spec) => self.start_group(waiting.requester, &spec, seats, now),
                        Want::Bundles { name, strategy, .. } => {
                            let seats = seats.into_iter().map(|(node, allocation, _)| (node, allocation)).collect();
                            self.start_placement_group(waiting.requester, &name, strategy, seats, now);
                        }
                    }
                }
            }
        }
    }

    /// Nodes that may be placed on, by name: the order breaks ties.
    fn placeable(&self, usable: impl Fn(&Node) -> bool) -> Vec<(NodeId, &Pool)> {
        let mut nodes: Vec<_> = self.nodes.iter().filter(|(_, n)| usable(n)).collect();
        nodes.sort_by(|a, b| (&a.1.info.name, a.0).cmp(&(&b.1.info.name, b.0)));
        nodes.into_iter().map(|(id, n)| (*id, &n.pool)).collect()
    }

    fn seats_for(&self, waiting: &Waiting, claims: &[Claim]) -> Answer {
        let want = &waiting.want;
        let (sites, placed): (Vec<(NodeId, Option<u32>, &Pool)>, _) = match want.placement_group() {
            None => {
                let nodes = self.placeable(Node::is_placeable);
                let sites: Vec<_> = nodes.into_iter().map(|(id, pool)| (id, None, pool)).collect();
                let first = self.first_site(waiting, &sites);
                let pools: Vec<&Pool> = sites.iter().map(|s| s.2).collect();
                let placed = placement::place(&pools, want.bundles(), want.strategy(), first, per_host(want));
                (sites, placed)
            }
            Some(id) => {
                if self.placement_groups.get(&id).is_none_or(|p| p.removing) {
                    return Answer::Never(no_placement_group(id));
                }
                let sites = self.bundle_sites(id, waiting, Node::is_placeable);
                let pools: Vec<&Pool> = sites.iter().map(|s| s.2).collect();
                let placed = placement::carve(&pools, want.bundles());
                (sites, placed)
            }
        };
        let Some(placed) = placed else { return Answer::Wait };
        if claims.iter().any(|c| c.source == want.placement_group() && takes_from(c, &sites, &placed)) {
            return Answer::Wait;
        }
        if let Want::Group(spec) = want {
            let nodes = placed.iter().map(|(site, _)| sites[*site].0);
            if let Some(refusal) = self.check_versions(spec, nodes) {
                return Answer::Never(refusal);
            }
        }
        let seat = |(site, allocation): (usize, _)| {
            let (node, bundle, _) = sites[site];
            (node, allocation, want.placement_group().zip(bundle))
        };
        Answer::Seats(placed.into_iter().map(seat).collect())
    }

    fn first_site(&self, waiting: &Waiting, sites: &[(NodeId, Option<u32>, &Pool)]) -> Option<usize> {
        let driver = match &waiting.want {
            Want::Group(spec) => spec.driver_node,
            Want::Bundles { .. } => waiting.requester.node,
        };
        sites.iter().position(|s| s.0 == driver)
    }

    /// Bundles of a placement group: the driver's node first, then node by node.
    fn bundle_sites(
        &self,
        id: PlacementGroupId,
        waiting: &Waiting,
        usable: impl Fn(&Node) -> bool,
    ) -> Vec<(NodeId, Option<u32>, &Pool)> {
        let Some(group) = self.placement_groups.get(&id) else { return Vec::new() };
        let on_usable = group.bundles.iter().filter(|(_, b)| self.nodes.get(&b.node).is_some_and(&usable));
        let mut sites: Vec<_> = on_usable.map(|(index, b)| (b.node, Some(*index), &b.pool)).collect();
        let first_of = |node: NodeId| group.bundles.values().position(|b| b.node == node);
        let driver = match &waiting.want {
            Want::Group(spec) => spec.driver_node,
            Want::Bundles { .. } => waiting.requester.node,
        };
        sites.sort_by_key(|s| (s.0 != driver, first_of(s.0), s.1));
        sites
    }

    /// Whether it could be placed if nobody held anything: on the nodes that are not gone.
    pub(super) fn is_feasible(&mut self, at: usize) -> bool {
        let waiting = &self.queue[at];
        if let Some((shape, feasible)) = waiting.feasible
            && shape == self.shape
        {
            return feasible;
        }
        let want = &waiting.want;
        let feasible = match want.placement_group() {
            None => {
                let pools: Vec<Pool> = self.placeable(|n| !n.is_gone()).iter().map(|(_, p)| p.emptied()).collect();
                let pools: Vec<&Pool> = pools.iter().collect();
                placement::place(&pools, want.bundles(), want.strategy(), None, per_host(want)).is_some()
            }
            Some(id) => {
                let sites = self.bundle_sites(id, waiting, |n| !n.is_gone());
                let pools: Vec<Pool> = sites.iter().map(|s| s.2.emptied()).collect();
                let pools: Vec<&Pool> = pools.iter().collect();
                placement::carve(&pools, want.bundles()).is_some()
            }
        };
        self.queue[at].feasible = Some((self.shape, feasible));
        feasible
    }

    /// Whether it would be placed now if nobody had come before it.
    pub(super) fn fits_now(&self, at: usize) -> bool {
        self.queue.get(at).is_some_and(|w| matches!(self.seats_for(w, &[]), Answer::Seats(_)))
    }

    pub(super) fn refuse_waiting_for(&mut self, id: PlacementGroupId) {
        let (gone, rest): (Vec<Waiting>, Vec<Waiting>) =
            self.queue.drain(..).partition(|w| w.want.placement_group() == Some(id));
        self.queue = rest.into();
        for waiting in gone {
            let request = waiting.requester.request;
            let refusal = no_placement_group(id);
            self.reply(waiting.requester, ToNode::RequestRefused { request, refusal, table: None });
        }
    }

    pub(super) fn refuse_all_waiting(&mut self, cause: &str) {
        for waiting in std::mem::take(&mut self.queue) {
            self.refuse(waiting.requester, RefusalKind::Failed, cause, "");
        }
    }

    /// Promise 10: what the driver runs with, against each node that would hold ranks. Only what both name is compared.
    fn check_versions(&self, spec: &GroupSpec, nodes: impl Iterator<Item = NodeId>) -> Option<Refusal> {
        let mut checked: Vec<NodeId> = Vec::new();
        for id in nodes {
            if checked.contains(&id) {
                continue;
            }
            checked.push(id);
            let Some(node) = self.nodes.get(&id) else { continue };
            for (component, wanted) in &spec.driver_versions {
                let found = node.info.versions.iter().find(|(name, _)| name == component).map(|(_, v)| v);
                let Some(found) = found.filter(|f| !same_version(component, wanted, f)) else { continue };
                let name = &node.info.name;
                let cause = format!(
                    "{component} differs: the driver on {} has {wanted}, node {name} has {found}",
                    self.node_name(spec.driver_node)
                );
                let hint = match component.as_str() {
                    "python" | "cuda" => {
                        format!("install {component} {wanted} on {name}, or {found} on the driver's node")
                    }
                    _ => format!("run `pip install {component}=={wanted}` on {name}"),
                };
                return Some(Refusal { kind: RefusalKind::Policy, cause, hint });
            }
        }
        None
    }
}

/// When a request that was not asked for again is forgotten.
pub(super) fn doubt_ends(since: Instant) -> Instant {
    since + ASK_AGAIN_WITHIN
}

/// Python talks to itself across patch releases; everything else must be equal. An empty version is an unknown one.
fn same_version(component: &str, a: &str, b: &str) -> bool {
    let minor = |v: &str| v.split('.').take(2).map(str::to_owned).collect::<Vec<_>>();
    a.is_empty() || b.is_empty() || a == b || (component == "python" && minor(a) == minor(b))
}

const fn per_host(want: &Want) -> usize {
    match want {
        Want::Group(_) => MAX_WORKERS_PER_HOST,
        Want::Bundles { .. } => usize::MAX,
    }
}

/// Whether this placement leaves less room for the bundles of an earlier request.
fn takes_from(claim: &Claim, sites: &[(NodeId, Option<u32>, &Pool)], placed: &placement::Placed) -> bool {
    let mut touched: Vec<usize> = placed.iter().map(|p| p.0).collect();
    touched.sort_unstable();
    touched.dedup();
    touched.into_iter().any(|site| {
        let mut after = sites[site].2.clone();
        let whole = placed.iter().filter(|p| p.0 == site).all(|p| after.take_exactly(&p.1));
        let room = |pool: &Pool, bundle| pool.capacity(bundle, MAX_WORLD_SIZE);
        !whole || claim.bundles.iter().any(|b| room(&after, b) < room(sites[site].2, b))
    })
}

fn no_placement_group(id: PlacementGroupId) -> Refusal {
    let cause = format!("there is no placement group {id} (any more)");
    Refusal { kind: RefusalKind::Invalid, cause, hint: "`rayless status` lists them".into() }
}

/// What is wrong with the form of a request: cause and hint.
fn bad_request(want: &Want) -> Option<(String, String)> {
    let bundles = want.bundles();
    let hint = |text: &str| text.to_owned();
    if bundles.is_empty() {
        return Some(("it asks for no bundle at all".into(), hint("give one bundle per rank")));
    }
    if bundles.len() > MAX_WORLD_SIZE {
        let cause = format!("it asks for {} bundles, more than {MAX_WORLD_SIZE}", bundles.len());
        return Some((cause, hint("start several groups")));
    }
    if want.name().len() > MAX_NAME {
        let cause = format!("its name has {} bytes, more than {MAX_NAME}", want.name().len());
        return Some((cause, hint("choose a shorter one")));
    }
    for bundle in bundles {
        if bundle.len() > MAX_RESOURCES || bundle.iter().any(|(name, _)| name.is_empty() || name.len() > MAX_NAME) {
            let cause = format!("a bundle may name {MAX_RESOURCES} resources, each of 1 to {MAX_NAME} bytes");
            return Some((cause, hint("ask for fewer")));
        }
        if let Err(error) = pool::check_bundle(bundle) {
            let text = error.to_string();
            let (cause, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
            return Some((cause.to_owned(), hint.to_owned()));
        }
    }
    None
}
