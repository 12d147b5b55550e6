//! A refused certificate, with the details that explain why.

use super::leaf::{Date, Leaf, NAMES_KEPT};
use rustls::pki_types::{CertificateDer, ServerName};
use std::{
    error,
    fmt::{self, Display, Formatter},
};

/// The most names that are shown; further ones are counted. A certificate may have hundreds.
const NAMES_SHOWN: usize = 8;

/// Why a certificate was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is not valid for the true name.
    NotValidForName,
    /// It has expired.
    Expired,
    /// It is not valid yet.
    NotYetValid,
    /// It is not issued by a trusted root.
    UnknownIssuer,
    /// It is self-signed, and not configured as trusted.
    SelfSigned,
    /// A revocation list revokes it.
    Revoked,
    /// It was not issued for servers.
    WrongUsage,
    /// None of the keys in its chain is pinned.
    PinMismatch,
    /// The root of its chain cannot be used, for this reason.
    Issuer(String),
    /// An intermediate of its chain cannot be used, for this reason.
    Intermediate(String),
    /// A signature does not match: the server does not have the certificate's key, or it is forged.
    BadSignature,
    /// Anything else.
    Other(String),
}

/// A refused certificate: what was expected, and what it contains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyFailure {
    /// Why it was refused.
    pub reason: Reason,
    /// The true name that it should be valid for.
    pub expected: String,
    /// The DNS names and IP addresses that it is valid for (subject alternative names).
    pub presented: Vec<String>,
    /// The subject's common name. It is not used for verification, but shows people which certificate it is.
    pub common_name: Option<String>,
    /// Its issuer's distinguished name; empty if the certificate cannot be parsed.
    pub issuer: String,
    /// Unix seconds; `None` if the certificate cannot be parsed.
    pub not_before: Option<i64>,
    /// Unix seconds; `None` if the certificate cannot be parsed.
    pub not_after: Option<i64>,
    /// The pin of the certificate's own key, in the form of `tls.pins`.
    pub pin: Option<String>,
}

impl VerifyFailure {
    pub(super) fn new(
        reason: Reason,
        expected: &ServerName<'_>,
        certificate: &CertificateDer<'_>,
    ) -> VerifyFailure {
        let leaf = Leaf::parse(certificate);
        let leaf = leaf.as_ref();
        VerifyFailure {
            reason,
            expected: expected.to_str().into_owned(),
            presented: leaf.map(Leaf::names).unwrap_or_default(),
            common_name: leaf.and_then(Leaf::common_name),
            issuer: leaf.map(Leaf::issuer).unwrap_or_default(),
            not_before: leaf.map(Leaf::not_before),
            not_after: leaf.map(Leaf::not_after),
            pin: leaf.map(Leaf::pin),
        }
    }

    /// The key or command that fixes it.
    pub fn hint(&self) -> String {
        let expected = &self.expected;
        match &self.reason {
            Reason::NotValidForName => match self.name_to_try() {
                Some(name) => format!(
                    "if this is the right server, set `tls.server_name: {name}`; if not, `{expected}` leads to the wrong server"
                ),
                None => format!(
                    "the server needs a certificate with `{expected}` as a subject alternative name; or set `tls.server_name` to a name that its certificate is valid for"
                ),
            },
            Reason::Expired => {
                "the server's operator must renew it; if it has been renewed, check this machine's clock (`date -u`)".to_owned()
            }
            Reason::NotYetValid => {
                "check this machine's clock (`date -u`); if it is right, the server uses the certificate too early".to_owned()
            }
            Reason::UnknownIssuer => {
                "add the CA's certificate (PEM) to `tls.ca.files`; if the CA is public, the server does not send its intermediate certificates".to_owned()
            }
            Reason::SelfSigned => {
                "if you are sure that it belongs to the server, add the certificate itself (PEM) to `tls.ca.files`".to_owned()
            }
            Reason::Revoked => {
                "the server's operator must replace it; the list is one of `tls.crls`".to_owned()
            }
            Reason::WrongUsage => {
                "it must be issued with the extended key usage serverAuth".to_owned()
            }
            Reason::Issuer(_) => {
                "replace the CA certificate in `tls.ca.files`, or in the system's trust store, with the current one".to_owned()
            }
            Reason::Intermediate(_) => {
                "the server's operator must replace that CA certificate in the chain that the server sends".to_owned()
            }
            Reason::PinMismatch => match &self.pin {
                Some(pin) => format!("if the server's key was changed on purpose, add `{pin}` to `tls.pins`"),
                None => "compare `tls.pins` with the keys in the server's chain".to_owned(),
            },
            Reason::BadSignature => {
                "the server's certificate and key do not match, or the connection is intercepted".to_owned()
            }
            Reason::Other(_) => {
                format!("inspect it with `openssl s_client -connect HOST:PORT -servername {expected} -showcerts`")
            }
        }
    }

    /// A name of the certificate that could be used as `tls.server_name`; not a wildcard.
    fn name_to_try(&self) -> Option<&str> {
        self.presented.iter().map(String::as_str).find(|name| !name.contains('*'))
    }

    fn headline(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let expected = &self.expected;
        match &self.reason {
            Reason::NotValidForName => write!(f, "certificate is not valid for `{expected}`"),
            Reason::Expired => write!(f, "certificate for `{expected}` has expired"),
            Reason::NotYetValid => write!(f, "certificate for `{expected}` is not valid yet"),
            Reason::UnknownIssuer => {
                write!(f, "certificate for `{expected}` has an unknown issuer")
            }
            Reason::SelfSigned => {
                write!(f, "certificate for `{expected}` is self-signed and not trusted")
            }
            Reason::Revoked => write!(f, "certificate for `{expected}` is revoked"),
            Reason::WrongUsage => {
                write!(f, "certificate for `{expected}` was not issued for servers")
            }
            Reason::PinMismatch => {
                write!(f, "certificate for `{expected}` has none of the pinned keys in its chain")
            }
            Reason::Issuer(fault) | Reason::Intermediate(fault) => {
                write!(f, "certificate for `{expected}` was refused: {fault}")
            }
            Reason::BadSignature => {
                write!(f, "certificate for `{expected}` has a signature that does not match")
            }
            Reason::Other(detail) => {
                write!(f, "certificate for `{expected}` was refused: {detail}")
            }
        }
    }

    fn names(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match (&self.presented[..], &self.common_name) {
            ([], Some(name)) => {
                write!(f, "it has only the common name `{name}`, which is not used")
            }
            ([], None) => write!(f, "it is valid for no name"),
            (names, _) => {
                write!(f, "it is valid for ")?;
                for (n, name) in names.iter().take(NAMES_SHOWN).enumerate() {
                    write!(f, "{}`{name}`", if n == 0 { "" } else { ", " })?;
                }
                match names.len().saturating_sub(NAMES_SHOWN) {
                    0 => Ok(()),
                    more if names.len() == NAMES_KEPT => write!(f, " and at least {more} more"),
                    more => write!(f, " and {more} more"),
                }
            }
        }
    }
}

impl Display for VerifyFailure {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.headline(f)?;
        let (Some(not_before), Some(not_after)) = (self.not_before, self.not_after) else {
            return Ok(());
        };
        write!(f, ": ")?;
        self.names(f)?;
        write!(f, "; issued by {}; valid ", self.issuer)?;
        if self.reason == Reason::NotYetValid {
            write!(f, "from {} ", Date(not_before))?;
        }
        write!(f, "until {}", Date(not_after))
    }
}

impl error::Error for VerifyFailure {}

/// The reason for an error from webpki about a server's certificate.
pub(super) fn reason(error: &webpki::Error, self_issued: bool) -> Reason {
    use webpki::Error::*;
    let other = match error {
        CertNotValidForName(_) => return Reason::NotValidForName,
        CertExpired { .. } | InvalidCertValidity => return Reason::Expired,
        CertNotValidYet { .. } => return Reason::NotYetValid,
        UnknownIssuer | CaUsedAsEndEntity if self_issued => return Reason::SelfSigned,
        UnknownIssuer => return Reason::UnknownIssuer,
        RequiredEkuNotFoundContext(_) => return Reason::WrongUsage,
        InvalidSignatureForPublicKey => return Reason::BadSignature,
        BadDer | BadDerTime | TrailingData(_) => "it is not correctly encoded",
        UnsupportedCriticalExtension => "it has an unknown critical extension",
        UnsupportedSignatureAlgorithmContext(_)
        | UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            "it, or its issuer, is signed with an algorithm that is too old (SHA-1) or unknown"
        }
        CaUsedAsEndEntity => "it is a CA's certificate, not a server's",
        EndEntityUsedAsCa => "a certificate in its chain does not belong to a CA",
        PathLenConstraintViolated => "there are more CAs in its chain than one of them allows",
        UnsupportedCertVersion => "it is of X.509 version 1 or 2, which has no names to verify",
        NameConstraintViolation => "its issuer may not issue certificates for this name",
        MaximumPathDepthExceeded => "there are more than six CAs between it and a trusted one",
        MaximumPathBuildCallsExceeded
        | MaximumSignatureChecksExceeded
        | MaximumNameConstraintComparisonsExceeded => {
            "too many certificates of its chain could have issued each other"
        }
        error => return Reason::Other(error.to_string()),
    };
    Reason::Other(other.to_owned())
}
