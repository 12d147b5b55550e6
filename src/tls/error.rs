//! TLS errors, with messages that say how to fix them.

use super::{
    failure::{Reason, VerifyFailure},
    offer::{Alpn, Offer},
};
use crate::{config::FileError, fault::Kind};
use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible,
    pki_types::ServerName,
};
use std::{
    error,
    fmt::{self, Display, Formatter},
    io,
    path::{Path, PathBuf},
};

/// All problems of one alias' TLS settings.
#[derive(Debug)]
pub struct TlsConfigErrors(Vec<TlsConfigError>);

impl TlsConfigErrors {
    /// `value`, unless there are errors.
    pub(super) fn unless<T>(errors: Vec<TlsConfigError>, value: Option<T>) -> Result<T, Self> {
        match value {
            Some(value) if errors.is_empty() => Ok(value),
            _ => Err(Self(errors)),
        }
    }

    /// The single errors.
    pub fn iter(&self) -> impl Iterator<Item = &TlsConfigError> {
        self.0.iter()
    }

    /// Whether all of them only mean that a file could not be read.
    pub fn are_io(&self) -> bool {
        self.0.iter().all(TlsConfigError::is_io)
    }
}

impl From<TlsConfigError> for TlsConfigErrors {
    fn from(error: TlsConfigError) -> Self {
        Self(vec![error])
    }
}

impl Display for TlsConfigErrors {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (nth, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if nth == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl error::Error for TlsConfigErrors {}

/// A TLS setting that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("`{key}`: {what}")]
pub struct TlsConfigError {
    /// The key; for an alias, its path starts at `tls`.
    pub key: &'static str,
    /// The file, if the key names one.
    pub file: Option<PathBuf>,
    /// What is wrong.
    pub what: TlsFault,
}

/// What is wrong with a TLS setting.
#[derive(Debug, thiserror::Error)]
pub enum TlsFault {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: FileError,
    },
    /// A file is not PEM.
    #[error("{} is not valid PEM: {detail}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A file contains no certificate.
    #[error(
        "{path} has no `-----BEGIN CERTIFICATE-----`; to convert a DER file, run `openssl x509 -inform der -in {path} -out {path}.pem`",
        path = path.display()
    )]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A certificate cannot be trusted.
    #[error("a certificate in {} cannot be trusted to verify a server: {detail}", path.display())]
    Root {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// No CA is trusted.
    #[error(
        "no CA is trusted: set `webpki: true`, list `files`, or install the system's CA certificates"
    )]
    NoRoots,
    /// A private key file contains no usable key.
    #[error(
        "{} has no usable private key: {detail}; to decrypt an encrypted key, run `openssl pkey -in FILE -out NEW`",
        path.display()
    )]
    PrivateKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Certificate and key are not a pair.
    #[error(
        "the key in {} does not match the (first) certificate in {}",
        key.display(), cert.display()
    )]
    Mismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The client certificate cannot be used for another reason.
    #[error("{} cannot be used: {detail}", cert.display())]
    ClientCertificate {
        /// The certificate's file.
        cert: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The value is not a pin.
    #[error(
        "`{pin}` is not a pin; a pin is `sha256/BASE64`, the hash of a public key: {PIN_COMMAND}"
    )]
    Pin {
        /// The value.
        pin: String,
    },
    /// A file is not a revocation list.
    #[error("{} is not a certificate revocation list (PEM or DER): {detail}", path.display())]
    Crl {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// rustls refuses the settings for a reason that the user cannot change.
    #[error("the TLS library refuses these settings: {0}")]
    Library(String),
}

impl TlsConfigError {
    pub(super) fn new(key: &'static str, what: TlsFault) -> Self {
        Self { key, file: None, what }
    }

    /// An error of a file. A key may list several files.
    pub(super) fn of(
        key: &'static str,
        file: &Path,
        what: impl FnOnce(PathBuf) -> TlsFault,
    ) -> Self {
        Self { key, file: Some(file.to_owned()), what: what(file.to_owned()) }
    }

    /// Whether it only means that its file could not be read.
    pub(super) fn is_io(&self) -> bool {
        matches!(&self.what, TlsFault::Read { source, .. } if source.is_io())
    }

    pub(super) fn root(path: &Path, why: &dyn Display) -> Self {
        Self::of("tls.ca.files", path, |path| TlsFault::Root { path, detail: why.to_string() })
    }

    pub(super) fn library(error: &Error) -> Self {
        Self::new("tls", TlsFault::Library(error.to_string()))
    }
}

const PIN_COMMAND: &str = "`openssl x509 -in CERT -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64`";

/// A handshake that failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate was refused.
    #[error(transparent)]
    Certificate(Box<VerifyFailure>),
    /// No common TLS version, cipher suite or group, or the server violated the protocol.
    #[error("no TLS with `{name}`: {detail}")]
    Protocol {
        /// The true name.
        name: String,
        /// What the server lacks or did.
        detail: String,
        /// How to fix it.
        hint: Option<String>,
    },
    /// The server refused with an alert.
    #[error("`{name}` refused the TLS connection with the alert {alert}{}", about_alert(alert, *.client_certificate))]
    Alert {
        /// The true name.
        name: String,
        /// The alert's name as in RFC 8446.
        alert: String,
        /// Whether a client certificate is configured.
        client_certificate: bool,
    },
    /// The server closed the connection during the handshake.
    #[error("`{name}` closed the connection during the TLS handshake")]
    Eof {
        /// The true name.
        name: String,
        /// Whether the long ClientHello of a post-quantum key exchange was sent.
        post_quantum: bool,
    },
    /// The response of the peer is not TLS.
    #[error("`{name}` responded in plaintext: this port does not speak TLS")]
    NotTls {
        /// The true name.
        name: String,
    },
    /// The server did not accept the required application protocol.
    #[error("`{name}` does not speak {offered} on this port (by ALPN)")]
    Alpn {
        /// The true name.
        name: String,
        /// What was offered.
        offered: &'static str,
    },
    /// The true name is not a valid server name.
    #[error(
        "no certificate can be valid for `{name}`, which is not a host name: its labels may contain letters, digits, `-` and `_`, must not begin or end with `-`, and the last one must not be a number"
    )]
    Name {
        /// The name in question.
        name: String,
    },
    /// The connection broke.
    #[error("the connection to `{name}` broke during the TLS handshake: {source}")]
    Io {
        /// The true name.
        name: String,
        /// The cause.
        source: io::Error,
        /// Whether the long ClientHello of a post-quantum key exchange was sent.
        post_quantum: bool,
    },
}

impl TlsError {
    /// Why a handshake as `name` failed.
    pub(super) fn from_handshake(
        error: io::Error,
        name: &ServerName<'_>,
        offer: Offer,
    ) -> TlsError {
        let post_quantum = offer.post_quantum;
        let expected = name.to_str().into_owned();
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(error) => TlsError::from_rustls(error, expected, offer),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                TlsError::Eof { name: expected, post_quantum }
            }
            None => TlsError::Io { name: expected, source: error, post_quantum },
        }
    }

    /// Finds the TLS error in the chain of causes of an error on an established connection.
    ///
    /// In TLS 1.3, a server refuses a missing client certificate only after the client has finished the
    /// handshake, so the alert arrives with the first read. `h2` keeps only the text of an I/O error.
    pub fn after_handshake(
        error: &(dyn error::Error + 'static),
        name: &ServerName<'_>,
        offer: Offer,
    ) -> Option<TlsError> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            let of_text = || alert_of_text(&error.to_string());
            if let Some(found) = error.downcast_ref::<Error>().cloned().or_else(of_text) {
                let name = name.to_str().into_owned();
                return Some(TlsError::from_rustls(&found, name, offer));
            }
            // `io::Error::source` is the source of its content, and so skips the content itself.
            cause = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
                Some(content) => Some(content),
                None => error.source(),
            };
        }
        None
    }

    /// The kind of failure, as for all other failures.
    pub fn kind(&self) -> Kind {
        match self {
            TlsError::Certificate(_) | TlsError::Name { .. } => Kind::TlsCertificate,
            TlsError::Eof { .. } | TlsError::Io { .. } => Kind::ConnectionLost,
            TlsError::Protocol { .. }
            | TlsError::Alert { .. }
            | TlsError::NotTls { .. }
            | TlsError::Alpn { .. } => Kind::TlsProtocol,
        }
    }

    /// The key or command that fixes it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            TlsError::Certificate(failure) => return Some(failure.hint()),
            TlsError::Protocol { hint, .. } => return hint.clone(),
            TlsError::Alert { alert, client_certificate, .. } => {
                return alert_hint(alert, *client_certificate);
            }
            TlsError::Eof { post_quantum: true, .. } => {
                "check that `port` is a TLS port (PostgreSQL needs `protocol: postgres`); if a middlebox drops long ClientHellos, set `tls.post_quantum: false`"
            }
            TlsError::Eof { post_quantum: false, .. } => {
                "check that `port` is a TLS port (PostgreSQL needs `protocol: postgres`)"
            }
            TlsError::NotTls { .. } => {
                "set `port` to the server's TLS port, or set `tls.mode: plaintext` if it should be used without TLS"
            }
            TlsError::Alpn { offered: "h2", .. } => "set `http.version: auto` or `\"1.1\"`",
            TlsError::Alpn { offered, .. } if *offered == Alpn::Listed.as_str() => {
                "set `tcp.alpn` to protocols that the target speaks"
            }
            TlsError::Alpn { .. } => "set `http.version: auto`",
            TlsError::Name { .. } => {
                "set `tls.server_name` to the name that the server's certificate is valid for, or correct the Service's `externalName`"
            }
            TlsError::Io { post_quantum: true, .. } => {
                "if it happens every time, a middlebox may drop long ClientHellos: set `tls.post_quantum: false`"
            }
            TlsError::Io { post_quantum: false, .. } => return None,
        };
        Some(hint.to_owned())
    }

    fn from_rustls(error: &Error, name: String, offer: Offer) -> TlsError {
        match error {
            Error::InvalidCertificate(CertificateError::Other(other)) => {
                match other.0.downcast_ref::<VerifyFailure>() {
                    Some(failure) => TlsError::Certificate(Box::new(failure.clone())),
                    None => TlsError::certificate(Reason::Other(other.to_string()), name),
                }
            }
            // All refusals of the certificate itself are `VerifyFailure`s. This is the handshake's
            // signature, which was made with another key than the certificate's.
            Error::InvalidCertificate(CertificateError::BadSignature) => {
                TlsError::certificate(Reason::BadSignature, name)
            }
            Error::InvalidCertificate(other) => {
                TlsError::certificate(Reason::Other(other.to_string()), name)
            }
            Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge,
            ) => TlsError::NotTls { name },
            Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | Error::NoApplicationProtocol => TlsError::Alpn { name, offered: offer.alpn.as_str() },
            Error::AlertReceived(
                alert @ (AlertDescription::HandshakeFailure
                | AlertDescription::InsufficientSecurity
                | AlertDescription::ProtocolVersion),
            ) => TlsError::nothing_in_common(*alert, name, offer),
            Error::AlertReceived(alert) => TlsError::Alert {
                name,
                alert: alert_name(*alert),
                client_certificate: offer.client_certificate,
            },
            Error::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig) => {
                TlsError::nothing_in_common(AlertDescription::ProtocolVersion, name, offer)
            }
            Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13) => {
                TlsError::Protocol {
                    name,
                    detail: "the server offers only TLS 1.1 or older, which is insecure and not supported".to_owned(),
                    hint: Some("enable TLS 1.2 or 1.3 on the server".to_owned()),
                }
            }
            Error::PeerIncompatible(lacking) => TlsError::Protocol {
                name,
                detail: format!("the server's TLS is not compatible: {lacking:?}"),
                hint: Some("enable TLS 1.3, or TLS 1.2 with ECDHE and AES-GCM or ChaCha20, on the server".to_owned()),
            },
            other => TlsError::Protocol {
                name,
                detail: format!("the server violated the TLS protocol: {other}"),
                hint: None,
            },
        }
    }

    /// The server supports nothing of what was offered.
    fn nothing_in_common(alert: AlertDescription, name: String, offer: Offer) -> TlsError {
        let only_13 = offer.requires_tls13;
        let versions = if only_13 { "only TLS 1.3" } else { "TLS 1.2 and 1.3" };
        if alert == AlertDescription::ProtocolVersion {
            let hint = if only_13 {
                "set `tls.min_version: \"1.2\"`"
            } else {
                "enable TLS 1.2 or 1.3 on the server; TLS 1.1 and older are insecure and not supported"
            };
            return TlsError::Protocol {
                name,
                detail: format!("it supports none of the offered TLS versions ({versions})"),
                hint: Some(hint.to_owned()),
            };
        }
        let mut hint =
            "enable ECDHE cipher suites with AES-GCM or ChaCha20 on the server".to_owned();
        if only_13 {
            hint.push_str(", or set `tls.min_version: \"1.2\"`");
        }
        if !offer.client_certificate {
            hint.push_str("; if it requires a client certificate, set `tls.client_certificate`");
        }
        TlsError::Protocol {
            name,
            detail: format!(
                "it refused with the alert {}: either it supports nothing of what was offered ({versions}, no RSA key exchange, no CBC), or it {}",
                alert_name(alert),
                if offer.client_certificate {
                    "does not accept our client certificate"
                } else {
                    "requires a client certificate"
                }
            ),
            hint: Some(hint),
        }
    }

    fn certificate(reason: Reason, expected: String) -> TlsError {
        TlsError::Certificate(Box::new(VerifyFailure {
            reason,
            expected,
            presented: Vec::new(),
            common_name: None,
            issuer: String::new(),
            not_before: None,
            not_after: None,
            pin: None,
        }))
    }
}

fn about_alert(alert: &str, client_certificate: bool) -> &'static str {
    match (alert, client_certificate) {
        ("certificate_required", false) => {
            ": it requires a client certificate, and none is configured"
        }
        (
            "bad_certificate"
            | "unsupported_certificate"
            | "certificate_revoked"
            | "certificate_expired"
            | "certificate_unknown"
            | "unknown_ca"
            | "access_denied"
            | "certificate_required",
            true,
        ) => ": it does not accept our client certificate",
        ("unrecognized_name", _) => ": it does not serve this name",
        _ => "",
    }
}

fn alert_hint(alert: &str, client_certificate: bool) -> Option<String> {
    let hint = match (alert, client_certificate) {
        (
            "certificate_required"
            | "bad_certificate"
            | "certificate_unknown"
            | "access_denied"
            | "unknown_ca",
            false,
        ) => {
            "set `tls.client_certificate: {cert: FILE, key: FILE}` to a certificate that the server's operator issued"
        }
        (
            "bad_certificate"
            | "unsupported_certificate"
            | "certificate_revoked"
            | "certificate_expired"
            | "certificate_unknown"
            | "unknown_ca"
            | "access_denied"
            | "certificate_required",
            true,
        ) => {
            "ask the server's operator to accept the certificate in `tls.client_certificate`, or renew it"
        }
        ("unrecognized_name", _) => "set `tls.server_name` to a name that the server serves",
        _ => return None,
    };
    Some(hint.to_owned())
}

/// The name in RFC 8446 §6 and the registry: `UnknownCA` is `unknown_ca`.
fn alert_name(alert: AlertDescription) -> String {
    let camel = match alert {
        AlertDescription::UnrecognisedName => "UnrecognizedName".to_owned(),
        AlertDescription::Unknown(code) => return format!("{code}"),
        alert => format!("{alert:?}"),
    };
    let mut name = String::with_capacity(camel.len() + 4);
    let mut after_lower = false;
    for c in camel.chars() {
        if c.is_ascii_uppercase() && after_lower {
            name.push('_');
        }
        after_lower = c.is_ascii_lowercase();
        name.push(c.to_ascii_lowercase());
    }
    name
}

/// The error with this text, if it is an alert.
fn alert_of_text(text: &str) -> Option<Error> {
    let mut alerts = (0..=u8::MAX).map(|code| Error::AlertReceived(AlertDescription::from(code)));
    // For other texts, there is no need to format 256 alerts.
    let is_alert = text.starts_with("received fatal alert");
    alerts.find(|alert| is_alert && alert.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_known_by_its_text_alone() {
        for alert in [AlertDescription::CertificateRequired, AlertDescription::Unknown(200)] {
            let error = Error::AlertReceived(alert);
            assert_eq!(alert_of_text(&error.to_string()), Some(error));
        }
        assert_eq!(alert_of_text("received fatal alert: none"), None);
    }

    #[test]
    fn alerts_are_spelt_as_in_the_registry() {
        for (alert, name) in [
            (AlertDescription::UnknownCA, "unknown_ca"),
            (AlertDescription::CertificateRequired, "certificate_required"),
            (AlertDescription::UnrecognisedName, "unrecognized_name"),
            (AlertDescription::HandshakeFailure, "handshake_failure"),
            (AlertDescription::Unknown(200), "200"),
        ] {
            assert_eq!(alert_name(alert), name);
        }
    }
}
