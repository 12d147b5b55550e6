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

/// `tls.mode: verify`: webpki's verdict, then the pins; refusals are [`VerifyFailure`]s.
pub(super) struct Verifier {
    pub(super) webpki: Arc<WebPkiServerVerifier>,
    pub(super) roots: Arc<Roots>,
    pub(super) pins: Pins,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    /// A self-signed certificate with the CA flag (what `openssl req -x509` makes) that is itself in
    /// `tls.ca.files`. webpki takes no CA for a server, but who names this very certificate as
    /// trusted means it, and curl takes it too.
    ///
    /// Everything that webpki would check is checked here: it does not promise an order, so its
    /// verdict on the form says nothing about the dates.
    fn verify_named(
        &self,
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
        let verdict = self.webpki.verify_server_cert(leaf, intermediates, name, ocsp, now);
        let verified = match verdict {
            // What webpki finds wrong with the form alone; an expired or revoked one stays refused.
            Err(Error::InvalidCertificate(CertificateError::Other(_)))
                if self.roots.files.contains(leaf) =>
            {
                self.verify_named(leaf, name, now)
            }
            verdict => verdict,
        }
        .map_err(|error| refusal(VerifyFailure::from_verdict(&error, name, leaf)))?;

        let pinned = self.pins.is_empty()
            || self.pins.hold_chain(leaf, intermediates, &self.roots, now, &self.algorithms);
        if !pinned {
            return Err(refusal(VerifyFailure::new(Reason::PinMismatch, name, leaf)));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
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

/// `tls.mode: insecure_skip_verify`: any certificate will do, unless pins say which.
#[derive(Debug)]
pub(super) struct SkipVerifier {
    pub(super) pins: Pins,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for SkipVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        // There is no verified chain: only the key that the server proves to hold can be pinned.
        if !self.pins.is_empty() && !self.pins.hold_leaf(leaf) {
            return Err(refusal(VerifyFailure::new(Reason::PinMismatch, name, leaf)));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        // Without a pin, whoever is in between has a key of his own: the signature proves nothing,
        // and old devices have certificates that webpki cannot even read.
        if self.pins.is_empty() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.pins.is_empty() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn refusal(failure: VerifyFailure) -> Error {
    CertificateError::Other(OtherError(Arc::new(failure))).into()
}
