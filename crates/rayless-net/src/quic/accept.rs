//! The accepting side of handshakes, where strangers are met.

use super::{
    close::{CloseCause, CloseCode, cause_of, close},
    session::{Session, peer},
};
use crate::{
    counters::{Counters, Refused},
    framing::{FrameReader, write_frame},
    half_open::HalfOpen,
};
use quinn::ConnectionError;
use rayless_proto::{
    hello::{Hello, Purpose},
    limits::{HANDSHAKE_TIMEOUT, MAX_HALF_OPEN, MAX_HELLO},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, time::timeout};

/// From so many handshakes in progress on, a stranger must prove its address first.
const PROVE_ADDRESS_FROM: usize = 16;

/// Where accepted sessions come out. Dropping it ends the acceptance.
#[derive(Debug)]
pub struct Acceptor {
    sessions: mpsc::Receiver<Session>,
    task: tokio::task::JoinHandle<()>,
}

impl Acceptor {
    /// Takes callers of `endpoint`.
    pub(super) fn open(endpoint: quinn::Endpoint, counters: Arc<Counters>) -> Self {
        let (ready, sessions) = mpsc::channel(MAX_HALF_OPEN);
        Self { sessions, task: tokio::spawn(accept_all(endpoint, counters, ready)) }
    }

    /// The next session; `None` once the endpoint is closed. May be dropped while waiting.
    pub async fn next(&mut self) -> Option<Session> {
        self.sessions.recv().await
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept_all(endpoint: quinn::Endpoint, counters: Arc<Counters>, ready: mpsc::Sender<Session>) {
    let mut half_open = HalfOpen::new(MAX_HALF_OPEN, counters.clone());
    let mut pace = Pace::new();
    while let Some(incoming) = endpoint.accept().await {
        if !pace.allows(Instant::now()) {
            // Not a word back; a true peer asks again.
            incoming.ignore();
            counters.refuse(Refused::TooMany);
            continue;
        }
        if half_open.len() >= PROVE_ADDRESS_FROM && !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        let counters = counters.clone();
        let ready = ready.clone();
        let task = tokio::spawn(async move {
            let address = incoming.remote_address();
            match timeout(HANDSHAKE_TIMEOUT, welcome(incoming)).await {
                Ok(Ok(session)) => {
                    counters.accept();
                    let _ = ready.send(session).await;
                }
                Ok(Err((why, detail))) => counters.report(why, address, &detail),
                Err(_) => counters.report(Refused::Unfinished, address, "handshake not finished in time"),
            }
        });
        half_open.admit(task.abort_handle());
    }
}

/// How many handshakes are begun. Each costs half a millisecond of cryptography, here with real-time priority, and strangers
/// must not be able to buy all of it.
struct Pace {
    left: f64,
    counted: Instant,
}

impl Pace {
    const PER_SECOND: f64 = 500.0;
    const AT_ONCE: f64 = 250.0;

    fn new() -> Self {
        Self { left: Self::AT_ONCE, counted: Instant::now() }
    }

    fn allows(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.counted = now;
        self.left = (self.left + elapsed * Self::PER_SECOND).min(Self::AT_ONCE);
        let allowed = self.left >= 1.0;
        self.left -= f64::from(u8::from(allowed));
        allowed
    }
}

/// The accepting side of a handshake.
async fn welcome(incoming: quinn::Incoming) -> Result<Session, (Refused, String)> {
    let broken = |error: &ConnectionError| match cause_of(error) {
        CloseCause::WrongToken => (Refused::WrongToken, "the cluster token differs".to_owned()),
        CloseCause::ByPeer { code: CloseCode::Version, reason } => (Refused::Version, reason),
        cause => (Refused::Unfinished, cause.to_string()),
    };
    let connection = incoming.accept().map_err(|e| broken(&e))?.await.map_err(|e| broken(&e))?;
    let refuse = |why, code, text: String| {
        close(&connection, code, &text);
        (why, text)
    };
    let peer = peer(&connection).ok_or_else(|| (Refused::WrongToken, "no certificate".to_owned()))?;
    if peer.is_delegate {
        return Err(refuse(Refused::NotAllowed, CloseCode::NotAllowed, "only nodes may join".to_owned()));
    }
    let (mut send, receive) = connection.accept_bi().await.map_err(|e| broken(&e))?;
    let mut receive = FrameReader::new(receive, MAX_HELLO);
    let frame = match receive.next().await {
        Ok(frame) => frame,
        Err(error) => {
            return Err(match connection.close_reason() {
                Some(cause) => broken(&cause),
                None => refuse(Refused::NotRayless, CloseCode::NotRayless, error.to_string()),
            });
        }
    };
    let hello = match Hello::decode(&frame) {
        Ok(hello) => hello,
        Err(error) => return Err(refuse(Refused::NotRayless, CloseCode::NotRayless, error.to_string())),
    };
    // Ours goes out in any case: each side can then name both.
    let _ = write_frame(&mut send, &Hello::of_this_build(hello.purpose).encode(), MAX_HELLO).await;
    let version = match hello.agree() {
        Ok(version) => version,
        Err(error) => {
            // Closing drops what is on its way; the peer closes when it has read our hello.
            let _ = timeout(Duration::from_secs(1), connection.closed()).await;
            return Err(refuse(Refused::Version, CloseCode::Version, error.to_string()));
        }
    };
    if !matches!(hello.purpose, Purpose::Control | Purpose::Heartbeat) {
        let text = "this kind of session goes over TCP".to_owned();
        return Err(refuse(Refused::NotAllowed, CloseCode::NotAllowed, text));
    }
    Ok(Session::new(connection, send, receive, peer, hello, version))
}
