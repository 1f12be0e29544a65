//! The transports under test.

use crate::fixture::Fixture;
use rayless_fabric::{
    Acceptor, EstablishError, Level, LinkConfig, LinkName, RecvLink, SendLink, Ticket, greet_rdma, greet_tcp,
    greet_tls, greet_unix, rdma, shm, tcp,
};
use rayless_net::{
    identity::{ClusterIdentity, NodeKey, TlsIdentity},
    link::{Channel, Patience},
    token::Token,
};
use std::{
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    sync::Mutex,
    time::{Duration, Instant},
};

const GREETING_TIME: Duration = Duration::from_secs(30);

/// TCP over loopback with a number of streams.
pub(crate) struct Tcp<const STREAMS: usize>;

impl<const STREAMS: usize> Fixture for Tcp<STREAMS> {
    const LEVEL: Level = Level::Tcp;
    type Listener = TcpListener;

    fn listen() -> TcpListener {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
    }

    fn address(listener: &TcpListener) -> String {
        listener.local_addr().unwrap().to_string()
    }

    fn connect(address: &str, name: LinkName, ticket: Ticket, config: &LinkConfig) -> Result<SendLink, EstablishError> {
        let streams = (0..STREAMS).map(|_| TcpStream::connect(address).unwrap()).collect();
        tcp::connect(streams, name, ticket, config)
    }

    fn accept(listener: &TcpListener, acceptor: &mut Acceptor) -> Result<RecvLink, EstablishError> {
        loop {
            let greeted = greet_tcp(listener.accept().unwrap().0, GREETING_TIME).unwrap();
            if let Some(link) = acceptor.admit(greeted)? {
                return Ok(link);
            }
        }
    }

    fn nonsense(listener: &TcpListener) -> io::Result<String> {
        let mut stream = TcpStream::connect(listener.local_addr()?)?;
        stream.write_all(&[b'x'; 200])?;
        Ok(greet_tcp(listener.accept()?.0, GREETING_TIME).unwrap_err().to_string())
    }
}

/// Shared memory.
pub(crate) struct Shm;

impl Fixture for Shm {
    const LEVEL: Level = Level::Shm;
    type Listener = (UnixListener, tempfile::TempDir);

    fn listen() -> Self::Listener {
        let dir = tempfile::tempdir().unwrap();
        (UnixListener::bind(dir.path().join("link.sock")).unwrap(), dir)
    }

    fn address((_, dir): &Self::Listener) -> String {
        dir.path().join("link.sock").to_str().unwrap().to_owned()
    }

    fn connect(address: &str, name: LinkName, ticket: Ticket, config: &LinkConfig) -> Result<SendLink, EstablishError> {
        shm::connect(UnixStream::connect(address).unwrap(), name, ticket, config)
    }

    fn accept((listener, _): &Self::Listener, acceptor: &mut Acceptor) -> Result<RecvLink, EstablishError> {
        let greeted = greet_unix(listener.accept().unwrap().0, GREETING_TIME).unwrap();
        acceptor.admit(greeted).map(|link| link.expect("one stream is all of it"))
    }

    fn nonsense((listener, dir): &Self::Listener) -> io::Result<String> {
        let mut stream = UnixStream::connect(dir.path().join("link.sock"))?;
        stream.write_all(&[b'x'; 200])?;
        Ok(greet_unix(listener.accept()?.0, GREETING_TIME).unwrap_err().to_string())
    }
}

/// Shared memory whose sender does not lend: two copies through the ring.
pub(crate) struct ShmRing;

impl Fixture for ShmRing {
    const LEVEL: Level = Level::Shm;
    type Listener = <Shm as Fixture>::Listener;

    fn listen() -> Self::Listener {
        Shm::listen()
    }

    fn address(listener: &Self::Listener) -> String {
        Shm::address(listener)
    }

    fn connect(address: &str, name: LinkName, ticket: Ticket, config: &LinkConfig) -> Result<SendLink, EstablishError> {
        Shm::connect(address, name, ticket, &LinkConfig { one_copy: false, ..config.clone() })
    }

    fn accept(listener: &Self::Listener, acceptor: &mut Acceptor) -> Result<RecvLink, EstablishError> {
        Shm::accept(listener, acceptor)
    }

    fn nonsense(listener: &Self::Listener) -> io::Result<String> {
        Shm::nonsense(listener)
    }
}

/// TCP over loopback within TLS.
pub(crate) struct Tls;

fn patient() -> Patience<'static> {
    Patience::new(Instant::now() + GREETING_TIME, &|| false)
}

/// A node of the cluster of `token`.
fn identity(token: &str) -> TlsIdentity {
    let key = NodeKey::generate().unwrap();
    ClusterIdentity::from_token(&token.parse::<Token>().unwrap(), &key).unwrap().tls().clone()
}

impl Fixture for Tls {
    const LEVEL: Level = Level::Tcp;
    /// The listener and the text of its cluster's token.
    type Listener = (TcpListener, String);

    fn listen() -> Self::Listener {
        (TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), Token::generate().unwrap().expose())
    }

    fn address((listener, token): &Self::Listener) -> String {
        format!("{} {token}", listener.local_addr().unwrap())
    }

    fn connect(address: &str, name: LinkName, ticket: Ticket, config: &LinkConfig) -> Result<SendLink, EstablishError> {
        let (address, token) = address.split_once(' ').unwrap();
        let patience = patient();
        let address = address.parse().unwrap();
        let (stream, tls) = Channel::call(address, "link.rayless", &identity(token), &patience).unwrap().into_tls();
        tcp::connect_tls(stream, tls, name, ticket, config)
    }

    fn accept((listener, token): &Self::Listener, acceptor: &mut Acceptor) -> Result<RecvLink, EstablishError> {
        let patience = patient();
        let stream = listener.accept().unwrap().0;
        let (stream, tls) = Channel::answer(stream, &identity(token), &patience).unwrap().into_tls();
        let greeted = greet_tls(stream, tls, GREETING_TIME).unwrap();
        acceptor.admit(greeted).map(|link| link.expect("one stream is all of it"))
    }

    fn nonsense((listener, token): &Self::Listener) -> io::Result<String> {
        let patience = patient();
        let address = listener.local_addr()?;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let patience = patient();
                let mut channel = Channel::call(address, "link.rayless", &identity(token), &patience).unwrap();
                channel.send(&[b'x'; 200], &patience).unwrap();
            });
            let channel = Channel::answer(listener.accept()?.0, &identity(token), &patience).unwrap();
            let (stream, tls) = channel.into_tls();
            Ok(greet_tls(stream, tls, GREETING_TIME).unwrap_err().to_string())
        })
    }
}

/// Soft-RoCE between the guest's two devices.
pub(crate) struct Rxe;
/// Soft-iWARP between the guest's two devices.
pub(crate) struct Siw;

/// Which addresses belong to the two devices of a kind, as tests/rdma-vm sets them up.
pub(crate) trait Devices: 'static {
    const RECEIVER: IpAddr;
    const SENDER: IpAddr;
}

impl Devices for Rxe {
    const RECEIVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
    const SENDER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
}

impl Devices for Siw {
    const RECEIVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 1));
    const SENDER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 78, 0, 2));
}

impl<D: Devices> Fixture for D {
    const LEVEL: Level = Level::Rdma;
    const OUTLIVES_ITS_SENDER: bool = false;
    const SMALL_MESSAGES: u64 = 2_000;
    type Listener = Mutex<rayless_verbs::Listener>;

    fn listen() -> Self::Listener {
        Mutex::new(rayless_verbs::Listener::bind(SocketAddr::new(D::RECEIVER, 0)).unwrap())
    }

    fn address(listener: &Self::Listener) -> String {
        listener.lock().unwrap().address().to_string()
    }

    fn connect(address: &str, name: LinkName, ticket: Ticket, config: &LinkConfig) -> Result<SendLink, EstablishError> {
        let config = LinkConfig { handshake: GREETING_TIME, ..config.clone() };
        rdma::connect(address.parse().unwrap(), Some(D::SENDER), name, ticket, &config)
    }

    fn accept(listener: &Self::Listener, acceptor: &mut Acceptor) -> Result<RecvLink, EstablishError> {
        let greeted = greet_rdma(&mut listener.lock().unwrap(), GREETING_TIME).unwrap();
        acceptor.admit(greeted).map(|link| link.expect("one connection is all of it"))
    }

    fn nonsense(listener: &Self::Listener) -> io::Result<String> {
        let to = listener.lock().unwrap().address();
        std::thread::scope(|scope| {
            let stranger = scope.spawn(move || {
                let deadline = Instant::now() + GREETING_TIME;
                let sizes = rayless_verbs::Sizes { sends: 1, recvs: 1, inline: 0 };
                let endpoint = rayless_verbs::Endpoint::to(to, Some(D::SENDER), sizes, deadline).unwrap();
                endpoint.connect(b"xxxxxxxx", deadline).map(drop).unwrap_err().to_string()
            });
            let said = greet_rdma(&mut listener.lock().unwrap(), GREETING_TIME).unwrap_err().to_string();
            assert_eq!(stranger.join().unwrap(), "the peer refused: no link greeting of this version");
            Ok(said)
        })
    }
}
