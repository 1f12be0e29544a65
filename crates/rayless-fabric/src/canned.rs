//! For tests: a stream that was written beforehand.

use crate::{
    error::TransportError,
    scatter::ScatterMut,
    transport::{Counters, End, Inbound, Level},
    wait::Wake,
};
use std::{sync::Arc, time::Duration};

/// A transport whose sender wrote these bytes and left.
pub(crate) struct Canned {
    bytes: Vec<u8>,
    at: usize,
}

struct Nobody;
impl Wake for Nobody {
    fn wake(&self) {}
}

impl Canned {
    pub(crate) const fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0 }
    }

    fn take(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.bytes.len() - self.at);
        out[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        n
    }
}

impl End for Canned {
    fn level(&self) -> Level {
        Level::Tcp
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(Nobody)
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }
}

impl Inbound for Canned {
    fn read_head(&mut self, head: &mut [u8], filled: &mut usize) -> Result<bool, TransportError> {
        *filled += self.take(&mut head[*filled..]);
        Ok(*filled == head.len())
    }

    fn read_body(&mut self, body: &mut ScatterMut<'_, '_>, filled: &mut u64) -> Result<bool, TransportError> {
        let (from, len) = (*filled, body.len());
        body.walk(from, len - from, |slice| {
            let took = self.take(slice);
            *filled += took as u64;
            took == slice.len()
        });
        Ok(*filled == len)
    }

    fn wait(&mut self, _: Duration) -> Result<(), TransportError> {
        Err(TransportError::gone("no more bytes"))
    }

    fn close(&mut self, _: &str) {}
}
