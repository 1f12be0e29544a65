//! Links between workers: which transport they get, and what becomes of those that cannot be.

use crate::{
    Story,
    world::{Shape, World, all, ask, texts},
};
use rayless_fabric::{DType, Extra, TensorRef, TensorSpec, Wait};
use rayless_net::{
    identity::{ClusterIdentity, NodeKey, TlsIdentity},
    link::{Channel, ChannelError, Patience},
    tcp::link_name,
    token::Token,
};
use rayless_proto::{
    codec,
    ids::GroupId,
    v1::link::{LinkAnswer, LinkOffer, LinkOpening, LinkPolicy, LinkState, LinkTransport, MAX_LINK_FRAME},
};
use rayless_worker::{
    driver::{CallError, Callbacks, GroupFailure},
    host::Worker,
};
use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

pub(crate) const STORIES: &[Story] = &[
    ("ranks of one host are linked by shared memory", one_host),
    ("ranks of two hosts without RDMA are linked by TCP", two_hosts),
    ("two daemons of one host are linked by shared memory", two_daemons),
    ("tensors that leave a host are encrypted where one side wants that", encrypted),
    ("payloads are checked where the driver wants that", verified),
    ("wishes of driver and node that contradict each other fail the start", contradiction),
    ("nodes with crossed wishes are told of both, at both ends", crossed),
    ("where no transport is left both ends know every reason", no_transport),
    ("an end that waits in vain names both ranks and nodes", nobody_comes),
    ("a sender that gave up may come again", sender_returns),
    ("ranks that there are not, and links that there are, are the caller's mistakes", mistakes),
    ("callers without the link's ticket are refused and the link opens", strangers),
    ("callers that say nothing keep nobody from a link", silent_callers),
    ("a group can be stopped while links are being opened", stopped),
    ("a peer that dies while a link is opened fails its group with that cause", peer_dies),
    ("how a link is reaches the daemon, and how much it moved", reports),
    ("why a link was lost reaches the daemon, from both ends", losses),
];

/// The worker's part of `link FROM TO CHANNEL MESSAGES [SECONDS]`: the sender sends so many messages, the receiver compares every byte. Both
/// tell what moved them. `SECONDS` bounds the opening.
pub(crate) fn at_worker(worker: &Worker, text: &str) -> Result<String, String> {
    let mut numbers = text.split(' ').filter_map(|word| word.parse::<u32>().ok());
    let mut next = || numbers.next().ok_or_else(|| format!("not a link: {text}"));
    let (from, to, channel, messages) = (next()?, next()?, next()? as u16, next()?);
    let within = Duration::from_secs(next().unwrap_or(20).into());
    let wait = || Wait::at_most(Duration::from_secs(20));
    if worker.rank() == from {
        let mut link = worker.links().send_link(to, channel, within).map_err(|error| error.to_string())?;
        for message in 0..messages {
            let data = bytes(message);
            let shape = [data.len() as u64];
            let spec = TensorSpec { name: "t", dtype: DType::U8, shape: &shape, strides: None };
            let extra = Extra { tag: message.into(), bytes: &[] };
            link.send(&[TensorRef { spec, data: &data }], extra, &wait()).map_err(|error| error.to_string())?;
        }
        return Ok(format!("sent by {}", link.level()));
    }
    if worker.rank() == to {
        let mut link = worker.links().recv_link(from, channel, within).map_err(|error| error.to_string())?;
        for message in 0..messages {
            let (_, tensors) = link.recv(Some(message.into()), &wait()).map_err(|error| error.to_string())?;
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

fn only(transport: LinkTransport) -> LinkPolicy {
    LinkPolicy { only: Some(transport), ..LinkPolicy::default() }
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

fn two_daemons() {
    let world = World::of(&Shape { one_host: true, ..Shape::new(1, 1) });
    let group = world.start();
    assert_eq!(texts(&all(&group, "link 0 1 0 8").unwrap()), ["sent by shm", "received by shm"]);
    assert_eq!(texts(&all(&group, "link 1 0 0 8").unwrap()), ["received by shm", "sent by shm"]);
}

fn encrypted() {
    let encrypt = LinkPolicy { encrypt: true, ..LinkPolicy::default() };
    let mut world = World::of(&Shape { wishes: [LinkPolicy::default(), encrypt], ..Shape::new(2, 1) });
    let group = world.start();
    assert_eq!(texts(&all(&group, "link 0 2 0 8").unwrap()), ["sent by tcp", "", "received by tcp"]);
    for index in [0, 1] {
        let report = world.report(index, |report| report.state == LinkState::Open);
        assert!(report.encrypted, "{report:?}");
        assert_eq!(report.rejected[1].0, LinkTransport::Rdma);
        assert!(report.rejected[1].1.contains("--encrypt-tensors"), "{report:?}");
    }
    // What stays on the host needs none.
    all(&group, "link 0 1 0 1").unwrap();
    assert!(!world.report(0, |report| report.state == LinkState::Open).encrypted);
}

fn verified() {
    let mut world = World::new(1, 1);
    let mut launch = world.launch();
    launch.env.push(("RAYLESS_VERIFY_LINKS".into(), "1".into()));
    launch.env.push(("RAYLESS_TRANSPORT".into(), "tcp".into()));
    let group = world.start_with(launch, Callbacks::default()).unwrap();
    assert_eq!(texts(&all(&group, "link 0 1 0 8").unwrap()), ["sent by tcp", "received by tcp"]);
    let report = world.report(1, |report| report.state == LinkState::Open);
    assert!(report.verified && report.transport == Some(LinkTransport::Tcp), "{report:?}");
    assert_eq!(report.rejected[0], (LinkTransport::Shm, "only tcp is allowed (--transport, RAYLESS_TRANSPORT)".into()));
}

fn contradiction() {
    let world = World::of(&Shape { wishes: [only(LinkTransport::Shm), LinkPolicy::default()], ..Shape::new(1, 0) });
    let mut launch = world.launch();
    launch.env.push(("RAYLESS_TRANSPORT".into(), "tcp".into()));
    let error = world.start_with(launch, Callbacks::default()).unwrap_err().to_string();
    assert!(error.contains("node a wants --transport shm, the driver wants --transport tcp\nhint: "), "{error}");
    let mut launch = world.launch();
    launch.env.push(("RAYLESS_TRANSPORT".into(), "pigeon".into()));
    let error = world.start_with(launch, Callbacks::default()).unwrap_err().to_string();
    assert!(error.starts_with("RAYLESS_TRANSPORT=`pigeon` is not one of auto, rdma, shm, tcp\nhint: "), "{error}");
}

fn crossed() {
    let wishes = [only(LinkTransport::Rdma), only(LinkTransport::Tcp)];
    let world = World::of(&Shape { wishes, ..Shape::new(1, 1) });
    let group = world.start();
    for told in texts(&all(&group, "link 0 1 0 1").unwrap()) {
        assert!(told.contains("link 0->1.0 of group"), "{told}");
        assert!(told.contains("from node a to node b"), "{told}");
        assert!(told.contains("node a wants --transport rdma, node b wants --transport tcp\nhint: "), "{told}");
    }
}

fn no_transport() {
    let wishes = [only(LinkTransport::Shm), LinkPolicy::default()];
    let mut world = World::of(&Shape { wishes, ..Shape::new(1, 1) });
    let group = world.start();
    for told in texts(&all(&group, "link 0 1 0 1").unwrap()) {
        let reasons = "no transport: shm: rank 0 is on node a and rank 1 on node b, which are two hosts; \
                       rdma: only shm is allowed (--transport, RAYLESS_TRANSPORT); \
                       tcp: only shm is allowed (--transport, RAYLESS_TRANSPORT)\nhint: ";
        assert!(told.contains(reasons), "{told}");
    }
    for index in [0, 1] {
        let report = world.report(index, |report| report.state == LinkState::Failed);
        assert!(report.cause.contains("two hosts"), "{report:?}");
    }
    // The group is as usable as before.
    all(&group, "echo").unwrap();
}

fn nobody_comes() {
    let world = World::new(1, 1);
    let group = world.start();
    let told = texts(&ask(&group, "on 1 link 0 1 3 1 1", &[1]).wait().unwrap()).remove(0);
    assert!(told.contains("link 0->1.3 of group"), "{told}");
    assert!(told.contains("from node a to node b: no sender came to rank 1 on node b within 1.0 s\nhint: "), "{told}");
    assert!(told.ends_with("rank 0 on node a has to call send_link(1, channel=3)"), "{told}");
    // The receiver's process listens by now, so its peer hears more than silence.
    let told = texts(&ask(&group, "on 0 link 0 1 3 1 3", &[0]).wait().unwrap()).remove(0);
    assert!(told.contains("rank 1 on node b did not ask for it within 3.0 s\nhint: "), "{told}");
    assert!(told.ends_with("rank 1 on node b has to call recv_link(0, channel=3)"), "{told}");
    // This one does not, so all that can be said is that there is no answer.
    let told = texts(&ask(&group, "on 1 link 1 0 4 1 1", &[1]).wait().unwrap()).remove(0);
    assert!(told.contains("link 1->0.4") && told.contains("rank 0 on node a"), "{told}");
}

fn sender_returns() {
    let world = World::new(1, 1);
    let group = world.start();
    let told = texts(&ask(&group, "on 0 link 0 1 0 1 1", &[0]).wait().unwrap()).remove(0);
    assert!(told.contains("no answer from rank 1 on node b"), "{told}");
    // The receiver finds the call that was given up before the one that counts.
    assert_eq!(texts(&all(&group, "link 0 1 0 4").unwrap()), ["sent by tcp", "received by tcp"]);
}

fn mistakes() {
    let world = World::new(2, 0);
    let group = world.start();
    let told = texts(&ask(&group, "on 0 link 0 9 0 1", &[0]).wait().unwrap()).remove(0);
    assert!(told.contains("there is no rank 9, the group has ranks 0 to 1"), "{told}");
    let told = texts(&ask(&group, "on 0 link 0 0 0 1", &[0]).wait().unwrap()).remove(0);
    assert!(told.contains("rank 0 has no link to itself"), "{told}");
    assert_eq!(texts(&all(&group, "link_twice 0 1").unwrap())[0], "it is open already");
}

/// The worker's part of `link_twice FROM TO`: asks for a link that it has.
pub(crate) fn twice(worker: &Worker, text: &str) -> Result<String, String> {
    let numbers: Vec<u32> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
    let &[from, to] = &numbers[..] else { return Err(text.to_owned()) };
    let within = Duration::from_secs(20);
    if worker.rank() != from {
        let _link = worker.links().recv_link(from, 0, within).map_err(|error| error.to_string())?;
        return Ok(String::new());
    }
    let _link = worker.links().send_link(to, 0, within).map_err(|error| error.to_string())?;
    let again = worker.links().send_link(to, 0, within).unwrap_err().to_string();
    let said = again.lines().next().and_then(|line| line.split(": ").nth(1)).unwrap_or_default();
    Ok(said.to_owned())
}

fn offer(group: GroupId, to: u32) -> Vec<u8> {
    codec::encode(&LinkOpening::Offer(LinkOffer {
        group,
        from: 0,
        to,
        channel: 0,
        ticket: [7; 32],
        node_name: "a".into(),
        host_id: "a".into(),
        policy: LinkPolicy::default(),
        rdma: Vec::new(),
        no_rdma: String::new(),
        max_message: 1,
    }))
}

fn strangers() {
    let world = World::new(1, 1);
    let group = world.start();
    // So that its worker listens.
    ask(&group, "on 1 link 0 1 9 0 0", &[1]).wait().unwrap();
    let patience = Patience::new(Instant::now() + Duration::from_secs(20), &|| false);
    let (address, id) = (world.address_of(1), world.configs[1].group);
    let member = TlsIdentity::from_bundle(world.leaf()).unwrap();
    let say = |opening: &[u8]| {
        let mut channel = Channel::call(address, &link_name(id, 1), &member, &patience)?;
        channel.send(opening, &patience)?;
        channel.receive(MAX_LINK_FRAME, &patience)
    };
    // A member of the cluster that is none of the group, one of another group, one that means another rank.
    let others = [
        (offer(id, 1), "the ticket is not this link's".to_owned()),
        (offer(GroupId([0; 8]), 1), format!("this is rank 1 of group {id}")),
        (offer(id, 0), format!("this is rank 1 of group {id}")),
    ];
    for (opening, reason) in others {
        let answer = codec::decode::<LinkAnswer>(&say(&opening).unwrap()).unwrap();
        assert_eq!(answer, LinkAnswer::Refused(reason));
    }
    // One that wants to slip a stream into a link that nobody opens, and one that talks nonsense.
    let stream = codec::encode(&LinkOpening::Stream { from: 0, channel: 0, ticket: [0; 32] });
    for opening in [&stream[..], b"nonsense", &[]] {
        assert!(matches!(say(opening), Err(ChannelError::Broken(_))));
    }
    // One of another cluster.
    let other = ClusterIdentity::from_token(&Token::generate().unwrap(), &NodeKey::generate().unwrap()).unwrap();
    let refused = Channel::call(address, &link_name(id, 1), other.tls(), &patience);
    assert!(matches!(refused, Err(ChannelError::Refused(_))), "{refused:?}");
    assert_eq!(texts(&all(&group, "link 0 1 0 4").unwrap()), ["sent by tcp", "received by tcp"]);
}

fn silent_callers() {
    let world = World::new(1, 1);
    let group = world.start();
    ask(&group, "on 1 link 0 1 9 0 0", &[1]).wait().unwrap();
    let (address, id) = (world.address_of(1), world.configs[1].group);
    let member = TlsIdentity::from_bundle(world.leaf()).unwrap();
    let mut hello = Vec::new();
    let name = link_name(id, 1).try_into().unwrap();
    rustls::ClientConnection::new(member.client_config(), name).unwrap().write_tls(&mut hello).unwrap();
    // More than are served at once: of some not even the hello is whole, the others never finish the handshake.
    let mut callers: Vec<TcpStream> = (0..100)
        .map(|number| {
            let mut caller = TcpStream::connect(address).unwrap();
            caller.write_all(&hello[..if number % 2 == 0 { hello.len() } else { number }]).unwrap();
            caller
        })
        .collect();
    assert_eq!(texts(&all(&group, "link 0 1 0 4").unwrap()), ["sent by tcp", "received by tcp"]);
    // They are not kept for ever.
    for caller in &mut callers {
        caller.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let ended = caller.read_to_end(&mut Vec::new());
        assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset));
    }
}

fn stopped() {
    let mut world = World::new(2, 1);
    let group = world.start();
    let _waiting = ask(&group, "on 0 link 1 0 0 1", &[0]);
    let _calling = ask(&group, "on 2 link 2 1 0 1", &[2]);
    ask(&group, "echo", &[1]).wait().unwrap();
    drop(group);
    assert_eq!(world.assert_nothing_left(), ["", ""]);
}

fn peer_dies() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let call = ask(&group, "link 0 1 0 1", &[0]);
    let _end = ask(&group, "on 1 exit 3", &[1]);
    // Whichever way it went with the link, it is the death that is told, not what came of it.
    let other = ask(&group, "on 0 link 0 1 1 1", &[0]);
    match other.wait().unwrap_err() {
        CallError::Failed(GroupFailure::WorkerDied { rank: 1, cause, .. }) => {
            assert!(cause.contains("code 3"), "{cause}")
        }
        error => panic!("{error:?}"),
    }
    drop(call);
    drop(group);
    world.assert_nothing_left();
}

fn reports() {
    let mut world = World::new(2, 0);
    let group = world.start();
    all(&group, "link 0 1 5 8").unwrap();
    let open = |by_sender| {
        move |r: &rayless_proto::v1::link::LinkReport| r.by_sender == by_sender && r.state == LinkState::Open
    };
    let report = world.report(0, open(true));
    assert_eq!((report.from, report.to, report.channel), (0, 1, 5));
    assert_eq!((report.transport, report.rejected.len()), (Some(LinkTransport::Shm), 0));
    // Both ends are closed by now; the last word has the counters.
    let closed = world.report(0, |report| report.state == LinkState::Closed);
    assert_eq!((closed.messages, closed.bytes), (8, 2 * (1 + (14 << 10) + (3 << 20))));
}

fn losses() {
    let mut world = World::new(1, 1);
    let group = world.start();
    let crossed = "rank 1 is at step 2, but rank 0 sent step 1";
    for told in texts(&all(&group, "link_crossed 0 1").unwrap()) {
        assert!(told.contains(crossed), "{told}");
    }
    for index in [0, 1] {
        let lost = world.report(index, |report| report.state == LinkState::Failed);
        assert!(lost.cause.starts_with("lost after ") && lost.cause.contains(crossed), "{lost:?}");
    }
}

/// The worker's part of `link_crossed FROM TO`: the receiver is at another step than the sender, and both tell how that ended.
pub(crate) fn out_of_step(worker: &Worker, text: &str) -> Result<String, String> {
    let numbers: Vec<u32> = text.split(' ').filter_map(|word| word.parse().ok()).collect();
    let &[from, to] = &numbers[..] else { return Err(text.to_owned()) };
    let within = Duration::from_secs(20);
    let wait = Wait::at_most(within);
    if worker.rank() == to {
        let mut link = worker.links().recv_link(from, 0, within).map_err(|error| error.to_string())?;
        return match link.recv(Some(2), &wait) {
            Err(error) => Ok(error.to_string()),
            Ok(_) => Err("a tensor of another step".to_owned()),
        };
    }
    let mut link = worker.links().send_link(to, 0, within).map_err(|error| error.to_string())?;
    loop {
        // Until the receiver's word comes back.
        if let Err(error) = link.send(&[], Extra { tag: 1, bytes: &[] }, &wait) {
            return Ok(error.to_string());
        }
    }
}
