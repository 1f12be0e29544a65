//! Writes well-formed input of every target to `corpus/<target>/`, so that the fuzzer need not invent it.

use rayless_net::{
    identity::{ClusterIdentity, NodeKey},
    token::Token,
};
use rayless_proto::{
    codec::encode,
    hello::{Hello, Purpose},
    v1::{
        heartbeat::Heartbeat,
        step::{FLAG_LAST, Header, Kind},
    },
};
use std::{fs, io, path::Path};

#[path = "../../crates/rayless-proto/tests/samples/mod.rs"]
mod samples;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let purposes = [Purpose::Control, Purpose::Heartbeat, Purpose::Step, Purpose::Link];
    let mut hellos: Vec<Vec<u8>> = purposes.map(|purpose| Hello::of_this_build(purpose).encode()).into();
    hellos.push(Heartbeat { sequence: 1, incarnation: 2, rtt_us: 300 }.encode().into());
    write("hello", &hellos)?;
    write("control", &[all(&samples::to_head(), encode), all(&samples::from_head(), encode)].concat())?;
    write("local", &[all(&samples::client_messages(), encode), all(&samples::daemon_messages(), encode)].concat())?;
    let keeper = [
        all(&samples::to_keeper(), encode),
        all(&samples::from_keeper(), encode),
        all(&samples::keeper_configs(), encode),
    ];
    write("keeper", &keeper.concat())?;

    let link = [
        all(&samples::link_openings(), encode),
        all(&samples::link_answers(), encode),
        all(&samples::link_outcomes(), encode),
        all(&samples::link_boots(), encode),
        all(&[samples::link_report()], encode),
    ];
    write("link", &link.concat())?;

    // Targets that take (number, bytes) read the number from the end of the input.
    let framed: Vec<Vec<u8>> =
        hellos.iter().map(|h| [&(h.len() as u32).to_le_bytes(), &h[..], &h[..], &[7]].concat()).collect();
    write("framing", &framed)?;
    let frame = |kind, payload: Vec<u8>| {
        let header = Header { length: payload.len() as u32, kind, flags: FLAG_LAST, rank: 0, asked: 0, call: 1 };
        [&header.encode(), &payload[..], &Header { length: 0, kind: Kind::Ping, ..header }.encode(), &[50, 0]].concat()
    };
    let launches = samples::launches().iter().map(|m| frame(Kind::Launch, encode(m))).collect::<Vec<_>>();
    let events = samples::keeper_events().iter().map(|m| frame(Kind::Event, encode(m))).collect::<Vec<_>>();
    let plain = [Kind::Call, Kind::Reply, Kind::Stop, Kind::Log].map(|kind| frame(kind, b"payload".to_vec()));
    let look = frame(Kind::Look, encode(&samples::look()));
    write("step", &[launches, events, plain.to_vec(), vec![look]].concat())?;

    let token = Token::generate()?;
    write("token", &[token.expose().into_bytes(), vec![b'a'; 64], b"0011223344556677.keeper.rayless".to_vec()])?;
    let identity = ClusterIdentity::from_token(&token, &NodeKey::generate()?)?;
    let leaf = identity.issue_delegate()?;
    write("certificate", &[leaf.certificates, leaf.ca_certificates].concat())?;
    let name = "0011223344556677.keeper.rayless".to_owned().try_into()?;
    let mut client = rustls::ClientConnection::new(identity.tls().client_config(), name)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    write("client_hello", &[hello])?;
    Ok(())
}

fn all<T>(messages: &[T], bytes: impl Fn(&T) -> Vec<u8>) -> Vec<Vec<u8>> {
    messages.iter().map(bytes).collect()
}

fn write(target: &str, inputs: &[Vec<u8>]) -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder)?;
    inputs.iter().enumerate().try_for_each(|(n, bytes)| fs::write(folder.join(format!("seed-{n}")), bytes))
}
