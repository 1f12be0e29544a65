//! Messages whose every byte is known from their number.

use rayless_fabric::{Announced, DType, Extra, SendError, SendLink, TensorRef, TensorSpec, Wait};

/// Bytes that differ by message, tensor and position, cheap enough for 256 MiB in a debug build.
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    // A prime period, so that no misplaced block looks like its neighbour.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let period: Vec<u8> = (0..8191)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect();
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        out.extend_from_slice(&period[..period.len().min(len - out.len())]);
    }
    out
}

/// A tensor of bytes.
pub(crate) fn flat<'a>(name: &'a str, shape: &'a [u64; 1], data: &'a [u8]) -> TensorRef<'a> {
    TensorRef { spec: TensorSpec { name, dtype: DType::U8, shape, strides: None }, data }
}

/// Sends message `number` of one tensor of `len` bytes; its step is its number.
pub(crate) fn send_flat(link: &mut SendLink, number: u64, len: usize, wait: &Wait<'_>) -> Result<(), SendError> {
    let data = bytes(number, len);
    link.send(&[flat("x", &[len as u64], &data)], Extra { tag: number, bytes: &[] }, wait)
}

/// Checks a received message made by `send_flat`.
pub(crate) fn check_flat(announced: &Announced, tensors: &[Vec<u8>], number: u64, len: usize) {
    assert_eq!((announced.sequence, announced.tag), (number, number));
    assert_eq!(announced.schema.tensors[0].shape, [len as u64]);
    assert!(tensors[0] == bytes(number, len), "message {number} of {len} bytes");
}
