//! How long to look before sleeping in a group's processes.
//!
//! While calls follow each other, looking again and again beats a futex by far, as long as there is a core for everyone who looks. Where a
//! group's own processes outnumber the cores nobody spins: those that are done would take the time of those that are not.

pub(crate) use rayless_fabric::spin::Spin;
use std::time::Duration;

/// How long to look at most; `RAYLESS_SPIN_US` overrides it and the rule about cores, 0 is never.
const DEFAULT: Duration = Duration::from_micros(100);
/// No useful spin is longer.
const LONGEST: Duration = Duration::from_millis(10);

/// For one of `processes` of this group and host that may look at the same time.
pub(crate) fn among(processes: usize) -> Spin {
    Spin::new(limit(processes))
}

/// The same as a time.
pub(crate) fn limit(processes: usize) -> Duration {
    let by_hand = std::env::var("RAYLESS_SPIN_US").ok().and_then(|text| text.parse().ok());
    let limit = by_hand.map_or_else(
        || {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            if processes <= cores { DEFAULT } else { Duration::ZERO }
        },
        Duration::from_micros,
    );
    limit.min(LONGEST)
}
