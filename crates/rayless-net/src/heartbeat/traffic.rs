//! The traffic of control sessions: from the main thread's queue to the peer, from the peer to the main thread's events.

use super::{
    event::NetEvent,
    session::{ControlSession, Out, SessionId},
};
use crate::{
    counters::{Counters, Refused},
    quic::{CloseCause, CloseCode, Link, Receiver, Sender, Session},
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};
use tokio::{sync::mpsc, task::JoinHandle};

/// Starts the traffic of `session`: an `Opened` event, `Message`s, and a `Closed` in the end. The task ends after that. With
/// `older` nothing is said before that task has ended.
pub(super) fn run(
    id: SessionId,
    session: Session,
    older: Option<JoinHandle<()>>,
    events: mpsc::Sender<NetEvent>,
    counters: Arc<Counters>,
) -> (ControlSession, JoinHandle<()>) {
    let Session { link, sender, receiver } = session;
    let (control, outgoing, queued) = ControlSession::new(id, link.clone());
    let opened = NetEvent::Opened(control.clone());
    let task = tokio::spawn(async move {
        if let Some(older) = older {
            let _ = older.await;
        }
        if events.send(opened).await.is_err() {
            return; // the main thread is gone, and with it the process
        }
        let writer = tokio::spawn(write(link.clone(), sender, outgoing, queued));
        let cause = read(id, receiver, &events).await;
        if let CloseCause::Violation(what) = &cause {
            counters.report(Refused::Malformed, link.peer_address(), what);
        }
        writer.abort();
        link.close(CloseCode::Done, "");
        let _ = events.send(NetEvent::Closed { session: id, cause }).await;
    });
    (control, task)
}

async fn read(id: SessionId, mut receiver: Receiver, events: &mpsc::Sender<NetEvent>) -> CloseCause {
    loop {
        match receiver.receive().await {
            // While the main thread does not take it, the peer is not read further: QUIC's window holds it back.
            Ok(message) => {
                if events.send(NetEvent::Message { session: id, message }).await.is_err() {
                    return CloseCause::Local;
                }
            }
            Err(cause) => return cause,
        }
    }
}

async fn write(link: Link, mut sender: Sender, mut outgoing: mpsc::UnboundedReceiver<Out>, queued: Arc<AtomicUsize>) {
    while let Some(out) = outgoing.recv().await {
        match out {
            Out::Message(message) => {
                let sent = sender.send(&message).await;
                queued.fetch_sub(message.len(), Relaxed);
                if let Err(cause) = sent {
                    // Over already, or a message of our own that no peer would take: the reader tells.
                    link.close(CloseCode::Malformed, &cause.to_string());
                    return;
                }
            }
            Out::Close(code, reason) => {
                sender.finish().await;
                link.close(code, &reason);
                return;
            }
        }
    }
}
