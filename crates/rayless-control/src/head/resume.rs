//! Launches that another head began.
//!
//! A node brings with its part of a group the request that it was started for, until the group's driver has come
//! ([`HeldGroup::launch`](rayless_proto::v1::control::HeldGroup::launch)), and says at its join which launches its clients still wait for, and which of
//! them were told of their placement. So a head that did not begin a launch goes on with it: it is placed once all its ranks are known, all keepers are
//! up and whoever asked has asked again; it is left to its driver if that was told by the head before; and it ends at once if nobody waits for it. What is
//! still open after [`RESUME_WITHIN`] ends, and what was asked for is then placed anew.

use super::{
    Head,
    model::{Launches, Phase, Requester, Resumed, Want},
};
use rayless_proto::{
    ids::{GroupId, NodeId},
    limits::RESUME_WITHIN,
    v1::control::GroupSpec,
};
use std::time::{Duration, Instant};

/// What is known of whoever asked for a launch.
enum Asker {
    /// It is about to ask again, or has yet to join.
    Awaited,
    /// It asked this head before the head knew of the launch.
    Asked(GroupSpec),
    /// It has the answer.
    Told,
    /// It does not wait (for this group) any more: why.
    Gone(&'static str),
}

impl Head {
    pub(super) fn resumed(now: Instant) -> Resumed {
        Resumed { until: now + RESUME_WITHIN, asked: None }
    }

    /// What a node said of its clients' launches; those that came over from another head are judged by that.
    pub(super) fn take_launches(&mut self, node: NodeId, launches: &Launches, now: Instant) {
        if let Some(known) = self.nodes.get_mut(&node) {
            known.launches.clone_from(launches);
        }
        let of_it = |g: &super::Group| g.resumed.is_some() && g.requester.is_some_and(|r| r.node == node);
        let open: Vec<GroupId> = self.groups.iter().filter(|(_, g)| of_it(g)).map(|(id, _)| *id).collect();
        for id in open {
            self.settle_launch(id, now);
        }
    }

    /// Goes as far with a launch of another head as what is known by now allows.
    pub(super) fn settle_launch(&mut self, id: GroupId, now: Instant) {
        let Some(group) = self.groups.get(&id).filter(|g| g.phase == Phase::Placing) else { return };
        let (Some(resumed), Some(requester)) = (&group.resumed, group.requester) else { return };
        if resumed.asked.is_none() {
            match self.asker(id, requester) {
                Asker::Awaited => {}
                Asker::Asked(spec) => self.asked_again(id, spec, now),
                Asker::Told => return self.driver_came(id, now),
                Asker::Gone(cause) => return self.abandon(id, cause, now),
            }
        }
        self.tell_driver_when_all_up(id, now);
    }

    /// Whoever asked for it asks this head.
    pub(super) fn asked_again(&mut self, id: GroupId, spec: GroupSpec, now: Instant) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.driver_pid = spec.driver_pid;
        if let Some(resumed) = group.resumed.as_mut().filter(|resumed| resumed.asked.is_none()) {
            resumed.asked = Some((spec, now));
        }
    }

    /// The sessions decide from here on: the driver was told by the head before this one.
    pub(super) fn driver_came(&mut self, id: GroupId, now: Instant) {
        let Some(group) = self.groups.get_mut(&id).filter(|g| g.resumed.is_some()) else { return };
        group.resumed = None;
        if group.phase == Phase::Placing {
            group.phase = Phase::Placed;
            group.told_on = group.requester.and_then(|r| self.nodes.get(&r.node)?.session);
            self.dirty = true;
            self.check_running(id, now);
        }
    }

    fn asker(&mut self, id: GroupId, requester: Requester) -> Asker {
        if self.groups.iter().any(|(other, g)| *other != id && g.requester == Some(requester)) {
            return Asker::Gone("it had been placed anew when this part of it came to the new head");
        }
        let waits = |w: &super::Waiting| w.requester == requester && matches!(w.want, Want::Group(_));
        if let Some(at) = self.queue.iter().position(waits)
            && let Some(Want::Group(spec)) = self.queue.remove(at).map(|waiting| waiting.want)
        {
            self.stirred = true;
            return Asker::Asked(spec);
        }
        let Some(node) = self.nodes.get(&requester.node) else { return Asker::Awaited };
        if node.session.is_none() || node.incarnation != requester.incarnation {
            // Its daemon is away, or another life by now: a driver that the last one told may still come.
            Asker::Awaited
        } else if node.launches.told.contains(&requester.request) {
            Asker::Told
        } else if node.launches.asks.contains(&requester.request) {
            Asker::Awaited
        } else {
            Asker::Gone("nobody waited for it any more when another head had taken over")
        }
    }

    /// Ends it without a word to whoever asked.
    fn abandon(&mut self, id: GroupId, cause: &str, now: Instant) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.requester = None;
        }
        self.end_group(id, Phase::Failed, cause, now);
    }

    /// Ends launches of another head that are still open after their time, and begins those that are waited for anew.
    pub(super) fn check_resumed(&mut self, now: Instant) {
        let late = |g: &super::Group| is_open(g).is_some_and(|until| until <= now);
        let late: Vec<GroupId> = self.groups.iter().filter(|(_, g)| late(g)).map(|(id, _)| *id).collect();
        for id in late {
            let Some(group) = self.groups.get(&id) else { continue };
            let (requester, asked) =
                (group.requester, group.resumed.as_ref().and_then(|resumed| resumed.asked.clone()));
            let Some((requester, (spec, since))) = requester.zip(asked) else {
                self.abandon(id, "whoever asked for it did not ask the new head", now);
                continue;
            };
            self.abandon(id, "not all of its nodes came to the new head: it is placed anew", now);
            let waited = u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX);
            // What is freed by that takes a moment, also for someone who did not want to wait.
            let least = u64::try_from(Duration::from_secs(1).as_millis()).unwrap_or(0);
            let spec = GroupSpec { wait_ms: spec.wait_ms.saturating_sub(waited).max(least), ..spec };
            self.on_create_group(requester, spec, now);
        }
    }

    pub(super) fn next_resumed_end(&self) -> Option<Instant> {
        self.groups.values().filter_map(is_open).min()
    }
}

/// Until when it may stay so, if this launch is not known to be whole and waited for.
fn is_open(group: &super::Group) -> Option<Instant> {
    let resumed = group.resumed.as_ref().filter(|_| group.phase == Phase::Placing)?;
    (resumed.asked.is_none() || !group.is_whole()).then_some(resumed.until)
}
