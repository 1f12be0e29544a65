//! How each transport under test makes a pair of ends, in one process or across two.

use rayless_fabric::{Acceptor, EstablishError, Level, LinkConfig, LinkName, RecvLink, SendLink, Ticket, Wait};
use rayless_proto::ids::GroupId;
use std::{
    io,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

/// Far longer than anything here takes: a test that hangs fails instead.
pub(crate) const LONG: Duration = Duration::from_secs(120);

pub(crate) fn long() -> Wait<'static> {
    Wait::at_most(LONG)
}

pub(crate) const TICKET: Ticket = Ticket([0x5a; 32]);

/// A name that no other link of this process has.
pub(crate) fn fresh_name() -> LinkName {
    static CHANNEL: AtomicU16 = AtomicU16::new(0);
    LinkName { group: GroupId([0xab; 8]), from: 0, to: 1, channel: CHANNEL.fetch_add(1, Ordering::Relaxed) }
}

/// A transport under test.
pub(crate) trait Fixture: 'static {
    const LEVEL: Level;
    /// Whether what a sender has sent arrives although its process was killed right after. (The kernel goes on
    /// sending from a socket's buffer; a queue pair dies with its process.)
    const OUTLIVES_ITS_SENDER: bool = true;
    /// Small messages of the order test; fewer where each takes the emulated guest a millisecond.
    const SMALL_MESSAGES: u64 = 10_000;
    /// Where the accepting end listens; unique to the test.
    type Listener: Send + 'static;

    fn listen() -> Self::Listener;
    /// What the connecting end, perhaps another process, needs to find it.
    fn address(listener: &Self::Listener) -> String;
    fn connect(address: &str, name: LinkName, ticket: Ticket, config: &LinkConfig) -> Result<SendLink, EstablishError>;
    /// Takes what one `connect` brings and hands it to the acceptor.
    fn accept(listener: &Self::Listener, acceptor: &mut Acceptor) -> Result<RecvLink, EstablishError>;
    /// Connects and says something that is no greeting; gives what the acceptor's side makes of it.
    fn nonsense(listener: &Self::Listener) -> io::Result<String>;

    /// Both ends of one link in this process.
    fn pair_with(sender: &LinkConfig, receiver: &LinkConfig) -> (SendLink, RecvLink) {
        let (sent, received) = Self::try_pair(fresh_name(), TICKET, sender, receiver);
        (sent.unwrap(), received.unwrap())
    }

    fn pair() -> (SendLink, RecvLink) {
        Self::pair_with(&LinkConfig::default(), &LinkConfig::default())
    }

    fn try_pair(
        name: LinkName,
        offered: Ticket,
        sender: &LinkConfig,
        receiver: &LinkConfig,
    ) -> (Result<SendLink, EstablishError>, Result<RecvLink, EstablishError>) {
        let listener = Self::listen();
        let address = Self::address(&listener);
        std::thread::scope(|scope| {
            let connecting = scope.spawn(|| Self::connect(&address, name, offered, sender));
            let mut acceptor = Acceptor::default();
            acceptor.expect(name, TICKET, receiver.clone());
            let received = Self::accept(&listener, &mut acceptor);
            assert_eq!(acceptor.pending(), usize::from(received.is_err()), "a refused link stays expected");
            (connecting.join().unwrap(), received)
        })
    }
}
