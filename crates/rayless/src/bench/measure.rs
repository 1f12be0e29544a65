//! What is measured: hops (half of a round trip over both links) and a stream of messages one way.

use super::{control::Control, open::Links};
use crate::message::Failure;
use hdrhistogram::Histogram;
use rayless_fabric::{DType, Extra, RecvLink, SendLink, TensorRef, TensorSpec, Wait};
use std::time::{Duration, Instant};

/// The longest round trip that a histogram tells apart.
const LONGEST: Duration = Duration::from_secs(600);
/// Rounds at least, however long they take.
const FEWEST: u64 = 5;
/// Rounds before those that count, or a tenth of the time.
const WARM_UP: u64 = 200;
/// Messages at least in a stream.
const STREAM: u64 = 4;
/// Steps that the two sides agree on: go on, or this was the last.
const MORE: u64 = 0;
const LAST: u64 = 1;

/// One size of one transport.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) bytes: u64,
    /// Hops measured.
    pub(super) hops: u64,
    /// Of one hop, in microseconds.
    pub(super) latency: Latency,
    /// One way, in 10^9 bytes per second.
    pub(super) gigabytes_per_s: f64,
    /// Messages of that.
    pub(super) messages: u64,
}

/// Microseconds of a hop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Latency {
    pub(super) min: f64,
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

/// The driving side.
pub(super) fn point(control: &mut Control, links: &mut Links, bytes: u64, time: Duration) -> Result<Point, Failure> {
    let mut buffer = vec![1u8; bytes as usize];
    control.say("latency")?;
    let (hops, latency) = latency(links, &mut buffer, time)?;
    control.say("bandwidth")?;
    let (messages, gigabytes_per_s) = bandwidth(links, &buffer, time)?;
    Ok(Point { bytes, hops, latency, gigabytes_per_s, messages })
}

fn latency(links: &mut Links, buffer: &mut [u8], time: Duration) -> Result<(u64, Latency), Failure> {
    let warm = Instant::now() + time / 10;
    let mut round = 0;
    while round < FEWEST.min(2) || (round < WARM_UP && Instant::now() < warm) {
        hop(links, buffer, MORE)?;
        round += 1;
    }
    // Nanoseconds of a round trip, in three digits.
    let mut times = Histogram::<u64>::new_with_bounds(1, LONGEST.as_nanos() as u64, 3).map_err(Failure::failed)?;
    let begin = Instant::now();
    loop {
        let is_last = times.len() + 1 >= FEWEST && begin.elapsed() >= time;
        let start = Instant::now();
        hop(links, buffer, if is_last { LAST } else { MORE })?;
        times.saturating_record(start.elapsed().as_nanos() as u64);
        if is_last {
            break;
        }
    }
    let us = |round_trip: f64| round_trip / 2.0 / 1000.0;
    let at = |quantile: f64| us(times.value_at_quantile(quantile) as f64);
    let latency = Latency {
        min: us(times.min() as f64),
        mean: us(times.mean()),
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        max: us(times.max() as f64),
    };
    Ok((times.len(), latency))
}

fn hop(links: &mut Links, buffer: &mut [u8], tag: u64) -> Result<(), Failure> {
    send(&mut links.tx, buffer, tag, links.stall)?;
    receive(&mut links.rx, buffer, links.stall).map(drop)
}

fn bandwidth(links: &mut Links, buffer: &[u8], time: Duration) -> Result<(u64, f64), Failure> {
    let begin = Instant::now();
    let mut sent = 0;
    loop {
        let is_last = sent + 1 >= STREAM && begin.elapsed() >= time;
        send(&mut links.tx, buffer, if is_last { LAST } else { MORE }, links.stall)?;
        sent += 1;
        if is_last {
            break;
        }
    }
    // The other side answers when it has the last.
    receive(&mut links.rx, &mut [], links.stall)?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok((sent, sent as f64 * buffer.len() as f64 / seconds / 1e9))
}

/// The other side of [`latency`]: every message comes back.
pub(super) fn echo(links: &mut Links) -> Result<(), Failure> {
    let mut buffer = Vec::new();
    loop {
        let tag = receive_any(&mut links.rx, &mut buffer, links.stall)?;
        send(&mut links.tx, &buffer, tag, links.stall)?;
        if tag == LAST {
            return Ok(());
        }
    }
}

/// The other side of [`bandwidth`]: only the last is answered.
pub(super) fn sink(links: &mut Links) -> Result<(), Failure> {
    let mut buffer = Vec::new();
    while receive_any(&mut links.rx, &mut buffer, links.stall)? != LAST {}
    send(&mut links.tx, &[], LAST, links.stall)
}

/// One dict of two tensors, as vLLM's stages send them.
fn send(link: &mut SendLink, data: &[u8], tag: u64, stall: Duration) -> Result<(), Failure> {
    let (one, other) = data.split_at(data.len() / 2);
    let shapes = [[one.len() as u64], [other.len() as u64]];
    let spec = |name, i: usize| TensorSpec { name, dtype: DType::U8, shape: &shapes[i], strides: None };
    let tensors =
        [TensorRef { spec: spec("hidden_states", 0), data: one }, TensorRef { spec: spec("residual", 1), data: other }];
    link.send(&tensors, Extra { tag, bytes: &[] }, &Wait::at_most(stall)).map_err(Failure::failed)
}

fn receive(link: &mut RecvLink, data: &mut [u8], stall: Duration) -> Result<u64, Failure> {
    let announced = link.recv_header(None, &Wait::at_most(stall)).map_err(Failure::failed)?;
    let (one, other) = data.split_at_mut(data.len() / 2);
    link.recv_payload(&mut [one, other], &Wait::at_most(stall)).map_err(Failure::failed)?;
    Ok(announced.tag)
}

fn receive_any(link: &mut RecvLink, buffer: &mut Vec<u8>, stall: Duration) -> Result<u64, Failure> {
    let announced = link.recv_header(None, &Wait::at_most(stall)).map_err(Failure::failed)?;
    buffer.resize(announced.schema.payload_bytes() as usize, 0);
    let (one, other) = buffer.split_at_mut(announced.schema.payload_bytes() as usize / 2);
    link.recv_payload(&mut [one, other], &Wait::at_most(stall)).map_err(Failure::failed)?;
    Ok(announced.tag)
}
