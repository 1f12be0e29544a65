//! The need/have table of a request that waits, and its one line of cause.

use super::{
    Head,
    model::{Keeper, Node, Want},
};
use rayless_proto::{
    ids::{NodeId, PlacementGroupId},
    resources::{CPU, GPU, MEMORY, Quantity, Resources, Strategy},
    v1::{
        control::{NeedHave, NeedHaveRow},
        status::NodeState,
    },
};

impl Head {
    /// The table of the request at this place of the queue.
    pub(super) fn need_have(&mut self, at: usize) -> NeedHave {
        let feasible = self.is_feasible(at);
        let want = &self.queue[at].want;
        let mut need = Resources::new();
        for bundle in want.bundles() {
            need.add(bundle);
        }
        let cause = match want.placement_group() {
            Some(id) => self.cause_in_placement_group(id, &need, feasible),
            None => self.cause_on_nodes(at, &need, feasible),
        };
        let bundles = u32::try_from(want.bundles().len()).unwrap_or(u32::MAX);
        NeedHave { cause, need, bundles, rows: self.rows() }
    }

    fn cause_on_nodes(&self, at: usize, need: &Resources, feasible: bool) -> String {
        let Some(waiting) = self.queue.get(at) else { return String::new() };
        let present: Vec<&Node> = self.nodes.values().filter(|n| !n.is_gone()).collect();
        let who = match present.len() {
            0 => return format!("needs {}, but no node has joined", list(need)),
            1 => "the only node has".to_owned(),
            n => format!("the {n} nodes have"),
        };
        let sum = |of: &dyn Fn(&Node) -> Resources| {
            let mut all = Resources::new();
            for node in &present {
                all.add(&of(node));
            }
            all
        };
        let total = sum(&|n| n.pool.total().clone());
        if let Some(short) = first_short(need, &total) {
            let (needed, there) = (amount(short, need.get(short)), number(short, total.get(short)));
            return format!("needs {needed}, {who} {there}{}", self.dead_that_have(short));
        }
        if !feasible {
            return self.cause_of_shape(&waiting.want, &present);
        }
        let free = sum(&|n| if n.is_placeable() { n.pool.available() } else { Resources::new() });
        if let Some(short) = first_short(need, &free) {
            return format!(
                "needs {}, {} of {} {} free",
                amount(short, need.get(short)),
                number(short, free.get(short)),
                number(short, total.get(short)),
                if total.get(short) == Quantity::ONE { "is" } else { "are" },
            );
        }
        if self.fits_now(at) {
            return "waits for an earlier launch to be placed first".to_owned();
        }
        let shape = shape_of(&waiting.want);
        format!("needs {shape}: {} are free, but not in that shape", list(&restricted(&free, need)))
    }

    /// There is enough in sum, but it could not be placed even on an empty cluster.
    fn cause_of_shape(&self, want: &Want, present: &[&Node]) -> String {
        let bundles = want.bundles();
        let fitting =
            bundles.first().map_or(0, |b| present.iter().filter(|n| n.pool.emptied().capacity(b, 1) > 0).count());
        match want.strategy() {
            Strategy::StrictSpread => format!(
                "needs {} on a node each ({}), {fitting} of the {} nodes could take one",
                shape_of(want),
                want.strategy().name(),
                present.len()
            ),
            Strategy::StrictPack => {
                format!("needs {} on one node ({}), no node has that much", shape_of(want), want.strategy().name())
            }
            Strategy::Pack | Strategy::Spread => {
                format!("needs {}, the nodes have enough in sum, but not in that shape", shape_of(want))
            }
        }
    }

    fn cause_in_placement_group(&self, id: PlacementGroupId, need: &Resources, feasible: bool) -> String {
        let Some(group) = self.placement_groups.get(&id) else { return "the placement group is gone".into() };
        let away = group.bundles.values().find(|b| self.nodes.get(&b.node).is_none_or(|n| !n.is_placeable()));
        if let Some(bundle) = away {
            let node = self.nodes.get(&bundle.node);
            let state = node.map_or("gone", |n| if n.is_gone() { n.state.name() } else { "not connected" });
            let name = self.node_name(bundle.node);
            return format!("placement group {} has a bundle on node {name}, which is {state}", group.name);
        }
        if feasible {
            format!("needs {}, other groups hold part of placement group {}", list(need), group.name)
        } else {
            format!("needs {}, the bundles of placement group {} could never hold that", list(need), group.name)
        }
    }

    /// `; node b is dead`, for the nodes that would have some of what is short.
    fn dead_that_have(&self, short: &str) -> String {
        let dead = self.nodes.values().filter(|n| n.state == NodeState::Dead && !n.pool.total().get(short).is_zero());
        let mut names: Vec<&str> = dead.map(|n| n.info.name.as_str()).collect();
        names.sort_unstable();
        match names.as_slice() {
            [] => String::new(),
            [one] => format!("; node {one} is dead"),
            [one, others @ ..] => format!("; node {one} and {} more are dead", others.len()),
        }
    }

    fn rows(&self) -> Vec<NeedHaveRow> {
        let mut nodes: Vec<_> = self.nodes.iter().filter(|(_, n)| n.state != NodeState::Left).collect();
        nodes.sort_by(|a, b| (&a.1.info.name, a.0).cmp(&(&b.1.info.name, b.0)));
        let row = |(id, node): (&NodeId, &Node)| NeedHaveRow {
            node: node.info.name.clone(),
            state: node.state.name().to_owned(),
            total: node.pool.total().clone(),
            available: if node.is_placeable() { node.pool.available() } else { Resources::new() },
            held: self.holders(*id),
        };
        nodes.into_iter().map(row).collect()
    }

    /// Who holds what on a node: by GPU, then those who hold other resources only.
    fn holders(&self, node: NodeId) -> Vec<(Option<u32>, String)> {
        let mut held = Vec::new();
        for (id, group) in &self.groups {
            let Some(part) = group.parts.get(&node).filter(|p| p.keeper != Keeper::Gone) else { continue };
            let gpus = part.ranks.iter().flat_map(|r| &r.allocation.gpus);
            let before = held.len();
            held.extend(gpus.map(|g| (Some(g.index), group.title(*id))));
            if held.len() == before {
                held.push((None, group.title(*id)));
            }
        }
        for group in self.placement_groups.values() {
            for bundle in group.bundles.values().filter(|b| b.node == node) {
                let title = format!("placement group {}", group.name);
                let idle = bundle.pool.devices().iter().filter(|d| d.free == d.total);
                held.extend(idle.map(|d| (Some(d.index), title.clone())));
                if bundle.allocation.gpus.is_empty() {
                    held.push((None, title));
                }
            }
        }
        if let Some(node) = self.nodes.get(&node) {
            let draining = node.pool.devices().iter().filter(|d| d.draining);
            held.extend(draining.map(|d| (Some(d.index), "memory not free yet".to_owned())));
        }
        held.sort_by(|a, b| (a.0.is_none(), &a.0, &a.1).cmp(&(b.0.is_none(), &b.0, &b.1)));
        held.dedup();
        held
    }
}

/// The resource that is short, GPUs first.
fn first_short<'a>(need: &'a Resources, have: &Resources) -> Option<&'a str> {
    let mut short: Vec<&str> = need.iter().filter(|(name, wanted)| have.get(name) < *wanted).map(|(n, _)| n).collect();
    short.sort_by_key(|name| (*name != GPU, *name != CPU, *name != MEMORY));
    short.first().copied()
}

fn restricted(all: &Resources, to: &Resources) -> Resources {
    to.iter().map(|(name, _)| (name.to_owned(), all.get(name))).collect()
}

/// `3`, or for memory `12.5 GiB`.
fn number(name: &str, quantity: Quantity) -> String {
    if name == MEMORY { format!("{:.1} GiB", quantity.as_f64() / f64::from(1 << 30)) } else { quantity.to_string() }
}

/// `16 GPUs`, `1 CPU`, `12.5 GiB of memory`, ``2 of `disk` ``.
fn amount(name: &str, quantity: Quantity) -> String {
    let plural = if quantity == Quantity::ONE { "" } else { "s" };
    match name {
        GPU | CPU => format!("{quantity} {name}{plural}"),
        MEMORY => format!("{} of memory", number(name, quantity)),
        _ => format!("{quantity} of `{name}`"),
    }
}

/// All of it, GPUs first.
fn list(resources: &Resources) -> String {
    let mut all: Vec<(&str, Quantity)> = resources.iter().collect();
    all.sort_by_key(|(name, _)| (*name != GPU, *name != CPU, *name != MEMORY));
    if all.is_empty() {
        return "nothing".to_owned();
    }
    all.into_iter().map(|(name, quantity)| amount(name, quantity)).collect::<Vec<_>>().join(", ")
}

/// `2 bundles of 8 GPUs`, or `3 different bundles`.
fn shape_of(want: &Want) -> String {
    let bundles = want.bundles();
    match bundles.first() {
        Some(first) if bundles.iter().all(|b| b == first) => match bundles.len() {
            1 => format!("a bundle of {}", list(first)),
            n => format!("{n} bundles of {}", list(first)),
        },
        _ => format!("{} different bundles", bundles.len()),
    }
}
