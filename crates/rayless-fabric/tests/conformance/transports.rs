//! The transports under test.

use crate::fixture::Fixture;
use rayless_fabric::{Acceptor, EstablishError, Level, LinkConfig, LinkName, RecvLink, SendLink, Ticket, greet_tcp, greet_unix, shm, tcp};
use std::{
    io::{self, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
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
