//! The store that says which of several daemons is the head: etcd, from version 3.4 on.
//!
//! It is spoken to through etcd's own JSON gateway, over HTTP/1.1 on the same port as gRPC. All that is needed are six calls
//! (grant, keep alive, revoke, range, transaction, watch), a few times a minute; a gRPC stack would be larger than they are by far.
//!
//! | key | value | lease |
//! |---|---|---|
//! | `/rayless/NAME/head` | who is the head, under which term | the head's |
//! | `/rayless/NAME/seats/<node>` | a daemon that may be: its node, name, address | its own |
//! | `/rayless/NAME/term` | the last term and the cluster's id | none |
//! | `/rayless/NAME/authority` | name (a hash) of the authority of the token that a head must accept | none |
//!
//! No token, key or state of the cluster is in it: nodes bring what they hold to a new head. A seat names the cluster's
//! authorities by hash, so that a daemon with another token finds out before it does harm.
//!
//! | file | what |
//! |---|---|
//! | `mod` | where the store is and how it is entered |
//! | `http` | HTTP/1.1 |
//! | `etcd` | the calls |
//! | `drive` | what a [`Candidate`](rayless_control::Candidate) wants, done |

mod drive;
mod etcd;
#[cfg(fuzzing)]
pub mod fuzzed;
mod http;

pub(crate) use drive::{StoreHandle, StoreNews, open};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use std::{
    fmt, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Port of etcd where none is given.
const DEFAULT_PORT: u16 = 2379;
/// Name of a cluster in the store where none is given.
const DEFAULT_NAME: &str = "default";

/// What is wrong with what was said of the store. A line of cause, then `hint: …`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StoreUsageError(String);

/// A call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// No connection, or it broke: the next server may answer.
    #[error("{0}")]
    Unreachable(String),
    /// It does not let this daemon in, or not do this: a new login may help.
    #[error("access is denied: {0}")]
    Denied(String),
    /// It does not know the lease.
    #[error("the lease is over")]
    LeaseOver,
    /// An answer that makes no sense here.
    #[error("{0}")]
    Odd(String),
}

/// Where the store is and how it is entered.
#[derive(Clone)]
pub struct StoreConfig {
    /// `host:port` of its servers.
    pub(crate) servers: Vec<String>,
    /// `/rayless/NAME/`
    pub(crate) prefix: String,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    pub(crate) login: Option<Login>,
}

/// User and password.
#[derive(Clone)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: String,
}

/// Files for TLS and login, as the user named them.
#[derive(Debug, Clone, Default)]
pub struct StoreAccess {
    /// `--store-ca`: with it all is TLS.
    pub ca: Option<PathBuf>,
    /// `--store-cert`
    pub cert: Option<PathBuf>,
    /// `--store-key`
    pub key: Option<PathBuf>,
    /// `--store-user`
    pub user: Option<String>,
    /// `--store-password-file`
    pub password_file: Option<PathBuf>,
}

impl StoreConfig {
    /// Reads `etcd://HOST[:PORT][,HOST[:PORT]…][/NAME]` and the files of `access`.
    ///
    /// # Errors
    /// [`StoreUsageError`]: what is wrong with which of them.
    pub fn new(address: &str, access: &StoreAccess) -> Result<Self, StoreUsageError> {
        let (servers, name) = parse(address)?;
        let tls = tls(access)?.map(Arc::new);
        let login = login(access)?;
        let on_this_host = |server: &String| {
            let host = server.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']);
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
        };
        if login.is_some() && tls.is_none() && !servers.iter().all(on_this_host) {
            return Err(usage(
                "the store's password would cross the network in clear",
                "give `--store-ca FILE`, the certificate of its authority: then all is TLS",
            ));
        }
        Ok(Self { servers, prefix: format!("/rayless/{name}/"), tls, login })
    }

    /// The store, for people.
    pub fn shown(&self) -> String {
        format!("etcd://{}", self.servers.join(","))
    }
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreConfig")
            .field("servers", &self.servers)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

fn usage(cause: impl fmt::Display, hint: impl fmt::Display) -> StoreUsageError {
    StoreUsageError(format!("{cause}\nhint: {hint}"))
}

fn parse(address: &str) -> Result<(Vec<String>, String), StoreUsageError> {
    let bad = |why: &str| {
        let hint =
            format!("give `etcd://HOST:PORT`, for example `etcd://10.0.0.9:{DEFAULT_PORT}`, several with commas");
        usage(format_args!("`{address}` is no store: {why}"), hint)
    };
    let rest = address.strip_prefix("etcd://").ok_or_else(|| bad("it does not begin with `etcd://`"))?;
    let (servers, name) = rest.split_once('/').unwrap_or((rest, DEFAULT_NAME));
    let name = if name.is_empty() { DEFAULT_NAME } else { name };
    if name.len() > 64 || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        return Err(bad("the name after the `/` may have 64 letters, digits, `-`, `_` and `.`"));
    }
    let mut found = Vec::new();
    for server in servers.split(',').map(str::trim) {
        let (host, port) = match server.rsplit_once(':') {
            // An IPv6 address without a port ends in no number but itself.
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| bad("a port is a number"))?)
            }
            _ => (server, DEFAULT_PORT),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
        if host.is_empty() || !host.chars().all(plain) {
            return Err(bad("a host is a name or an address"));
        }
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
        found.push(format!("{host}:{port}"));
    }
    Ok((found, name.to_owned()))
}

fn tls(access: &StoreAccess) -> Result<Option<ClientConfig>, StoreUsageError> {
    let Some(ca) = &access.ca else {
        if let Some(file) = access.cert.as_ref().or(access.key.as_ref()) {
            let hint = "give `--store-ca FILE`, too: the certificate of the store's authority";
            return Err(usage(format_args!("{} is of no use without TLS", file.display()), hint));
        }
        return Ok(None);
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate).map_err(|error| unreadable(ca, error))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|error| unreadable(ca, error))?
        .with_root_certificates(roots);
    let mut config = match (&access.cert, &access.key) {
        (Some(cert), Some(key)) => {
            closed(key)?;
            let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, error))?;
            builder.with_client_auth_cert(certificates(cert)?, secret).map_err(|error| unreadable(cert, error))?
        }
        (None, None) => builder.with_no_client_auth(),
        _ => {
            let hint = "give both `--store-cert FILE` and `--store-key FILE`, or neither";
            return Err(usage("a certificate for the store goes with its key", hint));
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, StoreUsageError> {
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(path).map_err(|error| unreadable(path, error))?.collect();
    let found = found.map_err(|error| unreadable(path, error))?;
    if found.is_empty() { Err(unreadable(path, "there is no certificate in it")) } else { Ok(found) }
}

fn login(access: &StoreAccess) -> Result<Option<Login>, StoreUsageError> {
    match (&access.user, &access.password_file) {
        (None, None) => Ok(None),
        (Some(user), Some(file)) => {
            closed(file)?;
            let password = fs::read_to_string(file).map_err(|error| unreadable(file, error))?;
            Ok(Some(Login { user: user.clone(), password: password.trim_end_matches(['\n', '\r']).to_owned() }))
        }
        _ => {
            let hint = "give both `--store-user NAME` and `--store-password-file FILE`, or neither";
            Err(usage("a user of the store goes with a password", hint))
        }
    }
}

/// A secret that others can read is none.
fn closed(path: &Path) -> Result<(), StoreUsageError> {
    let mode = fs::metadata(path).map_err(|error| unreadable(path, error))?.mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let path = path.display();
    Err(usage(format_args!("{path} may be read by others (mode {mode:03o})"), format_args!("run `chmod 600 {path}`")))
}

fn unreadable(path: &Path, error: impl fmt::Display) -> StoreUsageError {
    usage(format_args!("{}: {error}", path.display()), "name a readable PEM file, or for a password a text file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_stores() {
        let cases: [(&str, &[&str], &str); 5] = [
            ("etcd://10.0.0.9:2379", &["10.0.0.9:2379"], "default"),
            ("etcd://e1,e2:7000,e3/llm-1", &["e1:2379", "e2:7000", "e3:2379"], "llm-1"),
            ("etcd://[fd00::1]:7000/", &["[fd00::1]:7000"], "default"),
            ("etcd://fd00::1", &["[fd00::1]:2379"], "default"),
            ("etcd://[fd00::1]", &["[fd00::1]:2379"], "default"),
        ];
        for (given, servers, name) in cases {
            assert_eq!(
                parse(given).unwrap(),
                (servers.iter().map(ToString::to_string).collect(), name.to_owned()),
                "{given}"
            );
        }
        for bad in [
            "",
            "10.0.0.9:2379",
            "http://a",
            "etcd://",
            "etcd://a:x",
            "etcd://a:0",
            "etcd://a,,b",
            "etcd://a/b/c",
            "etcd://u:p@h",
        ] {
            let told = parse(bad).unwrap_err().to_string();
            assert!(told.contains("\nhint: "), "{told}");
        }
    }

    #[test]
    fn a_password_goes_over_tls_or_not_beyond_this_host_and_from_a_closed_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("password");
        fs::write(&file, "secret\n").unwrap();
        let access =
            StoreAccess { user: Some("u".into()), password_file: Some(file.clone()), ..StoreAccess::default() };
        let mode = |mode| fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        mode(0o644);
        let told = StoreConfig::new("etcd://127.0.0.1", &access).unwrap_err().to_string();
        assert!(told.contains("may be read by others (mode 644)"), "{told}");
        mode(0o600);
        let made = StoreConfig::new("etcd://127.0.0.1,[::1]:9,localhost", &access).unwrap();
        assert!(!format!("{made:?}").contains("secret"));
        let told = StoreConfig::new("etcd://127.0.0.1,10.0.0.9", &access).unwrap_err().to_string();
        assert!(told.contains("in clear"), "{told}");
        let half = StoreAccess { user: Some("u".into()), ..StoreAccess::default() };
        assert!(StoreConfig::new("etcd://a", &half).is_err());
    }
}
