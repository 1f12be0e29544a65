//! The cluster's tokens on this node: rotated by an operator on the head, taken from the head elsewhere. Whatever changes is on disk before
//! it is used, and used before it is told.

use super::{core::Core, event::ClientId};
use crate::tokens::Tokens;
use rayless_control::{election, head};
use rayless_net::{identity::ClusterIdentity, token::Token};
use rayless_proto::{
    ids::RequestId,
    v1::{
        control::{Refusal, RefusalKind, ToHead},
        local::ClientReply,
        token::TokenSet,
    },
};
use std::time::{Duration, Instant, SystemTime};

impl Core {
    /// `rayless token rotate`
    pub(crate) fn rotate_token(&mut self, client: ClientId, request: RequestId, overlap_ms: Option<u64>, now: Instant) {
        let overlap = overlap_ms.map(Duration::from_millis);
        let done = self.check_is_head().and_then(|()| {
            if self.tokens.previous().is_some() {
                let cause = "a rotation of the token is under way";
                return Err(refusal(RefusalKind::Invalid, cause, "end it first: `rayless token rotate --finish`"));
            }
            let new = Token::generate().map_err(|error| refusal(RefusalKind::Failed, &error.to_string(), ""))?;
            let until = overlap.and_then(|overlap| SystemTime::now().checked_add(overlap));
            self.accept_tokens(self.tokens.rotated(new, until))
        });
        self.answer_rotation(client, request, done, overlap, now);
    }

    /// `rayless token rotate --finish`
    pub(crate) fn finish_rotation(&mut self, client: ClientId, request: RequestId, now: Instant) {
        let done = self.check_is_head().and_then(|()| {
            if self.tokens.previous().is_none() {
                let cause = "no rotation of the token is under way";
                return Err(refusal(RefusalKind::Invalid, cause, "begin one: `rayless token rotate`"));
            }
            let behind = self.head.as_ref().map(head::Head::without_token).unwrap_or_default();
            if let Some((name, problem)) = behind.first() {
                let why = if problem.is_empty() { String::new() } else { format!(": {problem}") };
                let cause = format!("node {name} has not taken the new token{why}");
                let hint = "see `rayless status`; mend it or stop its daemon, then finish again";
                return Err(refusal(RefusalKind::Failed, &cause, hint));
            }
            self.accept_tokens(self.tokens.without_previous())
        });
        self.answer_rotation(client, request, done, None, now);
    }

    /// The time of an overlap is up: the previous token is refused even where the disk does not take that (a restart then finds by the
    /// record's own date that it is over).
    pub(crate) fn end_overlap(&mut self, now: Instant) {
        let alone = self.tokens.without_previous();
        if let Err(refusal) = self.accept_tokens(alone.clone()) {
            tracing::error!("{}", refusal.cause);
            self.use_tokens(alone);
        }
        self.hand_in_tokens(None, now);
    }

    /// What the head says is in force.
    pub(crate) fn take_tokens(&mut self, set: &TokenSet) {
        if *set == self.tokens.set() {
            self.tell_tokens(String::new());
            return;
        }
        let taken = self.tokens.told(set).map_err(|cause| refusal(RefusalKind::Failed, &cause, ""));
        let problem = match taken.and_then(|tokens| self.accept_tokens(tokens)) {
            Ok(()) => String::new(),
            Err(refusal) => {
                tracing::error!("the cluster's new token is not taken: {}", refusal.cause);
                refusal.cause
            }
        };
        self.tell_tokens(problem);
    }

    /// Tells the head which tokens this node accepts.
    pub(crate) fn tell_tokens(&mut self, problem: String) {
        let marks = self.tokens.set().marks();
        self.tell_head(ToHead::TokensHeld { marks, problem });
    }

    /// On the head: makes them the cluster's.
    pub(crate) fn hand_in_tokens(&mut self, overlap: Option<Duration>, now: Instant) {
        let set = self.tokens.set();
        self.head_takes(head::Input::Tokens { set, overlap }, now);
        self.name_authority();
    }

    /// Where heads take turns: tells the candidate what this daemon accepts, and whether all who live have it.
    pub(crate) fn name_authority(&mut self) {
        if self.stand.is_none() {
            return;
        }
        let all_have_it = self.head.as_ref().is_some_and(|head| head.without_token().is_empty());
        if let Some(input) = election::Input::authorities(self.identity.authority_names(), all_have_it) {
            self.stand_for(input);
        }
    }

    /// A keeper of an earlier daemon may still shake hands by tokens of that time.
    pub(crate) fn identify_keepers(&mut self) {
        for (group, keeper) in &mut self.keepers {
            match self.identity.issue_delegate() {
                Ok(leaf) => keeper.identify(leaf),
                Err(error) => tracing::error!(%group, %error, "no new identity for a keeper"),
            }
        }
    }

    /// On disk, then in use.
    fn accept_tokens(&mut self, tokens: Tokens) -> Result<(), Refusal> {
        let identity = ClusterIdentity::from_tokens(tokens.current(), tokens.previous(), &self.key);
        let identity = identity.map_err(|error| refusal(RefusalKind::Failed, &error.to_string(), ""))?;
        tokens.save(&self.run).map_err(|error| {
            let cause = format!("cannot write {}: {error}", self.run.tokens().display());
            refusal(RefusalKind::Failed, &cause, "is the file system of the run dir full or read-only?")
        })?;
        self.take_identity(tokens, identity);
        Ok(())
    }

    fn use_tokens(&mut self, tokens: Tokens) {
        match ClusterIdentity::from_tokens(tokens.current(), tokens.previous(), &self.key) {
            Ok(identity) => self.take_identity(tokens, identity),
            Err(error) => tracing::error!(%error, "the cluster's tokens are not changed"),
        }
    }

    fn take_identity(&mut self, tokens: Tokens, identity: ClusterIdentity) {
        self.wire.set_identity(&identity);
        self.identity = identity;
        self.tokens = tokens;
        self.identify_keepers();
        if self.head.is_none() {
            self.name_authority();
        }
        let accepts = if self.tokens.previous().is_some() { "and the one before it" } else { "alone" };
        tracing::info!(token = %self.tokens.current().mark(), "the cluster's token is accepted {accepts}");
    }

    fn check_is_head(&mut self) -> Result<(), Refusal> {
        // One that was replaced while this process was stopped must not make a token of its own.
        if self.may_decide() {
            return Ok(());
        }
        let cause = format!("{} is not the head of its cluster", self.info.name);
        let hint = format!("run it on the host of the head, {}", self.head_address);
        Err(refusal(RefusalKind::Invalid, &cause, &hint))
    }

    fn answer_rotation(
        &mut self,
        client: ClientId,
        request: RequestId,
        done: Result<(), Refusal>,
        overlap: Option<Duration>,
        now: Instant,
    ) {
        let reply = match done {
            Ok(()) => {
                self.hand_in_tokens(overlap, now);
                ClientReply::Done
            }
            Err(refusal) => ClientReply::Refused { refusal, table: None },
        };
        self.answer(client, request, reply);
    }
}

fn refusal(kind: RefusalKind, cause: &str, hint: &str) -> Refusal {
    Refusal { kind, cause: cause.to_owned(), hint: hint.to_owned() }
}
