//! The local certificate authority: it vouches for the aliases to the applications beside us, and
//! its key can vouch for nothing else.
//!
//! A root, whose key is thrown away at once, vouches for an issuer, whose key is kept and vouches
//! for the aliases. Both bear the same name constraints (RFC 5280 §4.2.1.10), and it takes both:
//! Java heeds no constraints of a certificate that is itself trusted, only of those beneath it.
//!
//! **Invariant:** the constraints are critical, permit the aliases' own names, and exclude what lies
//! beneath them and every address. Whoever steals the key gains no other name.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SanType,
};
use rustls::{
    pki_types::{CertificateDer, DnsName, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use x509_parser::{
    extensions::{GeneralName, GeneralSubtree as ParsedSubtree},
    parse_x509_certificate,
    time::ASN1Time,
};

use super::{failure::Date, pins::sha256, store::pem};

/// A root outlives the pods and laptops that trust it, within reason.
const ROOT_LIFETIME: Duration = Duration::from_secs(5 * 365 * 24 * 3600);

/// A root with less than this left is replaced.
const ROOT_MARGIN: Duration = Duration::from_secs(30 * 24 * 3600);

/// Backdates what is issued: the application's clock may be a little behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

/// Why the authority cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Making or signing a certificate.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// A certificate or a key that is not one.
    #[error("not the certificate and the key of a local authority: {0}")]
    Parse(String),
    /// A key that the TLS library does not take.
    #[error("cannot use a key: {0}")]
    Key(#[from] rustls::Error),
    /// A name that the root does not permit.
    #[error("this authority may not vouch for `{name}`; it may for {}", permitted.join(", "))]
    NotPermitted {
        /// The name asked for.
        name: String,
        /// Its names.
        permitted: Vec<String>,
    },
}

/// A root, and the issuer that it vouches for.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    issuer_certificate: CertificateDer<'static>,
    root: CertificateDer<'static>,
    names: BTreeSet<String>,
    /// Names that it may not vouch for, though they lie beneath one that it may; `.a` is all of
    /// those beneath `a`.
    excluded: Vec<String>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// A certificate for one alias, with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The certificate, and that of its issuer.
    pub chain: Vec<CertificateDer<'static>>,
    /// The certificate's key.
    pub key: KeyPair,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Authority {
    /// Makes a root for exactly `names`.
    pub fn generate(names: &BTreeSet<String>) -> Result<Self, AuthorityError> {
        Self::lasting(names, ROOT_LIFETIME)
    }

    pub(super) fn lasting(
        names: &BTreeSet<String>,
        lifetime: Duration,
    ) -> Result<Self, AuthorityError> {
        // No name permitted would be no constraint at all: then, one that nobody can have
        // (RFC 6761 §6.4).
        let nobody = BTreeSet::from(["invalid".to_owned()]);
        let names = if names.is_empty() { &nobody } else { names };
        let now = SystemTime::now();
        let (not_before, not_after) = (now - CLOCK_SKEW, now + lifetime);
        let excluded: Vec<String> = names
            .iter()
            .filter(|name| !names.iter().any(|other| is_beneath(other, name)))
            .map(|name| format!(".{name}"))
            .collect();
        let constrained = |name: &str, path_length| {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, name);
            params.not_before = not_before.into();
            params.not_after = not_after.into();
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            params.use_authority_key_identifier_extension = true;
            params.name_constraints = Some(constraints(names, &excluded));
            params
        };
        let root_key = KeyPair::generate()?;
        let root_params = constrained("truename local root", 1);
        let root = root_params.self_signed(&root_key)?.der().clone();
        let key = KeyPair::generate()?;
        let mut params = constrained("truename local authority", 0);
        // The names of people, which no constraint above is about, are not for servers.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let signed = params.signed_by(&key, &Issuer::new(root_params, root_key))?;
        Ok(Self {
            issuer_certificate: signed.der().clone(),
            issuer: Issuer::new(params, key),
            root,
            names: names.clone(),
            excluded,
            not_before,
            not_after,
        })
    }

    /// Reads what [`to_pem`](Self::to_pem) wrote.
    pub fn from_pem(text: &[u8]) -> Result<Self, AuthorityError> {
        let parse = |error: &dyn std::fmt::Display| AuthorityError::Parse(error.to_string());
        let key = PrivateKeyDer::from_pem_slice(text).map_err(|error| parse(&error))?;
        let key = KeyPair::try_from(&key).map_err(|error| parse(&error))?;
        let certificates = CertificateDer::pem_slice_iter(text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| parse(&error))?;
        let Ok([certificate, root]) = <[CertificateDer<'static>; 2]>::try_from(certificates) else {
            return Err(AuthorityError::Parse("there are not two certificates".into()));
        };
        let (_, x509) = parse_x509_certificate(&certificate).map_err(|error| parse(&error))?;
        if x509.public_key().subject_public_key.data != key.public_key_raw() {
            return Err(AuthorityError::Parse("the key is not the certificate's".into()));
        }
        let constraints = x509
            .name_constraints()
            .map_err(|error| parse(&error))?
            .map(|extension| extension.value)
            .filter(|constraints| constraints.permitted_subtrees.is_some())
            .ok_or_else(|| AuthorityError::Parse("it has no name constraints".into()))?;
        let names = dns_names(&constraints.permitted_subtrees).collect();
        let excluded = dns_names(&constraints.excluded_subtrees).collect();
        let time = |time: ASN1Time| {
            let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
        };
        Ok(Self {
            names,
            excluded,
            not_before: time(x509.validity().not_before),
            not_after: time(x509.validity().not_after),
            issuer: Issuer::from_ca_cert_der(&certificate, key).map_err(|error| parse(&error))?,
            issuer_certificate: certificate,
            root,
        })
    }

    /// The issuer's key (PKCS #8), its certificate and the root: all in one file, so that no reader
    /// finds parts of two authorities.
    pub fn to_pem(&self) -> String {
        let key = self.issuer.key().serialize_pem();
        format!("{key}{}{}", pem(&self.issuer_certificate), self.root_pem())
    }

    /// Whether it may vouch for all of `names`, and will for a while yet.
    pub fn covers(&self, names: &BTreeSet<String>) -> bool {
        names.iter().all(|name| self.permits(name)) && !self.ends_soon()
    }

    /// Whether the root has so little left that another should take its place.
    pub fn ends_soon(&self) -> bool {
        self.not_after <= SystemTime::now() + ROOT_MARGIN
    }

    /// Whether the root's constraints let it vouch for `name`.
    pub fn permits(&self, name: &str) -> bool {
        let covers = |subtree: &String| in_subtree(name, subtree);
        self.names.iter().any(covers) && !self.excluded.iter().any(covers)
    }

    /// The names that it may vouch for.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.names
    }

    /// When the root begins, as RFC 3339.
    pub fn begins(&self) -> String {
        timestamp(self.not_before)
    }

    /// When the root ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// When the root ends, as RFC 3339.
    pub fn ends(&self) -> String {
        timestamp(self.not_after)
    }

    /// The SHA-256 of the root, as `openssl x509 -fingerprint -sha256` writes it.
    pub fn fingerprint(&self) -> String {
        let bytes = sha256(&self.root);
        bytes.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
    }

    /// The root.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root as PEM.
    pub fn root_pem(&self) -> String {
        pem(&self.root)
    }

    /// Issues a server certificate for `names`, all of which the root must permit.
    pub fn issue(
        &self,
        names: &BTreeSet<String>,
        lifetime: Duration,
    ) -> Result<Leaf, AuthorityError> {
        if let Some(name) = names.iter().find(|name| !self.permits(name)) {
            return Err(AuthorityError::NotPermitted {
                name: name.clone(),
                permitted: self.names.iter().cloned().collect(),
            });
        }
        self.sign(names, lifetime)
    }

    fn sign(&self, names: &BTreeSet<String>, lifetime: Duration) -> Result<Leaf, AuthorityError> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let not_after = (now + lifetime).min(self.not_after);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = not_after.into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        Ok(Leaf { chain: vec![certificate, self.issuer_certificate.clone()], key, not_after })
    }
}

impl Leaf {
    /// The leaf for a TLS server.
    pub fn certified(&self) -> Result<CertifiedKey, AuthorityError> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der())
            .map_err(|error| AuthorityError::Parse(error.into()))?;
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)?;
        Ok(CertifiedKey::new(self.chain.clone(), key))
    }

    /// The chain as PEM.
    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(pem).collect()
    }

    /// When it ends, as RFC 3339.
    pub fn ends(&self) -> String {
        timestamp(self.not_after)
    }
}

/// What these names allow, and nothing else.
fn constraints(names: &BTreeSet<String>, excluded: &[String]) -> NameConstraints {
    // A permitted name permits all beneath it too, which for an alias called `shop` would be a
    // whole top-level domain.
    let beneath = excluded.iter().cloned().map(GeneralSubtree::DnsName);
    // A form of name that no constraint mentions is permitted whole.
    let addresses = [
        GeneralSubtree::IpAddress(CidrSubnet::V4([0; 4], [0; 4])),
        GeneralSubtree::IpAddress(CidrSubnet::V6([0; 16], [0; 16])),
    ];
    NameConstraints {
        permitted_subtrees: names.iter().cloned().map(GeneralSubtree::DnsName).collect(),
        excluded_subtrees: beneath.chain(addresses).collect(),
    }
}

/// Whether a client can ask for `name` by SNI, and a certificate bear it. `10` is a name in DNS, yet
/// none of these; one of them among its constraints would spoil a root whole.
pub fn is_certifiable(name: &str) -> bool {
    DnsName::try_from(name).is_ok()
}

/// RFC 5280 has no leading dot in a DNS constraint; those who verify know it all the same.
fn in_subtree(name: &str, subtree: &str) -> bool {
    match subtree.strip_prefix('.') {
        Some(parent) => is_beneath(name, parent),
        None => name == subtree || is_beneath(name, subtree),
    }
}

fn is_beneath(name: &str, parent: &str) -> bool {
    name.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
}

fn dns_names(subtrees: &Option<Vec<ParsedSubtree<'_>>>) -> impl Iterator<Item = String> {
    subtrees.iter().flatten().filter_map(|subtree| match &subtree.base {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    })
}

fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Date(since.as_secs().try_into().unwrap_or(i64::MAX)).to_string()
}
