//! Whether a revocation list is signed with a given key, and whether a certificate is signed with its own.

use parking_lot::Mutex;
use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, SubjectPublicKeyInfoDer},
};
use x509_parser::{asn1_rs::Any, certificate::X509Certificate, prelude::FromDer};

use super::super::failure::Reason;

/// The most keys of one name that are cached. A CA has one or two.
const KEYS: usize = 16;

/// A list or a certificate with its signature.
pub(super) struct Signed {
    data: Vec<u8>,
    /// The contents of its identifier in DER, like all of those in `pki_types`.
    algorithm: Vec<u8>,
    signature: Vec<u8>,
    /// By public key: a list may have megabytes, and is used in every handshake.
    verdicts: Mutex<Vec<(Vec<u8>, Verdict)>>,
}

/// Whether a list is signed with a given key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is signed with the key.
    Good,
    /// It is not signed with the key.
    OtherKey,
    /// It cannot be verified: the algorithm is too old or unknown.
    Unsupported,
}

impl Signed {
    /// Parses a list or a certificate in DER.
    pub(super) fn parse(whole: &[u8]) -> Option<Self> {
        let (data, rest) = split(split(whole)?.0.contents)?;
        let (algorithm, rest) = split(rest)?;
        let (signature, _) = split(rest)?;
        Some(Self {
            data: data.whole.to_vec(),
            algorithm: algorithm.contents.to_vec(),
            signature: bits(signature.contents)?.to_vec(),
            verdicts: Mutex::default(),
        })
    }

    /// Whether it is signed with this key.
    pub(super) fn verdict(
        &self,
        key: &SubjectPublicKeyInfoDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Verdict {
        let known = |verdicts: &[(Vec<u8>, Verdict)]| {
            verdicts.iter().find(|(known, _)| **known == **key).map(|(_, verdict)| *verdict)
        };
        if let Some(verdict) = known(&self.verdicts.lock()) {
            return verdict;
        }
        // Without the lock, because it takes a while.
        let verdict = self.verify(key, algorithms).unwrap_or(Verdict::OtherKey);
        let mut verdicts = self.verdicts.lock();
        if verdicts.len() < KEYS && known(&verdicts).is_none() {
            verdicts.push((key.to_vec(), verdict));
        }
        verdict
    }

    fn verify(
        &self,
        key: &SubjectPublicKeyInfoDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Option<Verdict> {
        let (key_algorithm, rest) = split(split(key)?.0.contents)?;
        let key = bits(split(rest)?.0.contents)?;
        let fitting = || {
            let all = algorithms.all.iter();
            all.filter(|one| one.signature_alg_id().as_ref() == self.algorithm)
        };
        let is_good = fitting()
            .filter(|one| one.public_key_alg_id().as_ref() == key_algorithm.contents)
            .any(|one| one.verify_signature(key, &self.data, &self.signature).is_ok());
        Some(match is_good {
            true => Verdict::Good,
            false if fitting().next().is_none() => Verdict::Unsupported,
            false => Verdict::OtherKey,
        })
    }
}

impl Verdict {
    /// Why a certificate is refused if the list of its issuer is not signed with the issuer's key.
    pub(super) fn reason(self) -> Reason {
        let why = match self {
            Verdict::Unsupported => {
                "a list in `tls.crls` is of its issuer, but is signed with an algorithm that is too old (SHA-1) or unknown"
            }
            _ => "a list in `tls.crls` has the name of its issuer, but is not signed by it",
        };
        Reason::Other(why.to_owned())
    }
}

/// The key of a certificate, if the certificate is signed with that same key.
///
/// The names are not enough: a CA that changes its key may sign the old one with the new one, under the same name.
pub(in crate::tls) fn own_key(
    certificate: &CertificateDer<'_>,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Option<SubjectPublicKeyInfoDer<'static>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    if parsed.issuer().as_raw() != parsed.subject().as_raw() {
        return None;
    }
    let key = SubjectPublicKeyInfoDer::from(parsed.public_key().raw.to_vec());
    let verdict = Signed::parse(certificate)?.verdict(&key, algorithms);
    (verdict == Verdict::Good).then_some(key)
}

/// A value in DER.
pub(super) struct Value<'a> {
    pub(super) whole: &'a [u8],
    pub(super) contents: &'a [u8],
}

/// Splits off the first value.
pub(super) fn split(der: &[u8]) -> Option<(Value<'_>, &[u8])> {
    let (rest, value) = Any::from_der(der).ok()?;
    let contents = value.data;
    Some((Value { whole: &der[..der.len() - rest.len()], contents }, rest))
}

/// The bytes of a bit string without unused bits.
fn bits(contents: &[u8]) -> Option<&[u8]> {
    contents.split_first().filter(|(unused, _)| **unused == 0).map(|(_, bits)| bits)
}
