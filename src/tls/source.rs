//! Where the certificates come from that applications are shown: files, or the local authority.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    client::verify_server_name,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, ServerName, pem::PemObject},
    server::ParsedCertificate,
    sign::CertifiedKey,
};

use super::{
    TlsConfigError,
    authority::{Authority, AuthorityError},
    roots::{certificates, read},
    server::Certificates,
    store::{Store, StoreError},
};

/// Where the certificates for aliases come from.
#[derive(Clone)]
pub enum Source {
    /// `listener.tls`: one certificate, with its key, for all names.
    Files {
        /// A chain as PEM.
        certificate: PathBuf,
        /// Its key as PEM.
        key: PathBuf,
    },
    /// The local authority.
    Local {
        /// What signs.
        authority: Arc<Authority>,
        /// Where it is kept; `None` where nothing can be written at all.
        store: Option<Store>,
        /// How long a certificate is valid.
        lifetime: Duration,
    },
}

/// The certificates of some aliases.
pub struct Issued {
    /// Themselves.
    pub certificates: Certificates,
    /// When to issue anew, well before the first ends; `None` where files change by themselves.
    pub renew_at: Option<SystemTime>,
    /// Names that a configured certificate does not bear.
    pub uncovered: Vec<String>,
}

/// Why there is no certificate for an alias.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file of `listener.tls` cannot be read, or is not what it should be.
    #[error("{0}")]
    Files(#[from] TlsConfigError),
    /// The two files of `listener.tls` do not go together.
    #[error(
        "`listener.tls`: {} and {} are no pair: {detail}",
        .certificate.display(), .key.display()
    )]
    Pair {
        /// `listener.tls.certificate`
        certificate: PathBuf,
        /// `listener.tls.key`
        key: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The local authority.
    #[error("{0}")]
    Authority(#[from] AuthorityError),
    /// The folder that was configured for it.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl Source {
    /// A certificate for each of `aliases`, given by their names.
    pub fn issue(&self, aliases: &[BTreeSet<String>]) -> Result<Issued, SourceError> {
        match self {
            Self::Files { certificate, key } => {
                let key = Arc::new(certified_key(certificate, key)?);
                let names = aliases.iter().flatten();
                let uncovered = names.filter(|name| !bears(&key, name)).cloned().collect();
                let certificates = Certificates { by_name: HashMap::new(), other: Some(key) };
                Ok(Issued { certificates, renew_at: None, uncovered })
            }
            Self::Local { authority, lifetime, .. } => {
                let mut by_name = HashMap::new();
                let mut ends = authority.not_after();
                for names in aliases.iter().filter(|names| !names.is_empty()) {
                    let leaf = authority.issue(names, *lifetime)?;
                    ends = ends.min(leaf.not_after);
                    let key = Arc::new(leaf.certified()?);
                    for name in names {
                        by_name.entry(name.clone()).or_insert_with(|| key.clone());
                    }
                }
                let now = SystemTime::now();
                let left = ends.duration_since(now).unwrap_or_default();
                Ok(Issued {
                    certificates: Certificates { by_name, other: None },
                    renew_at: Some(now + left.mul_f64(2.0 / 3.0)),
                    uncovered: Vec::new(),
                })
            }
        }
    }

    /// Differs when the files hold something else. By content: a ConfigMap or a Secret arrives by a
    /// swap of links whose targets may well be of the same second.
    pub fn fingerprint(&self) -> u64 {
        let files = match self {
            Self::Files { certificate, key } => vec![certificate.clone(), key.clone()],
            Self::Local { store: Some(store), .. } => vec![store.root(), store.key()],
            Self::Local { store: None, .. } => Vec::new(),
        };
        let mut hasher = DefaultHasher::new();
        for file in files {
            fs::read(file).ok().hash(&mut hasher);
        }
        hasher.finish()
    }
}

fn certified_key(certificate: &Path, key: &Path) -> Result<CertifiedKey, SourceError> {
    let no_pair = |detail: String| SourceError::Pair {
        certificate: certificate.into(),
        key: key.into(),
        detail,
    };
    let chain = certificates(certificate, "listener.tls.certificate")?;
    let der = PrivateKeyDer::from_pem_slice(&read(key, "listener.tls.key")?)
        .map_err(|error| no_pair(format!("the key: {error}")))?;
    CertifiedKey::from_der(chain, der, &aws_lc_rs::default_provider())
        .map_err(|error| no_pair(error.to_string()))
}

/// Whether a certificate is valid for `name`.
fn bears(key: &CertifiedKey, name: &str) -> bool {
    let Ok(leaf) = key.end_entity_cert().and_then(ParsedCertificate::try_from) else {
        return false;
    };
    ServerName::try_from(name).is_ok_and(|name| verify_server_name(&leaf, &name).is_ok())
}
