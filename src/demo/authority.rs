//! A throw-away certificate authority for the demo's world and for tests.
//!
//! It vouches for any name it is asked to, so its root must only ever be given to a process that
//! talks to this world. The proxy's own, name-constrained authority lives in `tls::authority`.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime, SystemTimeError, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

/// How long a root, and a leaf unless told otherwise, is valid.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// Backdates what is issued: a peer in a container may run on a clock that is a little behind.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// A root key in memory, and what it signs.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
}

impl Authority {
    /// Makes a fresh root whose subject is `common_name`.
    pub fn new(common_name: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(common_name);
        params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now - CLOCK_SKEW)?;
        params.not_after = date_time_ymd(1970, 1, 1) + since_1970(now + LIFETIME)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key)?;
        Ok(Self {
            root_pem: root.pem(),
            root: root.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The root certificate as PEM: what goes into `tls.ca.files`.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// A trust store that holds this root and nothing else.
    pub fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates([self.root.clone()]);
        Arc::new(roots)
    }

    /// Signs a certificate that bears exactly `names` and `addresses`.
    pub fn issue(
        &self,
        names: &[&str],
        addresses: &[IpAddr],
        options: LeafOptions,
    ) -> Result<Leaf, AuthorityError> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let serial = fastrand::u64(1..).to_be_bytes();

        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.distinguished_name =
            subject(options.common_name.as_deref().or(names.first().copied()).unwrap_or("leaf"));
        for name in names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        params.not_before =
            date_time_ymd(1970, 1, 1) + since_1970(options.not_before.unwrap_or(now - CLOCK_SKEW))?;
        params.not_after =
            date_time_ymd(1970, 1, 1) + since_1970(options.not_after.unwrap_or(now + LIFETIME))?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match options.usage {
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;

        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Leaf {
            chain_pem: certificate.pem(),
            chain: vec![certificate.into()],
            key_pem: key.serialize_pem(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            serial,
        })
    }

    /// A certificate revocation list, as PEM, that revokes `leaves`: what goes into `tls.crls`.
    pub fn revocation_list(&self, leaves: &[&Leaf]) -> Result<String, AuthorityError> {
        let now = SystemTime::now();
        let mut revoked_certs = Vec::with_capacity(leaves.len());
        for leaf in leaves {
            revoked_certs.push(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&leaf.serial),
                revocation_time: date_time_ymd(1970, 1, 1) + since_1970(now - CLOCK_SKEW)?,
                reason_code: None,
                invalidity_date: None,
            });
        }
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(1970, 1, 1) + since_1970(now - CLOCK_SKEW)?,
            next_update: date_time_ymd(1970, 1, 1) + since_1970(now + LIFETIME)?,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }
}

/// What may differ from an ordinary server certificate that is valid now.
#[derive(Clone, Debug, Default)]
pub struct LeafOptions {
    /// The subject's common name; the first name when not given. No verifier of today reads it:
    /// a leaf with a common name and no names is how to test that.
    pub common_name: Option<String>,
    /// The first instant of validity; a few minutes ago when not given.
    pub not_before: Option<SystemTime>,
    /// The last instant of validity; in a day when not given.
    pub not_after: Option<SystemTime>,
    /// The extended key usage.
    pub usage: Usage,
}

impl LeafOptions {
    /// A certificate that was valid once and is no longer.
    pub fn expired() -> Self {
        let now = SystemTime::now();
        Self {
            not_before: Some(now - 2 * LIFETIME),
            not_after: Some(now - LIFETIME),
            ..Self::default()
        }
    }
}

/// What a certificate may be used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usage {
    /// To prove who a server is.
    #[default]
    Server,
    /// To prove who a client is.
    Client,
}

/// A certificate with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The leaf alone: its issuer is a root, which peers have or do not trust.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key, PKCS #8.
    pub key: PrivateKeyDer<'static>,
    /// The chain as PEM.
    pub chain_pem: String,
    /// The key as PEM.
    pub key_pem: String,
    serial: [u8; 8],
}

impl Leaf {
    /// A server configuration that presents this leaf and offers `alpn` in that order.
    pub fn server_config(&self, alpn: &[&str]) -> Result<Arc<ServerConfig>, AuthorityError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }
}

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A name that no certificate can bear, or a key that could not be made.
    #[error("cannot make the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// rustls refuses the chain, the key or the protocol versions.
    #[error("cannot serve TLS with the certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// A validity that starts or ends before 1970.
    #[error("cannot date the certificate: {0}")]
    Time(#[from] SystemTimeError),
}

fn subject(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// rcgen dates certificates with a type of the `time` crate, which is no dependency of ours: adding
/// this to the epoch makes one without naming it.
fn since_1970(time: SystemTime) -> Result<Duration, SystemTimeError> {
    time.duration_since(UNIX_EPOCH)
}

#[cfg(test)]
mod tests;
