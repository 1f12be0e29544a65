//! A client of this host's node daemon, over `daemon.sock` in its run dir. Blocking: it serves commands and the
//! start of a group, where there is nothing else to do meanwhile.

use rayless_net::{
    framing::{self, HEADER},
    unix::{self, ConnectError},
};
use rayless_proto::{
    codec,
    ids::{GroupId, NodeId, RequestId},
    limits::MAX_LOCAL_MESSAGE,
    v1::{
        control::{NeedHave, Refusal},
        local::{ClientMessage, ClientReply, ClientRequest, DaemonMessage, Identity},
        status::{NodeState, StatusReport},
    },
};
use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Why a request to the daemon came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there. Exit code 3.
    #[error("no rayless daemon answers at {}\nhint: start one with `rayless head` or `rayless join ADDRESS`, or name its directory with --run-dir", path.display())]
    NoDaemon {
        /// The socket tried.
        path: PathBuf,
    },
    /// The daemon closed the connection or said something that makes no sense.
    #[error("lost the local rayless daemon: {cause}")]
    Lost {
        /// One line.
        cause: String,
    },
    /// The daemon or the head refused.
    #[error("{}{}", refusal.cause, if refusal.hint.is_empty() { String::new() } else { format!("\nhint: {}", refusal.hint) })]
    Refused {
        /// Why.
        refusal: Box<Refusal>,
        /// The table, where resources are short.
        table: Option<NeedHave>,
    },
    /// The socket could not be used.
    #[error("cannot talk to the local rayless daemon: {0}")]
    Io(#[from] io::Error),
}

/// What the head holds a node of one of this client's groups for.
#[derive(Debug, Clone)]
pub(crate) struct Verdict {
    pub(crate) node: NodeId,
    pub(crate) state: NodeState,
    pub(crate) cause: String,
}

/// What the daemon says without having been asked.
#[derive(Debug)]
pub(crate) enum Unasked {
    Verdict(Verdict),
    KeeperStopped { group: GroupId, node: NodeId, stopped: bool },
}

impl Unasked {
    #[expect(clippy::result_large_err, reason = "the other reply is no error, and goes on at once")]
    fn of(reply: ClientReply) -> Result<Self, ClientReply> {
        match reply {
            ClientReply::NodeVerdict { node, state, cause, .. } => Ok(Self::Verdict(Verdict { node, state, cause })),
            ClientReply::KeeperStopped { group, node, stopped } => Ok(Self::KeeperStopped { group, node, stopped }),
            other => Err(other),
        }
    }
}

/// A connection to the local daemon.
#[derive(Debug)]
pub struct LocalClient {
    stream: UnixStream,
    input: Vec<u8>,
    next_request: RequestId,
    unasked: VecDeque<Unasked>,
}

impl LocalClient {
    /// Connects to `daemon.sock` in `run_dir`.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`] where nobody listens.
    pub fn connect(run_dir: &Path) -> Result<Self, ClientError> {
        let path = run_dir.join("daemon.sock");
        let stream = unix::connect_std(&path).map_err(|error| match error {
            ConnectError::NobodyThere(_) => ClientError::NoDaemon { path: path.clone() },
            ConnectError::Io { error, .. } => ClientError::Io(error),
        })?;
        Ok(Self { stream, input: Vec::new(), next_request: 0, unasked: VecDeque::new() })
    }

    /// Sends `body` and waits for its final answer; answers on the way (`Waiting`, `WaitingForHead`) go to `on_progress`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] for a refusal, [`ClientError::Lost`] where the daemon ended.
    pub fn request(
        &mut self,
        body: ClientRequest,
        on_progress: &mut dyn FnMut(&ClientReply),
    ) -> Result<ClientReply, ClientError> {
        let answer = self.request_while(body, None, &mut |news| {
            if let Some(news) = news {
                on_progress(news);
            }
            true
        })?;
        // Only a `false` of that closure ends it without an answer.
        answer.ok_or_else(|| ClientError::Lost { cause: "no answer".into() })
    }

    /// [`Self::request`] that also calls `on_progress` with `None` each `tick`, and gives up (`None`) where that returns `false`; the caller then
    /// drops the connection, which cancels the request.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn request_while(
        &mut self,
        body: ClientRequest,
        tick: Option<Duration>,
        on_progress: &mut dyn FnMut(Option<&ClientReply>) -> bool,
    ) -> Result<Option<ClientReply>, ClientError> {
        self.next_request += 1;
        let request = self.next_request;
        let message = codec::encode(&ClientMessage { request, body });
        let header = framing::header_of(message.len(), MAX_LOCAL_MESSAGE).map_err(|e| lost(&e))?;
        self.stream.write_all(&[&header[..], &message].concat()).map_err(|e| lost(&e))?;
        self.stream.set_read_timeout(tick)?;
        loop {
            while let Some(message) = self.next_message()? {
                let body = match Unasked::of(message.body) {
                    Ok(unasked) => {
                        self.unasked.push_back(unasked);
                        continue;
                    }
                    Err(body) => body,
                };
                match body {
                    _ if message.request != request => {}
                    ClientReply::Waiting(_) | ClientReply::WaitingForHead(_) => {
                        if !on_progress(Some(&body)) {
                            return Ok(None);
                        }
                    }
                    ClientReply::Refused { refusal, table } => {
                        return Err(ClientError::Refused { refusal: Box::new(refusal), table });
                    }
                    answer => return Ok(Some(answer)),
                }
            }
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Lost { cause: "it closed the connection".into() }),
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock || error.kind() == io::ErrorKind::Interrupted =>
                {
                    if !on_progress(None) {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(lost(&error)),
            }
        }
    }

    fn next_message(&mut self) -> Result<Option<DaemonMessage>, ClientError> {
        let Some(header) = self.input.first_chunk::<HEADER>() else { return Ok(None) };
        let length = framing::length_of(*header, MAX_LOCAL_MESSAGE).map_err(|e| lost(&e))?;
        let Some(frame) = self.input.get(HEADER..HEADER + length) else { return Ok(None) };
        let message = codec::decode::<DaemonMessage>(frame).map_err(|e| lost(&e))?;
        self.input.drain(..HEADER + length);
        Ok(Some(message))
    }

    /// What the daemon is.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn identify(&mut self) -> Result<Identity, ClientError> {
        match self.request(ClientRequest::Identify, &mut |_| {})? {
            ClientReply::Identity(identity) => Ok(identity),
            _ => Err(unexpected()),
        }
    }

    /// The state of the cluster.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn status(&mut self) -> Result<StatusReport, ClientError> {
        match self.request(ClientRequest::Status, &mut |_| {})? {
            ClientReply::Status(report) => Ok(report),
            _ => Err(unexpected()),
        }
    }

    /// Ends a group, or all groups of the cluster.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn stop_group(&mut self, group: Option<GroupId>) -> Result<(), ClientError> {
        match self.request(ClientRequest::StopGroup(group), &mut |_| {})? {
            ClientReply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// [`Self::stop_group`] that waits for `limit` at most: `false` where the answer was not there by then.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn stop_group_within(&mut self, group: GroupId, limit: Duration) -> Result<bool, ClientError> {
        let until = Instant::now() + limit;
        let tick = Duration::from_millis(50).min(limit.max(Duration::from_millis(1)));
        let body = ClientRequest::StopGroup(Some(group));
        Ok(self.request_while(body, Some(tick), &mut |_| Instant::now() < until)?.is_some())
    }

    /// For an epoll set.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// What has come unasked; without waiting. An error where the daemon is gone.
    pub(crate) fn take_unasked(&mut self) -> Result<Vec<Unasked>, ClientError> {
        self.stream.set_nonblocking(true)?;
        let mut chunk = [0; 16 << 10];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Lost { cause: "it closed the connection".into() }),
                Ok(count) => self.input.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(&error)),
            }
        }
        while let Some(message) = self.next_message()? {
            self.unasked.extend(Unasked::of(message.body));
        }
        Ok(self.unasked.drain(..).collect())
    }
}

fn lost(error: &dyn std::error::Error) -> ClientError {
    ClientError::Lost { cause: error.to_string() }
}

fn unexpected() -> ClientError {
    ClientError::Lost { cause: "it gave an answer to another question".into() }
}
