//! TLS from applications: the choice of the certificate, and the handshake.

use std::{collections::HashMap, io, net::IpAddr, sync::Arc};

use rustls::{
    ServerConfig,
    client::verify_server_name,
    crypto::aws_lc_rs::{self, Ticketer},
    pki_types::ServerName,
    server::{Acceptor, ParsedCertificate, ResolvesServerCertUsingSni},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::LazyConfigAcceptor;
pub use tokio_rustls::server::TlsStream;

use super::{
    TlsConfigError,
    authority::{Authority, Certified},
    client::Negotiated,
};
use crate::stream::{ByteStream, Socket};

/// RFC 6066 §3: the server does not recognise the name.
const UNRECOGNIZED_NAME: u8 = 112;

/// The TLS server side. Shared by all listeners and workers.
pub struct ServerTls {
    /// It has no certificate: each connection gets a copy with its own.
    config: Arc<ServerConfig>,
}

/// The certificates of all aliases.
#[derive(Clone, Debug, Default)]
pub struct ServerCertificates {
    aliases: HashMap<String, Arc<AliasCertificates>>,
    /// The one for all aliases, from files.
    configured: Option<Arc<CertifiedKey>>,
}

/// What a client asks for, and where it connected.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The alias that serves it, if there is one.
    pub alias: Option<&'a str>,
    /// Whether its listener accepts any name.
    pub any: bool,
    /// The name that the client sent by SNI.
    pub name: Option<&'a str>,
    /// The address that it connected to.
    pub address: IpAddr,
}

/// The certificates of one alias.
#[derive(Debug)]
pub struct AliasCertificates {
    /// Its shortest name.
    main: Option<String>,
    /// The preferred one first.
    served: Vec<Served>,
}

type Served = (Arc<Authority>, Certified);

impl ServerCertificates {
    /// One certificate for all aliases.
    pub fn configured(key: Arc<CertifiedKey>) -> Self {
        Self { aliases: HashMap::new(), configured: Some(key) }
    }

    /// Each alias has its own.
    pub fn local(aliases: HashMap<String, Arc<AliasCertificates>>) -> Self {
        Self { aliases, configured: None }
    }

    /// The one certificate for all aliases, if there is one.
    pub fn configured_key(&self) -> Option<&CertifiedKey> {
        self.configured.as_deref()
    }

    /// The certificate to use.
    pub fn find(&self, asked: Asked<'_>) -> Option<&Arc<CertifiedKey>> {
        if let Some(configured) = &self.configured {
            let is_valid = || asked.name.is_some_and(|name| is_valid_for(configured, name));
            return Some(configured).filter(|_| asked.alias.is_some() || is_valid());
        }
        let alias = self.aliases.get(asked.alias?)?;
        match asked.name {
            Some(name) => alias.named(name).or_else(|| alias.first().filter(|_| asked.any)),
            None => alias.unnamed(asked.address),
        }
    }
}

impl AliasCertificates {
    /// The preferred one is the first of `served`.
    pub fn new(main: Option<String>, served: Vec<Served>) -> Self {
        Self { main, served }
    }

    fn named(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        let folded = name.trim_end_matches('.').to_ascii_lowercase();
        let (_, certified) =
            self.served.iter().find(|(authority, _)| authority.root().names().contains(&folded))?;
        Some(&certified.named)
    }

    /// For a client without SNI, which may verify the address, or the shortest name (as Java does).
    fn unnamed(&self, address: IpAddr) -> Option<&Arc<CertifiedKey>> {
        let has_main = |authority: &Authority| {
            self.main.as_ref().is_none_or(|main| authority.root().names().contains(main))
        };
        let has_address = |authority: &Authority| {
            authority.addresses().any(|has| IpAddr::V4(*has) == address.to_canonical())
        };
        let find = |wanted: &dyn Fn(&Authority) -> bool| {
            let mut served = self.served.iter();
            served.find(|(authority, _)| wanted(authority)).map(|(_, certified)| &certified.unnamed)
        };
        find(&|authority| has_main(authority) && has_address(authority))
            .or_else(|| find(&has_main))
            .or_else(|| find(&|_| true))
    }

    fn first(&self) -> Option<&Arc<CertifiedKey>> {
        self.served.first().map(|(_, certified)| &certified.named)
    }
}

impl PartialEq for AliasCertificates {
    fn eq(&self, other: &Self) -> bool {
        let same = |(one, other): (&Served, &Served)| {
            one.0.root() == other.0.root()
                && one.1.named.cert == other.1.named.cert
                && one.1.unnamed.cert == other.1.unnamed.cert
        };
        self.main == other.main
            && self.served.len() == other.served.len()
            && self.served.iter().zip(&other.served).all(same)
    }
}

/// Whether a certificate is valid for `name`.
pub fn is_valid_for(key: &CertifiedKey, name: &str) -> bool {
    let Ok(leaf) = key.end_entity_cert().and_then(ParsedCertificate::try_from) else {
        return false;
    };
    ServerName::try_from(name).is_ok_and(|name| verify_server_name(&leaf, &name).is_ok())
}

/// An application's TLS connection.
#[derive(Debug)]
pub struct Accepted<S> {
    /// Its plaintext side.
    pub stream: Box<TlsStream<S>>,
    /// The name that the application sent by SNI, if it did.
    pub server_name: Option<String>,
    /// The negotiated application protocol.
    pub alpn: Negotiated,
}

impl<S: ByteStream> ByteStream for TlsStream<S> {
    fn socket(&self) -> Option<&Socket> {
        self.get_ref().0.socket()
    }
}

/// Why a handshake with an application failed.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// There is no certificate for the name, or no name was sent and the listener has no alias.
    #[error(
        "the client asked for {}; this listener serves {}; another name has to be among the alias' \
         `hosts`, or a certificate of `listener.tls` has to be valid for it",
        .name.as_ref().map_or("no name".to_owned(), |name| format!("`{name}`")),
        .served
    )]
    UnknownName {
        /// The name that the client sent.
        name: Option<String>,
        /// The names that the listener serves, or the first of many.
        served: String,
    },
    /// The handshake failed, usually because the client does not trust the certificate.
    #[error("the client's TLS handshake failed: {0}")]
    Handshake(#[from] io::Error),
}

impl ServerTls {
    /// Without certificates.
    pub fn new() -> Result<Self, TlsConfigError> {
        let library = |error: rustls::Error| TlsConfigError::library(&error);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(library)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
        // `curl --http1.0` offers only the last.
        config.alpn_protocols = [&b"h2"[..], b"http/1.1", b"http/1.0"].map(<[u8]>::to_vec).to_vec();
        // Stateless tickets under keys that rotate every six hours.
        config.ticketer = Ticketer::new().map_err(library)?;
        Ok(Self { config: Arc::new(config) })
    }

    /// How long a ticket is valid: two periods of its key.
    #[cfg(test)]
    pub(super) fn ticket_lifetime(&self) -> Option<u32> {
        self.config.ticketer.enabled().then(|| self.config.ticketer.lifetime())
    }

    /// Performs the handshake. `choose` finds the certificate for the client's name; `names` returns the names
    /// that are served. If `spoken` is given, the first of the client's ALPN protocols that is in it is chosen, if
    /// there is one. Otherwise the protocols are those of HTTP, and a client that uses ALPN must offer one of them.
    ///
    /// The caller is responsible for a deadline.
    pub async fn accept<S>(
        &self,
        stream: S,
        choose: impl Fn(Option<&str>) -> Option<Arc<CertifiedKey>>,
        names: impl Fn() -> String,
        spoken: Option<&[String]>,
    ) -> Result<Accepted<S>, AcceptError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), stream);
        // rustls responds to an invalid ClientHello with an alert; the acceptor sends it.
        let start = (&mut acceptor).await?;
        let hello = start.client_hello();
        let name = hello.server_name().map(str::to_owned);
        let chosen = spoken.map(|spoken| {
            let is_spoken = |offered: &&[u8]| spoken.iter().any(|own| own.as_bytes() == *offered);
            hello.alpn().into_iter().flatten().find(is_spoken).map(<[u8]>::to_vec)
        });
        let Some(key) = choose(name.as_deref()) else {
            let mut stream = start.io;
            // A fatal alert in a record with the version of TLS 1.2, like a ServerHello's.
            let _ = stream.write_all(&[0x15, 3, 3, 0, 2, 2, UNRECOGNIZED_NAME]).await;
            let _ = stream.shutdown().await;
            return Err(AcceptError::UnknownName { name, served: names() });
        };
        let mut config = ServerConfig::clone(&self.config);
        config.cert_resolver = Arc::new(SingleCertAndKey::from(key));
        if let Some(chosen) = chosen {
            config.alpn_protocols = chosen.into_iter().collect();
        }
        let stream = start.into_stream(Arc::new(config)).await?;
        let alpn = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Negotiated::Http2,
            Some(_) => Negotiated::Http1,
            None => Negotiated::None,
        };
        Ok(Accepted { stream: Box::new(stream), server_name: name, alpn })
    }
}
