//! The client side: one configuration for each set of TLS settings, and the handshake.

use crate::{
    config,
    resolve::TrueName,
    tls::{RootStores, TlsConfigError, TlsError},
};
use rustls::{ClientConfig, pki_types::ServerName};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::client::TlsStream;

/// The application protocols to offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `http/1.1` only.
    Http1,
    /// `h2` only, and the server must agree to it.
    Http2,
    /// `h2`, then `http/1.1`.
    Http2Or1,
    /// Nothing: tunnels and databases.
    None,
}

/// The application protocol that the server agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Negotiated {
    /// `http/1.1`.
    Http1,
    /// `h2`.
    Http2,
    /// The server takes no part in ALPN.
    None,
}

/// An alias' TLS settings, loaded: ready for any number of handshakes.
pub struct ClientTls {
    generation: u64,
    client_certificate: bool,
    #[allow(dead_code)]
    http1: Arc<ClientConfig>,
}

impl ClientTls {
    /// Reads every file that the settings name. `None` for `mode: plaintext`: there is no TLS at all.
    ///
    /// Blocking, and slow where system roots are read: not for a worker.
    pub fn load(
        _config: &config::Tls,
        _roots: &mut RootStores,
    ) -> Result<Option<ClientTls>, TlsConfigError> {
        todo!()
    }

    /// Differs for each load: connections made under other trust or certificates are not these.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether there is a client certificate to show.
    pub fn has_client_certificate(&self) -> bool {
        self.client_certificate
    }
}

/// A connection that is up and verified.
pub struct Handshake<S> {
    /// The plaintext side of it.
    pub stream: TlsStream<S>,
    /// The application protocol agreed upon.
    pub alpn: Negotiated,
    /// Whether an earlier session was resumed.
    pub resumed: bool,
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// When the server's certificate expires, in Unix seconds.
    pub not_after: Option<i64>,
}

/// Verified TLS to `name` over `stream`. The deadline is the caller's.
pub async fn handshake<S>(
    _stream: S,
    _tls: &ClientTls,
    _alpn: Alpn,
    _name: &ServerName<'static>,
) -> Result<Handshake<S>, TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    todo!()
}

/// The name to send and to verify; an IP address is verified but not sent.
pub fn server_name(_name: &TrueName) -> Result<ServerName<'static>, TlsError> {
    todo!()
}
