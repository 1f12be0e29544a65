//! Both ends of a link in one process: for tests and benches, without a cluster.

use crate::{
    errors,
    link::{RecvLink, SendLink},
};
use pyo3::{exceptions::PyValueError, prelude::*};
use rayless_fabric::{
    Acceptor, EstablishError, GreetError, LinkConfig, LinkName, Ticket, greet_rdma, greet_tcp, greet_unix, rdma, shm,
    tcp,
};
use rayless_proto::ids::GroupId;
use std::{
    hash::{BuildHasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    thread,
    time::Duration,
};

/// How long either end waits for the other.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// What is asked of a pair.
struct Asked {
    name: LinkName,
    ticket: Ticket,
    config: LinkConfig,
    streams: usize,
    /// Receiver's and sender's address.
    addresses: (IpAddr, IpAddr),
}

/// The two ends of a link. `addresses`: the receiver's and the sender's, for `tcp` and `rdma`.
#[pyfunction]
#[pyo3(signature = (transport, *, from_rank=0, to_rank=1, channel=0, verify=false, max_message=None, streams=1, addresses=None))]
#[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
pub(crate) fn link_pair(
    py: Python<'_>,
    transport: &str,
    from_rank: u32,
    to_rank: u32,
    channel: u16,
    verify: bool,
    max_message: Option<u64>,
    streams: usize,
    addresses: Option<(String, String)>,
) -> PyResult<(SendLink, RecvLink)> {
    let addresses = match addresses {
        None => (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()),
        Some((receiver, sender)) => (address(&receiver)?, address(&sender)?),
    };
    let mut config = LinkConfig { verify, handshake: HANDSHAKE, ..LinkConfig::default() };
    config.max_message = max_message.unwrap_or(config.max_message);
    let secret = std::array::from_fn(|_| RandomState::new().hash_one(0) as u8);
    let group = GroupId(RandomState::new().hash_one(0).to_le_bytes());
    let name = LinkName { group, from: from_rank, to: to_rank, channel };
    let asked = Asked { name, ticket: Ticket(secret), config, streams, addresses };
    let pair = match transport {
        "tcp" => py.detach(|| asked.tcp()),
        "shm" => py.detach(|| asked.shm()),
        "rdma" => py.detach(|| asked.rdma()),
        other => {
            let text = format!("`{other}` is no transport\nhint: give tcp, shm or rdma");
            return Err(PyValueError::new_err(text));
        }
    };
    let (sender, receiver) = pair.map_err(|cause| {
        errors::link(py, "LinkUnavailableError", &format!("{name} over {transport}: {cause}"), name, None)
    })?;
    Ok((SendLink::new(sender), RecvLink::new(receiver)))
}

type Pair = Result<(rayless_fabric::SendLink, rayless_fabric::RecvLink), String>;

impl Asked {
    fn tcp(&self) -> Pair {
        let listener = TcpListener::bind((self.addresses.0, 0)).map_err(|error| error.to_string())?;
        let to = listener.local_addr().map_err(|error| error.to_string())?;
        self.join(
            || {
                let streams: io::Result<Vec<_>> = (0..self.streams).map(|_| TcpStream::connect(to)).collect();
                let streams = streams.map_err(|error| error.to_string())?;
                tcp::connect(streams, self.name, self.ticket, &self.config).map_err(|error| error.to_string())
            },
            |acceptor| {
                let stream = listener.accept().map_err(|error| error.to_string())?.0;
                admit(acceptor, greet_tcp(stream, HANDSHAKE))
            },
        )
    }

    fn shm(&self) -> Pair {
        let (near, far) = UnixStream::pair().map_err(|error| error.to_string())?;
        let mut far = Some(far);
        self.join(
            move || shm::connect(near, self.name, self.ticket, &self.config).map_err(|error| error.to_string()),
            |acceptor| far.take().map_or(Ok(None), |far| admit(acceptor, greet_unix(far, HANDSHAKE))),
        )
    }

    fn rdma(&self) -> Pair {
        let mut listener =
            rayless_verbs::Listener::bind(SocketAddr::new(self.addresses.0, 0)).map_err(|e| e.to_string())?;
        let to = listener.address();
        self.join(
            || {
                rdma::connect(to, Some(self.addresses.1), self.name, self.ticket, &self.config)
                    .map_err(|error| error.to_string())
            },
            |acceptor| admit(acceptor, greet_rdma(&mut listener, HANDSHAKE)),
        )
    }

    /// Runs both ends; `accept` until the link is whole.
    fn join(
        &self,
        connect: impl FnOnce() -> Result<rayless_fabric::SendLink, String> + Send,
        mut accept: impl FnMut(&mut Acceptor) -> Result<Option<rayless_fabric::RecvLink>, String>,
    ) -> Pair {
        let mut acceptor = Acceptor::default();
        acceptor.expect(self.name, self.ticket, self.config.clone());
        thread::scope(|scope| {
            let connecting = scope.spawn(connect);
            let receiver = loop {
                match accept(&mut acceptor) {
                    Ok(Some(link)) => break Ok(link),
                    Ok(None) => {}
                    Err(cause) => break Err(cause),
                }
            };
            let sender = connecting.join().map_err(|_| "the connecting thread panicked".to_owned())?;
            Ok((sender?, receiver?))
        })
    }
}

fn admit(
    acceptor: &mut Acceptor,
    greeted: Result<rayless_fabric::Greeted, GreetError>,
) -> Result<Option<rayless_fabric::RecvLink>, String> {
    let greeted = greeted.map_err(|error| error.to_string())?;
    acceptor.admit(greeted).map_err(|error: EstablishError| error.to_string())
}

fn address(text: &str) -> PyResult<IpAddr> {
    text.parse()
        .map_err(|_| PyValueError::new_err(format!("`{text}` is no IP address\nhint: give two, such as 127.0.0.1")))
}
