//! The certificate of a peer whose chain was found good: what is read out of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rayless_net::identity::peer_of;

fuzz_target!(|bytes: &[u8]| {
    let _ = peer_of(&rustls::pki_types::CertificateDer::from(bytes));
});
