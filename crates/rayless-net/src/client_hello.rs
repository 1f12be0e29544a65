//! As much of a TLS `ClientHello` (RFC 8446, section 4.1.2; RFC 6066, section 3) as it takes to find the server name.
//!
//! It reads bytes of strangers: every length is checked against what is there, nothing is copied before the end.

/// Bytes of the largest record that is looked at; those of rayless have some 300.
pub(crate) const MAX: usize = 4096;

/// What the first bytes of a connection are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A `ClientHello` with this server name, in lower case.
    Name(String),
    /// Perhaps one, when the rest has come.
    Incomplete,
    /// Anything else, also a `ClientHello` without a name or in several records: no rayless sends that.
    Other,
}

/// Looks at `bytes`, the first of a connection.
pub(crate) fn parse(bytes: &[u8]) -> Parsed {
    // What can be told from few bytes is told at once: a stranger is not waited for.
    const START: [(usize, u8); 3] = [(0, 22), (1, 3), (5, 1)]; // handshake record, version 3.x, ClientHello
    if START.iter().any(|(at, byte)| bytes.get(*at).is_some_and(|b| b != byte)) {
        return Parsed::Other;
    }
    let Some(length) = bytes.get(3..5).map(|b| usize::from(u16::from_be_bytes([b[0], b[1]]))) else {
        return Parsed::Incomplete;
    };
    if length > MAX - 5 {
        return Parsed::Other;
    }
    match bytes.get(5..5 + length) {
        None => Parsed::Incomplete,
        Some(record) => name_in(record).map_or(Parsed::Other, Parsed::Name),
    }
}

fn name_in(record: &[u8]) -> Option<String> {
    const SERVER_NAME: u16 = 0;
    const HOST_NAME: u8 = 0;
    let mut rest = record;
    take(&mut rest, 1)?; // ClientHello, checked above
    let length = take(&mut rest, 3)?;
    let length = usize::from(length[0]) << 16 | usize::from(length[1]) << 8 | usize::from(length[2]);
    if length != rest.len() {
        return None;
    }
    take(&mut rest, 2 + 32)?; // version, random
    take_with_length(&mut rest, 1)?; // session id
    take_with_length(&mut rest, 2)?; // cipher suites
    take_with_length(&mut rest, 1)?; // compression methods
    let mut extensions = take_with_length(&mut rest, 2)?;
    while !extensions.is_empty() {
        let kind = take(&mut extensions, 2)?;
        let mut body = take_with_length(&mut extensions, 2)?;
        if u16::from_be_bytes([kind[0], kind[1]]) == SERVER_NAME {
            let mut names = take_with_length(&mut body, 2)?;
            let is_host = take(&mut names, 1)?[0] == HOST_NAME;
            let name = take_with_length(&mut names, 2)?;
            let fits = is_host && (1..=253).contains(&name.len());
            let plain = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
            return (fits && name.iter().all(plain)).then(|| String::from_utf8_lossy(name).to_ascii_lowercase());
        }
    }
    None
}

/// The next `count` bytes.
fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count)?;
    *rest = left;
    Some(taken)
}

/// The next vector, behind a length of `width` bytes.
fn take_with_length<'a>(rest: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let length = take(rest, width)?.iter().fold(0, |all, b| all << 8 | usize::from(*b));
    take(rest, length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::{ClusterIdentity, NodeKey},
        token::Token,
    };
    use proptest::prelude::*;

    fn hello(name: &'static str) -> Vec<u8> {
        let node = ClusterIdentity::from_token(&Token::generate().unwrap(), &NodeKey::generate().unwrap()).unwrap();
        let name = name.try_into().unwrap();
        let mut client = rustls::ClientConnection::new(node.tls().client_config(), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_name_is_found_as_soon_as_all_is_there() {
        let bytes = hello("00010203fcfdfeff.keeper.rayless");
        for n in 0..bytes.len() {
            assert_eq!(parse(&bytes[..n]), Parsed::Incomplete, "{n}");
        }
        assert_eq!(parse(&bytes), Parsed::Name("00010203fcfdfeff.keeper.rayless".to_owned()));
        let more = [&bytes[..], b"more"].concat();
        assert_eq!(parse(&more), parse(&bytes));
    }

    #[test]
    fn strangers_are_known_by_their_first_bytes() {
        for stranger in [&b"GET / HTTP/1.1"[..], b"*1\r\n$4\r\nPING", b"\x16\x02", b"\x16\x03\x01\xff\xff", b"\0"] {
            assert_eq!(parse(stranger), Parsed::Other, "{stranger:?}");
        }
    }

    proptest! {
        #[test]
        fn no_change_of_a_hello_makes_it_panic(at in 0usize..600, byte: u8, cut in 0usize..600) {
            let mut bytes = hello("a.keeper.rayless");
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut.max(1));
            let _ = parse(&bytes);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 9..400)) {
            let length = (bytes.len() - 5) as u16;
            bytes[..6].copy_from_slice(&[22, 3, 1, (length >> 8) as u8, length as u8, 1]);
            prop_assert_ne!(parse(&bytes), Parsed::Incomplete);
        }
    }
}
