//! Local clients: `daemon.sock`, a reader and a writer task for each connection.

use super::event::{ClientId, Event, Events};
use rayless_net::{
    framing::{FrameReader, write_frame},
    unix,
};
use rayless_proto::{
    codec,
    limits::{MAX_CLIENT_BACKLOG, MAX_LOCAL_CLIENTS, MAX_LOCAL_MESSAGE},
    v1::local::{ClientMessage, DaemonMessage},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
};

/// A client that does not take its answers for this long is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Accepts clients for ever.
pub(crate) async fn accept(listener: UnixListener, events: Events) {
    let room = Arc::new(Semaphore::new(MAX_LOCAL_CLIENTS));
    let mut next: ClientId = 0;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: others may give some back.
                tracing::warn!(%error, "cannot accept a local client");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!("{MAX_LOCAL_CLIENTS} local clients are connected already, one more is turned away");
            continue;
        };
        let peer = match unix::peer_credentials(&stream) {
            Ok(peer) if peer.is_trusted() => peer,
            Ok(peer) => {
                tracing::warn!(uid = peer.uid, pid = peer.pid, "a client of another user is turned away");
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, "a client that the kernel cannot name is turned away");
                continue;
            }
        };
        next += 1;
        let client = next;
        let events = events.clone();
        tokio::spawn(async move {
            serve(stream, client, peer.pid, &events).await;
            let _ = events.send(Event::ClientGone { client }).await;
            drop(permit);
        });
    }
}

async fn serve(stream: UnixStream, client: ClientId, pid: u32, events: &Events) {
    let (read, mut write) = stream.into_split();
    let (outbox, mut answers) = mpsc::channel::<DaemonMessage>(MAX_CLIENT_BACKLOG);
    if events.send(Event::ClientOpened { client, pid, outbox }).await.is_err() {
        return;
    }
    let writer = async move {
        while let Some(answer) = answers.recv().await {
            let bytes = codec::encode(&answer);
            match tokio::time::timeout(WRITE_LIMIT, write_frame(&mut write, &bytes, MAX_LOCAL_MESSAGE)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            }
        }
    };
    let reader = async move {
        let mut frames = FrameReader::new(read, MAX_LOCAL_MESSAGE);
        while let Ok(frame) = frames.next().await {
            let message = match codec::decode::<ClientMessage>(&frame) {
                Ok(message) => message,
                Err(error) => {
                    tracing::warn!(pid, %error, "a local client is dropped");
                    return;
                }
            };
            if events.send(Event::ClientSaid { client, message }).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = writer => {}
        () = reader => {}
    }
}
