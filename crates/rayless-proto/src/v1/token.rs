//! The cluster's tokens as they travel while one replaces another.

use crate::ids::TokenMark;
use core::fmt;
use rkyv::{Archive, Deserialize, Serialize};

/// A token in its text form. It goes over authenticated control sessions between nodes, to nobody else.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq)]
pub struct MarkedToken {
    /// Tells it from others.
    pub mark: TokenMark,
    /// `rl1_…`
    pub text: String,
}

impl fmt::Debug for MarkedToken {
    /// Never shows the text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.mark)
    }
}

/// The tokens that a node accepts.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct TokenSet {
    /// The one to use.
    pub current: MarkedToken,
    /// The one before it, while both are accepted.
    pub previous: Option<MarkedToken>,
}

impl TokenSet {
    /// The marks of both, the current one's first.
    pub fn marks(&self) -> Vec<TokenMark> {
        [Some(&self.current), self.previous.as_ref()].into_iter().flatten().map(|token| token.mark).collect()
    }
}
