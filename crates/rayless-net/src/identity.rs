//! From a token to mutual TLS: who is a member of the cluster, and which node it is.
//!
//! Each side derives the cluster's certificate authority from the token (HKDF-SHA256 to an Ed25519 key; the certificate is
//! the same to the byte on every node), signs a leaf of its own with it and accepts a peer whose leaf it signed. There is
//! no file to copy and no date to expire.
//!
//! - A **node**'s leaf is for its own key, kept in its run dir; the node's id is SHA-256 of that public key.
//! - A **delegate** (a driver or a keeper, which never see the token) gets a leaf for a fresh key from its daemon, see
//!   [`LeafBundle`]. It names the node that issued it, and it expires.
//!
//! A leaf says which it is in one URI: `rayless://node/<id>` or `rayless://delegate/<id of the issuing node>`. Host
//! names are not checked: names carry no authority here, the issuer does. All holders of the token are one
//! trust domain: any of them could issue a leaf in any node's name.
//!
//! While a token is being rotated two are accepted. Each side then shows the leaf that the other asked for (both name
//! their authorities in the handshake), so nodes may change over one by one.

use crate::token::{Token, write_secret};
use rayless_proto::{ids::NodeId, v1::local::LeafBundle};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber, date_time_ymd,
};
use ring::{
    digest, hkdf, hmac,
    rand::{SecureRandom, SystemRandom},
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring as provider},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
    server::{
        ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The application protocol of every TLS handshake. It never changes; versions are the `Hello`'s matter.
pub const ALPN: &[u8] = b"rayless";
/// How long a delegate's leaf is accepted after its issue. Sessions that stand are not cut when it ends.
pub const DELEGATE_VALIDITY: Duration = Duration::from_secs(48 * 3600);
/// How far a delegate's leaf is dated back, for hosts whose clocks differ and clocks that jump.
pub const DELEGATE_BACKDATE: Duration = Duration::from_secs(48 * 3600);

const NODE_URI: &str = "rayless://node/";
const DELEGATE_URI: &str = "rayless://delegate/";
const SEED: usize = 32;

/// An identity could not be made.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The node's key file is damaged.
    #[error("{0} does not hold a node key\nhint: remove it, the node then comes back as a new one")]
    BadKeyFile(PathBuf),
    /// The node's key file could not be read or written.
    #[error("node key {path}: {error}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// The bundle given by the daemon is damaged, or the cryptographic library failed.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
}

/// A node's private key: 32 bytes, from which the key pair follows.
#[derive(Clone)]
pub struct NodeKey([u8; SEED]);

impl NodeKey {
    /// A fresh key.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn generate() -> io::Result<Self> {
        random_seed().map(Self)
    }

    /// The key in the file at `path`, made there (mode 0600) where there is none.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        let failed = |error| IdentityError::KeyFile { path: path.to_owned(), error };
        match fs::read(path) {
            Ok(bytes) => bytes.as_slice().try_into().map(Self).map_err(|_| IdentityError::BadKeyFile(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = Self::generate().map_err(failed)?;
                write_secret(path, &key.0).map_err(failed)?;
                Ok(key)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeKey(secret)")
    }
}

/// Who is at the other end, as its certificate proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The node, or for a delegate the node that issued its leaf.
    pub node: NodeId,
    /// Whether it is a driver or keeper of that node and not its daemon.
    pub is_delegate: bool,
}

/// What a holder of the token is: it can issue leaves. Cheap to clone.
#[derive(Clone)]
pub struct ClusterIdentity {
    authorities: Arc<Vec<Authority>>,
    node: NodeId,
    tls: TlsIdentity,
    reset_key: Arc<hmac::Key>,
}

impl ClusterIdentity {
    /// The identity of the node with key `key` in the cluster of `token`.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn from_token(token: &Token, key: &NodeKey) -> Result<Self, IdentityError> {
        Self::from_tokens(token, None, key)
    }

    /// The same while a token is being rotated: peers with either are accepted, `token` is preferred.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn from_tokens(token: &Token, other: Option<&Token>, key: &NodeKey) -> Result<Self, IdentityError> {
        let authorities: Vec<Authority> =
            std::iter::once(token).chain(other).map(Authority::derive).collect::<Result<_, _>>()?;
        let pair = key_pair(&key.0)?;
        let node = node_id(&pair.subject_public_key_info());
        let mut leaf = leaf_params(format!("{NODE_URI}{node}"))?;
        // Dates a thousand years apart: a node has no clock to trust when it joins.
        leaf.not_before = date_time_ymd(2000, 1, 1);
        leaf.not_after = date_time_ymd(3000, 1, 1);
        let leaves = authorities.iter().map(|ca| ca.issue(&pair, &leaf)).collect::<Result<Vec<_>, _>>()?;
        let anchors = authorities.iter().map(|ca| ca.certificate.clone()).collect();
        let tls = TlsIdentity::new(anchors, leaves, pkcs8(&key.0).into())?;
        let reset_key = Arc::new(hmac::Key::new(
            hmac::HMAC_SHA256,
            hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key.0), b"quic stateless reset").as_ref(),
        ));
        Ok(Self { authorities: Arc::new(authorities), node, tls, reset_key })
    }

    /// Key of QUIC's stateless resets: the same in every life of this node, so that a daemon started again can tell
    /// the peers of the last one that it is no longer there.
    pub(crate) fn reset_key(&self) -> Arc<hmac::Key> {
        self.reset_key.clone()
    }

    /// This node's id.
    pub fn node_id(&self) -> NodeId {
        self.node
    }

    /// A name for each authority that is accepted (half of the hash of its certificate, in hexadecimal), the preferred one first: by
    /// them two daemons can find out that they have the same token without showing it.
    pub fn authority_names(&self) -> Vec<String> {
        let name = |ca: &Authority| {
            let hash = digest::digest(&digest::SHA256, &ca.certificate);
            hash.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
        };
        self.authorities.iter().map(name).collect()
    }

    /// For handshakes as this node.
    pub fn tls(&self) -> &TlsIdentity {
        &self.tls
    }

    /// A leaf for a driver or keeper of this node, with a fresh key, valid from [`DELEGATE_BACKDATE`] ago for
    /// [`DELEGATE_VALIDITY`] from now.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn issue_delegate(&self) -> Result<LeafBundle, IdentityError> {
        self.issue_delegate_at(SystemTime::now())
    }

    /// The same with the time given.
    pub(crate) fn issue_delegate_at(&self, now: SystemTime) -> Result<LeafBundle, IdentityError> {
        let seed = random_seed().map_err(tls_error)?;
        let pair = key_pair(&seed)?;
        let now = date_time_ymd(1970, 1, 1) + now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut leaf = leaf_params(format!("{DELEGATE_URI}{}", self.node))?;
        leaf.not_before = now - DELEGATE_BACKDATE;
        leaf.not_after = now + DELEGATE_VALIDITY;
        let leaves = self.authorities.iter().map(|ca| ca.issue(&pair, &leaf));
        Ok(LeafBundle {
            ca_certificates: self.authorities.iter().map(|ca| ca.certificate.to_vec()).collect(),
            certificates: leaves.map(|leaf| leaf.map(|leaf| leaf.to_vec())).collect::<Result<_, _>>()?,
            key: pkcs8(&seed),
        })
    }
}

impl fmt::Debug for ClusterIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterIdentity").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What takes part in handshakes: a node, or a delegate. It cannot issue leaves. Cheap to clone.
#[derive(Clone)]
pub struct TlsIdentity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl TlsIdentity {
    /// The identity that a daemon issued to its driver or keeper.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn from_bundle(bundle: &LeafBundle) -> Result<Self, IdentityError> {
        let owned = |list: &[Vec<u8>]| list.iter().map(|der| CertificateDer::from(der.clone())).collect::<Vec<_>>();
        Self::new(owned(&bundle.ca_certificates), owned(&bundle.certificates), bundle.key.clone().into())
    }

    /// For the connecting side, TLS over TCP and QUIC alike.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// For the accepting side.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    fn new(
        anchors: Vec<CertificateDer<'static>>,
        leaves: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, IdentityError> {
        if anchors.is_empty() || anchors.len() > 2 || anchors.len() != leaves.len() {
            return Err(IdentityError::Tls("one or two authorities, and a leaf under each, are wanted".to_owned()));
        }
        let provider = Arc::new(only_ed25519());
        let signer = provider.key_provider.load_private_key(key.into()).map_err(tls_error)?;
        let mut roots = RootCertStore::empty();
        let mut choices = Vec::with_capacity(leaves.len());
        for (anchor, leaf) in anchors.into_iter().zip(leaves) {
            roots.add(anchor).map_err(tls_error)?;
            let subject = roots.subjects().pop().ok_or_else(|| tls_error("an authority has no name"))?;
            choices.push((subject, Arc::new(CertifiedKey::new(vec![leaf], signer.clone()))));
        }
        let verifier = Arc::new(Verifier::new(roots, &provider)?);
        let chooser = Arc::new(LeafChooser { choices });

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(tls_error)?
            .dangerous() // The verifier below checks the issuer; it leaves out host names only.
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(chooser.clone());
        client.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would outlive the token that it was made with.
        client.resumption = Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(tls_error)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(chooser);
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsIdentity")
    }
}

/// Who holds the leaf `certificate`, which the handshake has verified; `None` for a leaf that no rayless issues.
pub fn peer_of(certificate: &CertificateDer<'_>) -> Option<Peer> {
    let leaf = webpki::EndEntityCert::try_from(certificate).ok()?;
    let mut uris = leaf.valid_uri_names();
    let (Some(uri), None) = (uris.next(), uris.next()) else { return None };
    if let Some(id) = uri.strip_prefix(DELEGATE_URI) {
        return Some(Peer { node: id.parse().ok()?, is_delegate: true });
    }
    let node: NodeId = uri.strip_prefix(NODE_URI)?.parse().ok()?;
    // The name of a node must be that of the key that it shook hands with.
    (node == node_id(leaf.subject_public_key_info().as_ref())).then_some(Peer { node, is_delegate: false })
}

/// The cluster's certificate authority.
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn derive(token: &Token) -> Result<Self, IdentityError> {
        let mut seed = [0; SEED];
        hkdf::Salt::new(hkdf::HKDF_SHA256, b"rayless cluster token 1")
            .extract(token.secret())
            .expand(&[b"ed25519 certificate authority"], hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(&mut seed))
            .map_err(|_| tls_error("key derivation failed"))?;
        let pair = key_pair(&seed)?;
        let mut params = CertificateParams::default();
        // Two clusters differ in name too: with equal names a wrong token would show as a bad
        // signature, and one of two authorities could not be told from the other.
        let fingerprint = node_id(&pair.subject_public_key_info()).to_string();
        params.distinguished_name.push(DnType::CommonName, format!("rayless {}", &fingerprint[..32]));
        params.serial_number = Some(SerialNumber::from(1u64));
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(3000, 1, 1);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&pair).map_err(tls_error)?.der().clone();
        Ok(Self { certificate, issuer: Issuer::new(params, pair) })
    }

    fn issue(&self, pair: &KeyPair, leaf: &CertificateParams) -> Result<CertificateDer<'static>, IdentityError> {
        Ok(leaf.signed_by(pair, &self.issuer).map_err(tls_error)?.der().clone())
    }
}

/// A leaf that says `uri`; its dates are the caller's.
fn leaf_params(uri: String) -> Result<CertificateParams, IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "rayless");
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(tls_error)?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

/// Accepts every leaf that one of our authorities issued, as server and as client.
#[derive(Debug)]
struct Verifier {
    roots: RootCertStore,
    subjects: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
    of_clients: Arc<dyn ClientCertVerifier>,
}

impl Verifier {
    fn new(roots: RootCertStore, provider: &Arc<CryptoProvider>) -> Result<Self, IdentityError> {
        let of_clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots.clone()), provider.clone())
            .build()
            .map_err(tls_error)?;
        Ok(Self {
            subjects: roots.subjects(),
            roots,
            algorithms: provider.signature_verification_algorithms,
            of_clients,
        })
    }

    fn check_names(leaf: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let unknown = || CertificateError::Other(OtherError(Arc::new(NotOurs)));
        peer_of(leaf).map(drop).ok_or_else(|| unknown().into())
    }
}

/// Issued by our authority, but not as rayless does it.
#[derive(Debug, thiserror::Error)]
#[error("the certificate names no node")]
struct NotOurs;

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let leaf = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&leaf, &self.roots, intermediates, now, self.algorithms.all)?;
        Self::check_names(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.subjects)
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.of_clients.verify_client_cert(end_entity, intermediates, now)?;
        Self::check_names(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Shows the leaf under an authority that the peer accepts; the preferred one where it names none of ours, so that it
/// refuses with a reason.
#[derive(Debug)]
struct LeafChooser {
    choices: Vec<(DistinguishedName, Arc<CertifiedKey>)>,
}

impl LeafChooser {
    fn choose(&self, is_wanted: impl Fn(&[u8]) -> bool) -> Option<Arc<CertifiedKey>> {
        let wanted = self.choices.iter().find(|(subject, _)| is_wanted(subject.as_ref()));
        wanted.or_else(|| self.choices.first()).map(|(_, leaf)| leaf.clone())
    }
}

impl ResolvesClientCert for LeafChooser {
    fn resolve(&self, hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.choose(|subject| hints.contains(&subject))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for LeafChooser {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let hints = hello.certificate_authorities().unwrap_or_default();
        self.choose(|subject| hints.iter().any(|hint| hint.as_ref() == subject))
    }
}

/// ring's primitives, less every signature but the one that rayless makes.
fn only_ed25519() -> CryptoProvider {
    static ALGORITHMS: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
        all: &[webpki::ring::ED25519],
        mapping: &[(SignatureScheme::ED25519, &[webpki::ring::ED25519])],
    };
    CryptoProvider {
        signature_verification_algorithms: ALGORITHMS,
        kx_groups: vec![provider::kx_group::X25519],
        ..provider::default_provider()
    }
}

fn node_id(public_key_info: &[u8]) -> NodeId {
    let mut id = [0; 32];
    id.copy_from_slice(digest::digest(&digest::SHA256, public_key_info).as_ref());
    NodeId(id)
}

fn key_pair(seed: &[u8; SEED]) -> Result<KeyPair, IdentityError> {
    KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8(seed).into(), &rcgen::PKCS_ED25519).map_err(tls_error)
}

/// An Ed25519 seed as PKCS#8 version 1 (RFC 8410, section 7), which is what rcgen and rustls take.
fn pkcs8(seed: &[u8; SEED]) -> Vec<u8> {
    let mut der = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20".to_vec();
    der.extend_from_slice(seed);
    der
}

fn random_seed() -> io::Result<[u8; SEED]> {
    let mut seed = [0; SEED];
    SystemRandom::new().fill(&mut seed).map_err(|_| io::Error::other("no random numbers from the system"))?;
    Ok(seed)
}

fn tls_error(error: impl fmt::Display) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
