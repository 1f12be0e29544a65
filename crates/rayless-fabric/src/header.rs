//! The 64 bytes in front of every message.

/// Bytes of a header.
pub(crate) const HEADER: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"rlkm");

/// What follows a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Perhaps a description, then a payload.
    Data,
    /// Nothing: the sender closed its end.
    Goodbye,
    /// Perhaps a description; the payload, which is in a GPU's memory, comes by another way.
    Device(DevicePath),
    /// A part of the payload of the device message before: `tag` is its number, `payload` its bytes.
    Chunk,
}

/// How the payload of a message in device memory travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DevicePath {
    /// Staged in pinned host memory, as chunks behind the header on the same link.
    Chunks,
    /// From GPU to GPU through slots that both processes map; no host sees it.
    Slots,
}

/// A header's fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    /// Messages sent before this one.
    pub(crate) sequence: u64,
    /// The caller's step.
    pub(crate) tag: u64,
    /// Bytes of the payload, without the checksum behind it.
    pub(crate) payload: u64,
    /// The description's slot.
    pub(crate) slot: u16,
    /// Bytes of the description behind the header; 0: the slot is known.
    pub(crate) schema: u32,
    /// Whether four bytes of checksum follow the payload.
    pub(crate) checksum: bool,
}

impl Header {
    /// The bytes on the wire, little-endian, the last four a CRC of the others.
    pub(crate) fn encode(&self) -> [u8; HEADER] {
        let mut out = [0u8; HEADER];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = match self.kind {
            Kind::Data => 1,
            Kind::Goodbye => 2,
            Kind::Device(DevicePath::Chunks) => 3,
            Kind::Device(DevicePath::Slots) => 4,
            Kind::Chunk => 5,
        };
        out[5] = u8::from(self.checksum);
        out[6..8].copy_from_slice(&self.slot.to_le_bytes());
        out[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..24].copy_from_slice(&self.tag.to_le_bytes());
        out[24..32].copy_from_slice(&self.payload.to_le_bytes());
        out[32..36].copy_from_slice(&self.schema.to_le_bytes());
        let crc = crc32fast::hash(&out[..HEADER - 4]);
        out[HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a header; `None` when these bytes are none.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let u64_at = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?));
        if u32_at(0)? != MAGIC {
            return None;
        }
        let kind = match body[4] {
            1 => Kind::Data,
            2 => Kind::Goodbye,
            3 => Kind::Device(DevicePath::Chunks),
            4 => Kind::Device(DevicePath::Slots),
            5 => Kind::Chunk,
            _ => return None,
        };
        Some(Self {
            kind,
            checksum: body[5] != 0,
            slot: u16::from_le_bytes([body[6], body[7]]),
            sequence: u64_at(8)?,
            tag: u64_at(16)?,
            payload: u64_at(24)?,
            schema: u32_at(32)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_and_no_changed_bit_passes() {
        let header = Header {
            kind: Kind::Data,
            sequence: 41,
            tag: u64::MAX,
            payload: 1 << 28,
            slot: 63,
            schema: 185,
            checksum: true,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Some(header));
        for bit in 0..HEADER * 8 {
            let mut changed = bytes;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&changed), None, "bit {bit}");
        }
    }
}
