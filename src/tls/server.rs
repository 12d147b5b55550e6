//! TLS from applications: which certificate a name gets, and the handshake.

use std::{collections::HashMap, io, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs::{self, Ticketer},
    server::{Acceptor, ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::{TlsConfigError, client::Negotiated};
use crate::socket::{ByteStream, Socket};

/// RFC 6066 §3: the server knows no such name.
const UNRECOGNIZED_NAME: u8 = 112;
/// RFC 8446 §9.2: the server wants a name.
const MISSING_EXTENSION: u8 = 109;

/// What is served to applications that speak TLS. Shared by all listeners and workers.
pub struct ServerTls {
    config: Arc<ServerConfig>,
    certificates: Arc<Current>,
}

/// What is shown to whom.
#[derive(Debug, Default)]
pub struct Certificates {
    /// By the name that the client asks for.
    pub by_name: HashMap<String, Arc<CertifiedKey>>,
    /// For every other name that a listener serves.
    pub other: Option<Arc<CertifiedKey>>,
}

/// The certificates of now, replaced whole.
#[derive(Debug, Default)]
struct Current(ArcSwap<Certificates>);

impl ResolvesServerCert for Current {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load().find(hello.server_name()?).cloned()
    }
}

impl Certificates {
    fn find(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        let folded = || self.by_name.get(&name.trim_end_matches('.').to_ascii_lowercase());
        self.by_name.get(name).or_else(folded).or(self.other.as_ref())
    }
}

/// An application's connection under TLS.
#[derive(Debug)]
pub struct Accepted<S> {
    /// The plaintext side of it.
    pub stream: Box<TlsStream<S>>,
    /// The name that the application asked for.
    pub server_name: String,
    /// What it will speak.
    pub alpn: Negotiated,
}

impl<S: ByteStream> ByteStream for TlsStream<S> {
    fn socket(&self) -> Option<&Socket> {
        self.get_ref().0.socket()
    }
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
    #[error(
        "the client asked for `{name}`; this listener serves {}; another name has to be among the \
         alias' `hosts`, or be borne by a certificate of `listener.tls`",
        .served.join(", ")
    )]
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
        let library = |error: rustls::Error| TlsConfigError::library(&error);
        let certificates = Arc::<Current>::default();
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

    /// How long a ticket is good for: two terms of the key that it is under.
    #[cfg(test)]
    pub(super) fn ticket_lifetime(&self) -> Option<u32> {
        self.config.ticketer.enabled().then(|| self.config.ticketer.lifetime())
    }

    /// Serves these certificates from the next handshake on.
    pub fn serve(&self, certificates: Certificates) {
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
        let known = |name: &String| served(name) && self.certificates.0.load().find(name).is_some();
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
        Ok(Accepted { stream: Box::new(stream), server_name: name, alpn })
    }
}
