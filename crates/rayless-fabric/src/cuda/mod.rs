//! The GPU hop: messages whose tensors lie in device memory, on any link, with the waiting left to the streams.
//!
//! The header of such a message leaves when it is sent; the payload follows when the GPU has computed it. The receiver waits for
//! the header only. Its stream waits for the payload, by itself, through words in pinned memory. Read in this order:
//!
//! 1. [`CudaSender::isend`] and [`CudaReceiver::recv`]: the calls, in front of a [`SendQueue`](crate::SendQueue) and a [`RecvQueue`](crate::RecvQueue).
//! 2. `ring`: slots with two words each, which streams and threads fill and drain. All of the ordering is there.
//! 3. The two ways, chosen per message and said in its header:
//!    - **slots** ([`DevicePath::Slots`](crate::DevicePath)): on one host, device memory of the sender that the receiver maps by CUDA IPC (peers may be different
//!      GPUs with peer access). The sender's stream copies in, the receiver's stream copies out; no host is on the path.
//!    - **staged** ([`DevicePath::Chunks`](crate::DevicePath)): pinned memory at both ends, over whatever transport the link has, in chunks that overlap: while one
//!      is copied off the GPU, the one before is on the wire, and the one before that on its way into the other GPU.
//! 4. `device`, `load`, `ffi`: the driver library, loaded when first needed. Nothing of CUDA is needed to build, or to run without a GPU. The
//!    only CUDA calls of rayless are here.
//!
//! # What holds
//! - A value is never read before it has arrived: what waits for a payload that will not come keeps waiting. Only closing the receiving
//!   end ends such a wait, and what the stream then reads is all ones (not a number), not an older message.
//! - A tensor is held (`keep`) until the stream is done with it.
//! - The link's threads make no CUDA calls where streams can wait for words: they look at words and move bytes, so a host that sits in a
//!   synchronising call cannot block them. Where streams cannot, the host waits, and [`CudaReport::host_waits`] says so.
//! - Memory that a stream or the peer may still use is not freed: it is put aside, and freed once they are done.

mod device;
mod error;
mod ffi;
mod load;
mod page;
mod recv;
mod retired;
mod ring;
mod send;
#[cfg(test)]
mod tests;

pub use device::{Device, DeviceError, Stream, device_count};
pub use error::CudaError;
pub use load::LoadError;
pub(crate) use page::PAGE;
pub use recv::{CudaReceived, CudaReceiver};
pub use retired::put_aside;
pub use send::{CudaSender, CudaSent, DeviceTensor};

use crate::DevicePath;
use device::{Event, OwnStream};
use ring::{Ring, Uses};
use std::sync::Arc;

/// Up to here a payload is copied on the caller's own stream: waiting for a stream of ours and back costs more than the copy.
const ON_CALLERS_STREAM: u64 = 1 << 20;
/// A slot in device memory. Large enough that its copy costs more than the words around it; a link has eight.
const DEVICE_SLOT: usize = 2 << 20;

/// What a hop may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Slots in device memory, where both ends are on one host.
    pub slots: bool,
    /// Streams that wait for words, where the device has that.
    pub stream_operations: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { slots: true, stream_operations: true }
    }
}

/// How one end's payloads have travelled so far.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct CudaReport {
    /// The way of the last one.
    pub path: Option<DevicePath>,
    /// Messages by each way.
    pub through_slots: u64,
    /// Messages by each way.
    pub staged: u64,
    /// Why slots are not used, where that is known; one line.
    pub no_slots: Option<String>,
    /// The host waits for payloads, because the device's streams cannot.
    pub host_waits: bool,
}

impl CudaReport {
    fn count(&mut self, path: DevicePath) {
        self.path = Some(path);
        match path {
            DevicePath::Slots => self.through_slots += 1,
            DevicePath::Chunks => self.staged += 1,
        }
    }
}

/// A ring with what one end needs to use it.
struct Lane {
    ring: Arc<Ring>,
    /// For payloads that are too large for the caller's stream.
    side: OwnStream,
    /// The next chunk's number.
    next: u32,
    uses: Uses,
    /// For each slot, the last copy out of or into it: where streams cannot write words.
    copies: Vec<Arc<Event>>,
}

impl Lane {
    fn new(ring: Ring, stream_operations: bool) -> Result<Self, CudaError> {
        let side = OwnStream::new(&ring.device)?;
        let count = if stream_operations { 0 } else { ring::SLOTS };
        let copies = (0..count).map(|_| Event::new(&ring.device).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self { ring: Arc::new(ring), side, next: 0, uses: Uses::default(), copies })
    }

    /// The stream to use: ours, after what the caller's has so far, or the caller's own.
    fn stream(&self, callers: Stream, on_callers: bool) -> Result<Stream, CudaError> {
        if on_callers {
            return Ok(callers);
        }
        Event::after(&self.ring.device, callers)?.hold(self.side.stream)?;
        Ok(self.side.stream)
    }
}

/// A ring in pinned memory of this process, for staging.
fn staging_ring(device: &Arc<Device>) -> Result<Ring, CudaError> {
    let page = device::Pinned::allocate(device, PAGE)?;
    let memory = device::Pinned::allocate(device, crate::CHUNK * ring::SLOTS as usize)?;
    // SAFETY: a fresh zeroed page; slots of the size allocated.
    Ok(unsafe { Ring::new(device, page, 0, ring::Slots::Host(memory), crate::CHUNK) })
}
