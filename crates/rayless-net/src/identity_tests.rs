use super::*;
use rustls::{ClientConnection, ServerConnection};

fn token() -> Token {
    Token::generate().unwrap()
}

fn node(token: &Token) -> ClusterIdentity {
    ClusterIdentity::from_token(token, &NodeKey::generate().unwrap()).unwrap()
}

/// A whole handshake in memory; the peers as client and server see them, or the first error.
fn shake(client: &TlsIdentity, server: &TlsIdentity) -> Result<(Peer, Peer), rustls::Error> {
    let name = ServerName::try_from("head.rayless").unwrap();
    let mut client = ClientConnection::new(client.client_config(), name).unwrap();
    let mut server = ServerConnection::new(server.server_config()).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        bytes.clear();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    let peer = |certificates: Option<&[CertificateDer<'_>]>| peer_of(&certificates.unwrap()[0]).unwrap();
    Ok((peer(client.peer_certificates()), peer(server.peer_certificates())))
}

#[test]
fn two_nodes_of_one_token_know_each_other_by_their_keys() {
    let token = token();
    let (a, b) = (node(&token), node(&token));
    let (server, client) = shake(a.tls(), b.tls()).unwrap();
    assert_eq!(server, Peer { node: b.node_id(), is_delegate: false });
    assert_eq!(client, Peer { node: a.node_id(), is_delegate: false });
}

#[test]
fn the_authority_is_the_same_to_the_byte_everywhere() {
    let token: Token = "rl1_60rk4csm6mv3ee1sc5h66s35csrgesv7".parse().unwrap();
    let certificate = Authority::derive(&token).unwrap().certificate;
    assert_eq!(certificate, Authority::derive(&token).unwrap().certificate);
    // Pinned: a change here cuts new builds off from old ones.
    assert_eq!(node_id(&certificate).to_string(), "b14b9d5ffd4dfdbe7fdf72f410e9c65421a99514ab45c47160df0ba271847933");
}

#[test]
fn another_token_is_an_unknown_issuer() {
    let error = shake(node(&token()).tls(), node(&token()).tls()).unwrap_err();
    assert!(
        matches!(error, rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)),
        "a wrong token must be told from damage: {error:?}"
    );
}

#[test]
fn while_a_token_is_rotated_old_new_and_both_understand_each_other() {
    let (old, new) = (token(), token());
    let both = ClusterIdentity::from_tokens(&new, Some(&old), &NodeKey::generate().unwrap()).unwrap();
    let also = ClusterIdentity::from_tokens(&old, Some(&new), &NodeKey::generate().unwrap()).unwrap();
    for other in [node(&old), node(&new), also] {
        shake(both.tls(), other.tls()).unwrap();
        shake(other.tls(), both.tls()).unwrap();
        let driver = TlsIdentity::from_bundle(&both.issue_delegate().unwrap()).unwrap();
        shake(&driver, other.tls()).unwrap();
    }
    shake(both.tls(), node(&token()).tls()).unwrap_err();
    shake(node(&old).tls(), node(&new).tls()).unwrap_err();
}

#[test]
fn a_delegate_is_trusted_as_its_node_says_and_is_not_that_node() {
    let token = token();
    let (daemon, other) = (node(&token), node(&token));
    let bundle = daemon.issue_delegate().unwrap();
    assert!(!format!("{bundle:?}").contains(&format!("{:?}", bundle.key)));
    let (_, client) = shake(&TlsIdentity::from_bundle(&bundle).unwrap(), other.tls()).unwrap();
    assert_eq!(client, Peer { node: daemon.node_id(), is_delegate: true });
}

#[test]
fn a_delegates_leaf_survives_a_clock_that_jumps_and_ends_in_the_end() {
    let token = token();
    let (daemon, other) = (node(&token), node(&token));
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    for issued in [now - hour, now + hour, now + 47 * hour, now - 47 * hour] {
        let bundle = daemon.issue_delegate_at(issued).unwrap();
        shake(&TlsIdentity::from_bundle(&bundle).unwrap(), other.tls()).unwrap();
    }
    for issued in [now - 49 * hour, now + 49 * hour] {
        let bundle = daemon.issue_delegate_at(issued).unwrap();
        shake(&TlsIdentity::from_bundle(&bundle).unwrap(), other.tls()).unwrap_err();
    }
}

#[test]
fn a_leaf_with_another_nodes_name_is_refused() {
    let token = token();
    let (victim, other) = (node(&token), node(&token));
    let authority = Authority::derive(&token).unwrap();
    let seed = random_seed().unwrap();
    let pair = key_pair(&seed).unwrap();
    for uris in [
        vec![format!("{NODE_URI}{}", victim.node_id())],
        vec![format!("{DELEGATE_URI}beef")],
        vec!["https://example.org".to_owned()],
        vec![format!("{DELEGATE_URI}{}", victim.node_id()), format!("{NODE_URI}{}", victim.node_id())],
        vec![],
    ] {
        let mut params = leaf_params(NODE_URI.to_owned()).unwrap();
        params.subject_alt_names = uris.into_iter().map(|uri| SanType::URI(uri.try_into().unwrap())).collect();
        let leaf = authority.issue(&pair, &params).unwrap();
        let forged = TlsIdentity::new(vec![authority.certificate.clone()], vec![leaf], pkcs8(&seed).into()).unwrap();
        shake(&forged, other.tls()).unwrap_err();
        shake(other.tls(), &forged).unwrap_err();
    }
}

#[test]
fn a_node_key_file_is_private_and_keeps_the_node_the_same() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.key");
    let token = token();
    let id = |key: &NodeKey| ClusterIdentity::from_token(&token, key).unwrap().node_id();
    let first = id(&NodeKey::load_or_create(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(id(&NodeKey::load_or_create(&path).unwrap()), first);
    fs::write(&path, b"short").unwrap();
    assert!(matches!(NodeKey::load_or_create(&path), Err(IdentityError::BadKeyFile(_))));
}

#[test]
fn a_damaged_bundle_is_an_error_and_no_panic() {
    let mut bundle = node(&token()).issue_delegate().unwrap();
    bundle.certificates.clear();
    assert!(TlsIdentity::from_bundle(&bundle).is_err());
    bundle.certificates.push(vec![1, 2, 3]);
    bundle.key = vec![0; 7];
    assert!(TlsIdentity::from_bundle(&bundle).is_err());
}

#[test]
fn an_older_tls_is_refused_before_a_certificate_is_shown() {
    let server = node(&token());
    let client = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from("head.rayless").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(server.tls().server_config()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    server.read_tls(&mut bytes.as_slice()).unwrap();
    let error = server.process_new_packets().unwrap_err();
    assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error:?}");
    let mut answer = Vec::new();
    server.write_tls(&mut answer).unwrap();
    assert!(answer.len() < 16, "an alert and nothing else: {} bytes", answer.len());
}

#[test]
fn a_recorded_session_is_worth_nothing_the_second_time() {
    let token = token();
    let (a, b) = (node(&token), node(&token));
    let name = ServerName::try_from("head.rayless").unwrap();
    let mut client = ClientConnection::new(a.tls().client_config(), name).unwrap();
    let mut server = ServerConnection::new(b.tls().server_config()).unwrap();
    let mut recorded = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        recorded.push(std::mem::take(&mut bytes));
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets().unwrap();
    }
    let mut again = ServerConnection::new(b.tls().server_config()).unwrap();
    let replayed: Result<Vec<_>, _> = recorded
        .iter()
        .map(|bytes| {
            again.read_tls(&mut bytes.as_slice()).unwrap();
            again.process_new_packets()
        })
        .collect();
    assert!(replayed.is_err() && again.is_handshaking(), "the same bytes let somebody in twice");
    assert!(again.peer_certificates().is_none());
}
