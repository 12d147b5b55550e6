//! The parts of a certificate that messages show.

use std::{
    fmt::{self, Display, Formatter},
    net::IpAddr,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer, time::ASN1Time,
};

use super::shared::sha256;

/// The most names that are read from a foreign certificate. Each text is cut to [`TEXT_KEPT`].
pub(super) const NAMES_KEPT: usize = 100;

const TEXT_KEPT: usize = 256;

/// A parsed certificate, for messages. webpki does the verification.
pub(super) struct Leaf<'a>(X509Certificate<'a>);

impl<'a> Leaf<'a> {
    pub(super) fn parse(certificate: &'a CertificateDer<'_>) -> Option<Leaf<'a>> {
        X509Certificate::from_der(certificate).ok().map(|(_, parsed)| Leaf(parsed))
    }

    pub(super) fn public_key(&self) -> &[u8] {
        self.0.public_key().raw
    }

    /// The pin of its public key, in the form of `tls.pins`.
    pub(super) fn pin(&self) -> String {
        format!("sha256/{}", STANDARD.encode(sha256(self.public_key())))
    }

    pub(super) fn subject(&self) -> String {
        printable(&self.0.subject().to_string())
    }

    pub(super) fn not_before(&self) -> i64 {
        self.0.validity().not_before.timestamp()
    }

    pub(super) fn not_after(&self) -> i64 {
        self.0.validity().not_after.timestamp()
    }

    /// Why it cannot be used at `now` (Unix seconds), according to what webpki checks in every certificate of a chain.
    pub(super) fn fault(&self, now: i64) -> Option<Fault> {
        match (self.not_before(), self.not_after()) {
            (_, until) if now > until => Some(Fault::Expired(until)),
            (from, _) if now < from => Some(Fault::NotYetValid(from)),
            _ if !self.serves() => Some(Fault::NotForServers),
            _ => None,
        }
    }

    pub(super) fn is_self_issued(&self) -> bool {
        self.0.issuer().as_raw() == self.0.subject().as_raw()
    }

    /// Whether it may be used by a server: without an extended key usage, any use is allowed.
    pub(super) fn serves(&self) -> bool {
        match self.0.extended_key_usage() {
            Ok(usage) => usage.is_none_or(|usage| usage.value.server_auth || usage.value.any),
            Err(_) => false,
        }
    }

    pub(super) fn issuer(&self) -> String {
        printable(&self.0.issuer().to_string())
    }

    pub(super) fn common_name(&self) -> Option<String> {
        self.0.subject().iter_common_name().next()?.as_str().ok().map(printable)
    }

    pub(super) fn names(&self) -> Vec<String> {
        let Ok(Some(names)) = self.0.subject_alternative_name() else { return Vec::new() };
        names.value.general_names.iter().filter_map(name).take(NAMES_KEPT).collect()
    }
}

/// See [`Leaf::fault`].
pub(super) enum Fault {
    Expired(i64),
    NotYetValid(i64),
    NotForServers,
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Expired(until) => write!(f, "expired at {}", Date(*until)),
            Fault::NotYetValid(from) => write!(f, "is not valid before {}", Date(*from)),
            Fault::NotForServers => write!(f, "may not issue certificates for servers"),
        }
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(printable(name)),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let address = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

/// Makes a text of a foreign certificate safe for logs and headers: no control characters, no characters that
/// change the text direction, and a limited length.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() && !turns_text(*c)).take(TEXT_KEPT).collect()
}

/// Unicode's bidirectional control characters.
fn turns_text(c: char) -> bool {
    matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Unix seconds as RFC 3339.
pub(super) struct Date(pub(super) i64);

impl Display for Date {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Ok(time) = ASN1Time::from_timestamp(self.0) else {
            return write!(f, "{} seconds after 1970", self.0);
        };
        let at = time.to_datetime();
        let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
        let (hour, minute, second) = (at.hour(), at.minute(), at.second());
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}
