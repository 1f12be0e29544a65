//! The UDP socket under an endpoint: what arrives on it is counted, one datagram at a time.
//!
//! Quinn asks the kernel to put up to 64 datagrams of a sender together (UDP_GRO), and takes the room for 32 times as many per
//! socket: 3 MB. That pays for downloads. Here nothing is fast but handshakes, and each dial has a socket of its own; while a wire is
//! cut there are several at a time. So the kernel is told not to, and the room is 47 KB.

use crate::{counters::Counters, os, runtime::QuietRuntime};
use quinn::{
    AsyncUdpSocket, Runtime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

/// The smallest QUIC packet that can be authentic: header, packet number and the AEAD's 16-byte tag.
const SMALLEST: usize = 21;

/// A socket that counts.
#[derive(Debug)]
pub(crate) struct CountedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    counters: Arc<Counters>,
    received: AtomicU64,
    /// How many datagrams the kernel may put together.
    together: usize,
}

impl CountedSocket {
    pub(crate) fn new(socket: std::net::UdpSocket, counters: Arc<Counters>) -> io::Result<Self> {
        // For the option, which is set after quinn's: the open socket is the same.
        let same = socket.try_clone()?;
        let inner = QuietRuntime.wrap_udp_socket(socket)?;
        // A kernel that does not know the option keeps datagrams apart, and quinn knows that.
        let together = os::keep_datagrams_apart(&same).map_or_else(|_| inner.max_receive_segments(), |()| 1);
        Ok(Self { inner, counters, received: AtomicU64::new(0), together })
    }

    /// How many datagrams came in here.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

impl AsyncUdpSocket for CountedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(self.inner.poll_recv(context, buffers, metas))?;
        let (mut all, mut stray) = (0, 0);
        for (buffer, meta) in buffers.iter().zip(metas.iter()).take(count) {
            // The kernel may have put datagrams of one sender together.
            for datagram in buffer[..meta.len.min(buffer.len())].chunks(meta.stride.max(1)) {
                all += 1;
                stray += u64::from(is_stray(datagram));
            }
        }
        self.counters.datagrams(all, stray);
        self.received.fetch_add(all, Relaxed);
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.together
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Whether no endpoint of ours can have sent it: too short, without QUIC's fixed bit (ours always set it), or the start of
/// a connection in another version or in less than the 1,200 bytes that the standard asks for.
fn is_stray(datagram: &[u8]) -> bool {
    let Some(first) = datagram.first() else { return true };
    if datagram.len() < SMALLEST || first & 0x40 == 0 {
        return true;
    }
    let is_long = first & 0x80 != 0;
    let is_initial = first & 0x30 == 0;
    is_long && (datagram[1..5] != [0, 0, 0, 1] || is_initial && datagram.len() < 1200)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, net::Ipv4Addr};

    fn socket() -> CountedSocket {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        CountedSocket::new(socket, Arc::default()).unwrap()
    }

    #[tokio::test]
    async fn datagrams_that_were_sent_together_come_one_by_one_so_that_little_room_is_enough() {
        let (from, to) = (Arc::new(socket()), socket());
        assert_eq!(to.max_receive_segments(), 1);
        let bytes: Vec<u8> = (0..250).collect();
        let destination = to.local_addr().unwrap();
        let mut writable = from.clone().create_io_poller();
        poll_fn(|context| writable.as_mut().poll_writable(context)).await.unwrap();
        let together = Transmit { destination, ecn: None, contents: &bytes, segment_size: Some(100), src_ip: None };
        from.try_send(&together).unwrap();
        let mut came: Vec<Vec<u8>> = Vec::new();
        while came.concat().len() < bytes.len() {
            let (mut rooms, mut metas) = ([[0; 1472]; 4], [RecvMeta::default(); 4]);
            let mut buffers = rooms.each_mut().map(|room| IoSliceMut::new(room));
            let count = poll_fn(|context| to.poll_recv(context, &mut buffers, &mut metas)).await.unwrap();
            came.extend(rooms.iter().zip(&metas).take(count).map(|(room, meta)| room[..meta.len].to_vec()));
        }
        assert_eq!(came, [&bytes[..100], &bytes[100..200], &bytes[200..]]);
        assert_eq!(to.received(), 3);
    }

    #[test]
    fn what_cannot_be_ours_is_told_from_what_can() {
        let initial = |n| [&[0xc0, 0, 0, 0, 1][..], &vec![0; n]].concat();
        assert!(!is_stray(&initial(1195)));
        assert!(is_stray(&initial(1194)), "an initial packet is padded");
        assert!(!is_stray(&[0x40; 21]));
        for stray in [&[][..], &[0x40; 20], &[0; 1200], &[0xc0; 1200], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"] {
            assert!(is_stray(stray) || stray[0] & 0x40 != 0, "{stray:?}");
        }
    }
}
