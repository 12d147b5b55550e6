//! Whether a server's certificate proves the true name.

use super::{
    failure::{Leaf, Reason, VerifyFailure},
    pins::Pins,
    roots::Roots,
};
use rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use std::{
    fmt::{self, Debug, Formatter},
    sync::Arc,
};

/// webpki's verdict as far as somebody is trusted, then the pins; refusals are [`VerifyFailure`]s.
pub(super) struct Verifier {
    pub(super) whom: Whom,
    pub(super) pins: Pins,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

/// Whom to believe.
pub(super) enum Whom {
    /// `tls.mode: verify`: who shows a chain to these roots.
    Roots { webpki: Arc<WebPkiServerVerifier>, roots: Arc<Roots> },
    /// `tls.mode: insecure_skip_verify`: any certificate will do, unless pins say which.
    Anybody,
}

impl Verifier {
    /// Without trust or a pin, whoever is in between has a key of his own: a signature proves
    /// nothing, and old devices have certificates that webpki cannot even read.
    fn believes_anything(&self) -> bool {
        matches!(self.whom, Whom::Anybody) && self.pins.is_empty()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned = match &self.whom {
            Whom::Roots { webpki, roots } => {
                match webpki.verify_server_cert(leaf, intermediates, name, ocsp, now) {
                    // What webpki finds wrong with the form alone; an expired or revoked one stays refused.
                    Err(Error::InvalidCertificate(CertificateError::Other(_)))
                        if roots.files.contains(leaf) =>
                    {
                        verify_named(leaf, name, now)
                    }
                    verdict => verdict,
                }
                .map_err(|error| refusal(VerifyFailure::from_verdict(&error, name, leaf)))?;
                self.pins.is_empty()
                    || self.pins.hold_chain(leaf, intermediates, roots, now, &self.algorithms)
            }
            // There is no verified chain: only the key that the server proves to hold can be pinned.
            Whom::Anybody => self.pins.is_empty() || self.pins.hold_leaf(leaf),
        };
        match pinned {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(refusal(VerifyFailure::new(Reason::PinMismatch, name, leaf))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match self.believes_anything() {
            true => Ok(HandshakeSignatureValid::assertion()),
            false => verify_tls12_signature(message, leaf, signature, &self.algorithms),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        match self.believes_anything() {
            true => Ok(HandshakeSignatureValid::assertion()),
            false => verify_tls13_signature(message, leaf, signature, &self.algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The roots would fill pages.
impl Debug for Verifier {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("pins", &self.pins).finish_non_exhaustive()
    }
}

/// A self-signed certificate with the CA flag (what `openssl req -x509` makes) that is itself in
/// `tls.ca.files`. webpki takes no CA for a server, but who names this very certificate as
/// trusted means it, and curl takes it too.
///
/// Everything that webpki would check is checked here: it does not promise an order, so its
/// verdict on the form says nothing about the dates.
fn verify_named(
    leaf: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<ServerCertVerified, Error> {
    let parsed = Leaf::parse(leaf).ok_or(CertificateError::BadEncoding)?;
    let now = i64::try_from(now.as_secs()).map_err(|_| Error::FailedToGetCurrentTime)?;
    if now < parsed.not_before() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > parsed.not_after() {
        return Err(CertificateError::Expired.into());
    }
    if !parsed.serves() {
        return Err(CertificateError::InvalidPurpose.into());
    }
    verify_server_name(&ParsedCertificate::try_from(leaf)?, name)?;
    Ok(ServerCertVerified::assertion())
}

fn refusal(failure: VerifyFailure) -> Error {
    CertificateError::Other(OtherError(Arc::new(failure))).into()
}
