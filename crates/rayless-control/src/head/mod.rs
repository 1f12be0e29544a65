//! The head's side of membership.

mod io;

pub use io::{Effect, HeadConfig, Input};

use std::time::Duration;

/// Shortest time between two saves of the head's state. It is a help, not needed: nodes bring what they hold.
pub const SAVE_PERIOD: Duration = Duration::from_millis(250);
