//! TLS from applications: which certificate a name gets, and the handshake.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    client::verify_server_name,
    crypto::aws_lc_rs::{self, Ticketer},
    pki_types::{PrivateKeyDer, ServerName, pem::PemObject},
    server::{Acceptor, ClientHello, ParsedCertificate, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::{
    TlsConfigError,
    authority::{Authority, AuthorityError},
    client::Negotiated,
    roots::{certificates, read},
};

/// RFC 6066 §3: the server knows no such name.
const UNRECOGNIZED_NAME: u8 = 112;
/// RFC 8446 §9.2: the server wants a name.
const MISSING_EXTENSION: u8 = 109;

/// What is served to applications that speak TLS. Shared by all listeners and workers.
pub struct ServerTls {
    config: Arc<ServerConfig>,
    certificates: Arc<Certificates>,
}

/// The certificate of each name, replaced whole.
#[derive(Debug, Default)]
struct Certificates(ArcSwap<HashMap<String, Arc<CertifiedKey>>>);

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(hello.server_name()?)
    }
}

impl Certificates {
    fn find(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        let certificates = self.0.load();
        match certificates.get(name) {
            Some(key) => Some(key.clone()),
            None => certificates.get(&name.trim_end_matches('.').to_ascii_lowercase()).cloned(),
        }
    }
}

/// An application's connection under TLS.
#[derive(Debug)]
pub struct Accepted<S> {
    /// The plaintext side of it.
    pub stream: TlsStream<S>,
    /// The name that the application asked for.
    pub server_name: String,
    /// What it will speak.
    pub alpn: Negotiated,
}

/// A handshake that an application could not complete.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// No SNI.
    #[error(
        "the client named no server (SNI), as for an address in its URL; this listener serves {}",
        .served.join(", ")
    )]
    NoName {
        /// The names it could have asked for.
        served: Vec<String>,
    },
    /// A name without a certificate.
    #[error("the client asked for `{name}`; this listener serves {}", .served.join(", "))]
    UnknownName {
        /// What it asked for.
        name: String,
        /// The names it could have asked for.
        served: Vec<String>,
    },
    /// The handshake failed: most often, the client does not trust the certificate.
    #[error("the client's TLS handshake failed: {0}")]
    Handshake(#[from] io::Error),
}

impl ServerTls {
    /// No certificates yet.
    pub fn new() -> Result<Self, TlsConfigError> {
        let library = |error: rustls::Error| TlsConfigError::Library(error.to_string());
        let certificates = Arc::new(Certificates::default());
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(library)?
            .with_no_client_auth()
            .with_cert_resolver(certificates.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // Stateless tickets under keys that rotate every six hours.
        config.ticketer = Ticketer::new().map_err(library)?;
        Ok(Self { config: Arc::new(config), certificates })
    }

    /// Serves these certificates from the next handshake on.
    pub fn serve(&self, certificates: HashMap<String, Arc<CertifiedKey>>) {
        self.certificates.0.store(Arc::new(certificates));
    }

    /// Shakes hands. `served` says which of the names belong to the listener that was asked.
    ///
    /// The deadline is the caller's.
    pub async fn accept<S>(
        &self,
        stream: S,
        served: impl Fn(&str) -> bool,
        names: impl Fn() -> Vec<String>,
    ) -> Result<Accepted<S>, AcceptError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), stream);
        // rustls answers a ClientHello that is none with an alert; the acceptor sends it.
        let start = (&mut acceptor).await?;
        let name = start.client_hello().server_name().map(str::to_owned);
        let known = |name: &String| served(name) && self.certificates.find(name).is_some();
        let name = match name {
            Some(name) if known(&name) => name,
            name => {
                let alert = if name.is_some() { UNRECOGNIZED_NAME } else { MISSING_EXTENSION };
                let mut stream = start.io;
                // A fatal alert in a record of TLS 1.2's version, as a ServerHello's would be.
                let _ = stream.write_all(&[0x15, 3, 3, 0, 2, 2, alert]).await;
                let _ = stream.shutdown().await;
                let served = names();
                return Err(match name {
                    Some(name) => AcceptError::UnknownName { name, served },
                    None => AcceptError::NoName { served },
                });
            }
        };
        let stream = start.into_stream(self.config.clone()).await?;
        let alpn = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Negotiated::Http2,
            Some(_) => Negotiated::Http1,
            None => Negotiated::None,
        };
        Ok(Accepted { stream, server_name: name, alpn })
    }
}

/// Certificates for aliases: where they come from, and when they have to be made anew.
pub enum Source {
    /// `listener.tls`: one certificate, with its key, for all names.
    Files {
        /// A chain as PEM.
        certificate: PathBuf,
        /// Its key as PEM.
        key: PathBuf,
    },
    /// The local authority.
    Local(Box<Authority>, Duration),
}

/// The certificates of some aliases.
pub struct Issued {
    /// By the names that they are served for.
    pub certificates: HashMap<String, Arc<CertifiedKey>>,
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
}

impl Source {
    /// A certificate for each of `aliases`, given by their names.
    pub fn issue(&self, aliases: &[BTreeSet<String>]) -> Result<Issued, SourceError> {
        let mut certificates = HashMap::new();
        match self {
            Self::Files { certificate, key } => {
                let key = Arc::new(certified_key(certificate, key)?);
                let mut uncovered = Vec::new();
                for name in aliases.iter().flatten() {
                    if !bears(&key, name) {
                        uncovered.push(name.clone());
                    }
                    certificates.insert(name.clone(), key.clone());
                }
                Ok(Issued { certificates, renew_at: None, uncovered })
            }
            Self::Local(authority, lifetime) => {
                let mut ends = authority.not_after();
                for names in aliases {
                    let leaf = authority.issue(names, *lifetime)?;
                    ends = ends.min(leaf.not_after);
                    let key = Arc::new(leaf.certified()?);
                    for name in names {
                        certificates.entry(name.clone()).or_insert_with(|| key.clone());
                    }
                }
                let left = ends.duration_since(SystemTime::now()).unwrap_or_default();
                let renew_at = Some(SystemTime::now() + left.mul_f64(2.0 / 3.0));
                Ok(Issued { certificates, renew_at, uncovered: Vec::new() })
            }
        }
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
