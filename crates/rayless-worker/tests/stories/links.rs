//! Links between workers: which transport they get, and what becomes of those that cannot be.

use crate::{
    Story,
    world::{World, all, texts},
};
use rayless_fabric::{DType, Extra, TensorRef, TensorSpec, Wait};
use rayless_worker::host::Worker;
use std::time::Duration;

pub(crate) const STORIES: &[Story] = &[
    ("ranks of one host are linked by shared memory", one_host),
    ("ranks of two hosts without RDMA are linked by TCP", two_hosts),
];

const LONG: Duration = Duration::from_secs(20);

/// The worker's part of `link FROM TO CHANNEL MESSAGES`: the sender sends so many messages, the receiver compares every byte. Both tell
/// what moved them.
pub(crate) fn at_worker(worker: &Worker, text: &str) -> Result<String, String> {
    let numbers: Vec<u32> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
    let &[from, to, channel, messages] = &numbers[..] else { return Err(format!("not a link: {text}")) };
    let channel = channel as u16;
    if worker.rank() == from {
        let mut link = worker.links().send_link(to, channel, LONG).map_err(|error| error.to_string())?;
        for message in 0..messages {
            let data = bytes(message);
            let shape = [data.len() as u64];
            let spec = TensorSpec { name: "t", dtype: DType::U8, shape: &shape, strides: None };
            let extra = Extra { tag: message.into(), bytes: &[] };
            link.send(&[TensorRef { spec, data: &data }], extra, &Wait::at_most(LONG)).map_err(|e| e.to_string())?;
        }
        return Ok(format!("sent by {}", link.level()));
    }
    if worker.rank() == to {
        let mut link = worker.links().recv_link(from, channel, LONG).map_err(|error| error.to_string())?;
        for message in 0..messages {
            let (_, tensors) = link.recv(Some(message.into()), &Wait::at_most(LONG)).map_err(|e| e.to_string())?;
            if tensors != [bytes(message)] {
                return Err(format!("message {message} came with other bytes"));
            }
        }
        return Ok(format!("received by {}", link.level()));
    }
    Ok(String::new())
}

/// From none to over what is spread over all streams.
fn bytes(message: u32) -> Vec<u8> {
    let length = [0, 1, 14 << 10, 3 << 20][message as usize % 4];
    (0..length).map(|at| (at as u32).wrapping_mul(2_654_435_761).wrapping_add(message) as u8).collect()
}

fn one_host() {
    let world = World::new(2, 0);
    let group = world.start();
    assert_eq!(texts(&all(&group, "link 0 1 0 8").unwrap()), ["sent by shm", "received by shm"]);
    // The same again once it is closed, and the other way round on another channel.
    assert_eq!(texts(&all(&group, "link 0 1 0 1").unwrap()), ["sent by shm", "received by shm"]);
    assert_eq!(texts(&all(&group, "link 1 0 7 4").unwrap()), ["received by shm", "sent by shm"]);
}

fn two_hosts() {
    let world = World::new(1, 2);
    let group = world.start();
    assert_eq!(texts(&all(&group, "link 0 2 0 8").unwrap()), ["sent by tcp", "", "received by tcp"]);
    assert_eq!(texts(&all(&group, "link 1 2 0 8").unwrap()), ["", "sent by shm", "received by shm"]);
    assert_eq!(texts(&all(&group, "link 2 0 1 4").unwrap()), ["received by tcp", "", "sent by tcp"]);
}
