//! A temporary certificate authority for the demo and for tests.
//!
//! It issues certificates for any name, so its root must only be trusted by processes that connect to the
//! demo or the test. The proxy's own, name-constrained authority is in `tls::authority`.

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

/// The validity of roots, and the default validity of leaves.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// Certificates are backdated by this, because a peer's clock may be slightly behind.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// A certificate authority with its key in memory.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_pem: String,
}

impl Authority {
    /// Creates a root with the subject `common_name`.
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

    /// The root certificate as PEM, for `tls.ca.files`.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// A trust store with only this root.
    pub fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates([self.root.clone()]);
        Arc::new(roots)
    }

    /// Issues a certificate that is valid for exactly `names` and `addresses`.
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

    /// A certificate revocation list that revokes `leaves`, as PEM, for `tls.crls`.
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

/// Deviations from an ordinary server certificate that is valid now.
#[derive(Clone, Debug, Default)]
pub struct LeafOptions {
    /// The subject's common name; by default the first name. Modern verifiers ignore it. A leaf with a
    /// common name and no names can test that.
    pub common_name: Option<String>,
    /// The start of validity; by default a few minutes ago.
    pub not_before: Option<SystemTime>,
    /// The end of validity; by default in a day.
    pub not_after: Option<SystemTime>,
    /// The extended key usage.
    pub usage: Usage,
}

impl LeafOptions {
    /// A certificate that has expired.
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
    /// Server authentication.
    #[default]
    Server,
    /// Client authentication.
    Client,
}

/// A certificate with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The leaf alone, because its issuer is a root, which is not sent.
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

/// Why a certificate could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A name that is not possible in certificates, or a key that could not be generated.
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

/// rcgen uses a type of the `time` crate, which we do not depend on. Adding this to rcgen's epoch
/// gives such a value.
fn since_1970(time: SystemTime) -> Result<Duration, SystemTimeError> {
    time.duration_since(UNIX_EPOCH)
}

#[cfg(test)]
mod tests;
