//! Who moves the bytes: a waiting caller, or else the pump.
//!
//! A step's time is mostly threads waking threads. So the thread that waits for a call takes the lead: it looks at replies and sessions by
//! itself (a short spin that gives the core away, then a sleep on the *hot* epoll set) until its call is done. Only one thread leads. While
//! nobody does, the hot set is armed, once, in the pump's own set, and the pump does the same work for calls that nobody waits for. The
//! pump also has the clock: pings, silence, timeouts.

use super::{
    GroupFailure,
    calls::{Outcome, Slot},
    core::{Core, End},
};
use crate::{
    event,
    ring::timespec,
    spin::{self, Spin},
};
use rayless_proto::limits::HEARTBEAT_PERIOD;
use rustix::event::epoll::{self, EventData, EventFlags};
use std::{
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// In the pump's set.
const HOT: u64 = 0;
const WAKE: u64 = 1;
const CLIENT: u64 = 2;
/// In the hot set, after all sessions: another thread decided something that the leader may wait for.
const NUDGE: u64 = u64::MAX - 1;

pub(super) struct Shared {
    state: Mutex<State>,
    /// For threads that wait while another leads, and for those that wait for the end.
    changed: Condvar,
    /// The same set as the core's.
    hot: OwnedFd,
    pump_set: OwnedFd,
    pump_wake: OwnedFd,
    nudge: OwnedFd,
}

pub(super) struct State {
    pub(super) core: Core,
    leading: bool,
    /// The hot set is armed in the pump's.
    armed: bool,
    waiters: usize,
    spin: Spin,
    /// When the pump looks again by itself.
    pump_until: Instant,
}

impl Shared {
    /// The group and its pump.
    pub(super) fn start(mut core: Core) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let pump_set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let pump_wake = event::create()?;
        let nudge = event::create()?;
        epoll::add(&core.hot, &nudge, EventData::new_u64(NUDGE), EventFlags::IN)?;
        epoll::add(&pump_set, &pump_wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        epoll::add(&pump_set, &core.hot, EventData::new_u64(HOT), EventFlags::IN | EventFlags::ONESHOT)?;
        // Those that were read together with the placement: the socket will not tell of them.
        core.take_verdicts();
        if let Some(client) = &core.client {
            epoll::add(&pump_set, client.fd(), EventData::new_u64(CLIENT), EventFlags::IN)?;
        }
        let hot = core.hot.try_clone()?;
        let spin = spin::among(core.local_workers() + 1);
        let state = State { core, leading: false, armed: true, waiters: 0, spin, pump_until: Instant::now() };
        let shared =
            Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), hot, pump_set, pump_wake, nudge });
        let pumped = Arc::clone(&shared);
        let pump = std::thread::Builder::new().name("rayless-pump".into()).spawn(move || pumped.pump())?;
        Ok((shared, pump))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock leaves a state half made that a panic could show.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `action` on the group, and wakes whoever waits for what it decided.
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut Core) -> T) -> T {
        let mut state = self.lock();
        let result = action(&mut state.core);
        self.tell(&mut state, false);
        if state.core.next_deadline().is_some_and(|at| at < state.pump_until) {
            self.wake_pump();
        }
        result
    }

    fn wake_pump(&self) {
        event::notify(&self.pump_wake);
    }

    /// Wakes the threads that wait, where something was decided.
    fn tell(&self, state: &mut State, by_leader: bool) {
        if !std::mem::take(&mut state.core.changed) {
            return;
        }
        if state.waiters > 0 {
            self.changed.notify_all();
        }
        if state.leading && !by_leader {
            event::notify(&self.nudge);
        }
        if state.core.over {
            self.wake_pump();
        }
    }

    /// The outcome of a call, once it is there.
    pub(super) fn wait(&self, slot: &Slot) -> Outcome {
        loop {
            if let Some(outcome) = slot.get() {
                return outcome.clone();
            }
            self.wait_until(slot, None);
        }
    }

    /// The same for at most `timeout`, or until a signal arrives.
    pub(super) fn wait_for(&self, slot: &Slot, timeout: Duration) -> Option<Outcome> {
        if slot.get().is_none() {
            self.wait_until(slot, Some(Instant::now() + timeout));
        }
        slot.get().cloned()
    }

    fn wait_until(&self, slot: &Slot, until: Option<Instant>) {
        let mut state = self.lock();
        while state.leading {
            if slot.get().is_some() || until.is_some_and(|until| Instant::now() >= until) {
                return;
            }
            state = self.sleep_on_condvar(state, until);
        }
        state.leading = true;
        if std::mem::take(&mut state.armed) {
            let _ = epoll::modify(&self.pump_set, &state.core.hot, EventData::new_u64(HOT), EventFlags::empty());
        }
        state.core.after_sleep();
        let mut state = self.lead(state, slot, until);
        state.leading = false;
        self.arm(&mut state);
        if state.waiters > 0 {
            // One of them leads from here.
            self.changed.notify_all();
        }
        if state.core.next_deadline().is_some_and(|at| at < state.pump_until) {
            self.wake_pump();
        }
    }

    fn sleep_on_condvar<'a>(&self, mut state: MutexGuard<'a, State>, until: Option<Instant>) -> MutexGuard<'a, State> {
        /// Only a bound: whoever decides something wakes those that wait.
        const LONG: Duration = Duration::from_secs(60);
        let left = until.map_or(LONG, |until| until.saturating_duration_since(Instant::now()).min(LONG));
        state.waiters += 1;
        let (mut state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        state.waiters -= 1;
        state
    }

    /// Receives until the call is done, `until` passes or a signal arrives.
    fn lead<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        slot: &Slot,
        until: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        let mut spinning = state.spin.begin();
        let mut spin = true;
        loop {
            let mut worked = state.core.collect();
            let now = Instant::now();
            state.core.expire(now);
            self.tell(&mut state, true);
            if slot.get().is_some() {
                return state;
            }
            if until.is_some_and(|until| now >= until) {
                return state;
            }
            let timeout = if spin || worked {
                Some(Duration::ZERO)
            } else {
                if state.core.before_sleep() {
                    state.core.after_sleep();
                    continue;
                }
                let next = state.core.next_deadline().into_iter().chain(until).min();
                next.map(|at| at.saturating_duration_since(now))
            };
            let mut events = [MaybeUninit::<epoll::Event>::uninit(); 16];
            let polled = if timeout == Some(Duration::ZERO) {
                epoll::wait(&self.hot, &mut events[..], Some(&timespec(Duration::ZERO)))
            } else {
                drop(state);
                let polled = epoll::wait(&self.hot, &mut events[..], timeout.map(timespec).as_ref());
                state = self.lock();
                state.core.after_sleep();
                polled
            };
            match polled {
                Ok((events, _)) => {
                    worked |= !events.is_empty();
                    self.take_events(&mut state, events);
                }
                // A signal: the caller may want to look at it, and comes back.
                Err(_) => return state,
            }
            if worked {
                spinning = state.spin.begin();
            }
            spin = state.spin.again(&mut spinning);
        }
    }

    fn take_events(&self, state: &mut State, events: &[epoll::Event]) {
        for event in events {
            match event.data.u64() {
                NUDGE => event::clear(&self.nudge),
                token => state.core.on_ready(token, event.flags),
            }
        }
    }

    /// Hands the hot set to the pump.
    fn arm(&self, state: &mut State) {
        while state.core.before_sleep() {}
        self.tell(state, true);
        if !std::mem::replace(&mut state.armed, true) {
            let flags = EventFlags::IN | EventFlags::ONESHOT;
            let _ = epoll::modify(&self.pump_set, &state.core.hot, EventData::new_u64(HOT), flags);
        }
    }

    fn pump(&self) {
        let mut tick = Instant::now() + HEARTBEAT_PERIOD;
        loop {
            let mut state = self.lock();
            let now = Instant::now();
            if now >= tick {
                tick = state.core.tick(now, tick);
            }
            state.core.expire(now);
            if !state.leading {
                self.arm(&mut state);
            }
            self.tell(&mut state, false);
            if state.core.over {
                state.core.close_callbacks();
                self.changed.notify_all();
                return;
            }
            state.pump_until = state.core.next_deadline().into_iter().chain([tick]).min().unwrap_or(tick);
            let timeout = state.pump_until.saturating_duration_since(now);
            drop(state);
            let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
            let Ok((events, _)) = epoll::wait(&self.pump_set, &mut events[..], Some(&timespec(timeout))) else {
                continue;
            };
            for event in events.iter() {
                match event.data.u64() {
                    HOT => self.pump_hot(),
                    WAKE => event::clear(&self.pump_wake),
                    _ => self.lock().core.take_verdicts(),
                }
            }
        }
    }

    fn pump_hot(&self) {
        let mut state = self.lock();
        if state.leading {
            return;
        }
        state.armed = false;
        state.core.after_sleep();
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 16];
        if let Ok((events, _)) = epoll::wait(&state.core.hot, &mut events[..], Some(&timespec(Duration::ZERO))) {
            self.take_events(&mut state, events);
        }
        self.tell(&mut state, false);
    }

    /// Waits for news of the start or the end, at most until `until`; whatever woke it, the caller looks again.
    pub(super) fn wait_change(&self, until: Instant, is_due: impl Fn(&Core) -> bool) {
        let mut state = self.lock();
        while !is_due(&state.core) && Instant::now() < until {
            state = self.sleep_on_condvar(state, Some(until));
        }
    }

    /// Waits for the failure of the group; `None` where it was stopped or the time is up.
    pub(super) fn wait_failed(&self, timeout: Option<Duration>) -> Option<GroupFailure> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = self.lock();
        loop {
            match &state.core.end {
                Some(End::Failed(failure)) => return Some(failure.clone()),
                Some(End::Stopped) => return None,
                None if until.is_some_and(|until| Instant::now() >= until) => return None,
                None => state = self.sleep_on_condvar(state, until),
            }
        }
    }
}
