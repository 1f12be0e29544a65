//! Secrets of links: one per link, known to both its ends and never told, and one per attempt.

use rayless_fabric::LinkName;
use ring::{
    hmac,
    rand::{SecureRandom, SystemRandom},
};

/// What proves to the receiver that a caller may be the sender of `link`: both have the group's secret. It is said within TLS only.
pub(super) fn of_link(secret: &[u8; 32], link: LinkName) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
    context.update(b"rayless link 1");
    context.update(&link.group.0);
    context.update(&link.from.to_le_bytes());
    context.update(&link.to.to_le_bytes());
    context.update(&link.channel.to_le_bytes());
    let mut ticket = [0; 32];
    ticket.copy_from_slice(context.sign().as_ref());
    ticket
}

/// For one attempt at one transport: it travels in clear (in the private data of rdma_cm, say), and is worth nothing afterwards.
pub(super) fn of_attempt() -> Result<[u8; 32], String> {
    let mut ticket = [0; 32];
    SystemRandom::new().fill(&mut ticket).map_err(|_| "no random numbers from the system".to_owned())?;
    Ok(ticket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::ids::GroupId;

    #[test]
    fn each_link_of_each_group_has_its_own() {
        let name = |from, to, channel| LinkName { group: GroupId([1; 8]), from, to, channel };
        let mut all = vec![
            of_link(&[7; 32], name(0, 1, 0)),
            of_link(&[7; 32], name(1, 0, 0)),
            of_link(&[7; 32], name(0, 1, 1)),
            of_link(&[8; 32], name(0, 1, 0)),
            of_link(&[7; 32], LinkName { group: GroupId([2; 8]), ..name(0, 1, 0) }),
        ];
        assert_eq!(of_link(&[7; 32], name(0, 1, 0)), all[0]);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 5);
        assert_ne!(of_attempt().unwrap(), of_attempt().unwrap());
    }
}
