//! The node daemon: control over net, keepers, local clients, inventory.
#![forbid(unsafe_code)]

pub mod daemon;
pub mod inventory;
pub mod knobs;
pub mod node_env;
pub mod run_dir;
pub mod status_text;
pub mod store;
pub mod tokens;
