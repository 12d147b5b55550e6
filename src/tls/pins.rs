//! Pinned public keys.

use super::{failure::Leaf, roots::Roots};
use crate::tls::TlsConfigError;
use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::{
    RootCertStore, SupportedCipherSuite,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256},
    pki_types::{CertificateDer, UnixTime},
    server::ParsedCertificate,
};

/// SHA-256 over public keys (SubjectPublicKeyInfo); one of them must be in the verified chain.
#[derive(Debug)]
pub(super) struct Pins(Vec<Vec<u8>>);

impl Pins {
    /// Each is `sha256/BASE64`; curl's `sha256//BASE64` is taken too.
    pub(super) fn parse(pins: &[String]) -> Result<Pins, TlsConfigError> {
        pins.iter().map(|pin| parse(pin)).collect::<Result<_, _>>().map(Pins)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the certificate's own key is pinned.
    pub(super) fn hold_leaf(&self, leaf: &CertificateDer<'_>) -> bool {
        self.hold_key(leaf)
    }

    /// Whether a chain from the certificate passes a pinned key.
    ///
    /// That a pinned key is among what the server *sent* proves nothing, since anyone can send
    /// anyone's certificates along. So the leaf is verified once more with the pinned certificates
    /// as the only anchors.
    pub(super) fn hold_chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        roots: &Roots,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> bool {
        if self.hold_leaf(leaf) {
            return true;
        }
        let mut anchors = RootCertStore::empty();
        for root in &roots.store.roots {
            if self.hold(&sha256(&sequence(&root.subject_public_key_info))) {
                anchors.roots.push(root.clone());
            }
        }
        for intermediate in intermediates.iter().filter(|sent| self.hold_key(sent)) {
            // One that does not parse cannot be part of a chain either.
            let _ = anchors.add(intermediate.clone());
        }
        let Ok(leaf) = ParsedCertificate::try_from(leaf) else { return false };
        let all = algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, &anchors, intermediates, now, all).is_ok()
    }

    fn hold_key(&self, certificate: &CertificateDer<'_>) -> bool {
        Leaf::parse(certificate).is_some_and(|parsed| self.hold(&sha256(parsed.public_key())))
    }

    fn hold(&self, hash: &[u8]) -> bool {
        self.0.iter().any(|pin| pin == hash)
    }
}

/// The pin of a public key, as `tls.pins` takes it.
pub(super) fn pin(public_key: &[u8]) -> String {
    format!("sha256/{}", STANDARD.encode(sha256(public_key)))
}

fn parse(pin: &str) -> Result<Vec<u8>, TlsConfigError> {
    let refuse = || TlsConfigError::Pin { pin: pin.to_owned() };
    let text = pin.strip_prefix("sha256/").ok_or_else(refuse)?;
    // BASE64 may begin with a slash of its own: only a length past 44 betrays curl's form.
    let text = if text.len() > 44 { text.strip_prefix('/').unwrap_or(text) } else { text };
    STANDARD.decode(text).ok().filter(|hash| hash.len() == 32).ok_or_else(refuse)
}

/// From the TLS provider, so that no second implementation comes in.
pub(super) fn sha256(data: &[u8]) -> Vec<u8> {
    let hash = match TLS13_AES_128_GCM_SHA256 {
        SupportedCipherSuite::Tls13(suite) => suite.common.hash_provider,
        SupportedCipherSuite::Tls12(suite) => suite.common.hash_provider,
    };
    hash.hash(data).as_ref().to_vec()
}

/// Wraps in a DER SEQUENCE: trust anchors keep a public key without its tag and length.
fn sequence(content: &[u8]) -> Vec<u8> {
    let len = content.len();
    let bytes = len.to_be_bytes();
    let significant = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
    let mut der = vec![0x30];
    if len >= 0x80 {
        der.push(0x80 | significant.len() as u8);
        der.extend(significant);
    } else {
        der.push(len as u8);
    }
    der.extend(content);
    der
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_a_pin_are_the_same_pin() {
        let plain = pin(b"key");
        let curl = plain.replacen('/', "//", 1);
        assert_eq!(parse(&plain).unwrap(), parse(&curl).unwrap());
    }

    #[test]
    fn a_pin_that_begins_with_a_slash_is_read_as_it_stands() {
        let hash = [0xff; 32];
        let text = format!("sha256/{}", STANDARD.encode(hash));
        assert!(text.starts_with("sha256//"));
        assert_eq!(parse(&text).unwrap(), hash);
    }

    #[test]
    fn what_is_no_pin_is_refused_with_its_form() {
        for bad in ["", "sha256/", "sha256/AAAA", "sha1/AAAA", "sha256/!", "AAAA"] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains("sha256/BASE64"), "{bad}: {error}");
        }
    }

    #[test]
    fn sequences_of_every_length_form_are_der() {
        assert_eq!(sequence(&[1])[..], [0x30, 1, 1]);
        assert_eq!(sequence(&[0; 0x80])[..3], [0x30, 0x81, 0x80]);
        assert_eq!(sequence(&[0; 0x126])[..4], [0x30, 0x82, 0x01, 0x26]);
    }
}
