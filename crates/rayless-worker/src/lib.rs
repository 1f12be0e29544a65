//! Groups of workers: the processes, the ring they read from, and the driver that calls them.
//!
//! Who runs what:
//!
//! | process | module |
//! |---|---|
//! | keeper (one per group and host, started by the node daemon) | [`keeper`] |
//! | worker (one per rank, child of the keeper) | [`host`] |
//! | driver (whoever starts a group) | [`driver`], and [`client`] to its local daemon |
//!
//! A step, down and up: [`driver::WorkerGroup::call`] writes the payload once to the [`ring`] of its own host and one
//! frame to each other host's keeper, which writes it to its ring without looking inside. Each worker takes every
//! call in order ([`host::Worker::next_call`]); the asked ranks answer through a reply ring of their own, and the last
//! of them wakes the collector: the driver on its own host, the keeper elsewhere.
//!
//! Workers send tensors to each other over [`links`], of which each is agreed on by its two ends.
//!
//! This crate exists for shared memory and child processes, so it holds unsafe code: in `ring::map` (mapped memory),
//! `keeper::child` (what runs between fork and exec), `robust` (a mutex of libc's) and `retries` (a socket option), nowhere else.

pub mod client;
pub mod driver;
mod event;
pub mod host;
pub mod keeper;
pub mod links;
mod proc;
mod retries;
pub mod ring;
mod robust;
mod session;
mod spin;
pub mod stopped;
