//! A root certificate that truename created. Any other certificate is refused.

use std::collections::BTreeSet;

use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, GeneralSubtree},
    oid_registry::{
        OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_NAME_CONSTRAINTS,
    },
    parse_x509_certificate,
};

use super::{
    Seconds,
    names::{self, is_certifiable},
    timestamp,
};
use crate::tls::shared::sha256;

/// 127.0.0.0/8 in the form of name constraints: address and mask.
const LOOPBACK: [u8; 8] = [127, 0, 0, 0, 255, 0, 0, 0];

/// How many bytes of the SHA-256 an id has.
const ID_BYTES: usize = 8;

/// A root that passed all checks.
#[derive(Debug, PartialEq, Eq)]
pub struct Root {
    der: CertificateDer<'static>,
    id: String,
    /// Its distinguished name, as DER.
    subject: Vec<u8>,
    names: BTreeSet<String>,
    not_before: Seconds,
    not_after: Seconds,
}

/// Why a certificate is not a root that truename created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a root that truename created: {0}")]
pub struct RootError(&'static str);

impl Root {
    /// Parses and checks a certificate.
    pub fn parse(der: CertificateDer<'static>) -> Result<Self, RootError> {
        let (rest, x509) =
            parse_x509_certificate(&der).map_err(|_| RootError("it cannot be parsed"))?;
        if !rest.is_empty() {
            return Err(RootError("bytes follow the certificate"));
        }
        let names = checked(&x509)?;
        let not_before = x509.validity().not_before.timestamp();
        let not_after = x509.validity().not_after.timestamp();
        let id = sha256(&der)[..ID_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
        let subject = x509.subject().as_raw().to_vec();
        Ok(Self { id, subject, names, not_before, not_after, der })
    }

    /// Parses and checks the single certificate of a PEM file.
    pub fn from_pem(text: &[u8]) -> Result<Self, RootError> {
        let mut certificates = CertificateDer::pem_slice_iter(text);
        match (certificates.next(), certificates.next()) {
            (Some(Ok(der)), None) => Self::parse(der),
            _ => Err(RootError("it is not a single certificate in PEM")),
        }
    }

    /// The id in the names of its files: the beginning of its SHA-256.
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn subject(&self) -> &[u8] {
        &self.subject
    }

    /// The certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// The names that it is constrained to.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.names
    }

    /// The beginning of its validity.
    pub fn not_before(&self) -> Seconds {
        self.not_before
    }

    /// The end of its validity.
    pub fn not_after(&self) -> Seconds {
        self.not_after
    }

    /// The beginning and end of its validity, in the format of RFC 3339.
    pub fn validity(&self) -> (String, String) {
        (timestamp(self.not_before), timestamp(self.not_after))
    }

    /// The SHA-256 in the format of `openssl x509 -fingerprint -sha256`.
    pub fn fingerprint(&self) -> String {
        let bytes = sha256(&self.der);
        bytes.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
    }
}

/// The names that a certificate is constrained to, if truename created it.
fn checked(x509: &X509Certificate<'_>) -> Result<BTreeSet<String>, RootError> {
    if x509.subject() != x509.issuer() || x509.verify_signature(None).is_err() {
        return Err(RootError("it is not self-signed"));
    }
    let known =
        [OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_NAME_CONSTRAINTS];
    if x509.extensions().iter().any(|other| other.critical && !known.contains(&other.oid)) {
        return Err(RootError("it has a critical extension that ours do not have"));
    }
    let duplicate = RootError("an extension is repeated or cannot be parsed");
    let basic = x509.basic_constraints().map_err(|_| duplicate)?;
    if !basic.is_some_and(|basic| basic.value.ca && basic.value.path_len_constraint == Some(0)) {
        return Err(RootError("it is not a certificate authority with path length 0"));
    }
    let usage = x509.key_usage().map_err(|_| duplicate)?;
    if !usage.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(RootError("it may not sign certificates"));
    }
    let constraints = x509.name_constraints().map_err(|_| duplicate)?;
    let constraints = constraints
        .filter(|constraints| constraints.critical)
        .ok_or(RootError("it has no critical name constraints"))?
        .value;
    let permitted = constraints.permitted_subtrees.as_deref().unwrap_or_default();
    let (permitted, addresses) = subtrees(permitted)?;
    let excluded = constraints.excluded_subtrees.as_deref().unwrap_or_default();
    let (excluded, others) = subtrees(excluded)?;
    if addresses != [&LOOPBACK[..]] || !others.is_empty() {
        return Err(RootError("it is not constrained to 127.0.0.0/8"));
    }
    let below: BTreeSet<String> = permitted.iter().map(|name| format!(".{name}")).collect();
    if permitted.is_empty() || permitted.len() > names::MOST || excluded != below {
        return Err(RootError("it is not constrained to exact names"));
    }
    if names::nested(&permitted).is_some() || !permitted.iter().all(|name| is_certifiable(name)) {
        return Err(RootError("the names that it is constrained to are not exact"));
    }
    Ok(permitted)
}

/// The names and addresses of a list of constraints, which must have nothing else.
fn subtrees<'a>(
    subtrees: &'a [GeneralSubtree<'_>],
) -> Result<(BTreeSet<String>, Vec<&'a [u8]>), RootError> {
    let (mut names, mut addresses) = (BTreeSet::new(), Vec::new());
    for subtree in subtrees {
        match &subtree.base {
            GeneralName::DNSName(name) => drop(names.insert((*name).to_owned())),
            GeneralName::IPAddress(address) => addresses.push(*address),
            _ => return Err(RootError("it has constraints of another kind")),
        }
    }
    Ok((names, addresses))
}
