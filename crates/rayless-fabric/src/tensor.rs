//! Tensor dicts: what a message is made of, and its description on the wire.
//!
//! The description (names, dtypes, shapes and the caller's extra bytes) crosses a link once; both ends keep
//! it under a slot number and later messages of the same form carry only that number.

use crate::{
    dtype::{DType, DTypeSet},
    error::{Rejected, RejectedKind},
    name::LinkName,
};
use std::sync::Arc;

/// Bytes of the largest description: it travels in front of the payload and is kept by both ends.
pub const MAX_SCHEMA: usize = 64 << 10;
/// Descriptions that both ends keep; a PP stage has one per captured batch size.
pub(crate) const SCHEMA_SLOTS: u16 = 64;
/// Dimensions of a tensor, as in torch.
const MAX_DIMS: usize = 64;

/// A tensor's form.
#[derive(Clone, Copy, Debug)]
pub struct TensorSpec<'a> {
    /// Its key in the dict.
    pub name: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Elements along each dimension; empty for a scalar.
    pub shape: &'a [u64],
    /// Elements between neighbours along each dimension; `None`: contiguous.
    pub strides: Option<&'a [i64]>,
}

/// A tensor in host memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// Its form.
    pub spec: TensorSpec<'a>,
    /// Its bytes.
    pub data: &'a [u8],
}

/// What one message carries, apart from the payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// The step that the message belongs to; the receiver checks it when it names one.
    pub tag: u64,
    /// Bytes of the caller's own (a pickle of a dict's other values, say). They are part of the description.
    pub bytes: &'a [u8],
}

/// A received tensor's form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorMeta {
    /// Its key in the dict.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Elements along each dimension.
    pub shape: Vec<u64>,
    /// Its size in bytes.
    pub bytes: u64,
}

/// A received description.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Schema {
    /// The tensors, in the sender's order.
    pub tensors: Vec<TensorMeta>,
    /// The sender's extra bytes.
    pub extra: Vec<u8>,
}

impl Schema {
    /// Bytes of all tensors.
    pub fn payload_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    pub(crate) fn decode(mut bytes: &[u8]) -> Option<Self> {
        fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
            let (head, rest) = bytes.split_at_checked(n)?;
            *bytes = rest;
            Some(head)
        }
        fn number<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
            take(bytes, N)?.try_into().ok()
        }
        let count = u16::from_le_bytes(number(&mut bytes)?);
        let mut tensors = Vec::with_capacity(usize::from(count));
        let mut total = 0u64;
        for _ in 0..count {
            let name_len = u16::from_le_bytes(number(&mut bytes)?);
            let name = std::str::from_utf8(take(&mut bytes, usize::from(name_len))?).ok()?.to_owned();
            let [code, dims] = number(&mut bytes)?;
            let dtype = DType::from_code(code)?;
            let mut shape = Vec::with_capacity(usize::from(dims));
            for _ in 0..dims {
                shape.push(u64::from_le_bytes(number(&mut bytes)?));
            }
            let bytes = tensor_bytes(dtype, &shape)?;
            total = total.checked_add(bytes)?;
            tensors.push(TensorMeta { name, dtype, shape, bytes });
        }
        Some(Self { tensors, extra: bytes.to_vec() })
    }
}

/// Bytes of a contiguous tensor, if they can be counted.
pub(crate) fn tensor_bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(dtype.size(), |product, dim| product.checked_mul(*dim))
}

fn is_contiguous(shape: &[u64], strides: &[i64]) -> bool {
    if shape.len() != strides.len() {
        return false;
    }
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1u64;
    // A dimension of one element has no neighbours, so its stride says nothing.
    for (&dim, &stride) in shape.iter().zip(strides).rev().filter(|(dim, _)| **dim != 1) {
        if u64::try_from(stride) != Ok(expected) {
            return false;
        }
        expected = expected.saturating_mul(dim);
    }
    true
}

/// What the peer takes, as told in the handshake, for the checks made before anything is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerLimits {
    pub(crate) dtypes: DTypeSet,
    pub(crate) max_message: u64,
}

/// Checks a message against itself and the peer's limits and writes its description to `out`.
/// Returns the payload's size.
pub(crate) fn encode<'a>(
    link: LinkName,
    limits: PeerLimits,
    specs: impl ExactSizeIterator<Item = (TensorSpec<'a>, Option<u64>)>,
    extra: &[u8],
    out: &mut Vec<u8>,
) -> Result<u64, Rejected> {
    let reject = |kind, reason: String| Rejected { link, kind, reason };
    out.clear();
    let Ok(count) = u16::try_from(specs.len()) else {
        return Err(reject(
            RejectedKind::TooLarge,
            format!("{} tensors in one message; the limit is {}", specs.len(), u16::MAX),
        ));
    };
    out.extend_from_slice(&count.to_le_bytes());
    let mut total = 0u64;
    for (spec, data_len) in specs {
        let TensorSpec { name, dtype, shape, strides } = spec;
        if let Some(strides) = strides.filter(|strides| !is_contiguous(shape, strides)) {
            return Err(reject(
                RejectedKind::NotContiguous,
                format!("tensor `{name}` of shape {shape:?} is not contiguous (strides {strides:?})"),
            ));
        }
        if !limits.dtypes.contains(dtype) {
            return Err(reject(
                RejectedKind::DType,
                format!("tensor `{name}` is {dtype}, which the receiver cannot take"),
            ));
        }
        let (Ok(name_len), true) = (u16::try_from(name.len()), shape.len() <= MAX_DIMS) else {
            return Err(reject(
                RejectedKind::TooLarge,
                format!(
                    "a tensor with a name of {} bytes and {} dimensions; the limits are {} and {MAX_DIMS}",
                    name.len(),
                    shape.len(),
                    u16::MAX
                ),
            ));
        };
        let bytes = tensor_bytes(dtype, shape);
        let sum = bytes.and_then(|bytes| total.checked_add(bytes)).filter(|sum| *sum <= limits.max_message);
        let (Some(bytes), Some(sum)) = (bytes, sum) else {
            return Err(reject(
                RejectedKind::TooLarge,
                format!(
                    "tensor `{name}` of shape {shape:?} and {dtype} takes the message over the limit of {} bytes",
                    limits.max_message
                ),
            ));
        };
        if let Some(given) = data_len.filter(|given| *given != bytes) {
            return Err(reject(
                RejectedKind::Mismatch,
                format!("tensor `{name}` of shape {shape:?} and {dtype} has {bytes} bytes, but its buffer has {given}"),
            ));
        }
        total = sum;
        out.extend_from_slice(&name_len.to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&[dtype as u8, shape.len() as u8]);
        shape.iter().for_each(|dim| out.extend_from_slice(&dim.to_le_bytes()));
    }
    out.extend_from_slice(extra);
    if out.len() > MAX_SCHEMA {
        return Err(reject(
            RejectedKind::TooLarge,
            format!("names, shapes and extra bytes of {} bytes; the limit is {MAX_SCHEMA}", out.len()),
        ));
    }
    Ok(total)
}

/// The sender's half of the cache: which description lies in which slot.
#[derive(Default)]
pub(crate) struct SentSchemas {
    slots: Vec<(u32, Vec<u8>)>,
    recent: u16,
    victim: u16,
}

/// Where a description lies, and whether the peer still has to be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot {
    pub(crate) number: u16,
    pub(crate) is_new: bool,
}

impl SentSchemas {
    /// Finds `bytes`, or puts them in the place of the oldest description.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> Slot {
        let hash = crc32fast::hash(bytes);
        let is_it = |(other, kept): &(u32, Vec<u8>)| *other == hash && kept == bytes;
        if self.slots.get(usize::from(self.recent)).is_some_and(is_it) {
            return Slot { number: self.recent, is_new: false };
        }
        if let Some(at) = self.slots.iter().position(is_it) {
            self.recent = at as u16;
            return Slot { number: self.recent, is_new: false };
        }
        if self.slots.len() < usize::from(SCHEMA_SLOTS) {
            self.recent = self.slots.len() as u16;
            self.slots.push((hash, bytes.to_vec()));
        } else {
            self.recent = self.victim;
            self.victim = (self.victim + 1) % SCHEMA_SLOTS;
            let (old_hash, old) = &mut self.slots[usize::from(self.recent)];
            *old_hash = hash;
            old.clear();
            old.extend_from_slice(bytes);
        }
        Slot { number: self.recent, is_new: true }
    }

    /// Takes back the last `place` of a message that never left.
    pub(crate) fn forget(&mut self, slot: Slot) {
        if let (true, Some((hash, kept))) = (slot.is_new, self.slots.get_mut(usize::from(slot.number))) {
            // No description is empty (it has a count), so this one matches nothing.
            *hash = 0;
            kept.clear();
        }
    }
}

/// The receiver's half of the cache.
#[derive(Default)]
pub(crate) struct ReceivedSchemas(Vec<Option<Arc<Schema>>>);

impl ReceivedSchemas {
    /// Keeps a description under the sender's slot number.
    pub(crate) fn keep(&mut self, slot: u16, schema: Arc<Schema>) -> bool {
        let at = usize::from(slot);
        if slot >= SCHEMA_SLOTS {
            return false;
        }
        if self.0.len() <= at {
            self.0.resize(at + 1, None);
        }
        self.0[at] = Some(schema);
        true
    }

    /// The description in a slot.
    pub(crate) fn get(&self, slot: u16) -> Option<Arc<Schema>> {
        self.0.get(usize::from(slot))?.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayless_proto::ids::GroupId;

    const LINK: LinkName = LinkName { group: GroupId([7; 8]), from: 0, to: 1, channel: 0 };
    const LIMITS: PeerLimits = PeerLimits { dtypes: DTypeSet::ALL, max_message: 1 << 30 };

    fn encoded(specs: &[TensorSpec<'_>], extra: &[u8]) -> Result<(u64, Vec<u8>), Rejected> {
        let mut out = Vec::new();
        let total = encode(LINK, LIMITS, specs.iter().map(|s| (*s, None)), extra, &mut out)?;
        Ok((total, out))
    }

    #[test]
    fn a_description_reads_back_as_it_was_written() {
        let specs = [
            TensorSpec { name: "hidden_states", dtype: DType::BF16, shape: &[3, 7168], strides: Some(&[7168, 1]) },
            TensorSpec { name: "", dtype: DType::I64, shape: &[], strides: None },
            TensorSpec { name: "leer", dtype: DType::F32, shape: &[0, 1 << 63, 4], strides: None },
        ];
        let (total, bytes) = encoded(&specs, b"pickle").unwrap();
        assert_eq!(total, 3 * 7168 * 2 + 8);
        let schema = Schema::decode(&bytes).unwrap();
        assert_eq!(schema.payload_bytes(), total);
        assert_eq!(schema.extra, b"pickle");
        assert_eq!(schema.tensors[0].shape, [3, 7168]);
        assert_eq!(schema.tensors[2].bytes, 0);
        for cut in 0..bytes.len() - b"pickle".len() {
            assert_eq!(Schema::decode(&bytes[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn contiguity_looks_only_at_strides_that_matter() {
        assert!(is_contiguous(&[4, 1, 3], &[3, 999, 1]));
        assert!(is_contiguous(&[0, 5], &[7, 7]));
        assert!(is_contiguous(&[], &[]));
        assert!(!is_contiguous(&[3, 4], &[1, 3]));
        assert!(!is_contiguous(&[3, 4], &[8, 1]));
        assert!(!is_contiguous(&[3], &[-1]));
        assert!(!is_contiguous(&[3, 4], &[1]));
    }

    #[test]
    fn bad_messages_are_refused_with_the_value() {
        let strided = TensorSpec { name: "x", dtype: DType::F32, shape: &[2, 3], strides: Some(&[1, 2]) };
        let error = encoded(&[strided], b"").unwrap_err();
        assert_eq!(error.kind, RejectedKind::NotContiguous);
        assert_eq!(
            error.to_string(),
            "link 0->1.0 of group 07070707: tensor `x` of shape [2, 3] is not contiguous (strides [1, 2])"
        );
        let huge = TensorSpec { name: "x", dtype: DType::F32, shape: &[u64::MAX, 2], strides: None };
        assert_eq!(encoded(&[huge], b"").unwrap_err().kind, RejectedKind::TooLarge);
        assert_eq!(encoded(&[], &[0; MAX_SCHEMA]).unwrap_err().kind, RejectedKind::TooLarge);
        let spec = TensorSpec { name: "x", dtype: DType::F32, shape: &[2], strides: None };
        let only = PeerLimits { dtypes: DTypeSet::of(&[DType::BF16]), ..LIMITS };
        let error = encode(LINK, only, [(spec, None)].into_iter(), b"", &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind, RejectedKind::DType);
        let error = encode(LINK, LIMITS, [(spec, Some(7))].into_iter(), b"", &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind, RejectedKind::Mismatch);
    }

    #[test]
    fn both_halves_of_the_cache_agree_after_many_evictions() {
        let (mut sent, mut received) = (SentSchemas::default(), ReceivedSchemas::default());
        for round in 0..1000u64 {
            let dims = [round * round % 97, 4];
            let spec = TensorSpec { name: "x", dtype: DType::F32, shape: &dims, strides: None };
            let (_, bytes) = encoded(&[spec], b"").unwrap();
            let slot = sent.place(&bytes);
            if round % 5 == 0 {
                sent.forget(slot);
                continue;
            }
            if slot.is_new {
                assert!(received.keep(slot.number, Arc::new(Schema::decode(&bytes).unwrap())));
            }
            assert_eq!(received.get(slot.number).unwrap().tensors[0].shape, dims);
        }
    }
}
