//! Promise 10: the processes of a group run the same versions, or the start is refused with both sides named.

use super::{RankInfo, StartError};
use rayless_proto::ids::Rank;
use std::collections::BTreeMap;

/// What must be the same. Of Python only `major.minor` counts.
const COMPONENTS: [&str; 5] = ["python", "rayless", "vllm", "torch", "cuda"];

/// Compares what those ranks said that are ready so far, with the driver and with each other. Only what both sides name is compared.
pub(super) fn check(
    ranks: &[RankInfo],
    driver: &[(String, String)],
    ready: &BTreeMap<Rank, Vec<(String, String)>>,
) -> Result<(), StartError> {
    for component in COMPONENTS {
        let mut first = find(driver, component).map(|version| ("the driver".to_owned(), version));
        for (rank, versions) in ready {
            let Some(version) = find(versions, component) else { continue };
            let node = ranks.get(*rank as usize).map_or("?", |info| info.node_name.as_str());
            let who = format!("rank {rank} on node {node}");
            match &first {
                None => first = Some((who, version)),
                Some((left, left_version)) if counts(component, left_version) != counts(component, version) => {
                    return Err(StartError::Versions {
                        component: component.to_owned(),
                        left: left.clone(),
                        left_version: (*left_version).to_owned(),
                        right: who,
                        right_version: version.to_owned(),
                    });
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}

fn find<'a>(versions: &'a [(String, String)], component: &str) -> Option<&'a str> {
    versions.iter().find(|(name, _)| name == component).map(|(_, version)| version.as_str())
}

/// The part of `version` that must be the same.
fn counts<'a>(component: &str, version: &'a str) -> &'a str {
    match (component, version.match_indices('.').nth(1)) {
        ("python", Some((end, _))) => &version[..end],
        _ => version,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
    }

    #[test]
    fn a_patch_release_of_python_may_differ_and_vllm_may_not() {
        let driver = versions(&[("python", "3.11.2"), ("vllm", "0.32.0")]);
        let mut ready = BTreeMap::from([(0, versions(&[("python", "3.11.9"), ("vllm", "0.32.0")]))]);
        assert!(check(&[], &driver, &ready).is_ok());
        ready.insert(1, versions(&[("python", "3.11.2"), ("vllm", "0.31.0")]));
        let told = check(&[], &driver, &ready).unwrap_err().to_string();
        assert!(told.contains("vllm differs: the driver has 0.32.0, rank 1 on node"), "{told}");
    }

    #[test]
    fn ranks_are_compared_with_each_other_where_the_driver_is_silent() {
        let ready = BTreeMap::from([(0, versions(&[("torch", "2.13")])), (1, versions(&[("torch", "2.12")]))]);
        assert!(check(&[], &[], &ready).is_err());
        assert!(check(&[], &[], &BTreeMap::from([(0, versions(&[])), (1, versions(&[("cuda", "13")]))])).is_ok());
    }
}
