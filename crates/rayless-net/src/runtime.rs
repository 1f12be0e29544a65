//! What QUIC runs on: tokio, with timers that leave nothing behind.
//!
//! A tokio timer that is put off wakes the thread at its old time too. QUIC puts its loss timer off with every
//! acknowledgement, so that would be one wake for nothing per heartbeat, the larger part of the cost at rest.

use crate::os;
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use rustix::{
    fd::OwnedFd,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};
use tokio::{
    io::unix::AsyncFd,
    time::{Sleep, sleep_until},
};

/// Tokio for QUIC.
#[derive(Debug)]
pub(crate) struct QuietRuntime;

impl Runtime for QuietRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(Timer(Box::pin(sleep_until(at.into()))))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }
}

#[derive(Debug)]
struct Timer(Pin<Box<Sleep>>);

impl AsyncTimer for Timer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        // A new one in place of the old, which is taken off the wheel by its drop.
        self.0.set(sleep_until(at.into()));
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        Future::poll(self.0.as_mut(), context)
    }
}

/// A timer of the kernel's for the one tick that never ends: tokio's wheel wakes the thread twice for half a second.
#[derive(Debug)]
pub(crate) struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    pub(crate) fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        os::register_timer(timer).map(Self)
    }

    /// Sleeps until `at`.
    pub(crate) async fn until(&self, at: Instant) -> io::Result<()> {
        let left = at.saturating_duration_since(Instant::now());
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Zero would switch it off.
        let nanoseconds = i64::from(left.subsec_nanos()).max(1);
        let value = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: nanoseconds };
        let timer = Itimerspec { it_interval: zero, it_value: value };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &timer)?;
        loop {
            let mut ready = self.0.readable().await?;
            let read = ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut [0; 8])?));
            match read {
                Ok(outcome) => return outcome.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn an_alarm_goes_off_not_before_its_time_and_more_than_once() {
        let alarm = Alarm::new().unwrap();
        for wait in [0, 20, 1] {
            let at = Instant::now() + Duration::from_millis(wait);
            alarm.until(at).await.unwrap();
            assert!(Instant::now() >= at);
        }
    }

    #[tokio::test]
    async fn a_timer_can_be_put_off_and_brought_forward() {
        let start = Instant::now();
        let mut timer = QuietRuntime.new_timer(start + Duration::from_secs(3600));
        let soon = start + Duration::from_millis(5);
        timer.as_mut().reset(soon);
        std::future::poll_fn(|context| timer.as_mut().poll(context)).await;
        assert!(Instant::now() >= soon);
    }
}
