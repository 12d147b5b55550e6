//! Creates a root and everything that it will ever sign.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;

use super::{
    Authority, AuthorityError, DAY, EARLY, Root, Seconds, ServerCertificate,
    names::{self, nested},
    system_time,
};

/// The lifetime of a root. It cannot be renewed, because its key is discarded.
const ROOT_LIFETIME: Seconds = 5 * 365 * DAY;

/// The lifetime of a certificate: Apple's software accepts up to 825 days.
const LEAF_LIFETIME: Seconds = 820 * DAY;

/// How many certificates cover a root's lifetime. Each begins long before the previous one ends.
const TERMS: i64 = 3;

/// How much of an alias fits into a common name of 64 characters with the rest of it.
const ALIAS_IN_NAME: usize = 36;

/// What `truename ca issue` creates.
#[derive(Debug)]
pub struct Issued {
    /// The root that signed the certificate. It cannot sign another one.
    pub root: Root,
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key, as PEM (PKCS #8).
    pub key_pem: String,
    /// When the certificate expires.
    pub not_after: Seconds,
}

impl Authority {
    /// Creates a root for `names`, none of which may be below another, and its certificates: those for clients
    /// with SNI are valid for the names, and those for clients without SNI also for the addresses.
    pub fn make(
        alias: &str,
        names: &BTreeSet<String>,
        addresses: &BTreeSet<Ipv4Addr>,
        now: Seconds,
    ) -> Result<Self, AuthorityError> {
        let (not_before, not_after) = (begin(now), now + ROOT_LIFETIME);
        let signer = Signer::new(alias, names, not_before, not_after)?;
        let key = KeyPair::generate()?;
        let mut certificates = Vec::with_capacity(TERMS as usize * 2);
        for addresses in [&BTreeSet::new(), addresses] {
            for term in 0..TERMS {
                let step = (not_after - not_before - LEAF_LIFETIME) / (TERMS - 1);
                let begin = not_before + term * step;
                let end = (begin + LEAF_LIFETIME).min(not_after);
                let der = signer.sign(&key, names, addresses, (begin, end))?;
                certificates.push(ServerCertificate {
                    der,
                    not_before: begin,
                    not_after: end,
                    addresses: addresses.clone(),
                });
            }
        }
        Self::new(Arc::new(Root::parse(signer.root)?), key.serialize_der(), certificates)
    }
}

/// Creates a root for `names`, and one certificate for exactly these names, for another server.
pub fn issue(names: &BTreeSet<String>, now: Seconds) -> Result<Issued, AuthorityError> {
    if let Some((name, below)) = nested(names) {
        return Err(AuthorityError::Nested { name, below });
    }
    if names.len() > names::MOST {
        return Err(AuthorityError::TooMany { count: names.len() });
    }
    let validity @ (not_before, not_after) = (begin(now), begin(now) + LEAF_LIFETIME);
    let label = names.first().map_or("", String::as_str);
    let signer = Signer::new(label, names, not_before, not_after)?;
    let key = KeyPair::generate()?;
    let certificate = signer.sign(&key, names, &BTreeSet::new(), validity)?;
    let root = Root::parse(signer.root)?;
    Ok(Issued { root, certificate, key_pem: key.serialize_pem(), not_after })
}

/// A root with its key, while it signs.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Signer {
    fn new(
        alias: &str,
        names: &BTreeSet<String>,
        not_before: Seconds,
        not_after: Seconds,
    ) -> Result<Self, AuthorityError> {
        let alias = &alias[..alias.len().min(ALIAS_IN_NAME)];
        let random = random()?.map(|byte| format!("{byte:02x}"))[..8].concat();
        let mut params = params((not_before, not_after))?;
        // Names are unique, because some libraries try only a few roots with the same name.
        let name = format!("truename {alias} {random}");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.name_constraints = Some(constraints(names));
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?.der().clone();
        Ok(Self { issuer: Issuer::new(params, key), root })
    }

    fn sign(
        &self,
        key: &KeyPair,
        names: &BTreeSet<String>,
        addresses: &BTreeSet<Ipv4Addr>,
        validity: (Seconds, Seconds),
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let mut params = params(validity)?;
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        let addresses = addresses.iter().map(|address| SanType::IpAddress(IpAddr::V4(*address)));
        params.subject_alt_names.extend(addresses);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        Ok(params.signed_by(key, &self.issuer)?.der().clone())
    }
}

fn params(
    (not_before, not_after): (Seconds, Seconds),
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // NSS refuses two certificates of one issuer with the same serial number.
    params.serial_number = Some(SerialNumber::from_slice(&random()?));
    params.not_before = system_time(not_before).into();
    params.not_after = system_time(not_after).into();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Permits these names and the loopback addresses, and nothing else, not even names below these.
fn constraints(names: &BTreeSet<String>) -> NameConstraints {
    let subtree = |name: String| GeneralSubtree::DnsName(name);
    let loopback = GeneralSubtree::IpAddress(CidrSubnet::V4([127, 0, 0, 0], [255, 0, 0, 0]));
    NameConstraints {
        permitted_subtrees: names.iter().cloned().map(subtree).chain([loopback]).collect(),
        // RFC 5280 has no leading dot in a DNS constraint, but verifiers support it.
        excluded_subtrees: names.iter().map(|name| subtree(format!(".{name}"))).collect(),
    }
}

fn begin(now: Seconds) -> Seconds {
    (now - EARLY).max(0)
}

/// Sixteen random bytes. The first one makes them a positive number without leading zeros.
fn random() -> Result<[u8; 16], AuthorityError> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| rcgen::Error::RemoteKeyError)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(bytes)
}
