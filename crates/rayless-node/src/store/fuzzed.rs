//! Entry for the fuzz target `store`: a store that answers anything.

use super::{
    StoreAccess, StoreConfig,
    etcd::{Etcd, Servers, encode},
    http::Connection,
};
use rayless_control::{
    Candidate,
    election::{CandidateConfig, Effect, Input},
};
use rayless_proto::{
    ids::{ClusterId, NodeId, Term},
    v1::status::HeadSeat,
};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What the store says.
#[derive(Debug)]
pub enum Said<'a> {
    /// These bytes, whatever is asked.
    Bytes(&'a [u8]),
    /// Answers that are HTTP with these bodies.
    Bodies(&'a [&'a [u8]]),
    /// That these keys have these values, and that everything has this number. A value that cannot be the key's becomes part of one that
    /// can.
    Keys(&'a [(&'a str, &'a str)], u64),
}

/// Gives a few bytes at a time and swallows what is asked.
struct Pieces(Vec<u8>, usize, usize);

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (at, count) = (self.1, self.2.min(self.0.len() - self.1).min(into.remaining()));
        into.put_slice(&self.0[at..at + count]);
        self.1 += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn http(body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

/// A candidate lives by what such a store says. It never claims a term that is not higher than what it has seen.
#[allow(clippy::missing_panics_doc, clippy::expect_used, reason = "a panic is what the fuzzer looks for")]
pub fn answers(said: &Said<'_>, piece: usize) {
    let bytes = match said {
        Said::Bytes(bytes) => bytes.to_vec(),
        Said::Bodies(bodies) => bodies.iter().flat_map(|body| http(body)).collect(),
        Said::Keys(pairs, term) => {
            let number = term.to_string();
            let pairs: Vec<_> = pairs
                .iter()
                .map(|(key, value)| {
                    let value = match *key {
                        "term" if !value.contains(' ') => format!("{number} {}", ClusterId([1; 16])),
                        "head" | "seats/x" if !value.starts_with('{') => serde_json::json!({
                            "node": NodeId([value.len() as u8; 32]).to_string(), "name": value, "address": value,
                            "authorities": [value], "term": term % 16,
                        })
                        .to_string(),
                        _ => (*value).to_owned(),
                    };
                    serde_json::json!({
                        "key": encode(format!("/rayless/default/{key}").as_bytes()), "value": encode(value.as_bytes()),
                        "lease": number, "mod_revision": number,
                    })
                })
                .collect();
            let all = serde_json::json!({
                "header": { "revision": number }, "kvs": pairs, "ID": number, "TTL": number, "succeeded": true,
                "result": { "TTL": number, "events": [1] },
            });
            http(all.to_string().as_bytes()).repeat(8)
        }
    };
    let seat = HeadSeat { node: NodeId([7; 32]), name: "a".into(), address: "10.0.0.1:6379".into(), active: false };
    let config = CandidateConfig {
        seat,
        lease: Duration::from_secs(4),
        cluster: ClusterId([1; 16]),
        seen: Term(0),
        store: "etcd://x".into(),
        authorities: vec!["x".into()],
    };
    let mut now = Instant::now();
    let mut candidate = Candidate::new(config, now);
    let store = StoreConfig::new("etcd://x", &StoreAccess::default()).expect("a store's address");
    let connection = Connection::over(Pieces(bytes, 0, piece.max(1)));
    let mut etcd = Etcd::over(Servers::new(store), connection);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut seen = Term(0);
        loop {
            let Ok((lease, lease_time)) = etcd.grant(Duration::from_secs(4)).await else { break };
            let Ok((view, seats)) = etcd.view().await else { break };
            seen = seen.max(view.term);
            let _ = etcd.watch(view.revision).await.is_ok() && etcd.changed().await.is_ok();
            let kept = etcd.keep_alive(lease).await.is_ok();
            assert!(seats.len() <= 1 << 20);
            now += Duration::from_millis(500);
            candidate.handle(now, Input::Observed(view));
            candidate.handle(now, Input::Timer);
            while let Some(effect) = candidate.poll_effect() {
                match effect {
                    Effect::Register { attempt, .. } => {
                        candidate.handle(now, Input::Registered { attempt, lease, lease_time });
                    }
                    Effect::Renew { attempt, .. } if kept => candidate.handle(now, Input::Renewed(attempt)),
                    Effect::Renew { attempt, .. } => candidate.handle(now, Input::LeaseOver(attempt)),
                    Effect::Claim { attempt, term, after, cluster, .. } => {
                        assert!(term > after && term > seen, "{term:?} after {after:?}, {seen:?}");
                        candidate.handle(now, Input::Claimed { attempt, term, cluster, revision: 1 });
                    }
                    _ => {}
                }
            }
        }
    });
}
