//! What can go wrong with TLS, in words that say what mends it.

use crate::tls::VerifyFailure;
use std::io;

/// TLS settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsConfigError {}

/// A handshake that failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate does not prove the true name.
    #[error("{0:?}")]
    Certificate(Box<VerifyFailure>),
    /// No TLS version, cipher suite or group in common, or the server broke the protocol.
    #[error("{detail}")]
    Protocol {
        /// What the server lacks or did.
        detail: String,
    },
    /// The server refused with an alert.
    #[error("{alert}")]
    Alert {
        /// The alert's name as RFC 8446 spells it.
        alert: String,
        /// Whether we had a client certificate to show.
        client_certificate: bool,
    },
    /// The server closed the connection in the middle of the handshake.
    #[error("eof")]
    Eof,
    /// The peer answered, but not in TLS.
    #[error("not tls")]
    NotTls,
    /// The server did not agree to the application protocol that was demanded.
    #[error("alpn")]
    Alpn {
        /// What was offered.
        offered: &'static str,
    },
    /// The true name cannot be used as a server name.
    #[error("{name}")]
    Name {
        /// The name in question.
        name: String,
    },
    /// The connection broke.
    #[error("io")]
    Io(#[source] io::Error),
}

impl TlsError {
    /// The key or command that mends it.
    pub fn hint(&self) -> Option<String> {
        todo!()
    }

    /// The TLS error behind an I/O error met after the handshake.
    ///
    /// In TLS 1.3 a server refuses a missing client certificate only once the client believes the
    /// handshake to be over, so that the alert comes with the first read.
    pub fn after_handshake(
        _error: &(dyn std::error::Error + 'static),
        _client_certificate: bool,
    ) -> Option<TlsError> {
        todo!()
    }
}
