//! The other side: does what the driving side asks for.

use super::{
    control::Control,
    measure,
    open::{self, Links, Opening},
};
use crate::message::{Failure, data, talk};
use rayless_net::{congestion::Congestion, identity::TlsIdentity};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{
    io::{ErrorKind, stdin},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::Duration,
};

/// As a child of the driving side, whose control socket is our stdin.
pub(super) fn child(rdma_address: Option<IpAddr>) -> Result<(), Failure> {
    let stream = stdin().as_fd().try_clone_to_owned().map_err(Failure::failed)?;
    let mut control = Control::over_unix(UnixStream::from(stream))?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(Failure::failed)?;
    Congestion::from_env().apply(&listener).map_err(Failure::failed)?;
    listener.set_nonblocking(true).map_err(Failure::failed)?;
    // Whatever ends it is told by the driving side, which is at the same terminal.
    let _ = serve(&mut control, &listener, rdma_address);
    Ok(())
}

/// Serves one caller after the other, until it is ended.
pub(super) fn listen(address: SocketAddr, identity: &TlsIdentity, rdma_address: Option<IpAddr>) -> Result<(), Failure> {
    let listener = TcpListener::bind(address).map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::AddrInUse => "hint: choose another port: `--listen ADDRESS:PORT`",
            _ => "hint: an address of this host: `--listen ADDRESS[:PORT]`",
        };
        Failure::failed(format!("cannot listen on {address}: {error}\n{hint}"))
    })?;
    // The link back sends over streams that are accepted here.
    Congestion::from_env().apply(&listener).map_err(Failure::failed)?;
    listener.set_nonblocking(true).map_err(Failure::failed)?;
    let place = listener.local_addr().map_err(Failure::failed)?;
    talk(format_args!("waiting for `rayless bench link --to HOST:{}` from another host", place.port()));
    data(place);
    loop {
        let Some(stream) = accept(&listener, Duration::from_secs(3600))? else { continue };
        let Ok(from) = stream.peer_addr() else { continue };
        let mut control = match Control::answer(stream, from, identity) {
            Ok(control) => control,
            Err(failure) => {
                talk(format_args!("{from}: {}", failure.cause()));
                continue;
            }
        };
        talk(format_args!("measuring with {from}"));
        match serve(&mut control, &listener, rdma_address) {
            Ok(()) => talk(format_args!("done with {from}")),
            Err(failure) => talk(format_args!("{from}: {}", failure.cause())),
        }
    }
}

/// Takes a connection, if one comes in time.
pub(super) fn accept(listener: &TcpListener, within: Duration) -> Result<Option<TcpStream>, Failure> {
    let seconds = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: i64::from(within.subsec_nanos()) };
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&seconds)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(Failure::failed(format!("poll: {errno}"))),
    }
    match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(false).map_err(Failure::failed)?;
            Ok(Some(stream))
        }
        // One that came and went is no reason to end.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(Failure::failed(format!("accepting a connection: {error}"))),
    }
}

fn serve(control: &mut Control, listener: &TcpListener, rdma_address: Option<IpAddr>) -> Result<(), Failure> {
    let mut links: Option<Links> = None;
    loop {
        let asked = control.hear()?;
        match (asked.as_str(), &mut links) {
            ("latency", Some(links)) => measure::echo(links)?,
            ("bandwidth", Some(links)) => measure::sink(links)?,
            ("close", open) => {
                *open = None;
                control.say("closed")?;
            }
            ("end", _) => return Ok(()),
            (line, open) => {
                let opening = Opening::decode(line).ok_or_else(|| control.nonsense())?;
                match open::answer(control, &opening, listener, rdma_address) {
                    Ok(opened) => {
                        *open = Some(opened);
                        control.say("ok")?;
                    }
                    Err(failure) => control.say(&format!("failed {}", failure.text.replace('\n', "; ")))?,
                }
            }
        }
    }
}
