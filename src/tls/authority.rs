//! The local certificate authority: it vouches for the aliases to the applications beside us, and
//! its key can vouch for nothing else.
//!
//! **Invariant:** the root bears critical name constraints (RFC 5280 §4.2.1.10) that permit the
//! aliases' own names, and exclude every IP address. Whoever steals the key gains no other name.

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
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use x509_parser::{
    extensions::{GeneralName, ParsedExtension},
    parse_x509_certificate,
};

/// A root outlives the pods and laptops that trust it, within reason.
const ROOT_LIFETIME: Duration = Duration::from_secs(5 * 365 * 24 * 3600);

/// A root with less than this left is replaced at a start.
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
    #[error("not a certificate or a key of a local authority: {0}")]
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

/// A root with its key.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    names: BTreeSet<String>,
    not_after: SystemTime,
}

/// A certificate for one alias, with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: KeyPair,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Authority {
    /// Makes a root for exactly `names` and what is beneath them.
    pub fn generate(names: &BTreeSet<String>) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "truename local authority");
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = (now + ROOT_LIFETIME).into();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: names.iter().cloned().map(GeneralSubtree::DnsName).collect(),
            // A form of name that no constraint mentions is permitted whole: so all are mentioned.
            excluded_subtrees: vec![
                GeneralSubtree::IpAddress(CidrSubnet::V4([0; 4], [0; 4])),
                GeneralSubtree::IpAddress(CidrSubnet::V6([0; 16], [0; 16])),
            ],
        });
        let root = params.self_signed(&key)?.der().clone();
        Ok(Self {
            issuer: Issuer::new(params, key),
            root,
            names: names.clone(),
            not_after: now + ROOT_LIFETIME,
        })
    }

    /// Reads a root and its key as PEM.
    pub fn from_pem(root: &str, key: &str) -> Result<Self, AuthorityError> {
        let parse = |error: &dyn std::fmt::Display| AuthorityError::Parse(error.to_string());
        let key = KeyPair::from_pem(key)?;
        let certificate =
            CertificateDer::from_pem_slice(root.as_bytes()).map_err(|error| parse(&error))?;
        let (_, x509) = parse_x509_certificate(&certificate).map_err(|error| parse(&error))?;
        if x509.public_key().subject_public_key.data != key.public_key_raw() {
            return Err(AuthorityError::Parse("the key is not the certificate's".into()));
        }
        let names = x509
            .extensions()
            .iter()
            .find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::NameConstraints(constraints) => {
                    constraints.permitted_subtrees.as_ref()
                }
                _ => None,
            })
            .ok_or_else(|| AuthorityError::Parse("it has no name constraints".into()))?
            .iter()
            .filter_map(|subtree| match &subtree.base {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            })
            .collect();
        let seconds = u64::try_from(x509.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self {
            names,
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            issuer: Issuer::from_ca_cert_der(&certificate, key)?,
            root: certificate,
        })
    }

    /// Whether it may vouch for all of `names`, and will for a while yet.
    pub fn covers(&self, names: &BTreeSet<String>) -> bool {
        self.names.is_superset(names) && self.not_after > SystemTime::now() + ROOT_MARGIN
    }

    /// The names that it may vouch for.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.names
    }

    /// When the root ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root's key as PEM (PKCS #8).
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// Issues a server certificate for `names`, all of which the root must permit.
    pub fn issue(
        &self,
        names: &BTreeSet<String>,
        lifetime: Duration,
    ) -> Result<Leaf, AuthorityError> {
        let permits = |name: &str| {
            self.names.iter().any(|permitted| {
                name == permitted
                    || name.strip_suffix(permitted.as_str()).is_some_and(|rest| rest.ends_with('.'))
            })
        };
        if let Some(name) = names.iter().find(|name| !permits(name)) {
            return Err(AuthorityError::NotPermitted {
                name: name.clone(),
                permitted: self.names.iter().cloned().collect(),
            });
        }
        self.sign(names, lifetime)
    }

    /// Signs without asking whether it may: the root's constraints answer that to whoever
    /// verifies, and tests prove it.
    pub(super) fn sign(
        &self,
        names: &BTreeSet<String>,
        lifetime: Duration,
    ) -> Result<Leaf, AuthorityError> {
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
        Ok(Leaf { certificate, key, not_after })
    }
}

impl Leaf {
    /// The leaf for a TLS server.
    pub fn certified(&self) -> Result<CertifiedKey, AuthorityError> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der())
            .map_err(|error| AuthorityError::Parse(error.into()))?;
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)?;
        Ok(CertifiedKey::new(vec![self.certificate.clone()], key))
    }
}
