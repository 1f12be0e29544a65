//! Times of calls, for work on this crate: no-op calls of 2 KiB over loopback. The figures to publish come from `benches/`.

use crate::world::World;
use hdrhistogram::Histogram;
use rayless_worker::driver::{Asked, WorkerGroup};
use std::time::{Duration, Instant};

/// `bench [LOCAL REMOTE]`
pub(crate) fn main(arguments: &[String]) {
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse().ok());
    let shapes = match (number(0), number(1)) {
        (Some(local), Some(remote)) => vec![(local, remote)],
        _ => vec![(2, 0), (1, 1), (8, 0), (8, 8)],
    };
    for (local, remote) in shapes {
        let world = World::new(local, remote);
        let group = world.start();
        let payload = [b"x ".to_vec(), vec![0; 2046]].concat();
        let last = local + remote - 1;
        for (name, asked) in [("all", Asked::All), ("one", Asked::Ranks(vec![last]))] {
            for (pace, gap, count) in [("b2b", Duration::ZERO, 3000), ("gap", Duration::from_millis(2), 400)] {
                let times = measure(&group, &payload, &asked, gap, count);
                println!(
                    "{local}+{remote} asked {name} {pace}: p50 {} p99 {} µs",
                    times.value_at_quantile(0.5),
                    times.value_at_quantile(0.99)
                );
            }
        }
    }
}

fn measure(group: &WorkerGroup, payload: &[u8], asked: &Asked, gap: Duration, count: u32) -> Histogram<u64> {
    let mut times = Histogram::new(3).unwrap();
    for i in 0..count + 100 {
        if !gap.is_zero() {
            std::thread::sleep(gap);
        }
        let start = Instant::now();
        group.call(payload, asked, None).unwrap().wait().unwrap();
        if i >= 100 {
            times.record(start.elapsed().as_micros() as u64).unwrap();
        }
    }
    times
}
