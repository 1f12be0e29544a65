//! What the sender writes into the ring in front of a payload that is longer than the ring, where both ends can do with one copy.

/// Bytes of the fixed part.
pub(super) const FIXED: usize = 32;
/// Parts of a payload that is lent; one of more goes through the ring.
pub(super) const MAX_PARTS: usize = 256;
const PART: usize = 16;
const MAGIC: u32 = u32::from_le_bytes(*b"lend");
/// Bytes of the longest tail: a checksum.
const MAX_TAIL: usize = 4;

/// A piece of the sender's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) len: u64,
}

/// A loan as announced.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Record {
    /// Counted from 1.
    pub(super) number: u64,
    /// Where the payload lies, in order. None: it follows in the ring.
    pub(super) parts: Vec<Part>,
    /// What comes behind it and is not lent, for it lies on the sender's stack.
    pub(super) tail: Vec<u8>,
}

impl Record {
    /// Writes the record to `out`. Parts beyond [`MAX_PARTS`] make it one without parts.
    pub(super) fn encode(number: u64, parts: &[&[u8]], tail: &[u8], out: &mut Vec<u8>) {
        let lent = || parts.iter().filter(|part| !part.is_empty());
        let count = lent().count();
        let count = if count <= MAX_PARTS && tail.len() <= MAX_TAIL { count } else { 0 };
        out.clear();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&(count as u32).to_le_bytes());
        out.extend_from_slice(&number.to_le_bytes());
        let tail = if count > 0 { tail } else { &[] };
        out.extend_from_slice(&(tail.len() as u32).to_le_bytes());
        out.extend_from_slice(tail);
        out.resize(FIXED, 0);
        for part in lent().take(count) {
            // The receiver reads there by way of the kernel.
            out.extend_from_slice(&(part.as_ptr().expose_provenance() as u64).to_le_bytes());
            out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
    }

    /// Bytes behind the fixed part; `None`: this is none.
    pub(super) fn rest(fixed: &[u8; FIXED]) -> Option<usize> {
        let count = u32::from_le_bytes(fixed[4..8].try_into().ok()?) as usize;
        (fixed[..4] == MAGIC.to_le_bytes() && count <= MAX_PARTS).then_some(count * PART)
    }

    /// Reads a record of a payload of `payload` bytes with its tail; `None`: it contradicts itself or that.
    pub(super) fn decode(fixed: &[u8; FIXED], rest: &[u8], payload: u64, into: &mut Self) -> Option<()> {
        let tail = u32::from_le_bytes(fixed[16..20].try_into().ok()?) as usize;
        into.number = u64::from_le_bytes(fixed[8..16].try_into().ok()?);
        into.tail.clear();
        into.tail.extend_from_slice(fixed.get(20..20 + tail).filter(|tail| tail.len() <= MAX_TAIL)?);
        into.parts.clear();
        let (mut left, (words, over)) = (payload.checked_sub(tail as u64)?, rest.as_chunks::<8>());
        if !over.is_empty() || Self::rest(fixed)? != rest.len() {
            return None;
        }
        for pair in words.as_chunks::<2>().0 {
            let [address, len] = pair.map(u64::from_le_bytes);
            address.checked_add(len)?;
            left = left.checked_sub(len)?;
            into.parts.push(Part { address, len });
        }
        (left == 0 || into.parts.is_empty()).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(parts: &[&[u8]], tail: &[u8]) -> ([u8; FIXED], Vec<u8>) {
        let mut out = Vec::new();
        Record::encode(7, parts, tail, &mut out);
        let (fixed, rest) = out.split_first_chunk::<FIXED>().unwrap();
        assert_eq!(Record::rest(fixed), Some(rest.len()));
        (*fixed, rest.to_vec())
    }

    #[test]
    fn a_record_reads_back_and_one_that_lies_does_not() {
        let parts: [&[u8]; 3] = [&[1; 100], &[], &[2; 50]];
        let (fixed, rest) = encoded(&parts, b"crc!");
        let mut record = Record::default();
        Record::decode(&fixed, &rest, 154, &mut record).unwrap();
        let at = |part: &[u8]| Part { address: part.as_ptr() as u64, len: part.len() as u64 };
        let expected = Record { number: 7, parts: vec![at(parts[0]), at(parts[2])], tail: b"crc!".to_vec() };
        assert_eq!(record, expected);
        for payload in [0, 3, 4, 104, 153, 155, u64::MAX] {
            assert_eq!(Record::decode(&fixed, &rest, payload, &mut record), None, "{payload}");
        }
        assert_eq!(Record::decode(&fixed, &rest[..rest.len() - 1], 154, &mut record), None);
        assert_eq!(Record::decode(&fixed, &rest[..16], 154, &mut record), None);
        let mut over = rest.clone();
        over[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(Record::decode(&fixed, &over, 154, &mut record), None, "an address that wraps around");
        let mut long = fixed;
        long[16..20].copy_from_slice(&9u32.to_le_bytes());
        assert_eq!(Record::decode(&long, &rest, 154, &mut record), None, "a tail that is too long");
        assert_eq!(Record::rest(&[0; FIXED]), None);
    }

    #[test]
    fn too_many_parts_go_through_the_ring() {
        let parts = [[3u8].as_slice(); MAX_PARTS + 1];
        let (fixed, rest) = encoded(&parts, b"");
        let mut record = Record::default();
        Record::decode(&fixed, &rest, 257, &mut record).unwrap();
        assert_eq!((record.parts.len(), rest.len()), (0, 0));
        let (fixed, rest) = encoded(&parts[..MAX_PARTS], b"");
        Record::decode(&fixed, &rest, 256, &mut record).unwrap();
        assert_eq!(record.parts.len(), MAX_PARTS);
    }
}
