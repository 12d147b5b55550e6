//! Pinned public keys.

use super::{failure::Reason, leaf::Leaf, shared::sha256};
use crate::tls::{TlsConfigError, TlsFault};
use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::pki_types::CertificateDer;
use webpki::{VerifiedPath, spki_for_anchor};

/// SHA-256 hashes of public keys (SubjectPublicKeyInfo); one of these keys must be in the verified chain.
#[derive(Debug)]
pub(super) struct Pins(Vec<Vec<u8>>);

impl Pins {
    /// Parses pins of the form `sha256/BASE64`; curl's `sha256//BASE64` is accepted too.
    pub(super) fn parse(pins: &[String]) -> Result<Pins, TlsConfigError> {
        pins.iter().map(|pin| parse(pin)).collect::<Result<_, _>>().map(Pins)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the certificate's own key is pinned; always true without pins.
    pub(super) fn admit_leaf(&self, leaf: &CertificateDer<'_>) -> Result<(), Reason> {
        let key = Leaf::parse(leaf);
        self.admit_any(key.iter().map(|leaf| leaf.public_key()))
    }

    /// Whether a verified chain contains a pinned key; always true without pins.
    ///
    /// A pinned key among the certificates that the server *sent* proves nothing, because a server can send any
    /// certificates: only the verified path to the root counts.
    pub(super) fn admit(&self, path: &VerifiedPath<'_>) -> Result<(), Reason> {
        let own = path.end_entity().subject_public_key_info();
        let between = path.intermediate_certificates().map(|it| it.subject_public_key_info());
        let root = spki_for_anchor(path.anchor());
        let keys: Vec<_> = [own].into_iter().chain(between).chain([root]).collect();
        self.admit_any(keys.iter().map(|key| &**key))
    }

    fn admit_any<'a>(&self, mut keys: impl Iterator<Item = &'a [u8]>) -> Result<(), Reason> {
        match self.is_empty() || keys.any(|key| self.hold(&sha256(key))) {
            true => Ok(()),
            false => Err(Reason::PinMismatch),
        }
    }

    fn hold(&self, hash: &[u8]) -> bool {
        self.0.iter().any(|pin| pin == hash)
    }
}

fn parse(pin: &str) -> Result<Vec<u8>, TlsConfigError> {
    let refuse = || TlsConfigError::new("tls.pins", TlsFault::Pin { pin: pin.to_owned() });
    let text = pin.strip_prefix("sha256/").ok_or_else(refuse)?;
    // BASE64 itself may begin with a slash: only a length above 44 means curl's form.
    let text = if text.len() > 44 { text.strip_prefix('/').unwrap_or(text) } else { text };
    STANDARD.decode(text).ok().filter(|hash| hash.len() == 32).ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_a_pin_are_the_same_pin() {
        let plain = format!("sha256/{}", STANDARD.encode(sha256(b"key")));
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
}
