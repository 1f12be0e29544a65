//! What can go wrong with a link. Every error names the link, and with it both ranks.

use crate::{name::LinkName, wait::Stop};

/// The caller's fault, found before anything left or was consumed: the link stays usable.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{link}: {reason}")]
pub struct Rejected {
    /// The link.
    pub link: LinkName,
    /// What kind of fault.
    pub kind: RejectedKind,
    /// The fault, with the offending value.
    pub reason: String,
}

/// Kinds of caller's faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RejectedKind {
    /// A tensor's elements do not lie one after the other.
    NotContiguous,
    /// The peer cannot take this element type.
    DType,
    /// Over a limit: of bytes, of tensors, of a name.
    TooLarge,
    /// Sizes, shapes and buffers that contradict each other.
    Mismatch,
    /// A GPU that cannot be used, or memory that is not in it.
    Device,
    /// A call that does not fit the state of the link (a payload without its header).
    OutOfTurn,
}

/// The link is lost for good: every later call returns the same error. The group goes down with it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{link} was lost at message {sequence}: {cause}")]
pub struct Lost {
    /// The link.
    pub link: LinkName,
    /// The message that was being moved, counted from 0.
    pub sequence: u64,
    /// What kind of loss.
    pub kind: LostKind,
    /// One line of cause.
    pub cause: String,
}

/// Kinds of losses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LostKind {
    /// The peer's process ended, or its connection was reset or cut.
    PeerGone,
    /// The peer found the fault and said so.
    PeerReported,
    /// The two ends are at different messages or steps.
    Crossed,
    /// Bytes that cannot have been sent: a header or a checksum that does not fit.
    Corrupt,
    /// A call stopped in the middle of a message, so the rest of the stream means nothing any more.
    Abandoned,
    /// The operating system or the device refused an operation.
    System,
}

/// Why a message was not sent.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SendError {
    /// The caller's fault; nothing was sent and the link stays usable.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// The wait ended before the first byte left: the link stays usable.
    #[error("{link}: sending message {sequence} {stop}; nothing was sent")]
    Stopped {
        /// The link.
        link: LinkName,
        /// The message, counted from 0.
        sequence: u64,
        /// Deadline or cancellation.
        stop: Stop,
    },
    /// This end was closed before.
    #[error("{link}: this end is closed")]
    Closed {
        /// The link.
        link: LinkName,
    },
    /// The link is lost.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// Why a message was not received.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecvError {
    /// The caller's fault; the message is still there and the link stays usable.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// The wait ended before anything was consumed: the link stays usable, and the call can be made again.
    #[error("{link}: waiting for message {sequence} {stop}")]
    Stopped {
        /// The link.
        link: LinkName,
        /// The message, counted from 0.
        sequence: u64,
        /// Deadline or cancellation.
        stop: Stop,
    },
    /// The sender closed its end after a whole message, or this end was closed.
    #[error("{link} is closed after {messages} messages")]
    Closed {
        /// The link.
        link: LinkName,
        /// Messages received.
        messages: u64,
    },
    /// The link is lost.
    #[error(transparent)]
    Lost(#[from] Lost),
}

/// Why a link was not established. Nothing is left behind on either side.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EstablishError {
    /// The other side has another ticket, link or limit, and said so, or this side found it out.
    #[error("{link} over {transport}: refused: {reason}")]
    Refused {
        /// The link.
        link: LinkName,
        /// The transport's name.
        transport: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// The handshake did not end in time.
    #[error("{link} over {transport}: no answer from the peer within {within:?}")]
    TimedOut {
        /// The link.
        link: LinkName,
        /// The transport's name.
        transport: &'static str,
        /// The time given.
        within: std::time::Duration,
    },
    /// The transport cannot be used here, or broke during the handshake.
    #[error("{link} over {transport}: {cause}")]
    Failed {
        /// The link.
        link: LinkName,
        /// The transport's name.
        transport: &'static str,
        /// One line of cause.
        cause: String,
    },
}

/// What a transport reports; the link adds its name and the message's number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransportError {
    /// What kind of loss.
    pub kind: LostKind,
    /// One line of cause.
    pub cause: String,
}

impl TransportError {
    /// The peer is gone.
    pub fn gone(cause: impl Into<String>) -> Self {
        Self { kind: LostKind::PeerGone, cause: cause.into() }
    }

    /// The peer told a reason.
    pub fn reported(reason: &[u8]) -> Self {
        Self { kind: LostKind::PeerReported, cause: format!("the peer reported: {}", String::from_utf8_lossy(reason)) }
    }

    /// The system refused `call`.
    pub fn system(call: &str, errno: impl std::fmt::Display) -> Self {
        Self { kind: LostKind::System, cause: format!("{call}: {errno}") }
    }
}
