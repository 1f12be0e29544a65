//! Texts that a person gives: tokens and ids.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_net::token::Token;
use rayless_proto::ids::{GroupId, NodeId};

fuzz_target!(|text: &str| {
    if let Ok(token) = text.parse::<Token>() {
        assert_eq!(token.expose(), text);
    }
    if let Ok(id) = text.parse::<NodeId>() {
        assert_eq!(id.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(id) = text.parse::<GroupId>() {
        assert_eq!(id.to_string(), text.to_ascii_lowercase());
    }
    let _ = rayless_net::tcp::group_of(text);
});
