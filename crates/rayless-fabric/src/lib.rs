//! The data path: tensor dicts from one worker to another, one way, in order.
//!
//! A [`SendLink`] in one process and a [`RecvLink`] in another make a link. Read in this order:
//!
//! 1. [`LinkName`], [`Ticket`], [`LinkConfig`]: what a link is called, what opens it, how it behaves.
//! 2. [`TensorRef`], [`Schema`], [`DType`]: what a message is. Its description crosses the link once and is cached.
//! 3. [`SendLink`] and [`RecvLink`]: the calls. [`Wait`] and [`Cancel`] bound them. Only [`SendQueue`] has a thread of its own, and [`shm`] one per process: it watches for peers that die.
//! 4. [`SendError`], [`RecvError`]: what is still usable after what.
//! 5. [`transport`]: what moves the bytes, in ordered [`Level`]s: [`shm`], [`rdma`], [`tcp`]. [`select`] picks one and keeps the reasons.
//! 6. [`SendLink::prove`], [`RecvLink::prove`]: a real transfer before a link is relied on.
//! 7. [`Acceptor`]: how the receiving end of each is opened.
//!
//! # What holds
//! - Messages arrive whole, in order and once, or the link is lost. Each header carries its sequence number, and the caller's
//!   step: two ends at different ones are an error, never wrong tensors.
//! - A caller's mistake is found before a byte moves, and costs nothing but the call.
//! - A call that was stopped before its first byte moved can be made again. One that was stopped in the middle
//!   loses the link, at both ends, with one cause.
//! - In the steady state no call allocates (up to 16 tensors a message).
//!
//! # After an error
//! | error | link |
//! |---|---|
//! | `Rejected`, `Stopped` | usable; nothing moved |
//! | `Closed` | ended in order; nothing was lost |
//! | `Lost` | lost for good; every later call returns the same cause |

mod accept;
mod backoff;
#[cfg(any(test, fuzzing))]
mod canned;
mod config;
pub mod cuda;
mod dtype;
mod error;
mod fork;
#[cfg(fuzzing)]
pub mod fuzzed;
mod greeting;
mod header;
mod name;
mod probe;
mod prove;
mod queue;
pub mod rdma;
mod recv;
mod recv_queue;
mod scatter;
pub mod select;
mod send;
pub mod shm;
pub mod spin;
pub mod tcp;
mod tensor;
pub mod transport;
mod wait;
mod wake;

pub use accept::{Acceptor, GreetError, Greeted, greet_rdma, greet_tcp, greet_tls, greet_unix};
pub use config::LinkConfig;
pub use dtype::{DType, DTypeSet, UnknownDType};
pub use error::{EstablishError, Lost, LostKind, RecvError, Rejected, RejectedKind, SendError, TransportError};
pub use greeting::MAX_STREAMS;
pub use header::DevicePath;
pub use name::{LinkName, Ticket};
pub use probe::{Phase, Probe};
pub use queue::{DevicePayload, OwnedTensor, SendHandle, SendQueue, Source};
pub use recv::{Announced, RecvLink};
pub use recv_queue::{RecvQueue, Sink};
pub use scatter::{Scatter, ScatterMut};
pub use send::{CHUNK, SendLink};
pub use tensor::{Extra, MAX_SCHEMA, Schema, TensorMeta, TensorRef, TensorSpec};
pub use transport::Level;
pub use wait::{Cancel, Stop, Wait, Wake};
