//! Which bundle goes to which site: all of them, or none.
//!
//! A *site* is a [`Pool`]: a node, or a bundle of a placement group. Bundle *i* is rank *i*.
//!
//! - **Equal bundles** (every vLLM group): exact. A placement is found whenever there is one; PACK uses the fewest sites that
//!   its first site allows, SPREAD the most. Ranks of a site are contiguous.
//! - **Different bundles**: STRICT_SPREAD is exact (a matching); the others are greedy: first in rank order, which keeps ranks contiguous,
//!   then large bundles first.
//!
//! Rank 0 goes to the *first* site (the driver's node) wherever it fits there and the whole can still be placed.

use crate::pool::Pool;
use rayless_proto::resources::{Allocation, CPU, GPU, MEMORY, Resources, Strategy};
use std::cmp::Reverse;

/// Site (index into `sites`) and share of each bundle, in order of bundle.
pub type Placed = Vec<(usize, Allocation)>;

/// Places all bundles, at most `most` on a site, or none: `None`. The order of `sites` breaks ties.
pub fn place(
    sites: &[&Pool],
    bundles: &[Resources],
    strategy: Strategy,
    first: Option<usize>,
    most: usize,
) -> Option<Placed> {
    let bundle = bundles.first()?;
    if bundles.iter().all(|b| b == bundle) {
        let counts = count_equal(sites, bundle, bundles.len(), strategy, first, most)?;
        return take_counts(sites, bundle, &counts);
    }
    let placed = place_different(sites, bundles, strategy, first)?;
    let mut counts = vec![0usize; sites.len()];
    placed.iter().for_each(|(site, _)| counts[*site] += 1);
    counts.iter().all(|c| *c <= most).then_some(placed)
}

fn place_different(sites: &[&Pool], bundles: &[Resources], strategy: Strategy, first: Option<usize>) -> Option<Placed> {
    let bundle = bundles.first()?;
    let pinned = first.filter(|&site| sites.get(site).is_some_and(|pool| pool.capacity(bundle, 1) > 0));
    match strategy {
        Strategy::StrictPack => strict_pack(sites, bundles, first),
        Strategy::StrictSpread => strict_spread(sites, bundles, pinned).or_else(|| strict_spread(sites, bundles, None)),
        Strategy::Pack => {
            let order = by_free(sites, first);
            in_rank_order(sites, bundles, &order)
                .or_else(|| large_first(sites, bundles, &order, pinned, Preference::Order))
                .or_else(|| large_first(sites, bundles, &order, None, Preference::Order))
        }
        Strategy::Spread => {
            let order = by_free(sites, first);
            large_first(sites, bundles, &order, pinned, Preference::Emptiest)
                .or_else(|| large_first(sites, bundles, &order, None, Preference::Emptiest))
                .or_else(|| large_first(sites, bundles, &order, None, Preference::Order))
                .or_else(|| in_rank_order(sites, bundles, &order))
        }
    }
}

/// Carves bundles out of sites in the order given: as they come, else large ones first.
pub fn carve(sites: &[&Pool], bundles: &[Resources]) -> Option<Placed> {
    let order: Vec<usize> = (0..sites.len()).collect();
    in_rank_order(sites, bundles, &order).or_else(|| large_first(sites, bundles, &order, None, Preference::Order))
}

/// Sites and how many bundles each gets, in order of rank.
fn count_equal(
    sites: &[&Pool],
    bundle: &Resources,
    count: usize,
    strategy: Strategy,
    first: Option<usize>,
    most: usize,
) -> Option<Vec<(usize, usize)>> {
    // Not capped at `count`: the best fit is the site with the least to spare.
    let capacities: Vec<usize> = sites.iter().map(|pool| pool.capacity(bundle, most)).collect();
    let first = first.filter(|&site| capacities.get(site).is_some_and(|&c| c > 0));
    let smallest_for = |rest: usize, used: &[(usize, usize)]| {
        let fitting = (0..sites.len()).filter(|&s| capacities[s] >= rest && !used.iter().any(|u| u.0 == s));
        fitting.min_by_key(|&s| (capacities[s], s))
    };
    match strategy {
        Strategy::StrictPack => {
            let here = first.filter(|&site| capacities[site] >= count);
            here.or_else(|| smallest_for(count, &[])).map(|site| vec![(site, count)])
        }
        Strategy::Pack => {
            let mut counts: Vec<(usize, usize)> =
                first.map(|site| (site, capacities[site].min(count))).into_iter().collect();
            let mut rest = count - counts.iter().map(|c| c.1).sum::<usize>();
            while rest > 0 {
                let largest = || {
                    let open = (0..sites.len()).filter(|&s| capacities[s] > 0 && !counts.iter().any(|c| c.0 == s));
                    open.max_by_key(|&s| (capacities[s], Reverse(s)))
                };
                let site = smallest_for(rest, &counts).or_else(largest)?;
                let taken = capacities[site].min(rest);
                counts.push((site, taken));
                rest -= taken;
            }
            Some(counts)
        }
        Strategy::Spread | Strategy::StrictSpread => {
            let mut order: Vec<usize> = (0..sites.len()).filter(|&s| capacities[s] > 0).collect();
            order.sort_by_key(|&s| (first != Some(s), Reverse(capacities[s]), s));
            let share = if strategy == Strategy::Spread { count } else { 1 };
            let mut counts: Vec<(usize, usize)> = order.iter().map(|&s| (s, 0)).collect();
            let mut rest = count;
            while rest > 0 {
                let before = rest;
                for (site, taken) in &mut counts {
                    if rest > 0 && *taken < capacities[*site].min(share) {
                        *taken += 1;
                        rest -= 1;
                    }
                }
                if rest == before {
                    return None;
                }
            }
            Some(counts)
        }
    }
}

fn take_counts(sites: &[&Pool], bundle: &Resources, counts: &[(usize, usize)]) -> Option<Placed> {
    let mut placed = Vec::new();
    for &(site, count) in counts {
        let mut pool = sites[site].clone();
        for _ in 0..count {
            placed.push((site, pool.take(bundle)?));
        }
    }
    Some(placed)
}

/// What makes a bundle hard to place: GPUs, then CPUs, then memory, then the rest.
fn weight(bundle: &Resources) -> (u64, u64, u64, u64) {
    let rest = bundle.iter().filter(|(name, _)| ![GPU, CPU, MEMORY].contains(name));
    let rest = rest.fold(0u64, |sum, (_, quantity)| sum.saturating_add(quantity.raw()));
    (bundle.get(GPU).raw(), bundle.get(CPU).raw(), bundle.get(MEMORY).raw(), rest)
}

/// The first site, then those with the most free.
fn by_free(sites: &[&Pool], first: Option<usize>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sites.len()).collect();
    order.sort_by_key(|&s| (first != Some(s), Reverse(weight(&sites[s].available())), s));
    order
}

/// Fills site after site in rank order, never going back: contiguous ranks.
fn in_rank_order(sites: &[&Pool], bundles: &[Resources], order: &[usize]) -> Option<Placed> {
    let mut order = order.iter();
    let mut site = *order.next()?;
    let mut pool = sites[site].clone();
    let mut placed = Vec::new();
    for bundle in bundles {
        let allocation = loop {
            if let Some(allocation) = pool.take(bundle) {
                break allocation;
            }
            site = *order.next()?;
            pool = sites[site].clone();
        };
        placed.push((site, allocation));
    }
    Some(placed)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Preference {
    /// The first site in order that fits.
    Order,
    /// The site with the fewest bundles so far that fits.
    Emptiest,
}

/// Large bundles first, each where it fits by `preference`; bundle 0 before all others on `pinned`, if given.
fn large_first(
    sites: &[&Pool],
    bundles: &[Resources],
    order: &[usize],
    pinned: Option<usize>,
    preference: Preference,
) -> Option<Placed> {
    let mut pools: Vec<Pool> = sites.iter().map(|p| (*p).clone()).collect();
    let mut counts = vec![0usize; sites.len()];
    let mut placed: Vec<Option<(usize, Allocation)>> = vec![None; bundles.len()];
    let mut queue: Vec<usize> = (0..bundles.len()).collect();
    queue.sort_by_key(|&b| (Reverse(weight(&bundles[b])), b));
    if let Some(site) = pinned {
        placed[0] = Some((site, pools[site].take(&bundles[0])?));
        counts[site] += 1;
        queue.retain(|&b| b != 0);
    }
    for bundle in queue {
        let mut candidates = order.to_vec();
        if preference == Preference::Emptiest {
            // Stable: the order breaks ties.
            candidates.sort_by_key(|&s| counts[s]);
        }
        let fitting = candidates.into_iter().find_map(|s| pools[s].take(&bundles[bundle]).map(|a| (s, a)))?;
        counts[fitting.0] += 1;
        placed[bundle] = Some(fitting);
    }
    placed.into_iter().collect()
}

/// All on one site: the first, else the fullest on which they fit.
fn strict_pack(sites: &[&Pool], bundles: &[Resources], first: Option<usize>) -> Option<Placed> {
    let mut order: Vec<usize> = (0..sites.len()).collect();
    order.sort_by_key(|&s| (first != Some(s), weight(&sites[s].available()), s));
    order.into_iter().find_map(|site| large_first(sites, bundles, &[site], None, Preference::Order))
}

/// Each on a site of its own: a matching of bundles to sites (augmenting paths), exact.
fn strict_spread(sites: &[&Pool], bundles: &[Resources], pinned: Option<usize>) -> Option<Placed> {
    let fits = |bundle: usize, site: usize| {
        (bundle != 0 || pinned.is_none_or(|p| p == site)) && sites[site].capacity(&bundles[bundle], 1) > 0
    };
    let mut bundle_of: Vec<Option<usize>> = vec![None; sites.len()];
    for bundle in 0..bundles.len() {
        // Breadth first: which bundle would have to move where.
        let mut from: Vec<Option<usize>> = vec![None; sites.len()];
        let mut queue = std::collections::VecDeque::from([bundle]);
        let mut open = None;
        'search: while let Some(next) = queue.pop_front() {
            for site in 0..sites.len() {
                if from[site].is_some() || !fits(next, site) || bundle_of[site] == Some(next) {
                    continue;
                }
                from[site] = Some(next);
                match bundle_of[site] {
                    Some(moved) => queue.push_back(moved),
                    None => {
                        open = Some(site);
                        break 'search;
                    }
                }
            }
        }
        let mut site = open?;
        // Walk back: each bundle on the path takes the site found for it and frees its own.
        loop {
            let mover = from[site]?;
            let left = bundle_of.iter().position(|b| *b == Some(mover));
            bundle_of[site] = Some(mover);
            match left {
                Some(left) => site = left,
                None => break,
            }
        }
    }
    let mut placed: Vec<Option<(usize, Allocation)>> = vec![None; bundles.len()];
    for (site, bundle) in bundle_of.into_iter().enumerate() {
        if let Some(bundle) = bundle {
            placed[bundle] = Some((site, sites[site].clone().take(&bundles[bundle])?));
        }
    }
    placed.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rayless_proto::resources::{Quantity, Strategy};

    fn gpus(value: f64) -> Resources {
        Resources::new().with(GPU, Quantity::from_f64(value).unwrap())
    }
    fn nodes(gpu_counts: &[u32]) -> Vec<Pool> {
        let pool = |&n: &u32| Pool::of_node(&Resources::new().with(GPU, Quantity::whole(n.into())), 0..n);
        gpu_counts.iter().map(pool).collect()
    }
    fn place(pools: &[Pool], bundles: &[Resources], strategy: Strategy, first: Option<usize>) -> Option<Placed> {
        let pools: Vec<&Pool> = pools.iter().collect();
        super::place(&pools, bundles, strategy, first, usize::MAX)
    }
    fn sites(placed: Option<Placed>) -> Vec<usize> {
        placed.unwrap().into_iter().map(|p| p.0).collect()
    }

    #[test]
    fn pack_fills_the_drivers_node_then_the_best_fit() {
        let placed = place(&nodes(&[8, 4, 8]), &vec![gpus(1.0); 12], Strategy::Pack, Some(2));
        assert_eq!(sites(placed), [vec![2; 8], vec![1; 4]].concat());
    }

    #[test]
    fn pack_uses_the_fewest() {
        let placed = place(&nodes(&[1, 2, 3, 8]), &vec![gpus(1.0); 9], Strategy::Pack, None);
        assert_eq!(sites(placed), [vec![3; 8], vec![0; 1]].concat());
    }

    #[test]
    fn strict_pack_is_one_node_or_none() {
        assert_eq!(sites(place(&nodes(&[8, 4, 8]), &vec![gpus(1.0); 3], Strategy::StrictPack, None)), [1; 3]);
        assert_eq!(sites(place(&nodes(&[2, 4, 8]), &vec![gpus(1.0); 3], Strategy::StrictPack, Some(0))), [1; 3]);
        assert_eq!(place(&nodes(&[8, 8]), &vec![gpus(1.0); 9], Strategy::StrictPack, None), None);
    }

    #[test]
    fn spread_uses_the_most_and_keeps_ranks_together() {
        assert_eq!(sites(place(&nodes(&[8, 1, 8]), &vec![gpus(1.0); 5], Strategy::Spread, Some(0))), [0, 0, 2, 2, 1]);
        assert_eq!(place(&nodes(&[1, 1]), &vec![gpus(1.0); 3], Strategy::Spread, None), None);
    }

    #[test]
    fn a_site_takes_no_more_than_it_may() {
        let pools = nodes(&[8, 8]);
        let pools: Vec<&Pool> = pools.iter().collect();
        let placed = super::place(&pools, &vec![gpus(0.5); 6], Strategy::Pack, Some(1), 4);
        assert_eq!(sites(placed), [1, 1, 1, 1, 0, 0]);
        assert_eq!(super::place(&pools, &vec![gpus(0.5); 6], Strategy::Pack, None, 2), None);
    }

    #[test]
    fn strict_spread_is_a_node_each() {
        assert_eq!(sites(place(&nodes(&[1, 8, 2]), &vec![gpus(1.0); 3], Strategy::StrictSpread, Some(2))), [2, 1, 0]);
        assert_eq!(place(&nodes(&[8, 8]), &vec![gpus(1.0); 3], Strategy::StrictSpread, None), None);
    }

    #[test]
    fn strict_spread_of_different_bundles_moves_earlier_ones() {
        // Rank 0 would take the only node on which rank 1 fits.
        let bundles = [gpus(1.0), gpus(4.0), gpus(2.0)];
        assert_eq!(sites(place(&nodes(&[4, 1, 2]), &bundles, Strategy::StrictSpread, Some(0))), [1, 0, 2]);
    }

    #[test]
    fn different_bundles_keep_their_order_where_they_can() {
        let bundles = [gpus(2.0), gpus(1.0), gpus(0.5), gpus(0.5), gpus(4.0)];
        assert_eq!(sites(place(&nodes(&[4, 4]), &bundles, Strategy::Pack, Some(1))), [1, 1, 1, 1, 0]);
        // In rank order the 4 would not fit any more.
        let bundles = [gpus(1.0), gpus(4.0), gpus(1.0)];
        assert_eq!(sites(place(&nodes(&[4, 2]), &bundles, Strategy::Pack, Some(0))), [1, 0, 1]);
    }

    proptest! {
        /// Nothing is given out twice, and equal bundles are placed whenever they can be.
        #[test]
        fn equal_bundles_are_exact(
            counts in prop::collection::vec(0u32..5, 1..6),
            taken in prop::collection::vec(0u32..5, 1..6),
            tenths in prop::sample::select(vec![1u32, 3, 5, 10, 20, 30]),
            n in 1usize..12,
            strategy in prop::sample::select(vec![Strategy::Pack, Strategy::Spread, Strategy::StrictPack, Strategy::StrictSpread]),
            first in 0usize..6,
        ) {
            let mut pools = nodes(&counts);
            for (pool, taken) in pools.iter_mut().zip(&taken) {
                for _ in 0..*taken {
                    let _ = pool.take(&gpus(0.7));
                }
            }
            let bundle = gpus(f64::from(tenths) / 10.0);
            let room: Vec<usize> = pools
                .iter()
                .map(|p| { let mut p = p.clone(); std::iter::from_fn(|| p.take(&bundle)).count() })
                .collect();
            let possible = match strategy {
                Strategy::Pack | Strategy::Spread => room.iter().sum::<usize>() >= n,
                Strategy::StrictPack => room.iter().any(|r| *r >= n),
                Strategy::StrictSpread => room.iter().filter(|r| **r > 0).count() >= n,
            };
            let placed = place(&pools, &vec![bundle; n], strategy, Some(first));
            prop_assert_eq!(placed.is_some(), possible);
            let Some(placed) = placed else { return Ok(()) };
            prop_assert_eq!(placed.len(), n);
            for (site, allocation) in &placed {
                prop_assert!(pools[*site].take_exactly(allocation), "given twice");
            }
            let mut order: Vec<usize> = placed.iter().map(|p| p.0).collect();
            if first < room.len() && (strategy == Strategy::Pack || strategy == Strategy::Spread) && room[first] > 0 {
                prop_assert_eq!(order[0], first);
            }
            order.dedup();
            let distinct = order.len();
            order.sort_unstable();
            order.dedup();
            prop_assert_eq!(order.len(), distinct, "ranks of a node are contiguous");
        }

        /// Different bundles: what is placed does not overlap, and one site that takes all in order is always found.
        #[test]
        fn different_bundles_do_not_overlap(
            counts in prop::collection::vec(0u32..6, 1..5),
            tenths in prop::collection::vec(prop::sample::select(vec![2u32, 5, 10, 20, 40]), 1..8),
            strategy in prop::sample::select(vec![Strategy::Pack, Strategy::Spread, Strategy::StrictPack, Strategy::StrictSpread]),
        ) {
            let mut pools = nodes(&counts);
            let bundles: Vec<Resources> = tenths.iter().map(|t| gpus(f64::from(*t) / 10.0)).collect();
            let in_order = carve(&pools.iter().collect::<Vec<_>>(), &bundles).is_some();
            let placed = place(&pools, &bundles, strategy, Some(0));
            if strategy == Strategy::Pack || strategy == Strategy::Spread {
                prop_assert!(placed.is_some() || !in_order);
            }
            for (site, allocation) in placed.iter().flatten() {
                prop_assert!(pools[*site].take_exactly(allocation), "given twice");
            }
        }
    }
}
