//! The client side: a configuration for each set of TLS settings, and the handshake.

use super::{
    leaf::Leaf,
    lists::Lists,
    offer::{Alpn, Offer},
    pem::{certificates, pem_error, read},
    pins::Pins,
    roots::{RootStores, warn_of_dates},
    sessions::Sessions,
    verify::{Trust, Trusted, Verifier},
};
use crate::{
    config::{self, TlsMode, TlsVersion},
    resolve::TrueName,
    tls::{TlsConfigError, TlsConfigErrors, TlsError, TlsFault},
};
use rustls::{
    ClientConfig, Error, HandshakeKind, InconsistentKeys, ProtocolVersion,
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, kx_group},
    },
    pki_types::{PrivateKeyDer, ServerName, pem::PemObject},
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};
use std::{
    fmt::{self, Debug, Formatter},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// The application protocol that the server accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Negotiated {
    /// `http/1.1`.
    Http1,
    /// `h2`.
    Http2,
    /// The server does not support ALPN: by convention, this means HTTP/1.1.
    None,
}

/// The loaded TLS settings of an alias, ready for any number of handshakes.
///
/// There is one `rustls::ClientConfig` for each [`Alpn`]. All share one verifier and the sessions: rustls
/// resumes a session only with the verifier that made it.
pub struct ClientTls {
    generation: u64,
    client_certificate: bool,
    post_quantum: bool,
    requires_tls13: bool,
    sessions: Arc<Sessions>,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
    http2_or_1: Arc<ClientConfig>,
    listed: Arc<ClientConfig>,
    no_alpn: Arc<ClientConfig>,
}

impl ClientTls {
    /// Reads all files of the settings, and reports all their problems. `None` for `mode: plaintext`: there is
    /// no TLS at all.
    ///
    /// Blocking, and slow if it reads the system's roots: do not call it on a worker.
    pub fn load(
        config: &config::Tls,
        roots: &mut RootStores,
    ) -> Result<Option<ClientTls>, TlsConfigErrors> {
        Self::load_offering(config, &[], roots)
    }

    /// The same; [`Alpn::Listed`] offers these protocols.
    pub fn load_offering(
        config: &config::Tls,
        listed: &[String],
        roots: &mut RootStores,
    ) -> Result<Option<ClientTls>, TlsConfigErrors> {
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);

        let provider = Arc::new(provider(config));
        let mut errors = Vec::new();
        let trust = match config.mode {
            TlsMode::Plaintext => return Ok(None),
            TlsMode::Verify => trusted(config, roots, &mut errors),
            TlsMode::InsecureSkipVerify => Some(trust_any()),
        };
        let pins = keep_error(Pins::parse(&config.pins), &mut errors);
        let identity = config.client_certificate.as_ref();
        let identity =
            identity.map(|pair| keep_error(client_certificate(pair, &provider), &mut errors));
        let all = trust.zip(pins).zip(identity.map_or(Some(None), |identity| identity.map(Some)));
        let ((trust, pins), identity) = TlsConfigErrors::unless(errors, all)?;

        let algorithms = provider.signature_verification_algorithms;
        let verifier = Arc::new(Verifier { trust, pins, algorithms });
        let versions: &[_] = match config.min_version {
            TlsVersion::V1_2 => &[&TLS13, &TLS12],
            TlsVersion::V1_3 => &[&TLS13],
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| TlsConfigError::library(&error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone());
        let base = match identity {
            None => builder.with_no_client_auth(),
            Some(key) => {
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::new(key))))
            }
        };

        // Clones share verifier and client certificate.
        let offering = |alpn: Alpn| {
            let mut config = base.clone();
            config.alpn_protocols = alpn.protocols(listed);
            Arc::new(config)
        };
        Ok(Some(ClientTls {
            generation: GENERATIONS.fetch_add(1, Relaxed),
            client_certificate: config.client_certificate.is_some(),
            post_quantum: config.post_quantum,
            requires_tls13: config.min_version == TlsVersion::V1_3,
            sessions: Arc::new(Sessions::new(verifier)),
            http1: offering(Alpn::Http1),
            http2: offering(Alpn::Http2),
            http2_or_1: offering(Alpn::Http2Or1),
            listed: offering(Alpn::Listed),
            no_alpn: offering(Alpn::None),
        }))
    }

    /// Unique for each load: connections made with other roots or another certificate must not be mixed.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether there is a client certificate.
    pub fn has_client_certificate(&self) -> bool {
        self.client_certificate
    }

    /// What a handshake offers to the server.
    pub fn offer(&self, alpn: Alpn) -> Offer {
        Offer {
            alpn,
            post_quantum: self.post_quantum,
            client_certificate: self.client_certificate,
            requires_tls13: self.requires_tls13,
        }
    }

    fn config(&self, alpn: Alpn) -> &Arc<ClientConfig> {
        match alpn {
            Alpn::Http1 => &self.http1,
            Alpn::Http2 => &self.http2,
            Alpn::Http2Or1 => &self.http2_or_1,
            Alpn::Listed => &self.listed,
            Alpn::None => &self.no_alpn,
        }
    }
}

/// Without the configurations, which are long.
impl Debug for ClientTls {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("generation", &self.generation).finish_non_exhaustive()
    }
}

/// An established and verified connection.
#[derive(Debug)]
pub struct Handshake<S> {
    /// Its plaintext side.
    pub stream: TlsStream<S>,
    /// The negotiated application protocol.
    pub alpn: Negotiated,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// When the server's certificate expires, in Unix seconds.
    pub not_after: Option<i64>,
}

/// Verified TLS to `name` over `stream`. The caller is responsible for a deadline.
pub async fn handshake<S>(
    stream: S,
    tls: &ClientTls,
    alpn: Alpn,
    name: &ServerName<'static>,
) -> Result<Handshake<S>, TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (config, visit) = tls.sessions.attend(tls.config(alpn));
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector
        .connect(name.clone(), stream)
        .await
        .map_err(|error| TlsError::from_handshake(error, name, tls.offer(alpn)))?;

    let (_, session) = stream.get_ref();
    let negotiated = match session.alpn_protocol() {
        Some(b"h2") => Negotiated::Http2,
        Some(b"http/1.1") => Negotiated::Http1,
        _ => Negotiated::None,
    };
    // A server without ALPN would take the HTTP/2 preface for an invalid HTTP/1 request.
    if alpn == Alpn::Http2 && negotiated != Negotiated::Http2 {
        return Err(TlsError::Alpn { name: name.to_str().into_owned(), offered: alpn.as_str() });
    }
    let version = match session.protocol_version() {
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "TLSv1.3",
    };
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let chain = session.peer_certificates().unwrap_or_default();
    visit.verified(name, chain);
    let leaf = chain.first();
    let not_after = leaf.and_then(Leaf::parse).map(|leaf| leaf.not_after());
    Ok(Handshake { alpn: negotiated, resumed, version, not_after, stream })
}

/// The name to send by SNI and to verify; an IP address is only verified.
pub fn server_name(name: &TrueName) -> Result<ServerName<'static>, TlsError> {
    match name.ip() {
        Some(address) => Ok(ServerName::IpAddress(address.into())),
        None => ServerName::try_from(name.to_string())
            .map_err(|_| TlsError::Name { name: name.to_string() }),
    }
}

fn provider(config: &config::Tls) -> CryptoProvider {
    let mut kx_groups = vec![kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1];
    if config.post_quantum {
        kx_groups.insert(0, kx_group::X25519MLKEM768);
    }
    CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() }
}

/// The value, or `None` after adding the error to the others.
fn keep_error<T>(result: Result<T, TlsConfigError>, errors: &mut Vec<TlsConfigError>) -> Option<T> {
    result.map_err(|error| errors.push(error)).ok()
}

fn trusted(
    config: &config::Tls,
    roots: &mut RootStores,
    errors: &mut Vec<TlsConfigError>,
) -> Option<Trust> {
    let roots = roots.load(&config.ca).map_err(|more| errors.extend(more)).ok();
    let mut lists = Lists::default();
    errors.extend(config.crls.iter().filter_map(|path| lists.add_file(path).err()));
    Some(Trust::Roots(Trusted { roots: roots?, lists }))
}

fn trust_any() -> Trust {
    tracing::warn!(
        "`tls.mode: insecure_skip_verify` is set: any server is accepted, so an attacker can read and change everything; `tls.ca` and `tls.crls` are ignored"
    );
    Trust::Any
}

/// A client certificate with its key, which must be a pair.
fn client_certificate(
    pair: &config::ClientCertificate,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsConfigError> {
    const CERT: &str = "tls.client_certificate.cert";

    let chain = certificates(&pair.cert, CERT)?;
    warn_of_dates(CERT, &pair.cert, &chain[0]);
    CertifiedKey::from_der(chain, private_key(&pair.key)?, provider)
        .map_err(|error| pair_error(pair, &error))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
    PrivateKeyDer::from_pem_slice(&read(path, KEY)?)
        .map_err(|error| key_error(path, pem_error(&error)))
}

const KEY: &str = "tls.client_certificate.key";

fn key_error(path: &Path, detail: String) -> TlsConfigError {
    TlsConfigError::of(KEY, path, |path| TlsFault::PrivateKey { path, detail })
}

fn pair_error(pair: &config::ClientCertificate, error: &Error) -> TlsConfigError {
    let both = |what| TlsConfigError::new("tls.client_certificate", what);
    match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            both(TlsFault::Mismatch { cert: pair.cert.clone(), key: pair.key.clone() })
        }
        Error::InvalidCertificate(error) => {
            both(TlsFault::ClientCertificate { cert: pair.cert.clone(), detail: error.to_string() })
        }
        error => key_error(&pair.key, error.to_string()),
    }
}
