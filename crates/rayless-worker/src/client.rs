//! A client of this host's node daemon, over `daemon.sock` in its run dir. Blocking: it serves commands and the
//! start of a group, where there is nothing else to do meanwhile.

use rayless_proto::{
    ids::GroupId,
    v1::{
        control::{NeedHave, Refusal},
        local::{ClientReply, ClientRequest, Identity},
        status::StatusReport,
    },
};
use std::{
    io,
    path::{Path, PathBuf},
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
        refusal: Refusal,
        /// The table, where resources are short.
        table: Option<NeedHave>,
    },
    /// The socket could not be used.
    #[error("cannot talk to the local rayless daemon: {0}")]
    Io(#[from] io::Error),
}

/// A connection to the local daemon.
#[derive(Debug)]
pub struct LocalClient {}

impl LocalClient {
    /// Connects to `daemon.sock` in `run_dir`.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`] where nobody listens.
    pub fn connect(_run_dir: &Path) -> Result<Self, ClientError> {
        unimplemented!()
    }

    /// Sends `body` and waits for its final answer; answers on the way (`Waiting`, `WaitingForHead`) go to `on_progress`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] for a refusal, [`ClientError::Lost`] where the daemon ended.
    pub fn request(
        &mut self,
        _body: ClientRequest,
        _on_progress: &mut dyn FnMut(&ClientReply),
    ) -> Result<ClientReply, ClientError> {
        unimplemented!()
    }

    /// What the daemon is.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn identify(&mut self) -> Result<Identity, ClientError> {
        unimplemented!()
    }

    /// The state of the cluster.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn status(&mut self) -> Result<StatusReport, ClientError> {
        unimplemented!()
    }

    /// Ends a group, or all groups of the cluster.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn stop_group(&mut self, _group: Option<GroupId>) -> Result<(), ClientError> {
        unimplemented!()
    }
}
