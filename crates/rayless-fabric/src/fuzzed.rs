//! Entries for the fuzz targets (`fuzz/`): what reads bytes of the other end of a link.

use crate::{
    canned::Canned,
    config::LinkConfig,
    greeting::{ANSWER, Answer, GREETING, Greeting},
    header::{DevicePath, HEADER, Header, Kind},
    name::LinkName,
    rdma,
    recv::RecvLink,
    tensor::Schema,
    wait::Wait,
};
use rayless_proto::ids::GroupId;
use std::time::Duration;

/// The decoders of the handshake and of a message's front, each by itself; what is accepted goes round unchanged.
#[allow(clippy::missing_panics_doc, reason = "a panic is what the fuzzer looks for")]
pub fn decoders(bytes: &[u8]) {
    if let Some(greeting) = bytes.first_chunk::<GREETING>().and_then(Greeting::decode) {
        let again = Greeting::decode(&greeting.encode());
        assert!(again.is_some_and(|again| again.name == greeting.name && again.count == greeting.count));
    }
    if let Some(answer) = bytes.first_chunk::<ANSWER>().and_then(Answer::decode) {
        // A reason that is not UTF-8 is shown with replacement characters, which may be too long to go round.
        let shown = matches!(&answer, Answer::Refused(reason) if reason.contains('\u{fffd}'));
        assert!(shown || Answer::decode(&answer.encode()) == Some(answer));
    }
    let _ = rdma::decode_greeting(bytes);
    rdma::decode_slots(bytes);
    if let Some(header) = bytes.first_chunk::<HEADER>().and_then(Header::decode) {
        assert_eq!(Header::decode(&header.encode()), Some(header));
    }
    if let Some(schema) = Schema::decode(bytes) {
        assert!(schema.payload_bytes() >= schema.tensors.first().map_or(0, |tensor| tensor.bytes));
    }
}

/// One message as a sender that says anything would write it: its header is a header (its checksum is right), whatever it claims.
#[derive(Debug)]
pub struct Claim<'a> {
    /// Which kind of message.
    pub kind: u8,
    /// Added to the sequence number that is due.
    pub skip: u64,
    /// The description's slot.
    pub slot: u16,
    /// Claimed bytes of the payload.
    pub payload: u64,
    /// Claimed bytes of the description; `None`: as many as there are.
    pub schema: Option<u32>,
    /// Claims a checksum.
    pub checksum: bool,
    /// The description.
    pub description: &'a [u8],
    /// The payload.
    pub body: &'a [u8],
}

/// Receives what such a sender writes, until the link is lost. No message may hand out more bytes than `max_message`, nor a tensor
/// whose size is not that of its form.
#[allow(clippy::missing_panics_doc, reason = "a panic is what the fuzzer looks for")]
pub fn receive(verify: bool, max_message: u64, claims: &[Claim<'_>], rest: &[u8]) {
    let mut bytes = Vec::new();
    for (sequence, claim) in claims.iter().enumerate() {
        let kind = match claim.kind % 5 {
            0 => Kind::Data,
            1 => Kind::Goodbye,
            2 => Kind::Device(DevicePath::Chunks),
            3 => Kind::Device(DevicePath::Slots),
            _ => Kind::Chunk,
        };
        let header = Header {
            kind,
            sequence: (sequence as u64).wrapping_add(claim.skip),
            tag: 0,
            payload: claim.payload,
            slot: claim.slot,
            schema: claim.schema.unwrap_or(claim.description.len() as u32),
            checksum: claim.checksum,
        };
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(claim.description);
        bytes.extend_from_slice(claim.body);
        if claim.checksum {
            bytes.extend_from_slice(&crc32fast::hash(claim.body).to_le_bytes());
        }
    }
    bytes.extend_from_slice(rest);
    let name = LinkName { group: GroupId([1; 8]), from: 0, to: 1, channel: 0 };
    let config = LinkConfig { max_message, verify, spin: Duration::ZERO, ..LinkConfig::default() };
    let mut link = RecvLink::new(name, Box::new(Canned::new(bytes)), &config);
    while let Ok(announced) = link.recv_header(None, &Wait::forever()) {
        let total = announced.schema.payload_bytes();
        assert!(total <= max_message, "a message of {total} bytes was announced");
        if announced.device == Some(DevicePath::Slots) {
            // Its bytes do not come over this link.
            if link.taken_through_slots().is_err() {
                return;
            }
            continue;
        }
        let mut tensors: Vec<Vec<u8>> = announced.schema.tensors.iter().map(|t| vec![0; t.bytes as usize]).collect();
        let mut parts: Vec<&mut [u8]> = tensors.iter_mut().map(Vec::as_mut_slice).collect();
        if link.recv_payload(&mut parts, &Wait::forever()).is_err() {
            return;
        }
    }
}
