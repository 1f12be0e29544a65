//! Clusters, raw peers that misbehave, and a lossy wire.

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rayless_net::{
    counters::{Counters, Refused},
    framing::{FrameReader, write_frame},
    identity::{ClusterIdentity, NodeKey, TlsIdentity},
    token::Token,
};
use rayless_proto::{
    hello::{Hello, Purpose},
    limits::MAX_HELLO,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::{Arc, atomic},
    time::Duration,
};
use tokio::net::UdpSocket;

/// Any free port of the loopback interface.
pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

pub(crate) fn token() -> Token {
    Token::generate().unwrap()
}

pub(crate) fn node(token: &Token) -> ClusterIdentity {
    ClusterIdentity::from_token(token, &NodeKey::generate().unwrap()).unwrap()
}

pub(crate) fn counters() -> Arc<Counters> {
    Arc::new(Counters::default())
}

/// Waits until `why` was counted `times` times: what a side counts may come after what the other side sees.
pub(crate) async fn counted(counters: &Counters, why: Refused, times: u64) {
    while counters.refused(why) < times {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(counters.refused(why), times, "{why:?}");
}

/// A QUIC client that keeps to no rule but TLS'.
pub(crate) async fn raw_client(
    config: Arc<rustls::ClientConfig>,
    server: SocketAddr,
) -> Result<quinn::Connection, quinn::ConnectionError> {
    let crypto = QuicClientConfig::try_from(config).unwrap();
    let endpoint = quinn::Endpoint::client(ANY).unwrap();
    endpoint.connect_with(quinn::ClientConfig::new(Arc::new(crypto)), server, "raw.rayless").unwrap().await
}

/// A QUIC server that answers one caller with the first frame `hello`.
pub(crate) fn raw_server(identity: &TlsIdentity, hello: Vec<u8>) -> (SocketAddr, tokio::task::JoinHandle<Vec<u8>>) {
    let crypto = QuicServerConfig::try_from(identity.server_config()).unwrap();
    let endpoint = quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), ANY).unwrap();
    let address = endpoint.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, receive) = connection.accept_bi().await.unwrap();
        let theirs = FrameReader::new(receive, MAX_HELLO).next().await.unwrap();
        write_frame(&mut send, &hello, MAX_HELLO).await.unwrap();
        connection.closed().await;
        theirs
    });
    (address, task)
}

/// The hello of a build that does not exist yet.
pub(crate) fn hello_of_the_future(purpose: Purpose) -> Vec<u8> {
    Hello { protocol_min: 700, protocol_max: 900, purpose, build: "7.0.0".to_owned() }.encode()
}

/// TLS of a stranger that believes any server and shows `shown` to it.
pub(crate) fn gullible(shown: Option<&TlsIdentity>) -> Arc<rustls::ClientConfig> {
    #[derive(Debug)]
    struct Believe;
    impl rustls::client::danger::ServerCertVerifier for Believe {
        fn verify_server_cert(
            &self,
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &[rustls::pki_types::CertificateDer<'_>],
            _: &rustls::pki_types::ServerName<'_>,
            _: &[u8],
            _: rustls::pki_types::UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            unreachable!("TLS 1.3 only")
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            vec![rustls::SignatureScheme::ED25519]
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Believe));
    let mut config = match shown {
        Some(identity) => builder.with_client_cert_resolver(identity.client_config().client_auth_cert_resolver.clone()),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"rayless".to_vec()];
    Arc::new(config)
}

/// A wire for UDP that may lose packets. Callers call `address` instead of the server.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    /// Of 100 packets so many are lost, to the server and from it.
    pub(crate) loss: Arc<[atomic::AtomicU64; 2]>,
}

impl Wire {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind(ANY).await.unwrap());
        let address = front.local_addr().unwrap();
        let loss: Arc<[atomic::AtomicU64; 2]> = Arc::default();
        let lost = loss.clone();
        tokio::spawn(async move {
            let mut backs = HashMap::<SocketAddr, Arc<UdpSocket>>::new();
            let mut random = Random(7);
            let mut buffer = [0; 2048];
            while let Ok((count, client)) = front.recv_from(&mut buffer).await {
                if let Entry::Vacant(place) = backs.entry(client) {
                    let back = Arc::new(UdpSocket::bind(ANY).await.unwrap());
                    back.connect(server).await.unwrap();
                    tokio::spawn(back_to(client, back.clone(), front.clone(), lost.clone()));
                    place.insert(back);
                }
                if random.percent() >= lost[0].load(atomic::Ordering::Relaxed) {
                    let _ = backs[&client].send(&buffer[..count]).await;
                }
            }
        });
        Self { address, loss }
    }

    pub(crate) fn lose(&self, to_server: u64, from_server: u64) {
        self.loss[0].store(to_server, atomic::Ordering::Relaxed);
        self.loss[1].store(from_server, atomic::Ordering::Relaxed);
    }
}

async fn back_to(client: SocketAddr, back: Arc<UdpSocket>, front: Arc<UdpSocket>, lost: Arc<[atomic::AtomicU64; 2]>) {
    let mut random = Random(u64::from(client.port()));
    let mut buffer = [0; 2048];
    while let Ok(count) = back.recv(&mut buffer).await {
        if random.percent() >= lost[1].load(atomic::Ordering::Relaxed) {
            let _ = front.send_to(&buffer[..count], client).await;
        }
    }
}

/// Knuth's linear congruential numbers: the same at each run.
struct Random(u64);

impl Random {
    fn percent(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % 100
    }
}
