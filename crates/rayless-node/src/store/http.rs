//! As much of HTTP/1.1 as etcd's JSON gateway needs: one request after the other on a kept connection, and one whose answer
//! never ends. Bodies are bounded; nothing is decoded that is longer.

use super::StoreError;
use rustix::net::sockopt;
use rustls::{ClientConfig, pki_types::ServerName};
use std::{fmt, io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// Longest head of an answer.
const MAX_HEAD: usize = 16 << 10;
/// Longest body, or line of an endless one: a seat has some hundred bytes, and there are few.
const MAX_BODY: usize = 1 << 20;
/// A peer that is gone without a word is found out on an idle connection after this, and three more seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// A connection to one server of the store.
pub(crate) struct Connection {
    wire: Box<dyn Wire>,
    host: String,
    /// Read and not used yet.
    buffer: Vec<u8>,
    rest: Rest,
}

/// What of the present body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// So many bytes.
    Bytes(usize),
    /// The rest of a chunk, then further ones.
    Chunk(usize),
    /// Nothing.
    Done,
}

impl Connection {
    /// Connects to `host:port`, with TLS where a configuration is given.
    pub(crate) async fn open(host_port: &str, tls: Option<&Arc<ClientConfig>>) -> Result<Self, StoreError> {
        let stream = TcpStream::connect(host_port).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        // Best effort: without it a lost server shows when the next renewal is not answered.
        let _ = sockopt::set_socket_keepalive(&stream, true);
        let _ = sockopt::set_tcp_keepidle(&stream, KEEP_ALIVE);
        let _ = sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(1));
        let _ = sockopt::set_tcp_keepcnt(&stream, 3);
        let wire: Box<dyn Wire> = match tls {
            None => Box::new(stream),
            Some(config) => {
                let host = host_port.rsplit_once(':').map_or(host_port, |(host, _)| host);
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(unreachable)?;
                Box::new(TlsConnector::from(config.clone()).connect(name, stream).await.map_err(unreachable)?)
            }
        };
        Ok(Self { wire, host: host_port.to_owned(), buffer: Vec::new(), rest: Rest::Done })
    }

    /// A connection over anything that bytes come from.
    #[cfg(any(test, fuzzing))]
    pub(super) fn over(wire: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        Self { wire: Box::new(wire), host: "x".to_owned(), buffer: Vec::new(), rest: Rest::Done }
    }

    /// Sends a request and reads the answer's head: its status.
    pub(crate) async fn ask(&mut self, path: &str, body: &str, login: Option<&str>) -> Result<u16, StoreError> {
        let login = login.map(|token| format!("Authorization: {token}\r\n")).unwrap_or_default();
        let request = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\n{login}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.host,
            body.len()
        );
        self.wire.write_all(request.as_bytes()).await.map_err(unreachable)?;
        self.wire.flush().await.map_err(unreachable)?;
        let end = loop {
            if let Some(at) = find(&self.buffer, b"\r\n\r\n") {
                break at;
            }
            if self.buffer.len() > MAX_HEAD {
                return Err(odd("the head of its answer is too long"));
            }
            self.fill().await?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end + 4);
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok());
        let status = status.ok_or_else(|| odd("it does not speak HTTP/1.1"))?;
        self.rest = Rest::Bytes(0);
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                let length = value.parse().ok().filter(|length| *length <= MAX_BODY);
                self.rest = Rest::Bytes(length.ok_or_else(|| odd("its answer is too long"))?);
            } else if name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
                self.rest = Rest::Chunk(0);
                break;
            }
        }
        Ok(status)
    }

    /// The whole body of the answer.
    pub(crate) async fn body(&mut self) -> Result<Vec<u8>, StoreError> {
        let mut body = Vec::new();
        while let Some(part) = self.part().await? {
            body.extend_from_slice(&part);
            if body.len() > MAX_BODY {
                return Err(odd("its answer is too long"));
            }
        }
        Ok(body)
    }

    /// The next line of an endless body; `held` keeps what has come of it, so that the wait may be dropped.
    pub(crate) async fn line(&mut self, held: &mut Vec<u8>) -> Result<Vec<u8>, StoreError> {
        // What has come before has been looked through, so that a line in a million pieces costs no more than one in few.
        let mut looked = 0;
        loop {
            if let Some(at) = held[looked..].iter().position(|byte| *byte == b'\n').map(|at| looked + at) {
                let mut line: Vec<u8> = held.drain(..=at).collect();
                line.pop();
                return Ok(line);
            }
            if held.len() > MAX_BODY {
                return Err(odd("a line of its answer is too long"));
            }
            looked = held.len();
            match self.part().await? {
                Some(part) => held.extend_from_slice(&part),
                None => return Err(odd("it ended its answer")),
            }
        }
    }

    /// Some more of the body; `None` at its end.
    async fn part(&mut self) -> Result<Option<Vec<u8>>, StoreError> {
        loop {
            match self.rest {
                Rest::Done | Rest::Bytes(0) => {
                    self.rest = Rest::Done;
                    return Ok(None);
                }
                Rest::Bytes(left) if !self.buffer.is_empty() => {
                    let take = left.min(self.buffer.len());
                    self.rest = Rest::Bytes(left - take);
                    return Ok(Some(self.buffer.drain(..take).collect()));
                }
                // The line end of the chunk before, if any, then the length of the next.
                Rest::Chunk(0) => {
                    let at = if self.buffer.starts_with(b"\r\n") { 2 } else { 0 };
                    let Some(end) = find(&self.buffer[at..], b"\r\n").map(|end| at + end) else {
                        if self.buffer.len() > MAX_HEAD {
                            return Err(odd("a chunk has no length"));
                        }
                        self.fill().await?;
                        continue;
                    };
                    let text = String::from_utf8_lossy(&self.buffer[at..end]);
                    let text = text.split(';').next().unwrap_or_default().trim();
                    let length = usize::from_str_radix(text, 16).ok().filter(|length| *length <= MAX_BODY);
                    let length = length.ok_or_else(|| odd("a chunk's length makes no sense"))?;
                    if length > 0 {
                        self.buffer.drain(..end + 2);
                        self.rest = Rest::Chunk(length);
                        continue;
                    }
                    // Trailers, up to an empty line.
                    match find(&self.buffer[end..], b"\r\n\r\n") {
                        Some(last) => {
                            self.buffer.drain(..end + last + 4);
                            self.rest = Rest::Done;
                        }
                        None if self.buffer.len() > MAX_HEAD => return Err(odd("its trailers are too long")),
                        None => self.fill().await?,
                    }
                }
                Rest::Chunk(left) if !self.buffer.is_empty() => {
                    let take = left.min(self.buffer.len());
                    self.rest = Rest::Chunk(left - take);
                    return Ok(Some(self.buffer.drain(..take).collect()));
                }
                Rest::Bytes(_) | Rest::Chunk(_) => self.fill().await?,
            }
        }
    }

    /// Reads what there is. May be dropped while it waits: what was read is in the buffer.
    async fn fill(&mut self) -> Result<(), StoreError> {
        match self.wire.read_buf(&mut self.buffer).await.map_err(unreachable)? {
            0 => Err(StoreError::Unreachable("it closed the connection".to_owned())),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("host", &self.host).finish_non_exhaustive()
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn unreachable(error: impl fmt::Display) -> StoreError {
    StoreError::Unreachable(error.to_string())
}

fn odd(what: &str) -> StoreError {
    StoreError::Odd(what.to_owned())
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        Self::Unreachable(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    /// An answer that comes in pieces of every size.
    async fn answered(bytes: &[u8], piece: usize) -> Result<(u16, Vec<u8>), StoreError> {
        let (near, mut far) = duplex(1 << 16);
        let mut connection = Connection::over(near);
        let bytes = bytes.to_vec();
        let server = tokio::spawn(async move {
            for part in bytes.chunks(piece) {
                far.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
            // What is asked is not looked at.
            far
        });
        let status = connection.ask("/", "{}", None).await?;
        let body = connection.body().await;
        drop(server.await);
        body.map(|body| (status, body))
    }

    #[tokio::test]
    async fn whole_and_chunked_answers_are_read_however_they_are_cut() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
        let chunked = b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=1\r\nlo\r\n0\r\nGrpc: x\r\n\r\n";
        for piece in [1, 2, 3, 7, 1000] {
            assert_eq!(answered(whole, piece).await, Ok((200, b"hello".to_vec())));
            assert_eq!(answered(chunked, piece).await, Ok((404, b"hello".to_vec())));
        }
    }

    #[tokio::test]
    async fn answers_that_make_no_sense_are_refused() {
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "y".repeat(MAX_HEAD + 10));
        for bad in [
            "SSH-2.0-OpenSSH\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
            &long,
        ] {
            assert!(matches!(answered(bad.as_bytes(), 1000).await, Err(StoreError::Odd(_))), "{bad}");
        }
    }
}
