//! What is free on a node or in a bundle: exact quantities, and the devices behind the GPU quantity.
//!
//! A bundle's GPUs are whole devices, or one fraction of a single device. The GPU quantity is never checked alone: two
//! halves on two devices are not one GPU.

use rayless_proto::resources::{Allocation, GPU, GpuShare, Quantity, Resources};

/// A bundle that no node could ever serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// It asks for nothing.
    #[error("a bundle asks for nothing\nhint: give it at least one resource, for example {{\"CPU\": 1}}")]
    Empty,
    /// More than one GPU, and not a whole number.
    #[error("a bundle asks for {0} GPUs\nhint: more than one GPU must be a whole number")]
    MixedGpus(Quantity),
}

/// Checks the form of a bundle.
///
/// # Errors
/// [`BundleError`], with a hint.
pub fn check_bundle(bundle: &Resources) -> Result<(), BundleError> {
    let gpus = bundle.get(GPU);
    if bundle.is_empty() {
        Err(BundleError::Empty)
    } else if gpus > Quantity::ONE && !gpus.is_whole() {
        Err(BundleError::MixedGpus(gpus))
    } else {
        Ok(())
    }
}

/// A device and what is free of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Index on its node.
    pub index: u32,
    /// All that the pool has of it (a bundle may own a fraction).
    pub total: Quantity,
    /// What nobody holds.
    pub free: Quantity,
    /// Not to be placed on: its memory is not back yet.
    pub draining: bool,
}

/// Resources that are taken and given back whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pool {
    total: Resources,
    free: Resources,
    devices: Vec<Device>,
}

impl Pool {
    /// A node's pool: all of `total` free, one device for each of `gpus`.
    pub fn of_node(total: &Resources, gpus: impl IntoIterator<Item = u32>) -> Self {
        let whole = |index| Device { index, total: Quantity::ONE, free: Quantity::ONE, draining: false };
        Self { total: total.clone(), free: total.clone(), devices: gpus.into_iter().map(whole).collect() }
    }

    /// A pool of what a bundle holds.
    pub fn of_allocation(held: &Allocation) -> Self {
        let share = |g: &GpuShare| Device { index: g.index, total: g.amount, free: g.amount, draining: false };
        Self {
            total: held.resources.clone(),
            free: held.resources.clone(),
            devices: held.gpus.iter().map(share).collect(),
        }
    }

    /// All it has.
    pub const fn total(&self) -> &Resources {
        &self.total
    }

    /// What nobody holds, draining devices included.
    pub const fn free(&self) -> &Resources {
        &self.free
    }

    /// What can be given out now: like [`free`](Self::free), less the draining devices.
    pub fn available(&self) -> Resources {
        let drained = self.devices.iter().filter(|d| d.draining).fold(Quantity::ZERO, |sum, d| sum.plus(d.free));
        let mut available = self.free.clone();
        available.set(GPU, self.free.get(GPU).minus(drained).unwrap_or_default());
        available
    }

    /// Its devices.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Marks a device; an unknown index is ignored.
    pub fn set_draining(&mut self, index: u32, draining: bool) {
        if let Some(device) = self.devices.iter_mut().find(|d| d.index == index) {
            device.draining = draining;
        }
    }

    /// The same pool as if nobody held anything and nothing drained.
    #[must_use]
    pub fn emptied(&self) -> Self {
        let devices = self.devices.iter().map(|d| Device { free: d.total, draining: false, ..*d }).collect();
        Self { total: self.total.clone(), free: self.total.clone(), devices }
    }

    /// Takes a bundle, or nothing at all.
    ///
    /// Whole GPUs are taken lowest index first; a fraction goes to the fullest device that still has room, so that whole
    /// devices stay whole.
    pub fn take(&mut self, bundle: &Resources) -> Option<Allocation> {
        let wanted = bundle.get(GPU);
        let usable = |d: &Device| !d.draining && !d.free.is_zero();
        let gpus: Vec<GpuShare> = if wanted.is_zero() {
            Vec::new()
        } else if wanted < Quantity::ONE {
            let fitting = self.devices.iter().filter(|d| usable(d) && d.free >= wanted);
            let best = fitting.min_by_key(|d| (d.free, d.index))?;
            vec![GpuShare { index: best.index, amount: wanted }]
        } else {
            let count = usize::try_from(wanted.raw() / Quantity::SCALE).ok()?;
            let whole = self.devices.iter().filter(|d| usable(d) && d.free == Quantity::ONE);
            let mut indices: Vec<u32> = whole.map(|d| d.index).collect();
            indices.sort_unstable();
            indices.truncate(count);
            if indices.len() < count {
                return None;
            }
            indices.into_iter().map(|index| GpuShare { index, amount: Quantity::ONE }).collect()
        };
        let allocation = Allocation { resources: bundle.clone(), gpus };
        self.take_exactly(&allocation).then_some(allocation)
    }

    /// Takes just these devices and quantities, draining or not: what a node says it already holds. `false`, and nothing
    /// taken, where some of it is not there.
    #[must_use]
    pub fn take_exactly(&mut self, held: &Allocation) -> bool {
        let mut devices = self.devices.clone();
        for share in &held.gpus {
            let Some(device) = devices.iter_mut().find(|d| d.index == share.index) else { return false };
            let Some(left) = device.free.minus(share.amount) else { return false };
            device.free = left;
        }
        if !self.free.take(&held.resources) {
            return false;
        }
        self.devices = devices;
        true
    }

    /// Gives back what [`take`](Self::take) or [`take_exactly`](Self::take_exactly) took.
    pub fn give(&mut self, held: &Allocation) {
        self.free.add(&held.resources);
        for share in &held.gpus {
            if let Some(device) = self.devices.iter_mut().find(|d| d.index == share.index) {
                device.free = device.free.plus(share.amount);
            }
        }
    }

    /// How many equal bundles could be taken one after the other, at most `limit`.
    pub fn capacity(&self, bundle: &Resources, limit: usize) -> usize {
        let scalars = bundle.iter().filter(|(name, _)| *name != GPU);
        let by_quantity = scalars.map(|(name, wanted)| self.free.get(name).raw() / wanted.raw()).min();
        let wanted = bundle.get(GPU);
        let usable = self.devices.iter().filter(|d| !d.draining);
        let by_device = if wanted.is_zero() {
            None
        } else if wanted < Quantity::ONE {
            Some(usable.map(|d| d.free.raw() / wanted.raw()).sum())
        } else {
            let whole = usable.filter(|d| d.free == Quantity::ONE).count() as u64;
            Some(whole / (wanted.raw() / Quantity::SCALE))
        };
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        let capacity = by_quantity.unwrap_or(limit).min(by_device.unwrap_or(limit)).min(limit);
        usize::try_from(capacity).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::resources::CPU;

    fn q(value: f64) -> Quantity {
        Quantity::from_f64(value).unwrap()
    }
    fn gpus(value: f64) -> Resources {
        Resources::new().with(GPU, q(value))
    }
    fn node(gpu_count: u32) -> Pool {
        let total = Resources::new().with(GPU, Quantity::whole(gpu_count.into())).with(CPU, q(4.0));
        Pool::of_node(&total, 0..gpu_count)
    }
    fn indices(allocation: &Allocation) -> Vec<u32> {
        allocation.gpus.iter().map(|g| g.index).collect()
    }

    #[test]
    fn a_fraction_fills_a_started_device_first() {
        let mut pool = node(2);
        assert_eq!(indices(&pool.take(&gpus(0.5)).unwrap()), [0]);
        assert_eq!(indices(&pool.take(&gpus(1.0)).unwrap()), [1]);
        assert_eq!(indices(&pool.take(&gpus(0.5)).unwrap()), [0]);
        assert_eq!(pool.take(&gpus(0.1)), None);
    }

    #[test]
    fn two_halves_are_not_a_whole() {
        let mut pool = node(2);
        let half = pool.take(&gpus(0.6)).unwrap();
        let other = pool.take(&gpus(0.6)).unwrap();
        assert_eq!(pool.free().get(GPU), q(0.8));
        assert_eq!(pool.take(&gpus(0.8)), None);
        pool.give(&half);
        pool.give(&other);
        assert_eq!(pool, node(2));
    }

    #[test]
    fn a_draining_device_is_not_given_out() {
        let mut pool = node(2);
        pool.set_draining(0, true);
        assert_eq!(pool.available().get(GPU), Quantity::ONE);
        assert_eq!(pool.capacity(&gpus(1.0), 9), 1);
        assert_eq!(indices(&pool.take(&gpus(1.0)).unwrap()), [1]);
        assert_eq!(pool.take(&gpus(1.0)), None);
        pool.set_draining(0, false);
        assert_eq!(indices(&pool.take(&gpus(1.0)).unwrap()), [0]);
    }

    #[test]
    fn a_take_that_fails_takes_nothing() {
        let mut pool = node(2);
        assert_eq!(pool.take(&gpus(1.0).with(CPU, q(5.0))), None);
        assert_eq!(pool, node(2));
    }

    #[test]
    fn capacity_counts_the_scarcest() {
        let pool = node(3);
        assert_eq!(pool.capacity(&gpus(1.0), 100), 3);
        assert_eq!(pool.capacity(&gpus(2.0), 100), 1);
        assert_eq!(pool.capacity(&gpus(0.4), 100), 6);
        assert_eq!(pool.capacity(&gpus(0.4).with(CPU, q(1.0)), 100), 4);
        assert_eq!(pool.capacity(&Resources::new().with(CPU, q(0.0001)), 100), 100);
        assert_eq!(pool.capacity(&Resources::new().with("disk", q(1.0)), 100), 0);
    }

    #[test]
    fn odd_bundles_are_refused() {
        assert_eq!(check_bundle(&Resources::new()), Err(BundleError::Empty));
        assert!(check_bundle(&gpus(1.5)).is_err());
        assert!(check_bundle(&gpus(2.0)).is_ok());
    }
}
