//! Verifies a server's certificate for the true name.

use super::{
    failure::{Reason, VerifyFailure, reason},
    leaf::{Fault, Leaf},
    lists::{Lists, own_key},
    pins::Pins,
    roots::Roots,
};
use rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::{
    cell::RefCell,
    fmt::{self, Debug, Formatter},
    sync::Arc,
};
use webpki::{Cert, EndEntityCert, KeyUsage, VerifiedPath, spki_for_anchor};

/// Verifies with webpki, if there are roots, and then checks the pins. Refusals are [`VerifyFailure`]s.
pub(super) struct Verifier {
    pub(super) trust: Trust,
    pub(super) pins: Pins,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

/// Which certificates are accepted.
pub(super) enum Trust {
    /// `tls.mode: verify`: those with a chain to these roots that no list revokes.
    Roots(Trusted),
    /// `tls.mode: insecure_skip_verify`: any, unless there are pins.
    Any,
}

/// The trusted roots, and the revocation lists.
pub(super) struct Trusted {
    pub(super) roots: Arc<Roots>,
    pub(super) lists: Lists,
}

impl Verifier {
    /// Without roots or pins, an attacker in the middle can use his own key: a signature proves nothing, and
    /// old devices have certificates that webpki cannot even parse.
    fn believes_anything(&self) -> bool {
        matches!(self.trust, Trust::Any) && self.pins.is_empty()
    }

    /// Verifies the certificates for `name` at `now`.
    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Box<VerifyFailure>> {
        let verdict = match &self.trust {
            Trust::Roots(trusted) => {
                let asked = Asked { leaf, name, now };
                let proved = trusted.verify_chain(&asked, intermediates, self);
                match proved.map_err(|reason| trusted.blame(reason, &asked, intermediates)) {
                    Err(_) if trusted.roots.has_server(leaf) => trusted.verify_named(&asked, self),
                    verdict => verdict,
                }
            }
            // There is no verified chain: only the key that the server proves to have can be pinned.
            Trust::Any => self.pins.admit_leaf(leaf),
        };
        verdict.map_err(|reason| Box::new(VerifyFailure::new(reason, name, leaf)))
    }
}

/// What is being verified.
struct Asked<'a> {
    leaf: &'a CertificateDer<'a>,
    name: &'a ServerName<'a>,
    now: UnixTime,
}

impl Trusted {
    /// Verifies a chain from the leaf to a root. If one is refused, webpki looks for another.
    fn verify_chain(
        &self,
        asked: &Asked<'_>,
        intermediates: &[CertificateDer<'_>],
        verifier: &Verifier,
    ) -> Result<(), Reason> {
        let self_issued = Leaf::parse(asked.leaf).is_some_and(|leaf| leaf.is_self_issued());
        let to_reason = |error| reason(&error, self_issued);
        let leaf = EndEntityCert::try_from(asked.leaf).map_err(to_reason)?;
        let refused = RefCell::new(None);
        let judge = |path: &VerifiedPath<'_>| {
            self.judge(path, asked.now, verifier).map_err(|reason| {
                *refused.borrow_mut() = Some(reason);
                webpki::Error::UnknownIssuer
            })
        };
        leaf.verify_for_usage(
            verifier.algorithms.all,
            &self.roots.anchors,
            intermediates,
            asked.now,
            KeyUsage::server_auth(),
            None,
            Some(&judge),
        )
        .map_err(|error| refused.take().unwrap_or_else(|| to_reason(error)))?;
        leaf.verify_is_valid_for_subject_name(asked.name).map_err(to_reason)
    }

    /// What webpki leaves to its callers: the root's own restrictions, and the pins. Also the revocation lists,
    /// because webpki uses only one of several lists with the same issuer name.
    fn judge(
        &self,
        path: &VerifiedPath<'_>,
        now: UnixTime,
        verifier: &Verifier,
    ) -> Result<(), Reason> {
        let anchor = path.anchor();
        let mut certificate: &Cert<'_> = path.end_entity();
        for issuer in path.intermediate_certificates() {
            let key = issuer.subject_public_key_info();
            self.lists.check(certificate, &key, &verifier.algorithms)?;
            certificate = issuer;
        }
        self.lists.check(certificate, &spki_for_anchor(anchor), &verifier.algorithms)?;
        if let Some(fault) = self.roots.fault(anchor, now, &self.lists, &verifier.algorithms) {
            return Err(Reason::Issuer(fault));
        }
        if self.roots.is_too_long(anchor, path.intermediate_certificates().count()) {
            return Err(Reason::Issuer(
                "there are more CAs in its chain than its root allows".to_owned(),
            ));
        }
        verifier.pins.admit(path)
    }

    /// Finds the certificate that caused the failure: webpki does not say which certificate of a chain it refused.
    fn blame(
        &self,
        reason: Reason,
        asked: &Asked<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Reason {
        let now = i64::try_from(asked.now.as_secs()).unwrap_or(i64::MAX);
        let concerns = |fault: &Fault| {
            matches!(
                (fault, &reason),
                (Fault::Expired(_), Reason::Expired)
                    | (Fault::NotYetValid(_), Reason::NotYetValid)
                    | (Fault::NotForServers, Reason::WrongUsage)
            )
        };
        let fault = |certificate: &CertificateDer<'_>| {
            if reason == Reason::Revoked {
                let parsed = EndEntityCert::try_from(certificate).ok()?;
                let is_revoked = self.lists.name(parsed.issuer(), parsed.serial());
                return is_revoked.then(|| "is revoked by a list in `tls.crls`".to_owned());
            }
            let fault = Leaf::parse(certificate)?.fault(now).filter(concerns)?;
            Some(fault.to_string())
        };
        if fault(asked.leaf).is_some() {
            return reason;
        }
        let found = intermediates.iter().find_map(|certificate| {
            let subject = Leaf::parse(certificate)?.subject();
            Some(format!("the CA certificate `{subject}` {}", fault(certificate)?))
        });
        found.map_or(reason, Reason::Intermediate)
    }

    /// Verifies a certificate that is itself trusted. webpki accepts no CA certificate for a server, although
    /// `openssl req -x509` makes these, and a certificate that is not a CA cannot be a root. So the certificate needs
    /// no issuer if it is equal to a trusted one. Everything else is checked as usual.
    fn verify_named(&self, asked: &Asked<'_>, verifier: &Verifier) -> Result<(), Reason> {
        let leaf = Leaf::parse(asked.leaf).ok_or_else(|| Reason::Other(UNREADABLE.to_owned()))?;
        let to_reason = |error| reason(&error, leaf.is_self_issued());
        let parsed = EndEntityCert::try_from(asked.leaf).map_err(to_reason)?;
        let now = i64::try_from(asked.now.as_secs()).unwrap_or(i64::MAX);
        if now < leaf.not_before() {
            return Err(Reason::NotYetValid);
        }
        if now > leaf.not_after() {
            return Err(Reason::Expired);
        }
        if !leaf.serves() {
            return Err(Reason::WrongUsage);
        }
        let number = (parsed.issuer(), parsed.serial());
        let own_key = || own_key(asked.leaf, &verifier.algorithms);
        if self.lists.revoke(number, own_key, &verifier.algorithms) {
            return Err(Reason::Revoked);
        }
        parsed.verify_is_valid_for_subject_name(asked.name).map_err(to_reason)?;
        verifier.pins.admit_leaf(asked.leaf)
    }
}

const UNREADABLE: &str = "it is not correctly encoded";

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.verify(leaf, intermediates, name, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(failure) => Err(CertificateError::Other(OtherError(Arc::new(*failure))).into()),
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

/// Without the roots, which are long.
impl Debug for Verifier {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("pins", &self.pins).finish_non_exhaustive()
    }
}
