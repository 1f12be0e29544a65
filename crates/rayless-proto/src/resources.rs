//! Resources: names with exact quantities.
//!
//! A quantity counts ten-thousandths (as Ray's `FixedPoint` does), so that any order of takes and
//! returns of fractions comes back to exactly what was there.

use rkyv::{Archive, Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Name of the CPU resource.
pub const CPU: &str = "CPU";
/// Name of the GPU resource. Quantities of it are also bound to devices, see [`GpuShare`].
pub const GPU: &str = "GPU";
/// Name of the memory resource, in bytes.
pub const MEMORY: &str = "memory";

/// An exact, never negative amount of a resource, in ten-thousandths.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Quantity(u64);

/// A number that cannot be a quantity.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("`{0}` is not a resource quantity\nhint: give a number from 0 to 1e14, in steps of 0.0001")]
pub struct QuantityError(pub f64);

impl Quantity {
    /// Ten-thousandths in one.
    pub const SCALE: u64 = 10_000;
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// Exactly one.
    pub const ONE: Self = Self(Self::SCALE);

    /// `n` whole units. Saturates at the largest quantity.
    pub const fn whole(n: u64) -> Self {
        Self(n.saturating_mul(Self::SCALE))
    }

    /// From ten-thousandths.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// In ten-thousandths.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Rounded to the nearest ten-thousandth.
    ///
    /// # Errors
    /// For a negative, non-finite or far too large number, and for a positive one that would round to nothing.
    pub fn from_f64(value: f64) -> Result<Self, QuantityError> {
        if !value.is_finite() || !(0.0..=1e14).contains(&value) {
            return Err(QuantityError(value));
        }
        let raw = (value * Self::SCALE as f64).round() as u64;
        if raw == 0 && value > 0.0 {
            return Err(QuantityError(value));
        }
        Ok(Self(raw))
    }

    /// For people and JSON.
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / Self::SCALE as f64
    }

    /// Whether this is a whole number of units.
    pub const fn is_whole(self) -> bool {
        self.0.is_multiple_of(Self::SCALE)
    }

    /// Whether this is nothing.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// `self + other`, saturating.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// `self - other`, or `None` where that would be negative.
    pub const fn minus(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_whole() { write!(f, "{}", self.0 / Self::SCALE) } else { write!(f, "{}", self.as_f64()) }
    }
}

impl fmt::Debug for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A set of resources: never holds a zero entry.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Default, Debug)]
pub struct Resources(BTreeMap<String, Quantity>);

impl Resources {
    /// Nothing at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// How much of `name` there is.
    pub fn get(&self, name: &str) -> Quantity {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// Sets `name` to `quantity`; zero removes it.
    pub fn set(&mut self, name: &str, quantity: Quantity) {
        if quantity.is_zero() {
            self.0.remove(name);
        } else {
            self.0.insert(name.to_owned(), quantity);
        }
    }

    /// `self` with `name` set, for building in one expression.
    #[must_use]
    pub fn with(mut self, name: &str, quantity: Quantity) -> Self {
        self.set(name, quantity);
        self
    }

    /// Adds all of `other`.
    pub fn add(&mut self, other: &Self) {
        for (name, quantity) in other.iter() {
            self.set(name, self.get(name).plus(quantity));
        }
    }

    /// Takes all of `other`, or nothing at all: `false` where some of it is not there.
    #[must_use]
    pub fn take(&mut self, other: &Self) -> bool {
        if !self.covers(other) {
            return false;
        }
        for (name, quantity) in other.iter() {
            let left = self.get(name).minus(quantity).unwrap_or_default();
            self.set(name, left);
        }
        true
    }

    /// Whether all of `other` is here.
    pub fn covers(&self, other: &Self) -> bool {
        other.iter().all(|(name, quantity)| self.get(name) >= quantity)
    }

    /// Name and quantity, in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Quantity)> {
        self.0.iter().map(|(name, quantity)| (name.as_str(), *quantity))
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many names it holds.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl FromIterator<(String, Quantity)> for Resources {
    fn from_iter<I: IntoIterator<Item = (String, Quantity)>>(entries: I) -> Self {
        let mut all = Self::new();
        for (name, quantity) in entries {
            all.set(&name, quantity);
        }
        all
    }
}

/// A share of one GPU: all of it, or a fraction.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct GpuShare {
    /// Index of the GPU on its node, as NVML counts (or 0.. where `--gpus N` declared them).
    pub index: u32,
    /// At most one.
    pub amount: Quantity,
}

/// What a bundle got on its node.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct Allocation {
    /// All resources of the bundle, GPUs included.
    pub resources: Resources,
    /// The devices behind the GPU quantity; empty where the bundle asked for none.
    pub gpus: Vec<GpuShare>,
}

/// How the bundles of a group may lie on the nodes (Ray's names and meanings).
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Strategy {
    /// On as few nodes as possible.
    #[default]
    Pack,
    /// On as many different nodes as possible.
    Spread,
    /// All on one node, or not at all.
    StrictPack,
    /// Each on a node of its own, or not at all.
    StrictSpread,
}

impl Strategy {
    /// Ray's spelling.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pack => "PACK",
            Self::Spread => "SPREAD",
            Self::StrictPack => "STRICT_PACK",
            Self::StrictSpread => "STRICT_SPREAD",
        }
    }

    /// Reads Ray's spelling.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Pack, Self::Spread, Self::StrictPack, Self::StrictSpread].into_iter().find(|s| s.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_tenths_are_one_again() {
        let tenth = Resources::new().with(GPU, Quantity::from_f64(0.1).unwrap());
        let mut free = Resources::new().with(GPU, Quantity::ONE);
        for _ in 0..10 {
            assert!(free.take(&tenth));
        }
        assert!(!free.take(&tenth));
        assert!(free.is_empty());
        for _ in 0..10 {
            free.add(&tenth);
        }
        assert_eq!(free.get(GPU), Quantity::ONE);
    }

    #[test]
    fn a_take_that_fails_takes_nothing() {
        let mut free = Resources::new().with(CPU, Quantity::whole(4)).with(GPU, Quantity::ONE);
        let before = free.clone();
        assert!(!free.take(&Resources::new().with(CPU, Quantity::ONE).with(GPU, Quantity::whole(2))));
        assert_eq!(free, before);
    }

    #[test]
    fn odd_numbers_are_refused() {
        for value in [-1.0, f64::NAN, f64::INFINITY, 1e300, 0.00001] {
            assert!(Quantity::from_f64(value).is_err(), "{value}");
        }
        assert_eq!(Quantity::from_f64(0.5).unwrap().to_string(), "0.5");
        assert_eq!(Quantity::from_f64(8.0).unwrap().to_string(), "8");
    }
}
