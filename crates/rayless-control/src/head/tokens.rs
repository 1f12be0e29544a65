//! The cluster's tokens: which ones are in force, who accepts them.
//!
//! The daemon makes, keeps and uses tokens; the head only sees to it that every node has those in force. A rotation is three steps: the
//! daemon hands in two tokens ([`Input::Tokens`](super::Input::Tokens)), they go to every node that is connected or connects, and when the overlap is over
//! the daemon hands in the new one alone, by itself (an operator said so) or when it is asked to
//! ([`Effect::EndOverlap`](super::Effect::EndOverlap)). Whoever was away all that time knows only a token that nobody accepts any more.

use super::{Effect, Head, model::Node};
use rayless_proto::{
    ids::{NodeId, TokenMark},
    v1::{
        control::ToNode,
        status::{NodeState, TokenStatus},
        token::TokenSet,
    },
};
use std::time::{Duration, Instant};

/// The tokens in force.
#[derive(Debug, Clone)]
pub(super) struct Tokens {
    set: TokenSet,
    /// When the previous one ends, where that was said.
    until: Option<Instant>,
    /// Whether the daemon was asked to end it.
    asked: bool,
}

impl Head {
    pub(super) fn on_tokens(&mut self, set: TokenSet, overlap: Option<Duration>, now: Instant) {
        let before = self.tokens.as_ref().map(|known| known.set.marks());
        let overlaps = set.previous.is_some();
        let until = overlap.filter(|_| overlaps).map(|left| now + left);
        let marks = set.marks();
        self.tokens = Some(Tokens { set, until, asked: false });
        if before.is_none_or(|before| before == marks) {
            // A head that starts: nodes tell what they have when they join.
            return;
        }
        if overlaps {
            self.note("token-rotation", "a new cluster token is spread; the one before it is still accepted", now);
        } else {
            self.note("token-rotated", "the cluster token before the present one is refused from here on", now);
        }
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.send_tokens(id);
        }
    }

    pub(super) fn on_tokens_held(&mut self, from: NodeId, marks: Vec<TokenMark>, problem: String, now: Instant) {
        let Some(node) = self.nodes.get_mut(&from) else { return };
        let name = node.info.name.clone();
        node.tokens = marks;
        node.token_problem.clone_from(&problem);
        if !problem.is_empty() {
            self.note_repeated("token-not-taken", format!("node {name} cannot take the new token: {problem}"), now);
            return;
        }
        if self.is_behind(from) {
            self.send_tokens(from);
        } else if self.tokens.as_ref().is_some_and(|tokens| tokens.set.previous.is_some()) && self.behind().is_empty() {
            self.note_repeated("token-spread", "every living node accepts the new cluster token".to_owned(), now);
        }
    }

    /// Asks the daemon, once, to end an overlap whose time is up.
    pub(super) fn check_overlap(&mut self, now: Instant) {
        if let Some(tokens) = self.tokens.as_mut().filter(|tokens| !tokens.asked)
            && tokens.until.is_some_and(|until| until <= now)
        {
            tokens.asked = true;
            self.effects.push_back(Effect::EndOverlap);
        }
    }

    pub(super) fn next_overlap_end(&self) -> Option<Instant> {
        self.tokens.as_ref().filter(|tokens| !tokens.asked)?.until
    }

    /// Names of living nodes that do not accept what is in force, each with its reason where it gave one: an overlap that ended now
    /// would shut them out at their next call.
    pub fn without_token(&self) -> Vec<(String, String)> {
        self.behind().into_iter().map(|(id, problem)| (self.node_name(id), problem)).collect()
    }

    pub(super) fn token_status(&self, now: Instant) -> TokenStatus {
        let Some(tokens) = &self.tokens else { return TokenStatus::default() };
        TokenStatus {
            mark: Some(tokens.set.current.mark),
            rotating: tokens.set.previous.is_some(),
            left_ms: tokens
                .until
                .map(|until| u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX)),
            behind: self.behind(),
        }
    }

    fn behind(&self) -> Vec<(NodeId, String)> {
        let living = self.nodes.iter().filter(|(_, node)| matches!(node.state, NodeState::Alive | NodeState::Suspect));
        living.filter(|(id, _)| self.is_behind(**id)).map(|(id, node)| (*id, node.token_problem.clone())).collect()
    }

    fn is_behind(&self, id: NodeId) -> bool {
        let Some(tokens) = &self.tokens else { return false };
        self.nodes.get(&id).is_some_and(|node: &Node| node.tokens != tokens.set.marks())
    }

    fn send_tokens(&mut self, id: NodeId) {
        if let Some(set) = self.tokens.as_ref().map(|tokens| tokens.set.clone()) {
            self.send(id, ToNode::Tokens(set));
        }
    }
}
