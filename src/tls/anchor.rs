//! What a trusted certificate may be used for. webpki uses only the name and the key of a trust anchor, and
//! ignores the rest of its certificate, which is checked here.

use super::{
    leaf::{Date, printable},
    lists::Lists,
};
use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateDer, SubjectPublicKeyInfoDer, UnixTime},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer, x509::X509Version};

/// What a trusted certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// To verify other certificates: it belongs to a CA.
    Issuer,
    /// As the certificate of a single server. It cannot verify other certificates.
    Server,
}

/// Why a trusted certificate can never verify anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Useless {
    /// It cannot be parsed.
    #[error("{0}")]
    Unreadable(String),
    /// It is neither for a CA nor for a server.
    #[error("{0}")]
    Unfit(&'static str),
}

/// The parts of a trusted certificate that a [`rustls::pki_types::TrustAnchor`] lacks.
#[derive(Clone, Debug)]
pub(super) struct Terms {
    /// For messages.
    pub(super) subject: String,
    pub(super) not_before: i64,
    pub(super) not_after: i64,
    /// How many CAs may be between it and a server's certificate.
    path_length: Option<u32>,
    /// These identify it in a revocation list.
    issuer: Vec<u8>,
    serial: Vec<u8>,
    /// Its key, if it is known to be self-signed: then a list that is signed with another key cannot revoke it.
    pub(super) own_key: Option<SubjectPublicKeyInfoDer<'static>>,
}

impl Terms {
    /// Parses a trusted certificate.
    pub(super) fn read(certificate: &CertificateDer<'_>) -> Result<(Use, Terms), Useless> {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
            return Err(Useless::Unreadable("it is not an X.509 certificate".to_owned()));
        };
        let usage = usage(&parsed).map_err(Useless::Unfit)?;
        let basic = parsed.basic_constraints().ok().flatten();
        let terms = Terms {
            subject: printable(&parsed.subject().to_string()),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
            path_length: basic.and_then(|basic| basic.value.path_len_constraint),
            issuer: contents(parsed.issuer().as_raw()).to_vec(),
            serial: parsed.raw_serial().to_vec(),
            own_key: None,
        };
        Ok((usage, terms))
    }

    /// Why it cannot be used at `now`.
    pub(super) fn fault(
        &self,
        now: UnixTime,
        lists: &Lists,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Option<String> {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let subject = &self.subject;
        if now > self.not_after {
            return Some(format!(
                "the CA certificate `{subject}` expired at {}",
                Date(self.not_after)
            ));
        }
        if now < self.not_before {
            let from = Date(self.not_before);
            return Some(format!("the CA certificate `{subject}` is not valid before {from}"));
        }
        let number = (&*self.issuer, &*self.serial);
        if lists.revoke(number, || self.own_key.clone(), algorithms) {
            return Some(format!(
                "the CA certificate `{subject}` is revoked by a list in `tls.crls`"
            ));
        }
        None
    }

    /// Whether a chain with this many intermediates is longer than it allows.
    pub(super) fn is_too_long(&self, intermediates: usize) -> bool {
        self.path_length.is_some_and(|most| intermediates > most as usize)
    }
}

/// Decides like OpenSSL whether a certificate is a CA.
fn usage(certificate: &X509Certificate<'_>) -> Result<Use, &'static str> {
    let signs = match certificate.key_usage() {
        Ok(usage) => usage.map(|usage| usage.value.key_cert_sign()),
        Err(_) => return Err("its key usage cannot be read"),
    };
    let is_ca = match certificate.basic_constraints() {
        Ok(Some(basic)) => basic.value.ca,
        // Before X.509 version 3, certificates could not say it.
        Ok(None) if certificate.version() != X509Version::V3 => {
            certificate.issuer() == certificate.subject()
        }
        Ok(None) => signs == Some(true),
        Err(_) => return Err("its basic constraints cannot be read"),
    };
    let for_servers = match certificate.extended_key_usage() {
        Ok(usage) => usage.is_none_or(|usage| usage.value.server_auth || usage.value.any),
        Err(_) => return Err("its extended key usage cannot be read"),
    };
    let has_names = certificate
        .subject_alternative_name()
        .is_ok_and(|names| names.is_some_and(|names| !names.value.general_names.is_empty()));
    match (is_ca && signs != Some(false), for_servers, has_names) {
        (_, false, _) => Err("its extended key usage does not include serverAuth"),
        (true, ..) => Ok(Use::Issuer),
        (false, _, true) => Ok(Use::Server),
        (false, _, false) if is_ca => Err("it is a CA whose key usage lacks keyCertSign"),
        (false, _, false) => Err(
            "it is neither a CA (its basic constraints lack CA:TRUE) nor a server's certificate \
            (it has no subject alternative name)",
        ),
    }
}

/// The contents of a DER sequence, without tag and length, like the issuers of webpki.
fn contents(sequence: &[u8]) -> &[u8] {
    match sequence {
        [_, length, rest @ ..] if *length < 0x80 => rest,
        [_, length, rest @ ..] => rest.get(usize::from(length & 0x7f)..).unwrap_or_default(),
        _ => &[],
    }
}
