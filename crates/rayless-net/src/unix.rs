//! Unix sockets of one user: bind, connect, know the caller, pass descriptors.
//!
//! A socket's path may be longer than the 107 bytes that the kernel takes: it is then reached through
//! `/proc/self/fd/<directory>/<name>`. A socket is private (mode 0600) from the moment it exists.

use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{self as rfs, FlockOperation, Mode, OFlags},
    io::Errno,
    net::{
        self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    },
};
use std::{
    ffi::OsString,
    fs,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
};

/// Bytes of a path that fit a socket address, less the final zero.
const MAX_PATH: usize = 107;
/// Descriptors that travel with one message.
pub const MAX_FDS: usize = 8;

/// A socket could not be opened for callers.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody alive listens there.
    #[error("{0} is in use by a running process\nhint: stop it, or give this one another --run-dir")]
    InUse(PathBuf),
    /// The path cannot be used.
    #[error("cannot listen on {path}: {error}")]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
}

/// A socket could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no socket, or nobody listens on it any more.
    #[error("nobody listens on {0}")]
    NobodyThere(PathBuf),
    /// The path cannot be used.
    #[error("cannot connect to {path}: {error}")]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
}

/// The process at the other end, as the kernel saw it connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Its process; of the listener, for the connecting side.
    pub pid: u32,
    /// Its effective user.
    pub uid: u32,
}

impl PeerCredentials {
    /// Whether it may talk to us: it runs as the same user, or as root.
    pub fn is_trusted(&self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// Listens on `path`, for its owner only. A socket file that a dead process left is replaced; its directory must exist.
/// Two processes doing this at once do not take each other's socket away.
///
/// # Errors
/// See [`BindError`].
///
/// # Panics
/// Outside of a tokio runtime.
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let io_error = |error| BindError::Io { path: path.to_owned(), error };
    let listener = bind_std(path)?;
    listener.set_nonblocking(true).map_err(io_error)?;
    UnixListener::from_std(listener).map_err(io_error)
}

/// [`bind`] for a thread without tokio.
///
/// # Errors
/// See [`BindError`].
pub fn bind_std(path: &Path) -> Result<StdListener, BindError> {
    let io_error = |error: io::Error| BindError::Io { path: path.to_owned(), error };
    let place = Place::of(path).map_err(io_error)?;
    // Held until the socket listens: between finding a stale socket and replacing it nobody else may.
    rfs::flock(&place.directory, FlockOperation::LockExclusive).map_err(|e| io_error(e.into()))?;
    let bound = match place.bind() {
        Err(Errno::ADDRINUSE) => {
            match StdStream::connect(&place.address) {
                Ok(_) => return Err(BindError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(io_error(error)),
            }
            // A plain file refuses connections too; that one is not ours to remove.
            if !fs::symlink_metadata(&place.address).map_err(io_error)?.file_type().is_socket() {
                return Err(io_error(io::Error::new(io::ErrorKind::AlreadyExists, "it is there and is no socket")));
            }
            fs::remove_file(&place.address).map_err(io_error)?;
            place.bind()
        }
        other => other,
    };
    bound.map(StdListener::from).map_err(|e| io_error(e.into()))
}

/// Connects to `path`.
///
/// # Errors
/// See [`ConnectError`].
pub async fn connect(path: &Path) -> Result<UnixStream, ConnectError> {
    let io_error = |error| ConnectError::Io { path: path.to_owned(), error };
    let place = Place::of(path).map_err(|error| nobody_or(path, error))?;
    loop {
        match UnixStream::connect(&place.address).await {
            Ok(stream) => return Ok(stream),
            // The listener's queue is full, and there is no event for room in it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
            Err(error) if is_nobody(&error) => return Err(ConnectError::NobodyThere(path.to_owned())),
            Err(error) => return Err(io_error(error)),
        }
    }
}

/// [`connect`] for a thread without tokio; blocking.
///
/// # Errors
/// See [`ConnectError`].
pub fn connect_std(path: &Path) -> Result<StdStream, ConnectError> {
    let place = Place::of(path).map_err(|error| nobody_or(path, error))?;
    StdStream::connect(&place.address).map_err(|error| nobody_or(path, error))
}

/// Who is at the other end.
///
/// # Errors
/// The descriptor is not a connected Unix socket.
pub fn peer_credentials(stream: impl AsFd) -> io::Result<PeerCredentials> {
    let credentials = net::sockopt::socket_peercred(stream)?;
    let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).unwrap_or(0);
    Ok(PeerCredentials { pid, uid: credentials.uid.as_raw() })
}

/// Sends `bytes` (at least one) with up to [`MAX_FDS`] descriptors; returns how many bytes went. The descriptors
/// travel with the first of them.
///
/// # Errors
/// The system's.
pub async fn send_fds(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    stream.async_io(Interest::WRITABLE, || send_fds_now(stream, bytes, fds)).await
}

/// Sends one descriptor with one byte.
///
/// # Errors
/// The system's.
pub async fn send_fd(stream: &UnixStream, byte: u8, fd: BorrowedFd<'_>) -> io::Result<()> {
    send_fds(stream, &[byte], &[fd]).await.map(drop)
}

/// Receives up to `bytes.len()` bytes and the descriptors with them (closed at exec); 0 bytes: the peer closed.
///
/// # Errors
/// The system's; `InvalidData` where more than [`MAX_FDS`] descriptors came.
pub async fn recv_fds(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    stream.async_io(Interest::READABLE, || recv_fds_now(stream, bytes)).await
}

/// Receives one byte with exactly one descriptor.
///
/// # Errors
/// `UnexpectedEof` where the peer closed, `InvalidData` where not one descriptor came, else the system's.
pub async fn recv_fd(stream: &UnixStream) -> io::Result<(u8, OwnedFd)> {
    let mut byte = [0];
    let (count, mut fds) = recv_fds(stream, &mut byte).await?;
    match (count, fds.pop(), fds.is_empty()) {
        (0, ..) => Err(io::ErrorKind::UnexpectedEof.into()),
        (_, Some(fd), true) => Ok((byte[0], fd)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "one descriptor was expected")),
    }
}

/// [`send_fds`] in one system call, for a blocking socket or a caller that waits by itself.
///
/// # Errors
/// The system's.
pub fn send_fds_now(stream: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if bytes.is_empty() || fds.len() > MAX_FDS || !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds))
    {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors, or no byte to carry them"));
    }
    Ok(net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// [`recv_fds`] in one system call, for a blocking socket or a caller that waits by itself.
///
/// # Errors
/// As [`recv_fds`].
pub fn recv_fds_now(stream: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = net::recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors than expected"));
    }
    Ok((message.bytes, fds))
}

/// A socket's path in a form that fits an address. Valid while it lives: the address may lead through `directory`.
struct Place {
    directory: OwnedFd,
    address: PathBuf,
}

impl Place {
    fn of(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        let directory = rfs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut address = path.to_owned();
        if path.as_os_str().len() > MAX_PATH {
            let fd = rustix::fd::AsRawFd::as_raw_fd(&directory);
            let mut through = OsString::from(format!("/proc/self/fd/{fd}/"));
            through.push(name);
            address = through.into();
        }
        Ok(Self { directory, address })
    }

    fn bind(&self) -> Result<OwnedFd, Errno> {
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // On Linux the file is made with the socket's own mode: private from its first moment, whatever the umask.
        rfs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        net::bind(&socket, &SocketAddrUnix::new(&self.address)?)?;
        net::listen(&socket, 128)?;
        Ok(socket)
    }
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn nobody_or(path: &Path, error: io::Error) -> ConnectError {
    if is_nobody(&error) {
        ConnectError::NobodyThere(path.to_owned())
    } else {
        ConnectError::Io { path: path.to_owned(), error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Seek, Write},
        os::unix::fs::PermissionsExt,
    };

    #[test]
    fn a_socket_is_private_and_tells_who_calls_however_long_its_path() {
        for depth in [0, 6] {
            let dir = tempfile::tempdir().unwrap();
            let deep = (0..depth).fold(dir.path().to_owned(), |p, _| p.join("a-directory-with-a-long-name"));
            fs::create_dir_all(&deep).unwrap();
            let path = deep.join("daemon.sock");
            assert_eq!(path.as_os_str().len() > MAX_PATH, depth > 0);
            assert!(matches!(connect_std(&path), Err(ConnectError::NobodyThere(_))));
            let listener = bind_std(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let near = connect_std(&path).unwrap();
            let (far, _) = listener.accept().unwrap();
            for end in [&near, &far] {
                let peer = peer_credentials(end).unwrap();
                assert_eq!(peer.pid, std::process::id());
                assert!(peer.is_trusted());
            }
        }
    }

    #[test]
    fn a_dead_ones_socket_is_replaced_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.sock");
        let listener = bind_std(&path).unwrap();
        let error = bind_std(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse(_)) && error.to_string().contains("hint: "), "{error}");
        drop(listener);
        assert!(path.exists() && matches!(connect_std(&path), Err(ConnectError::NobodyThere(_))));
        let _listener = bind_std(&path).unwrap();
        connect_std(&path).unwrap();
    }

    #[test]
    fn of_many_that_bind_at_once_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.sock");
        drop(bind_std(&path).unwrap());
        let bound: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| bind_std(&path))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(bound.iter().filter(|b| b.is_ok()).count(), 1);
        connect_std(&path).unwrap();
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind_std(&path), Err(BindError::Io { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        assert!(bind_std(Path::new("/nowhere/at/all.sock")).is_err());
    }

    #[tokio::test]
    async fn descriptors_cross_with_their_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = bind(&path).unwrap();
        let near = connect(&path).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        let mut files: Vec<fs::File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        for (i, file) in files.iter_mut().enumerate() {
            write!(file, "file {i}").unwrap();
        }
        let fds: Vec<_> = files.iter().map(|f| f.as_fd()).collect();
        assert_eq!(send_fds(&near, b"three", &fds).await.unwrap(), 5);
        let mut bytes = [0; 16];
        let (count, received) = recv_fds(&far, &mut bytes).await.unwrap();
        assert_eq!((&bytes[..count], received.len()), (&b"three"[..], 3));
        for (i, fd) in received.into_iter().enumerate() {
            let mut file = fs::File::from(fd);
            file.rewind().unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("file {i}"));
        }
        send_fd(&near, b'S', files[0].as_fd()).await.unwrap();
        assert_eq!(recv_fd(&far).await.unwrap().0, b'S');
        assert_eq!(send_fds(&near, b"none", &[]).await.unwrap(), 4);
        assert!(recv_fd(&far).await.is_err());
        let mut rest = [0; 3];
        assert_eq!(recv_fds(&far, &mut rest).await.unwrap().0, 3);
        let too_many = vec![files[0].as_fd(); MAX_FDS + 1];
        assert!(send_fds(&near, b"x", &too_many).await.is_err());
        drop(near);
        assert_eq!(recv_fd(&far).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
