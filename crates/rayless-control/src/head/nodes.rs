//! Nodes: join in any order, rejoin, leave, suspect, dead, fenced.

use super::{
    Effect, Head,
    adopt::Life,
    model::{Brought, CONTEST, Contest, Group, Launches, Node, Phase, Requester},
};
use crate::{SessionId, liveness::Transition, pool::Pool};
use rayless_proto::{
    ids::{GroupId, Incarnation, NodeId},
    limits::{MAX_GONE_NODES, MAX_NAME, MAX_RESOURCES, REJOIN_TIMEOUT},
    resources::{GPU, Quantity},
    v1::{
        control::{HeldGroup, NodeInfo, Refusal, RefusalKind, ToNode},
        status::NodeState,
    },
};
use std::{collections::BTreeSet, net::IpAddr, time::Instant};

impl Head {
    pub(super) fn on_join(&mut self, session: SessionId, info: NodeInfo, brought: &Brought, now: Instant) {
        if let Err(refusal) = self.check_join(session, &info, now) {
            self.note_repeated("node-refused", format!("node {} was refused: {}", info.name, refusal.cause), now);
            self.turn_away(session, info.id, ToNode::Refused(refusal));
            return;
        }
        let (id, incarnation) = (info.id, info.incarnation);
        if self.is_contested(&info, now) {
            // It dials again at once; if the other one still lives, so does that.
            self.effects.push_back(Effect::Close { session });
            return;
        }
        let known = self.nodes.get(&id).map(|n| (n.incarnation, n.state, n.cause.clone()));
        let assumed = self.nodes.get(&id).is_some_and(|n| n.awaited.is_some());
        if let Some((present, state, cause)) = &known {
            if incarnation == *present && *state == NodeState::Left {
                // A late join of a life that has left.
                self.effects.push_back(Effect::Close { session });
                return;
            }
            if incarnation == *present && *state == NodeState::Dead && !assumed && !self.any_lives(&brought.held) {
                return self.fence(session, &info, &brought.held, cause.clone(), now);
            }
        }
        let reborn = known.as_ref().is_some_and(|(present, ..)| *present < incarnation);
        let before = known.as_ref().map(|(_, state, _)| *state);
        self.take_session(session, id, &info, known.as_ref().map(|k| k.0), now);
        let welcome = ToNode::Welcome {
            cluster: self.config.cluster,
            head: self.config.node,
            your_address: self.sessions.get(&session).map(|s| s.address.clone()).unwrap_or_default(),
            dead_after_ms: u64::try_from(self.config.dead_after.as_millis()).unwrap_or(u64::MAX),
            heads: self.config.heads.iter().map(|head| head.address.clone()).collect(),
        };
        self.send(id, welcome);
        let line = match before {
            None => format!("node {} joined from {}", info.name, info.address),
            Some(_) if reborn => format!("node {} joined again as a new life", info.name),
            Some(_) => format!("node {} is connected again", info.name),
        };
        self.note(if before.is_none() { "node-joined" } else { "node-rejoined" }, line, now);
        if reborn {
            self.forget_requests(id, Some(incarnation), "its daemon was restarted before the group was placed", now);
        }
        self.doubt_requests(id, now);
        let life = Life { reborn, vouches: reborn || assumed };
        self.compare_books(id, life, brought, now);
        if reborn {
            self.orphan_bundles(id, Some(incarnation));
        }
        if before.is_some_and(|b| b != NodeState::Alive) {
            self.send_verdicts(id);
        }
        self.send_verdicts_to(id);
        self.shape += 1;
        self.stirred = true;
        self.dirty = true;
    }

    /// Makes `session` the node's present one and this its present life.
    fn take_session(
        &mut self,
        session: SessionId,
        id: NodeId,
        info: &NodeInfo,
        earlier: Option<Incarnation>,
        now: Instant,
    ) {
        if let Some(opened) = self.sessions.get_mut(&session) {
            opened.joined = true;
        }
        let incarnation = info.incarnation;
        let pool = || Pool::of_node(&info.resources, info.gpus.iter().map(|g| g.index));
        let node = self.nodes.entry(id).or_insert_with(|| Node {
            info: info.clone(),
            state: NodeState::Alive,
            incarnation,
            session: None,
            pool: pool(),
            heard: None,
            rtt_us: 0,
            awaited: None,
            tokens: Vec::new(),
            token_problem: String::new(),
            contest: None,
            launches: Launches::default(),
            cause: String::new(),
            since: now,
        });
        let old_session = node.session.replace(session).filter(|old| *old != session);
        if node.incarnation != incarnation || node.state != NodeState::Alive {
            node.since = now;
        }
        node.info.clone_from(info);
        node.incarnation = incarnation;
        node.state = NodeState::Alive;
        node.heard = Some(now);
        node.awaited = None;
        node.tokens.clear();
        node.token_problem.clear();
        node.cause.clear();
        if let Some(old) = old_session {
            self.effects.push_back(Effect::Close { session: old });
        }
        self.story_due();
        if id != self.config.node {
            if let Some(old) = earlier.filter(|old| *old != incarnation) {
                self.effects.push_back(Effect::Unwatch { node: id, incarnation: old });
            }
            self.effects.push_back(Effect::Watch { node: id, incarnation });
        }
    }

    pub(super) fn is_connected(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|n| n.session.is_some())
    }

    fn check_join(&self, session: SessionId, info: &NodeInfo, now: Instant) -> Result<(), Refusal> {
        let refuse = |kind, cause: String, hint: &str| Err(Refusal { kind, cause, hint: hint.to_owned() });
        let Some(opened) = self.sessions.get(&session) else {
            return refuse(RefusalKind::Policy, "the session is not known".into(), "");
        };
        if opened.node != info.id {
            return refuse(RefusalKind::Policy, "the node's id is not that of its key".into(), "");
        }
        if let Some(cause) = bad_inventory(info) {
            return refuse(RefusalKind::Invalid, cause, "check `--name`, `--gpus`, `--cpus` and `--resource`");
        }
        if is_translated(&info.address, &opened.address) {
            let cause = format!(
                "node {} calls itself {} but is seen as {}: an address translation (NAT) lies between",
                info.name, info.address, opened.address
            );
            let hint = "run the container with `--network=host`, or publish 6379/udp and 6379/tcp and give the outer address with `--bind`";
            return refuse(RefusalKind::Policy, cause, hint);
        }
        if let Some(known) = self.nodes.get(&info.id).filter(|n| n.is_claimed_elsewhere(info, self.config.node, now)) {
            let cause =
                format!("node {} has the key of node {}, which lives on another host", info.name, known.info.name);
            let hint = "a run dir, or the file node.key in it, was copied: remove node.key here, and this host gets a key of its own";
            return refuse(RefusalKind::Policy, cause, hint);
        }
        if let Some(known) = self.nodes.get(&info.id).filter(|n| n.incarnation > info.incarnation) {
            let cause = format!(
                "node {} comes as life {}, but life {} of it was already here",
                info.name, info.incarnation.0, known.incarnation.0
            );
            let hint =
                "is another daemon running with a copy of this run dir? start this one with `--run-dir` of its own";
            return refuse(RefusalKind::Policy, cause, hint);
        }
        Ok(())
    }

    /// Whether a node that counts as alive on one host has yet to show that it does, now that a new life of it comes from another: a container that was
    /// killed and started again comes like that, and so does a second host with a copy of the key. The older one, if it lives, is back within milliseconds
    /// (its session was replaced); then the newcomer is refused by [`check_join`](Self::check_join).
    fn is_contested(&mut self, info: &NodeInfo, now: Instant) -> bool {
        let Some(node) = self.nodes.get_mut(&info.id) else { return false };
        if node.info.host_id == info.host_id || node.is_gone() || node.awaited.is_some() {
            if node.incarnation == info.incarnation && node.contest.is_some() {
                node.contest = Some(Contest::Won(now));
            }
            return false;
        }
        match *node.contest.get_or_insert(Contest::Since(now)) {
            Contest::Since(since) if now.saturating_duration_since(since) >= CONTEST => {
                node.contest = None;
                false
            }
            Contest::Since(_) => true,
            // Won long ago, or it would have been refused.
            Contest::Won(_) => {
                node.contest = Some(Contest::Since(now));
                true
            }
        }
    }

    pub(super) fn turn_away(&mut self, session: SessionId, to: NodeId, message: ToNode) {
        self.effects.push_back(Effect::Send { session, to, message });
        self.effects.push_back(Effect::Close { session });
    }

    /// Whether a node that was declared dead brings back a group whose sessions have kept it alive all the same (or of which a
    /// restarted head does not know).
    fn any_lives(&self, held: &[HeldGroup]) -> bool {
        held.iter().any(|h| match self.groups.get(&h.group) {
            Some(group) => group.phase.is_live(),
            None => !self.buried_groups.contains(&h.group),
        })
    }

    fn fence(&mut self, session: SessionId, info: &NodeInfo, held: &[HeldGroup], cause: String, now: Instant) {
        for h in held {
            // Lost counts as failed from here on: what runs of it is about to be killed.
            let cause = self.groups.get(&h.group).map(|g| g.cause.clone()).unwrap_or_default();
            self.end_group(h.group, Phase::Failed, &cause, now);
        }
        let line = format!("node {} was declared dead ({cause}) and spoke again: it kills its workers", info.name);
        self.note("node-fenced", line, now);
        self.turn_away(session, info.id, ToNode::Fenced { cause });
    }

    pub(super) fn on_liveness(&mut self, id: NodeId, life: Incarnation, transition: Transition, now: Instant) {
        let dead_after = self.config.dead_after;
        let Some(node) = self.nodes.get_mut(&id).filter(|n| n.incarnation == life && !n.is_gone()) else { return };
        let name = node.info.name.clone();
        match transition {
            Transition::Suspect if node.state == NodeState::Alive => {
                node.state = NodeState::Suspect;
                node.since = now;
                node.cause = format!("no heartbeat for more than {:.1} s", dead_after.as_secs_f64() / 2.0);
                let line = format!("node {name}: {}", node.cause);
                self.note("node-suspect", line, now);
            }
            Transition::Alive if node.state == NodeState::Suspect => {
                node.state = NodeState::Alive;
                node.since = now;
                node.cause.clear();
                self.stirred = true;
                self.note("node-alive", format!("node {name} is heard of again"), now);
            }
            Transition::Dead => {
                let cause = format!("no heartbeat for {:.1} s", dead_after.as_secs_f64());
                self.on_dead(id, cause, now);
                return;
            }
            Transition::Suspect | Transition::Alive => return,
        }
        self.shape += 1;
        self.send_verdicts(id);
    }

    /// Nodes that a restarted head remembers and that have not dialled in time.
    pub(super) fn check_awaited(&mut self, now: Instant) {
        let missing = |n: &Node| !n.is_gone() && n.awaited.is_some_and(|until| now >= until);
        let missing: Vec<NodeId> = self.nodes.iter().filter(|(_, n)| missing(n)).map(|(id, _)| *id).collect();
        for id in missing {
            let cause = format!("it did not dial the restarted head within {} s", REJOIN_TIMEOUT.as_secs());
            self.on_dead(id, cause, now);
        }
    }

    fn on_dead(&mut self, id: NodeId, cause: String, now: Instant) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.state = NodeState::Dead;
        node.since = now;
        node.cause.clone_from(&cause);
        let (name, incarnation, session) = (node.info.name.clone(), node.incarnation, node.session.take());
        self.effects.push_back(Effect::Unwatch { node: id, incarnation });
        if let Some(session) = session {
            // It dials again and is then told what it is: fenced, or welcome.
            self.effects.push_back(Effect::Close { session });
        }
        let line = format!("node {name} is dead: {cause}");
        self.note("node-dead", line.clone(), now);
        self.forget_requests(id, None, &line, now);
        for group in self.groups_on(id) {
            match self.groups.get(&group).map(|g| g.phase) {
                Some(Phase::Placing) => self.end_group(group, Phase::Failed, &line, now),
                Some(Phase::Placed | Phase::Running) => self.lose_if_all_dead(group, &line, now),
                _ => {}
            }
        }
        self.send_verdicts(id);
        self.shape += 1;
        self.stirred = true;
        self.dirty = true;
        self.prune_nodes(now);
    }

    /// Live groups that a change of this node concerns.
    fn groups_on(&self, node: NodeId) -> Vec<GroupId> {
        let live = self.groups.iter().filter(|(_, g)| g.phase.is_live());
        live.filter(|(_, g)| g.nodes().contains(&node)).map(|(id, _)| *id).collect()
    }

    /// Where nobody is left who could tell how a group fares, it counts as failed until somebody does.
    fn lose_if_all_dead(&mut self, id: GroupId, cause: &str, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let gone = |n: NodeId| self.nodes.get(&n).is_none_or(Node::is_gone);
        if group.nodes().into_iter().all(gone) {
            group.phase = Phase::Lost;
            cause.clone_into(&mut group.cause);
            let title = group.title(id);
            self.note("group-failed", format!("group {title} failed: {cause}"), now);
        }
    }

    pub(super) fn on_leave(&mut self, id: NodeId, now: Instant) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.state = NodeState::Left;
        node.since = now;
        node.cause = "it left".into();
        let (name, incarnation, session) = (node.info.name.clone(), node.incarnation, node.session.take());
        self.effects.push_back(Effect::Unwatch { node: id, incarnation });
        if let Some(session) = session {
            self.effects.push_back(Effect::Close { session });
        }
        let line = format!("node {name} left");
        self.note("node-left", line.clone(), now);
        self.forget_requests(id, None, &line, now);
        let concerned = self.groups_on(id);
        self.send_verdicts(id);
        self.forget_parts(id);
        for group in concerned {
            self.end_group(group, Phase::Failed, &line, now);
        }
        self.lose_bundles(id, &line, now);
        self.orphan_bundles(id, None);
        self.shape += 1;
        self.dirty = true;
        self.prune_nodes(now);
    }

    /// Nothing of any group is left on this node.
    fn forget_parts(&mut self, node: NodeId) {
        let groups: Vec<GroupId> =
            self.groups.iter().filter(|(_, g)| g.parts.contains_key(&node)).map(|(id, _)| *id).collect();
        for group in groups {
            self.release_part(group, node);
        }
        self.prune_groups();
    }

    /// Drops what a node's clients wait for, except those of its life `keep`; launches of theirs that nobody was told of fail.
    fn forget_requests(&mut self, node: NodeId, keep: Option<Incarnation>, cause: &str, now: Instant) {
        let of_it = |r: &Requester| r.node == node && Some(r.incarnation) != keep;
        self.queue.retain(|w| !of_it(&w.requester));
        self.stops.retain(|s| !of_it(&s.requester));
        let placing: Vec<GroupId> = self
            .groups
            .iter()
            .filter(|(_, g)| g.phase == Phase::Placing && g.requester.is_some_and(|r| of_it(&r)))
            .map(|(id, _)| *id)
            .collect();
        for id in placing {
            self.end_group(id, Phase::Failed, cause, now);
        }
        self.stirred = true;
    }

    /// Tells every node that shares a live group with `id` what the head holds it for.
    fn send_verdicts(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get(&id) else { return };
        let (name, state, cause) = (node.info.name.clone(), node.state, node.cause.clone());
        let live = self.groups.values().filter(|g| g.phase.is_live()).map(Group::nodes);
        let concerned: BTreeSet<NodeId> = live.filter(|nodes| nodes.contains(&id)).flatten().collect();
        for to in concerned.into_iter().filter(|to| *to != id) {
            let message = ToNode::NodeVerdict { node: id, name: name.clone(), state, cause: cause.clone() };
            self.send(to, message);
        }
    }

    /// Tells a node that just joined what the head holds the other nodes of its groups for.
    fn send_verdicts_to(&mut self, to: NodeId) {
        let live = self.groups.values().filter(|g| g.phase.is_live()).map(Group::nodes);
        let others: BTreeSet<NodeId> =
            live.filter(|nodes| nodes.contains(&to)).flatten().filter(|n| *n != to).collect();
        for other in others {
            let Some(node) = self.nodes.get(&other) else { continue };
            let (name, cause) = (node.info.name.clone(), node.cause.clone());
            let message = ToNode::NodeVerdict { node: other, name, state: node.state, cause };
            self.send(to, message);
        }
    }

    pub(super) fn on_gpu_draining(&mut self, id: NodeId, gpus: &[(u32, bool)]) {
        if let Some(node) = self.nodes.get_mut(&id) {
            for (index, draining) in gpus {
                node.pool.set_draining(*index, *draining);
            }
            self.stirred = true;
        }
    }

    pub(super) fn on_update(&mut self, id: NodeId, info: NodeInfo, now: Instant) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if info.id != id || info.incarnation != node.incarnation {
            return;
        }
        if let Some(cause) = bad_inventory(&info) {
            let line = format!("node {}: its update is ignored: {cause}", node.info.name);
            return self.note("node-refused", line, now);
        }
        node.info = info;
        self.rebuild_pool(id, true, now);
        self.shape += 1;
        self.stirred = true;
        self.dirty = true;
    }

    /// Forgets the nodes that have been gone for longest, with all that they may still hold.
    fn prune_nodes(&mut self, now: Instant) {
        let mut gone: Vec<(Instant, NodeId)> =
            self.nodes.iter().filter(|(_, n)| n.is_gone()).map(|(id, n)| (n.since, *id)).collect();
        if gone.len() <= MAX_GONE_NODES {
            return;
        }
        gone.sort_unstable();
        for (_, id) in gone.iter().take(gone.len() - MAX_GONE_NODES) {
            let line = format!("node {} was gone for too long", self.node_name(*id));
            for group in self.groups_on(*id) {
                self.end_group(group, Phase::Failed, &line, now);
            }
            self.forget_parts(*id);
            self.lose_bundles(*id, &line, now);
            self.orphan_bundles(*id, None);
            self.nodes.remove(id);
        }
    }
}

/// What is wrong with what a node says of itself.
fn bad_inventory(info: &NodeInfo) -> Option<String> {
    let indices: BTreeSet<u32> = info.gpus.iter().map(|g| g.index).collect();
    if info.name.is_empty() || info.name.len() > MAX_NAME {
        Some(format!("a node's name has 1 to {MAX_NAME} bytes, this one has {}", info.name.len()))
    } else if info.resources.len() > MAX_RESOURCES {
        Some(format!("it declares {} resources, more than {MAX_RESOURCES}", info.resources.len()))
    } else if info.resources.iter().any(|(name, _)| name.is_empty() || name.len() > MAX_NAME) {
        Some(format!("a resource's name has 1 to {MAX_NAME} bytes"))
    } else if info.resources.get(GPU) != Quantity::whole(info.gpus.len() as u64) || indices.len() != info.gpus.len() {
        Some(format!("it declares {} GPUs but names {}", info.resources.get(GPU), indices.len()))
    } else {
        None
    }
}

/// Whether a node is seen from another address than it calls its own. Two loopback addresses are one host.
fn is_translated(own: &str, seen: &str) -> bool {
    match (own.parse::<IpAddr>(), seen.parse::<IpAddr>()) {
        (Ok(own), Ok(seen)) => {
            let (own, seen) = (own.to_canonical(), seen.to_canonical());
            own != seen && !(own.is_loopback() && seen.is_loopback())
        }
        // Not compared.
        _ => false,
    }
}
