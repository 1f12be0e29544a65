//! Sessions between real sockets on this host's loopback interface.

#[cfg(test)]
mod link;
#[cfg(test)]
mod net_thread;
#[cfg(test)]
mod quic;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tcp;
