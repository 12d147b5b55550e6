//! The certificates that a root signed, with their key, in memory and as a file.

use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::{
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
    sign::{CertifiedKey, SigningKey},
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use super::{AuthorityError, EARLY, Root, Seconds};

/// A root without its key, the certificates that it signed, and their key.
pub struct Authority {
    root: Arc<Root>,
    /// PKCS #8.
    key: Vec<u8>,
    /// The same for the TLS library.
    signing: Arc<dyn SigningKey>,
    certificates: Vec<ServerCertificate>,
}

/// One of its certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerCertificate {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// When it begins.
    pub not_before: Seconds,
    /// When it ends.
    pub not_after: Seconds,
    /// The addresses that it is valid for; empty for the certificates for clients with SNI.
    pub addresses: BTreeSet<Ipv4Addr>,
}

/// The certificates that a TLS server uses at a given time.
#[derive(Clone, Debug)]
pub struct Certified {
    /// For clients with SNI.
    pub named: Arc<CertifiedKey>,
    /// For clients without SNI.
    pub unnamed: Arc<CertifiedKey>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("root", &self.root.id()).finish_non_exhaustive()
    }
}

impl Authority {
    /// Checks that the parts match.
    pub(super) fn new(
        root: Arc<Root>,
        key: Vec<u8>,
        certificates: Vec<ServerCertificate>,
    ) -> Result<Self, AuthorityError> {
        let signing = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.clone()));
        let authority = Self { root, signing: any_supported_type(&signing)?, key, certificates };
        for kind in [true, false] {
            let first = authority.of_kind(kind).next();
            let first = first
                .ok_or_else(|| AuthorityError::Parse("a certificate is missing".to_owned()))?;
            CertifiedKey::new(vec![first.der.clone()], authority.signing.clone()).keys_match()?;
        }
        Ok(authority)
    }

    /// The root.
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// The addresses that its certificates for clients without SNI are valid for.
    pub fn addresses(&self) -> impl Iterator<Item = &Ipv4Addr> {
        let unnamed = self.certificates.iter().find(|one| !one.addresses.is_empty());
        unnamed.into_iter().flat_map(|one| &one.addresses)
    }

    /// Whether it has currently valid certificates.
    pub fn is_valid(&self, now: Seconds) -> bool {
        [true, false].into_iter().all(|named| self.current(named, now).is_some())
    }

    /// The certificates to use now: valid ones, or else the last ones.
    pub fn certified(&self, now: Seconds) -> Certified {
        let certified = |named| {
            let last = || self.of_kind(named).max_by_key(|one| one.not_after);
            let certificate = self.current(named, now).or_else(last);
            let chain = certificate.map(|one| one.der.clone()).into_iter().collect();
            Arc::new(CertifiedKey::new(chain, self.signing.clone()))
        };
        Certified { named: certified(true), unnamed: certified(false) }
    }

    /// The next time at which other certificates are to be used.
    pub fn changes(&self, now: Seconds) -> Option<Seconds> {
        let times = self.certificates.iter().flat_map(|one| [turn(one), one.not_after]);
        times.filter(|time| *time > now).min()
    }

    /// The key and the certificates as PEM, for the file.
    pub fn to_pem(&self) -> String {
        let key = block("PRIVATE KEY", &self.key);
        self.certificates.iter().fold(key, |text, one| text + &pem(&one.der))
    }

    /// Parses the output of [`to_pem`](Self::to_pem). All of it must belong to `root`.
    pub fn from_pem(text: &[u8], root: &Arc<Root>) -> Result<Self, AuthorityError> {
        let parse = |what: &dyn std::fmt::Display| AuthorityError::Parse(what.to_string());
        let key = match PrivateKeyDer::from_pem_slice(text).map_err(|error| parse(&error))? {
            PrivateKeyDer::Pkcs8(key) => key.secret_pkcs8_der().to_vec(),
            _ => return Err(parse(&"the key is not PKCS #8")),
        };
        let mut certificates = Vec::new();
        for der in CertificateDer::pem_slice_iter(text) {
            certificates.push(server_certificate(der.map_err(|error| parse(&error))?, root)?);
        }
        Self::new(root.clone(), key, certificates)
    }

    /// The certificate to use now.
    fn current(&self, named: bool, now: Seconds) -> Option<&ServerCertificate> {
        let valid = self.of_kind(named).filter(|one| one.not_before <= now && now < one.not_after);
        // One whose validity has just begun is used later, because clocks may be behind.
        valid.max_by_key(|one| (turn(one) <= now, one.not_before))
    }

    fn of_kind(&self, named: bool) -> impl Iterator<Item = &ServerCertificate> {
        self.certificates.iter().filter(move |one| one.addresses.is_empty() == named)
    }
}

/// When a certificate is first used.
fn turn(certificate: &ServerCertificate) -> Seconds {
    certificate.not_before + EARLY
}

fn server_certificate(
    der: CertificateDer<'static>,
    root: &Root,
) -> Result<ServerCertificate, AuthorityError> {
    let parse = |what: &str| AuthorityError::Parse(what.to_owned());
    let (_, x509) = parse_x509_certificate(&der).map_err(|error| parse(&error.to_string()))?;
    // Each root has a unique name. Clients verify the signature; verifying all of them here would cost as much
    // as creating new ones.
    if x509.issuer().as_raw() != root.subject() {
        return Err(parse("a certificate was not signed by the root"));
    }
    let names = x509.subject_alternative_name().map_err(|error| parse(&error.to_string()))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let addresses = names.iter().filter_map(|name| match name {
        GeneralName::IPAddress(bytes) => <[u8; 4]>::try_from(*bytes).ok().map(Ipv4Addr::from),
        _ => None,
    });
    Ok(ServerCertificate {
        addresses: addresses.collect(),
        not_before: x509.validity().not_before.timestamp(),
        not_after: x509.validity().not_after.timestamp(),
        der,
    })
}

/// RFC 7468.
pub fn pem(certificate: &CertificateDer<'_>) -> String {
    block("CERTIFICATE", certificate)
}

/// RFC 7468.
fn block(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}
