//! How a connection ends, and how that is said.

use super::transport::IDLE_TIMEOUT;
use quinn::{ConnectionError, VarInt};
use rayless_proto::hello::HelloError;

/// Codes by which a side ends a connection. Part of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseCode {
    /// In order.
    Done,
    /// No common protocol version.
    Version,
    /// The first frame was no `Hello`.
    NotRayless,
    /// This identity may not open this kind of connection.
    NotAllowed,
    /// The peer was told a reason (refused, fenced, …); the text has it.
    Refused,
    /// A message was malformed or too long.
    Malformed,
    /// A newer connection of the same node took over.
    Replaced,
    /// A later build's.
    Other(u32),
}

impl CloseCode {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Done => 0,
            Self::Version => 1,
            Self::NotRayless => 2,
            Self::NotAllowed => 3,
            Self::Refused => 4,
            Self::Malformed => 5,
            Self::Replaced => 6,
            Self::Other(number) => number,
        }
    }

    fn of(number: VarInt) -> Self {
        match number.into_inner() {
            0 => Self::Done,
            1 => Self::Version,
            2 => Self::NotRayless,
            3 => Self::NotAllowed,
            4 => Self::Refused,
            5 => Self::Malformed,
            6 => Self::Replaced,
            other => Self::Other(u32::try_from(other).unwrap_or(u32::MAX)),
        }
    }
}

/// Why a session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseCause {
    /// The peer said so.
    #[error("closed by the peer{}", colon(reason))]
    ByPeer {
        /// Its code.
        code: CloseCode,
        /// Its words; may be empty.
        reason: String,
    },
    /// This side said so.
    #[error("closed by this side")]
    Local,
    /// Nothing was heard for [`IDLE_TIMEOUT`].
    #[error("silent for {} s", IDLE_TIMEOUT.as_secs())]
    Silent,
    /// The peer's process is another one now: it does not know this connection.
    #[error("the peer was restarted")]
    Restarted,
    /// The peer's certificate was not accepted, or ours was not.
    #[error("the cluster token differs")]
    WrongToken,
    /// The peer sent what the protocol does not allow.
    #[error("protocol violation: {0}")]
    Violation(String),
}

pub(super) fn close(connection: &quinn::Connection, code: CloseCode, reason: &str) {
    let line = reason.lines().next().unwrap_or_default();
    connection.close(VarInt::from_u32(code.number()), line.as_bytes());
}

pub(super) fn code_of(error: &HelloError) -> CloseCode {
    match error {
        HelloError::NotHello => CloseCode::NotRayless,
        HelloError::Version { .. } => CloseCode::Version,
    }
}

pub(super) fn cause_of(error: &ConnectionError) -> CloseCause {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            CloseCause::ByPeer { code: CloseCode::of(close.error_code), reason: printable(&close.reason) }
        }
        ConnectionError::LocallyClosed => CloseCause::Local,
        ConnectionError::TimedOut => CloseCause::Silent,
        ConnectionError::Reset => CloseCause::Restarted,
        ConnectionError::TransportError(error) if is_wrong_token(error.code) => CloseCause::WrongToken,
        ConnectionError::ConnectionClosed(close) if is_wrong_token(close.error_code) => CloseCause::WrongToken,
        ConnectionError::ConnectionClosed(close) => {
            CloseCause::Violation(format!("{} {}", close.error_code, printable(&close.reason)).trim().to_owned())
        }
        other => CloseCause::Violation(other.to_string()),
    }
}

/// TLS alerts (RFC 8446, section 6) that say: your certificate, or the lack of one, is not accepted.
fn is_wrong_token(code: quinn::TransportErrorCode) -> bool {
    const ALERTS: [u64; 6] = [
        42,  // bad_certificate
        46,  // certificate_unknown
        48,  // unknown_ca
        49,  // access_denied
        51,  // decrypt_error
        116, // certificate_required
    ];
    u64::from(code).checked_sub(0x100).is_some_and(|alert| ALERTS.contains(&alert))
}

/// A peer's words on one line, without what could play with a terminal.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).take(256).collect()
}

fn colon(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}
