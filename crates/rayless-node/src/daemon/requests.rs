//! What local clients ask for: answered here, or asked of the head under a number of this node's own.

use super::{
    asked::{Pending, Wants},
    core::Core,
    event::ClientId,
};
use rayless_proto::{
    BUILD,
    ids::RequestId,
    limits::MAX_CLIENT_BACKLOG,
    v1::{
        control::{Refusal, RefusalKind, ToHead, ToNode},
        local::{ClientMessage, ClientReply, ClientRequest, DaemonMessage, Identity},
        status::NodeState,
    },
};
use std::time::{Duration, Instant};

impl Core {
    pub(crate) fn client_said(&mut self, client: ClientId, message: ClientMessage, now: Instant) {
        let ClientMessage { request, body } = message;
        if self.requests.values().filter(|pending| pending.client == client).count() >= MAX_CLIENT_BACKLOG {
            let refusal = Refusal {
                kind: RefusalKind::Invalid,
                cause: format!("more than {MAX_CLIENT_BACKLOG} requests of one client are under way"),
                hint: "wait for their answers".to_owned(),
            };
            self.answer(client, request, ClientReply::Refused { refusal, table: None });
            return;
        }
        let wants = match body {
            ClientRequest::Identify => {
                let identity = self.who_am_i();
                self.answer(client, request, ClientReply::Identity(identity));
                return;
            }
            ClientRequest::Stop => {
                self.begin_leave(Some((client, request)), now);
                return;
            }
            ClientRequest::RotateToken { overlap_ms } => {
                self.rotate_token(client, request, overlap_ms, now);
                return;
            }
            ClientRequest::FinishRotation => {
                self.finish_rotation(client, request, now);
                return;
            }
            ClientRequest::CreateGroup(mut spec) => {
                // Known here for certain, whatever the client thinks.
                spec.driver_node = self.info.id;
                if let Some(pid) = self.clients.get(&client).map(|client| client.pid).filter(|pid| *pid != 0) {
                    spec.driver_pid = pid;
                }
                Wants::Group(spec)
            }
            ClientRequest::Report(_) if !self.may_ask_for_report(client, request) => return,
            other => {
                if let ClientRequest::RemovePlacementGroup(id) = &other
                    && let Some(client) = self.clients.get_mut(&client)
                {
                    client.placement_groups.remove(id);
                }
                Wants::Now(other)
            }
        };
        self.next_request += 1;
        let number = self.next_request;
        let pending = Pending { client, request, wants, since: now, told: None };
        if self.member.is_welcomed() {
            let message = pending.message(number, now);
            self.requests.insert(number, pending);
            self.tell_head(message);
            return;
        }
        self.requests.insert(number, pending);
        self.without_head(number, now);
    }

    pub(crate) fn client_gone(&mut self, client: ClientId) {
        let placement_groups = self.clients.remove(&client).map(|known| known.placement_groups).unwrap_or_default();
        for id in placement_groups {
            self.next_request += 1;
            self.tell_head(ToHead::RemovePlacementGroup { request: self.next_request, id });
        }
        let gone: Vec<RequestId> =
            self.requests.iter().filter(|(_, pending)| pending.client == client).map(|(number, _)| *number).collect();
        for request in gone {
            self.requests.remove(&request);
            self.tell_head(ToHead::CancelRequest { request });
        }
    }

    /// Sends an answer; a client that lets its answers pile up is given up.
    pub(crate) fn answer(&mut self, client: ClientId, request: RequestId, body: ClientReply) {
        let Some(known) = self.clients.get_mut(&client) else { return };
        let Some(outbox) = &known.outbox else { return };
        if outbox.try_send(DaemonMessage { request, body }).is_err() {
            tracing::warn!(pid = known.pid, "a local client does not read its answers and is dropped");
            known.outbox = None;
        }
    }

    /// What the head says to a request.
    pub(crate) fn answer_from_head(&mut self, message: ToNode, now: Instant) {
        let (number, reply, is_final) = match message {
            ToNode::Waiting { request, table } => (request, ClientReply::Waiting(table), false),
            ToNode::GroupPlaced { request, group, placements, nodes } => {
                let Some(client) = self.requests.get(&request).map(|pending| pending.client) else {
                    // Its client went away at the same moment: nobody would ever open a session to it.
                    self.tell_head(ToHead::CancelRequest { request });
                    return;
                };
                let leaf = match self.identity.issue_delegate() {
                    Ok(leaf) => leaf,
                    Err(error) => {
                        let refusal = Refusal {
                            kind: RefusalKind::Failed,
                            cause: format!("no identity for the driver: {error}"),
                            hint: String::new(),
                        };
                        self.finish(request, ClientReply::Refused { refusal, table: None });
                        return;
                    }
                };
                let keeper = self.keepers.get(&group).and_then(|keeper| keeper.socket());
                let local_keeper = keeper.map(|path| path.to_string_lossy().into_owned());
                let known: Vec<_> = nodes.iter().map(|node| (node.id, node.name.clone())).collect();
                self.finish(request, ClientReply::GroupPlaced { group, placements, nodes, local_keeper, leaf });
                if let Some(client) = self.clients.get_mut(&client) {
                    client.is_told(request);
                }
                // They were alive a moment ago, or nothing would have been placed on them.
                for (node, name) in known {
                    let state = self.verdicts.get(&node).map_or(NodeState::Alive, |(_, state)| *state);
                    self.verdicts.insert(node, (name.clone(), state));
                    self.answer(client, 0, ClientReply::NodeVerdict { node, name, state, cause: String::new() });
                }
                return;
            }
            ToNode::PlacementGroupPlaced { request, id, nodes } => {
                let client = self.requests.get(&request).map(|pending| pending.client);
                match client.and_then(|client| self.clients.get_mut(&client)) {
                    Some(client) => client.placement_groups.insert(id),
                    None => {
                        self.tell_head(ToHead::CancelRequest { request });
                        return;
                    }
                };
                (request, ClientReply::PlacementGroupPlaced { id, nodes }, true)
            }
            ToNode::Done { request } => (request, ClientReply::Done, true),
            ToNode::RequestRefused { request, refusal, table } => {
                (request, ClientReply::Refused { refusal, table }, true)
            }
            ToNode::Status { request, report } => (request, ClientReply::Status(report), true),
            ToNode::ReportPart { request, part } => (request, ClientReply::Report(part), true),
            other => {
                tracing::debug!(?other, "not an answer");
                return;
            }
        };
        if is_final {
            self.finish(number, reply);
        } else if let Some(pending) = self.requests.get_mut(&number) {
            pending.told = Some(now);
            let (client, request) = (pending.client, pending.request);
            self.answer(client, request, reply);
        }
    }

    fn finish(&mut self, number: RequestId, reply: ClientReply) {
        if let Some(pending) = self.requests.remove(&number) {
            self.answer(pending.client, pending.request, reply);
        }
    }

    /// After a welcome: the head knows by their numbers which ones it already has.
    pub(crate) fn send_requests_again(&mut self, now: Instant) {
        let messages: Vec<ToHead> =
            self.requests.iter().map(|(number, pending)| pending.message(*number, now)).collect();
        for message in messages {
            self.tell_head(message);
        }
    }

    /// The head is gone: launches wait for the next one, the rest is refused.
    pub(crate) fn requests_lost(&mut self, now: Instant) {
        for number in self.requests.keys().copied().collect::<Vec<_>>() {
            self.without_head(number, now);
        }
    }

    /// Repeats and ends the waiting of launches while there is no head.
    pub(crate) fn waits_for_head(&mut self, now: Instant) {
        if self.member.is_welcomed() {
            return;
        }
        let due = |pending: &Pending| pending.next_report().is_some_and(|at| at <= now);
        let due: Vec<RequestId> =
            self.requests.iter().filter(|(_, pending)| due(pending)).map(|(number, _)| *number).collect();
        for number in due {
            self.without_head(number, now);
        }
    }

    /// When [`Self::waits_for_head`] has something to say next.
    pub(crate) fn next_wait_report(&self) -> Option<Instant> {
        if self.member.is_welcomed() {
            return None;
        }
        self.requests.values().filter_map(Pending::next_report).min()
    }

    fn without_head(&mut self, number: RequestId, now: Instant) {
        let refusal = self.no_head_refusal();
        let Some(pending) = self.requests.get_mut(&number) else { return };
        let waits = match &pending.wants {
            Wants::Group(spec) => now < pending.since + Duration::from_millis(spec.wait_ms),
            Wants::Now(_) => false,
        };
        if !waits {
            self.finish(number, ClientReply::Refused { refusal, table: None });
            return;
        }
        pending.told = Some(now);
        let (client, request) = (pending.client, pending.request);
        self.answer(client, request, ClientReply::WaitingForHead(refusal.cause));
    }

    fn who_am_i(&self) -> Identity {
        Identity {
            node: self.info.id,
            name: self.info.name.clone(),
            address: self.address(),
            pid: std::process::id(),
            build: BUILD.to_owned(),
            is_head: self.head.is_some(),
            head_address: self.head_address.clone(),
            joined: self.member.is_welcomed(),
            waiting_for: self.member.waiting_for().unwrap_or_default(),
            dead_after_ms: u64::try_from(self.dead_after.as_millis()).unwrap_or(u64::MAX),
            step_deadline_ms: u64::try_from(self.step_deadline.as_millis()).unwrap_or(u64::MAX),
            host_id: self.info.host_id.clone(),
        }
    }
}
