//! What a direction of the wire does to packets, as a test sets it.

use std::time::Duration;

/// The damage of one direction. The default is a perfect wire.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rule {
    /// Share of packets that vanish, 0 to 1.
    pub(crate) loss: f64,
    /// Share of packets that arrive twice.
    pub(crate) duplicate: f64,
    /// Share of packets that are held back by `hold` while later ones pass.
    pub(crate) reorder: f64,
    /// How long a reordered packet is held back.
    pub(crate) hold: Duration,
    /// Every packet takes this long.
    pub(crate) delay: Duration,
    /// And up to this much more, evenly spread; it does not change the order.
    pub(crate) jitter: Duration,
    /// Longer packets vanish without an ICMP message (a tunnel on the way that nobody told of).
    pub(crate) mtu: Option<usize>,
    /// Bits per second.
    pub(crate) rate: Option<f64>,
    /// Nothing passes.
    pub(crate) cut: bool,
    /// Passes for a while, then does not for a while, and again.
    pub(crate) flap: Option<Flap>,
}

/// A link that comes and goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flap {
    up: Duration,
    down: Duration,
    since: Duration,
}

/// A change that is no change of a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no KEY=VALUE of a rule")]
pub(crate) struct NoRule(String);

impl Default for Rule {
    fn default() -> Self {
        Self {
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            hold: Duration::from_millis(10),
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            mtu: None,
            rate: None,
            cut: false,
            flap: None,
        }
    }
}

impl Rule {
    /// Applies one `key=value`; `now` is when a flapping begins.
    pub(crate) fn change(&mut self, text: &str, now: Duration) -> Result<(), NoRule> {
        let wrong = || NoRule(text.to_owned());
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        match (key, value) {
            ("cut", "on") => self.cut = true,
            ("cut", "off") => self.cut = false,
            ("flap", _) => {
                let (up, down) = value.split_once('/').ok_or_else(wrong)?;
                let (up, down) = (milliseconds(up).ok_or_else(wrong)?, milliseconds(down).ok_or_else(wrong)?);
                self.flap = (!down.is_zero()).then_some(Flap { up, down, since: now });
            }
            ("loss", _) => self.loss = share(value).ok_or_else(wrong)?,
            ("duplicate", _) => self.duplicate = share(value).ok_or_else(wrong)?,
            ("reorder", _) => self.reorder = share(value).ok_or_else(wrong)?,
            ("hold", _) => self.hold = milliseconds(value).ok_or_else(wrong)?,
            ("delay", _) => self.delay = milliseconds(value).ok_or_else(wrong)?,
            ("jitter", _) => self.jitter = milliseconds(value).ok_or_else(wrong)?,
            ("mtu", _) => self.mtu = Some(value.parse().map_err(|_| wrong())?).filter(|bytes| *bytes > 0),
            ("rate", _) => self.rate = Some(number(value).ok_or_else(wrong)? * 1e6).filter(|rate| *rate > 0.0),
            _ => return Err(wrong()),
        }
        Ok(())
    }

    /// Whether nothing passes at this moment.
    pub(crate) fn is_down(&self, now: Duration) -> bool {
        self.cut
            || self.flap.is_some_and(|flap| {
                let period = (flap.up + flap.down).as_nanos();
                now.saturating_sub(flap.since).as_nanos() % period >= flap.up.as_nanos()
            })
    }
}

fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0)
}

fn share(percent: &str) -> Option<f64> {
    number(percent).filter(|n| *n <= 100.0).map(|n| n / 100.0)
}

fn milliseconds(text: &str) -> Option<Duration> {
    number(text).filter(|n| *n < 1e9).map(|n| Duration::from_secs_f64(n / 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flapping_link_is_up_first_and_then_down() {
        let mut rule = Rule::default();
        rule.change("flap=300/200", Duration::from_millis(1000)).unwrap();
        let down: Vec<bool> = (0..10).map(|n| rule.is_down(Duration::from_millis(1000 + n * 100))).collect();
        assert_eq!(down, [false, false, false, true, true, false, false, false, true, true]);
        rule.change("flap=1/0", Duration::ZERO).unwrap();
        assert_eq!(rule, Rule::default());
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in
            ["loss", "loss=101", "loss=-1", "loss=x", "cut=maybe", "flap=5", "delay=1e12", "colour=red", "mtu=-4"]
        {
            assert_eq!(Rule::default().change(text, Duration::ZERO), Err(NoRule(text.to_owned())), "{text}");
        }
    }
}
