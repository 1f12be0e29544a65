//! Settings of every connection: little memory for strangers, nothing in the way of heartbeats.

use quinn::{AckFrequencyConfig, ConnectionId, IdleTimeout, TransportConfig, VarInt, congestion};
use rayless_proto::hello::Purpose;
use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

/// Bytes of stream data that a peer may send ahead of the reader, and that we keep until it has them.
const WINDOW: u32 = 256 << 10;
/// Bytes of datagrams that wait to be read or sent; the oldest go first.
const DATAGRAM_BUFFER: usize = 4 << 10;
/// Without a word from the peer for so long a connection is given up. Much longer than `--dead-after`: who is dead is decided
/// by those who watch heartbeats, and an observer that was itself paused must still have its connections.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// A control connection at rest says a word this often, for the idle time-out and for tables in between.
const KEEP_ALIVE: Duration = Duration::from_secs(25);
/// Round trip assumed before the first is measured; lost first packets are sent again after three of them.
const FIRST_RTT: Duration = Duration::from_millis(100);

/// Ids of connections. Quinn's own are signed with a key of the process, and packets with others are dropped: a daemon
/// started again could not tell the peers of its last life that it is no longer there.
pub(super) struct RandomIds;

impl quinn::ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; 8];
        // Without random numbers TLS would not have got this far; an id that is not one costs a connection, no more.
        let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// One configuration for all: small windows, no second stream, no search for larger packets (a path that drops them
/// would cost heartbeats, and nothing here is large).
pub(super) fn transport(calling_for: Option<Purpose>) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(u32::from(calling_for.is_none())))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER)
        .initial_rtt(FIRST_RTT)
        .mtu_discovery_config(None)
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok());
    if calling_for == Some(Purpose::Control) {
        config.keep_alive_interval(Some(KEEP_ALIVE));
    }
    if calling_for == Some(Purpose::Heartbeat) {
        // Every heartbeat is answered at once: the acknowledgement is the echo, and the head needs no timer for it.
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(0));
        config.ack_frequency_config(Some(acks)).congestion_controller_factory(Arc::new(FixedWindow));
    }
    config
}

/// Heartbeats are twenty packets of 60 bytes a second at the worst. A window that shrinks with loss would silence
/// them just when they matter.
#[derive(Debug, Clone, Copy)]
struct FixedWindow;

impl congestion::ControllerFactory for FixedWindow {
    fn build(self: Arc<Self>, _now: Instant, _mtu: u16) -> Box<dyn congestion::Controller> {
        Box::new(Self)
    }
}

impl congestion::Controller for FixedWindow {
    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, _is_persistent: bool, _lost_bytes: u64) {}

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        self.initial_window()
    }

    fn clone_box(&self) -> Box<dyn congestion::Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        64 << 10
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
