//! A small, safe layer over libibverbs and librdmacm, which are loaded when first used: a program with this
//! crate in it builds, starts and runs on machines that have neither.
//!
//! Only what RoCE, iWARP and eRDMA share: reliable connections by rdma_cm, SEND/RECV, WRITE, READ, one completion queue
//! with an event channel, plain memory registration. No `_ex` call, no immediate data, no shared receive queue.
//!
//! 1. [`devices`]: what is there, from sysfs. [`preflight`]: the ways out, and what keeps them from working, by name.
//! 2. [`Listener`], [`Endpoint::to`], [`Endpoint::for_request`]: from an address or a request to a prepared endpoint.
//! 3. [`Endpoint`]: memory, RECVs, then `connect`/`accept`, then work and completions.
//!
//! Work refers to registered regions by number and range, each checked; regions live as long as their endpoint and are
//! freed after its queue pair. So no device touches memory that was given back, and no code outside this crate is
//! unsafe for the sake of RDMA (but for memory of somebody else's, [`Endpoint::register`]).

mod cm;
mod device;
mod endpoint;
mod error;
mod ffi;
mod load;
mod preflight;
mod reach;
mod region;

pub use cm::{Listener, MAX_PRIVATE, Request};
pub use device::{Device, Gid, Kind, PciPlace, Port, devices, nearest, pci_distance};
pub use endpoint::{
    Completion, Connected, Endpoint, MAX_BATCH, Operation, Posted, Prepared, Range, RegionId, Remote, Sizes, Work,
    is_connection_error,
};
pub use error::VerbsError;
pub use load::{LoadError, available};
pub use preflight::{ErdmaMode, Finding, Preflight, erdma_mode, preflight};
pub use reach::{Protocol, Reach, interfaces, reaches};
pub use region::Access;
