//! A real transfer over a new link, before it is relied on: a device that looks right but drops large packets (an
//! MTU that does not fit, a switch in between) is found at launch and named, not in the middle of a step.

use crate::{
    dtype::DType,
    error::{LostKind, RecvError, SendError},
    recv::RecvLink,
    send::SendLink,
    tensor::{Extra, TensorRef, TensorSpec},
    wait::Wait,
};

/// The step that the proof claims to be.
const STEP: u64 = u64::MAX;
/// Sizes: within one packet, over one packet of any MTU, and over one slot or stripe of any transport.
const SIZES: [usize; 3] = [64, 28 << 10, (1 << 20) + 1];

/// Bytes that no run of zeros, and no shifted copy of themselves, looks like.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

impl SendLink {
    /// The sender's half of the proof.
    pub fn prove(&mut self, wait: &Wait<'_>) -> Result<(), SendError> {
        for len in SIZES {
            let (data, shape) = (pattern(len), [len as u64]);
            let spec = TensorSpec { name: "proof", dtype: DType::U8, shape: &shape, strides: None };
            self.send(&[TensorRef { spec, data: &data }], Extra { tag: STEP, bytes: &[] }, wait)?;
        }
        Ok(())
    }
}

impl RecvLink {
    /// The receiver's half: every byte is compared.
    pub fn prove(&mut self, wait: &Wait<'_>) -> Result<(), RecvError> {
        for len in SIZES {
            let (_, tensors) = self.recv(Some(STEP), wait)?;
            let expected = pattern(len);
            let same = tensors.first().is_some_and(|data| *data == expected);
            if !same {
                let cause = format!("the proof's message of {len} bytes came with other bytes");
                return Err(self.abandon(LostKind::Corrupt, cause));
            }
        }
        Ok(())
    }
}
