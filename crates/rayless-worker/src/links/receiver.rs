//! The receiving end of a link: waits for its sender, then has it try one transport after the other.

use super::{
    Asked, LinkFault, PROOF, STREAMS, policy,
    rdma::{self, Door},
    reach,
    report::{self, Live},
    ticket,
};
use rayless_fabric::{
    Acceptor, Level, RecvLink, Ticket, Wait,
    select::{self, End, Place, Plan, Step},
};
use rayless_net::link::{Channel, ChannelError};
use rayless_proto::{
    codec,
    v1::link::{
        LinkAnswer, LinkBoot, LinkOffer, LinkOutcome, LinkPlace, LinkPolicy, LinkState, LinkTransport, LinkTry,
        MAX_LINK_FRAME,
    },
};

/// How an agreement with a sender failed.
enum Failure {
    /// With this sender's call; it, or another one, may call again.
    Call(String),
    /// For good.
    Link(LinkFault),
}

impl From<ChannelError> for Failure {
    fn from(error: ChannelError) -> Self {
        Self::Call(error.to_string())
    }
}

/// See [`super::Links::recv_link`].
pub(super) fn open(asked: &Asked<'_>) -> Result<(RecvLink, Live), LinkFault> {
    let mut last = String::new();
    loop {
        let Some((channel, offer)) = asked.shared.next_offer(asked.link, &asked.patience) else {
            let (from, to) = (asked.link.from, asked.link.to);
            let hint = format!("{} has to call send_link({to}, channel={})", asked.named(from), asked.link.channel);
            return Err(asked.stopped(format!("no sender came to {}", asked.named(to)), &last, hint));
        };
        match agree(asked, channel, &offer) {
            Ok(opened) => return Ok(opened),
            Err(Failure::Call(reason)) => last = reason,
            Err(Failure::Link(fault)) => return Err(fault),
        }
    }
}

/// Talks one sender's offer through to its end.
fn agree(asked: &Asked<'_>, mut channel: Channel, offer: &LinkOffer) -> Result<(RecvLink, Live), Failure> {
    let boot = asked.shared.boot().map_err(Failure::Link)?;
    let sender = format!("node {}", offer.node_name);
    let receiver = format!("node {}", asked.shared.node_name(asked.link.to));
    let policy = match policy::together((&offer.policy, &sender), (&boot.policy, &receiver)) {
        Ok(policy) => policy,
        Err(contradiction) => {
            let reason = contradiction.to_string();
            channel.send(&codec::encode(&LinkAnswer::Refused(reason.clone())), &asked.patience)?;
            return Err(Failure::Link(LinkFault::Refused(reason)));
        }
    };
    let (own_node, from_node) = (asked.shared.node_name(asked.link.to), asked.shared.node_name(asked.link.from));
    let host = asked.shared.node(asked.link.to);
    let (ways, no_rdma) = reach::reaches(&boot.rdma_devices, host.map_or("", |node| node.address.as_str()));
    let from = End { rank: asked.link.from, node: &from_node, rdma: &offer.rdma, no_rdma: &offer.no_rdma };
    let to = End { rank: asked.link.to, node: &own_node, rdma: &ways, no_rdma: &no_rdma };
    let rdma_nodes: Vec<&str> =
        boot.table.nodes.iter().filter(|node| node.has_rdma).map(|node| node.name.as_str()).collect();
    let same_host = host.is_some_and(|node| node.host_id == offer.host_id);
    let mut plan = select::plan(&from, &to, &Place { same_host, rdma_nodes: &rdma_nodes }, &policy);
    let opened = plan.first(|step| match place_of(asked, boot, step, &policy) {
        Ok((place, door)) => attempt(asked, &mut channel, place, door, &policy),
        Err(reason) => Ok(Err(reason)),
    })?;
    if let Some((step, link)) = opened {
        let rejected = rejected(&plan);
        let settled = LinkAnswer::Settled { rejected: rejected.clone() };
        channel.send(&codec::encode(&settled), &asked.patience)?;
        let mut report = report::plain(asked.link, false, LinkState::Open);
        report.transport = Some(step.level.into());
        report.mode = link.mode().unwrap_or_default().to_owned();
        report.device = link.device().unwrap_or_default().to_owned();
        if let Some((from, to)) = step.pair {
            report.mtu = rdma::mtu(&from, &to);
            report.gid = to.gid;
        }
        report.rejected = rejected;
        report.verified = policy.verify;
        report.encrypted = step.level == Level::Tcp && policy.encrypt;
        let live = Live::new(report, link.probe());
        return Ok((link, live));
    }
    let fault = LinkFault::NoTransport { rejected: rejected(&plan), hint: plan.hint().to_owned() };
    channel.send(&codec::encode(&LinkAnswer::Refused(fault.to_string())), &asked.patience)?;
    Err(Failure::Link(fault))
}

fn rejected(plan: &Plan) -> Vec<(LinkTransport, String)> {
    plan.rejected().into_iter().map(|known| (known.level.into(), known.reason)).collect()
}

/// Where the sender may open the step's transport, and for RDMA what listens there.
fn place_of(
    asked: &Asked<'_>,
    boot: &LinkBoot,
    step: &Step,
    policy: &LinkPolicy,
) -> Result<(LinkPlace, Option<Door>), String> {
    match (step.level, &step.pair) {
        (Level::Rdma, Some((from, to))) => {
            let door = Door::open(to, boot.rdma_ports, asked.link.to)
                .map_err(|cause| format!("{cause} (at {})", asked.named(asked.link.to)))?;
            let place =
                LinkPlace::Rdma { address: door.address(), from: Box::new(from.clone()), to: Box::new(to.clone()) };
            Ok((place, Some(door)))
        }
        (Level::Rdma, None) => Err("no two devices can talk".to_owned()),
        (Level::Shm, _) => Ok((LinkPlace::Shm { keeper_socket: boot.keeper_socket.clone() }, None)),
        // One stream within TLS: it is the cipher that limits it, not the flow.
        (Level::Tcp, _) if policy.encrypt => Ok((LinkPlace::Tcp { streams: 1, encrypt: true }, None)),
        (Level::Tcp, _) => Ok((LinkPlace::Tcp { streams: STREAMS, encrypt: false }, None)),
    }
}

/// Has the sender open a transport. The inner error is why that came to nothing; the outer one, that the sender is gone.
fn attempt(
    asked: &Asked<'_>,
    channel: &mut Channel,
    place: LinkPlace,
    door: Option<Door>,
    policy: &LinkPolicy,
) -> Result<Result<RecvLink, String>, Failure> {
    let ticket = match ticket::of_attempt() {
        Ok(ticket) => ticket,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut acceptor = Acceptor::default();
    acceptor.expect(asked.link, Ticket(ticket), asked.config(policy.verify));
    let encrypt = matches!(place, LinkPlace::Tcp { encrypt: true, .. });
    asked.shared.expect(asked.link, ticket, encrypt);
    let answer = LinkAnswer::Try(LinkTry { ticket, verify: policy.verify, place });
    channel.send(&codec::encode(&answer), &asked.patience)?;
    let opened = accept(asked, channel, &mut acceptor, door)?.and_then(|mut link| {
        let stop = || asked.patience.left().is_none();
        match link.prove(&Wait::at_most(PROOF).with_check(&stop)) {
            Ok(()) => Ok(link),
            Err(error) => Err(error.to_string()),
        }
    });
    // Where it failed here the link is closed by now, so the sender comes to an end too.
    let said = channel.receive(MAX_LINK_FRAME, &asked.patience)?;
    let outcome = codec::decode::<LinkOutcome>(&said).map_err(|error| Failure::Call(error.to_string()))?;
    Ok(match (opened, outcome) {
        (Ok(link), LinkOutcome::Proven) => Ok(link),
        (_, LinkOutcome::Failed(reason)) => Err(format!("{reason} (at {})", asked.named(asked.link.from))),
        (Err(reason), LinkOutcome::Proven) => Err(format!("{reason} (at {})", asked.named(asked.link.to))),
    })
}

/// Takes the streams of an attempt as they come, until the link is whole or the sender has something else to say.
fn accept(
    asked: &Asked<'_>,
    channel: &Channel,
    acceptor: &mut Acceptor,
    mut door: Option<Door>,
) -> Result<Result<RecvLink, String>, Failure> {
    let mut last = "no stream of it came".to_owned();
    loop {
        let next = match &mut door {
            None => asked.shared.next_stream(asked.link, &asked.patience),
            Some(door) => match door.next() {
                Ok(next) => next,
                Err(cause) => return Ok(Err(cause)),
            },
        };
        if let Some(greeted) = next {
            match acceptor.admit(greeted) {
                Ok(Some(link)) => return Ok(Ok(link)),
                Ok(None) => {}
                Err(error) => last = error.to_string(),
            }
        } else if channel.has_news() {
            // What it is will be read by the caller: a failure, or that the sender is gone.
            return Ok(Err(last));
        } else if asked.patience.left().is_none() {
            return Err(ChannelError::Stopped.into());
        }
    }
}
