//! What daemons do with the cluster's tokens. A token is a number here, its mark that number.

use super::world::World;
use rayless_control::head;
use rayless_proto::{
    ids::TokenMark,
    v1::{
        control::ToHead,
        token::{MarkedToken, TokenSet},
    },
};
use std::time::Duration;

/// The token that every host of a story begins with.
pub const FIRST: TokenMark = TokenMark([0, 0, 0, 0, 0, 0, 0, 1]);

fn marked(mark: TokenMark) -> MarkedToken {
    MarkedToken { mark, text: String::new() }
}

impl World {
    /// Whether a handshake between these hosts succeeds: some token is accepted by both.
    pub fn share_a_token(&self, a: usize, b: usize) -> bool {
        self.hosts[a].tokens.iter().any(|mark| self.hosts[b].tokens.contains(mark))
    }

    /// `rayless token rotate` on the head's host.
    pub fn rotate(&mut self, overlap: Option<Duration>) {
        let head = self.head_host();
        let mut next = self.hosts[head].tokens[0];
        next.0[7] += 1;
        self.hosts[head].tokens.insert(0, next);
        self.hosts[head].tokens.truncate(2);
        self.hosts[head].overlap_ends = overlap.map(|overlap| self.now + overlap);
        self.hand_in_tokens(head, overlap);
    }

    /// `rayless token rotate --finish` there.
    pub fn finish_rotation(&mut self) -> Result<(), String> {
        let lacking = self.head().map(head::Head::without_token).unwrap_or_default();
        if !lacking.is_empty() {
            return Err(format!("{lacking:?} lack it"));
        }
        let head = self.head_host();
        self.end_overlap(head);
        Ok(())
    }

    pub fn end_overlap(&mut self, head: usize) {
        self.hosts[head].tokens.truncate(1);
        self.hosts[head].overlap_ends = None;
        self.hand_in_tokens(head, None);
    }

    /// Tells the head role of this daemon what it accepts; at its start what is left of an overlap.
    pub fn hand_in_tokens(&mut self, host: usize, overlap: Option<Duration>) {
        let h = &self.hosts[host];
        let left = h.overlap_ends.map(|end| end.saturating_sub(self.now));
        let set = TokenSet { current: marked(h.tokens[0]), previous: h.tokens.get(1).map(|mark| marked(*mark)) };
        self.head_in(host, head::Input::Tokens { set, overlap: overlap.or(left) });
        self.name_authority(host);
    }

    pub fn authorities(&self, host: usize) -> Vec<String> {
        self.hosts[host].tokens.iter().map(|mark| format!("authority {}", mark.0[7])).collect()
    }

    /// Tells the candidate what this daemon accepts, and whether all who live have it.
    pub fn name_authority(&mut self, host: usize) {
        let held = self.authorities(host);
        let side = self.hosts[host].daemon.as_ref().and_then(|d| d.head.as_ref());
        let all_have_it = side.is_some_and(|side| side.head.without_token().is_empty());
        if let Some(input) = rayless_control::election::Input::authorities(held, all_have_it) {
            self.candidate_in(host, input);
        }
    }

    pub fn take_tokens(&mut self, host: usize, marks: Vec<TokenMark>) {
        let problem = if self.hosts[host].disk_full && self.hosts[host].tokens != marks {
            "no space left on device"
        } else {
            self.hosts[host].tokens = marks;
            ""
        };
        self.name_authority(host);
        self.tell_tokens(host, problem);
    }

    pub fn tell_tokens(&mut self, host: usize, problem: &str) {
        let marks = self.hosts[host].tokens.clone();
        self.tell_head(host, ToHead::TokensHeld { marks, problem: problem.to_owned() });
    }
}
