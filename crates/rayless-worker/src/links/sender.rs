//! The sending end of a link: calls its receiver until that is there, then tries the transports that it names.

use super::{
    Asked, LinkFault, PROOF, rdma, reach,
    report::{self, Live},
    ticket,
};
use rayless_fabric::{LinkName, SendLink, Ticket, Wait, rdma as fabric_rdma, shm, tcp};
use rayless_net::{
    identity::TlsIdentity,
    link::{Channel, ChannelError},
    tcp::link_name,
    unix,
};
use rayless_proto::{
    codec,
    v1::link::{
        LinkAnswer, LinkNode, LinkOffer, LinkOpening, LinkOutcome, LinkPlace, LinkState, LinkTransport, LinkTry,
        MAX_LINK_FRAME, MAX_LINK_STREAMS,
    },
};
use std::{
    io::Write,
    net::{IpAddr, SocketAddr},
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Between two calls: at first, and at most.
const SOON: Duration = Duration::from_millis(20);
const LATER: Duration = Duration::from_secs(1);

/// See [`super::Links::send_link`].
pub(super) fn open(asked: &Asked<'_>) -> Result<(SendLink, Live), LinkFault> {
    let identity = asked.shared.listen()?;
    let Some(node) = asked.shared.node(asked.link.to) else {
        return Err(LinkFault::Caller("there is no such rank".to_owned()));
    };
    let caller = Caller { asked, identity, address: address_of(node)? };
    let offer = caller.offer()?;
    let (mut last, mut pause) = (String::new(), SOON);
    // Whether the receiver has said that it is there but was not asked for this link yet.
    let mut idle = false;
    loop {
        match caller.call(&offer, &mut idle) {
            Ok(opened) => return Ok(opened),
            Err(Failure::Link(fault)) => return Err(fault),
            Err(Failure::Call(ChannelError::Refused(error))) => return Err(LinkFault::Refused(error.to_string())),
            Err(Failure::Call(ChannelError::Broken(reason))) => last = reason,
            Err(Failure::Call(ChannelError::Stopped)) => {}
        }
        let until = Instant::now() + pause;
        pause = (pause * 2).min(LATER);
        while let Some(left) = asked.patience.left() {
            let nap = until.saturating_duration_since(Instant::now()).min(left).min(Duration::from_millis(50));
            if nap.is_zero() {
                break;
            }
            thread::sleep(nap);
        }
        if asked.patience.left().is_none() {
            let to = asked.named(asked.link.to);
            let hint = format!("{to} has to call recv_link({}, channel={})", asked.link.from, asked.link.channel);
            let what = if idle { format!("{to} did not ask for it") } else { format!("no answer from {to}") };
            return Err(asked.stopped(what, &last, hint));
        }
    }
}

enum Failure {
    /// This call; another one may do better.
    Call(ChannelError),
    /// For good.
    Link(LinkFault),
}

impl From<ChannelError> for Failure {
    fn from(error: ChannelError) -> Self {
        Self::Call(error)
    }
}

struct Caller<'a> {
    asked: &'a Asked<'a>,
    identity: TlsIdentity,
    address: SocketAddr,
}

impl Caller<'_> {
    fn offer(&self) -> Result<LinkOffer, LinkFault> {
        let (asked, link) = (self.asked, self.asked.link);
        let boot = asked.shared.boot()?;
        let address = asked.shared.node(link.from).map_or("", |node| node.address.as_str());
        let (rdma, no_rdma) = reach::reaches(&boot.rdma_devices, address);
        Ok(LinkOffer {
            group: link.group,
            from: link.from,
            to: link.to,
            channel: link.channel,
            ticket: ticket::of_link(&boot.table.secret, link),
            node_name: asked.shared.node_name(link.from),
            host_id: asked.shared.node(link.from).map(|node| node.host_id.clone()).unwrap_or_default(),
            policy: boot.policy.clone(),
            rdma,
            no_rdma,
            max_message: asked.config(false).max_message,
        })
    }

    fn dial(&self) -> Result<Channel, ChannelError> {
        let name = link_name(self.asked.link.group, self.asked.link.to);
        Channel::call(self.address, &name, &self.identity, &self.asked.patience)
    }

    /// One call, from the handshake to the link.
    fn call(&self, offer: &LinkOffer, idle: &mut bool) -> Result<(SendLink, Live), Failure> {
        let patience = &self.asked.patience;
        let mut channel = self.dial()?;
        channel.send(&codec::encode(&LinkOpening::Offer(offer.clone())), patience)?;
        let mut proven = None;
        loop {
            let answer = channel.receive(MAX_LINK_FRAME, patience)?;
            let answer = codec::decode::<LinkAnswer>(&answer).map_err(|e| ChannelError::Broken(e.to_string()))?;
            match (answer, proven.take()) {
                (LinkAnswer::Waiting, _) => *idle = true,
                (LinkAnswer::Refused(reason), _) => return Err(Failure::Link(LinkFault::Refused(reason))),
                (LinkAnswer::Try(attempt), _) => {
                    let outcome = match self.attempt(&attempt) {
                        Ok(link) => {
                            proven = Some((link, attempt));
                            LinkOutcome::Proven
                        }
                        Err(reason) => LinkOutcome::Failed(reason),
                    };
                    channel.send(&codec::encode(&outcome), patience)?;
                }
                (LinkAnswer::Settled { rejected }, Some((link, attempt))) => {
                    let mut report = report::plain(self.asked.link, true, LinkState::Open);
                    report.transport = Some(report::transport(link.level()));
                    report.mode = link.mode().unwrap_or_default().to_owned();
                    report.device = link.device().unwrap_or_default().to_owned();
                    if let LinkPlace::Rdma { from, to, .. } = &attempt.place {
                        report.mtu = rdma::mtu(from, to);
                        report.gid.clone_from(&from.gid);
                    }
                    report.rejected = rejected;
                    report.verified = attempt.verify;
                    report.encrypted = matches!(attempt.place, LinkPlace::Tcp { encrypt: true, .. });
                    let live = Live::new(report, link.probe());
                    return Ok((link, live));
                }
                (LinkAnswer::Settled { .. }, None) => {
                    return Err(ChannelError::Broken("settled on nothing".to_owned()).into());
                }
            }
        }
    }

    /// Opens what the receiver names, and proves it.
    fn attempt(&self, attempt: &LinkTry) -> Result<SendLink, String> {
        let asked = self.asked;
        let (link, ticket, config) = (asked.link, Ticket(attempt.ticket), asked.config(attempt.verify));
        let wanted = match &attempt.place {
            LinkPlace::Shm { .. } => LinkTransport::Shm,
            LinkPlace::Rdma { .. } => LinkTransport::Rdma,
            LinkPlace::Tcp { .. } => LinkTransport::Tcp,
        };
        let only = asked.shared.boot().map_err(|fault| fault.to_string())?.policy.only;
        if let Some(only) = only.filter(|only| *only != wanted) {
            return Err(format!("--transport {} was given", only.name()));
        }
        let opened = match &attempt.place {
            LinkPlace::Shm { keeper_socket } => {
                shm::connect(self.knock(Path::new(keeper_socket))?, link, ticket, &config)
            }
            LinkPlace::Rdma { address, from, .. } => {
                let to = address.parse().map_err(|_| format!("`{address}` is no address"))?;
                let own = from.address.parse().map_err(|_| format!("`{}` is no address", from.address))?;
                fabric_rdma::connect(to, Some(own), link, ticket, &config)
            }
            LinkPlace::Tcp { encrypt: true, .. } => {
                let (stream, tls) = self.stream(attempt.ticket).map_err(|error| error.to_string())?.into_tls();
                tcp::connect_tls(stream, tls, link, ticket, &config)
            }
            LinkPlace::Tcp { streams, .. } => {
                let streams =
                    (0..(*streams).clamp(1, MAX_LINK_STREAMS)).map(|_| self.stream(attempt.ticket)?.into_clear());
                let streams: Result<_, ChannelError> = streams.collect();
                tcp::connect(streams.map_err(|error| error.to_string())?, link, ticket, &config)
            }
        };
        let mut opened = opened.map_err(|error| error.to_string())?;
        let stop = || asked.patience.left().is_none();
        opened.prove(&Wait::at_most(PROOF).with_check(&stop)).map_err(|error| error.to_string())?;
        Ok(opened)
    }

    /// One more connection, that becomes a stream of the link.
    fn stream(&self, ticket: [u8; 32]) -> Result<Channel, ChannelError> {
        let LinkName { from, channel, .. } = self.asked.link;
        let opening = LinkOpening::Stream { from, channel, ticket };
        let mut stream = self.dial()?;
        stream.send(&codec::encode(&opening), &self.asked.patience)?;
        Ok(stream)
    }

    /// Has the keeper of the receiver, on this host, pass a connection on.
    fn knock(&self, keeper: &Path) -> Result<std::os::unix::net::UnixStream, String> {
        let mut stream = unix::connect_std(keeper).map_err(|error| error.to_string())?;
        let trusted = unix::peer_credentials(&stream).is_ok_and(|peer| peer.is_trusted());
        if !trusted {
            return Err(format!("{} belongs to another user", keeper.display()));
        }
        let mut word = *b"T\0\0\0\0";
        word[1..].copy_from_slice(&self.asked.link.to.to_le_bytes());
        stream.write_all(&word).map_err(|error| format!("{}: {error}", keeper.display()))?;
        Ok(stream)
    }
}

fn address_of(node: &LinkNode) -> Result<SocketAddr, LinkFault> {
    let ip = node.address.parse::<IpAddr>();
    let ip = ip.map_err(|_| LinkFault::Over(format!("the address of node {} is `{}`", node.name, node.address)))?;
    Ok(SocketAddr::new(ip, node.port))
}
