//! Certificate revocation lists: reads them from files, and checks certificates against them.

mod serials;
mod signature;

use std::{iter, path::Path, sync::Arc};

use rustls::{
    crypto::WebPkiSupportedAlgorithms,
    pki_types::{CertificateRevocationListDer, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject},
};
use webpki::{BorrowedCertRevocationList, Cert, CertRevocationList};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{ParsedExtension, X509Extension},
    prelude::FromDer,
    time::ASN1Time,
};

pub(super) use self::signature::own_key;
use self::{
    serials::Serials,
    signature::{Signed, Verdict, split},
};
use super::{
    error::{TlsConfigError, TlsFault},
    failure::Reason,
    leaf::Date,
    pem::read_up_to,
    shared::{Digest, Shared},
};

const KEY: &str = "tls.crls";

/// The largest file of revocation lists that is read: enough for more than a million revoked certificates.
const MAX_LISTS: usize = 64 << 20;

static FILES: Shared<Vec<List>> = Shared::new();

/// All lists of an alias.
#[derive(Default)]
pub(super) struct Lists(Vec<Arc<Vec<List>>>);

/// The needed parts of a list, which may have a million entries.
struct List {
    /// In the form that webpki uses.
    issuer: Vec<u8>,
    revoked: Serials,
    signed: Signed,
    /// Which of its issuer's keys signed it, according to the list itself.
    key_id: Option<Vec<u8>>,
    /// Unix seconds: when the next one is due.
    next_update: Option<i64>,
}

impl Lists {
    /// Adds the lists of a file: PEM, or DER as CAs publish it.
    pub(super) fn add_file(&mut self, path: &Path) -> Result<(), TlsConfigError> {
        let content = read_up_to(MAX_LISTS, path, KEY)?;
        let lists = FILES.find_or_make(Digest::of(&content), || parse(path, content))?;
        lists.iter().for_each(|list| list.warn_if_due(path));
        self.0.push(lists);
        Ok(())
    }

    /// Fails if a list revokes the certificate. `issuer` is the key of its issuer.
    ///
    /// A CA that was renewed with another key has two keys with one name, and a list for each, and unrelated CAs may
    /// have the same name. webpki uses the first list with the name, whichever key signed it.
    pub(super) fn check(
        &self,
        certificate: &Cert<'_>,
        issuer: &SubjectPublicKeyInfoDer<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Reason> {
        let mut lists = self.of(certificate.issuer()).peekable();
        if lists.peek().is_none() {
            return Ok(());
        }
        let key_id = issuer_key_id(certificate);
        let (mut is_known, mut unknown) = (false, None);
        for list in lists {
            match list.signed.verdict(issuer, algorithms) {
                Verdict::Good if list.names(certificate.serial()) => return Err(Reason::Revoked),
                Verdict::Good => is_known = true,
                // A key may have different identifiers in different places: only the signature shows whose list it is.
                bad => match key_id.as_ref().zip(list.key_id.as_ref()) {
                    Some((id, other)) if id != other => {}
                    Some(_) => return Err(bad.reason()),
                    None => unknown = Some(bad),
                },
            }
        }
        unknown.filter(|_| !is_known).map_or(Ok(()), |bad| Err(bad.reason()))
    }

    /// Whether a list of this issuer contains the serial number.
    pub(super) fn name(&self, issuer: &[u8], serial: &[u8]) -> bool {
        self.of(issuer).any(|list| list.names(serial))
    }

    /// Whether a list revokes a certificate that is itself trusted.
    ///
    /// For a self-signed certificate, lists that are signed with another key do not count. For others, the issuer's key
    /// is not known. Since the operator configured the lists, equal issuer names are enough.
    pub(super) fn revoke(
        &self,
        (issuer, serial): (&[u8], &[u8]),
        own_key: impl FnOnce() -> Option<SubjectPublicKeyInfoDer<'static>>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> bool {
        let mut naming = self.of(issuer).filter(|list| list.names(serial)).peekable();
        if naming.peek().is_none() {
            return false;
        }
        let Some(key) = own_key() else { return true };
        naming.any(|list| list.signed.verdict(&key, algorithms) != Verdict::OtherKey)
    }

    fn of<'a>(&'a self, issuer: &'a [u8]) -> impl Iterator<Item = &'a List> {
        self.0.iter().flat_map(|lists| lists.iter()).filter(move |list| list.issuer == issuer)
    }

    #[cfg(test)]
    pub(super) fn shares_with(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

impl List {
    fn names(&self, serial: &[u8]) -> bool {
        self.revoked.contains(serial)
    }

    /// A list that is out of date still revokes its entries, but lacks later ones.
    fn warn_if_due(&self, path: &Path) {
        let now = UnixTime::now().as_secs() as i64;
        if let Some(due) = self.next_update.filter(|next| *next < now) {
            tracing::warn!(
                key = KEY,
                file = %path.display(),
                due = %Date(due),
                "a revocation list is out of date: later revocations are unknown; replace it",
            );
        }
    }
}

fn parse(path: &Path, content: Vec<u8>) -> Result<Vec<List>, TlsConfigError> {
    let bad = |detail| TlsConfigError::of(KEY, path, |path| TlsFault::Crl { path, detail });
    let mut lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(&content)
        .collect::<Result<_, _>>()
        .map_err(|error| bad(error.to_string()))?;
    if lists.is_empty() {
        lists.push(content.into());
    }
    let parse = |list: CertificateRevocationListDer<'_>| {
        let unread = |error| bad(format!("the TLS library cannot read it ({error})"));
        let damaged = || bad("it is damaged".to_owned());
        let parsed = BorrowedCertRevocationList::from_der(&list).map_err(unread)?;
        let revoked = parsed.into_iter().map(|each| each.map(|each| each.serial_number));
        let revoked = Serials::new(revoked.collect::<Result<_, _>>().map_err(unread)?);
        let (next_update, key_id) = rest(&list).ok_or_else(damaged)?;
        Ok(List {
            issuer: CertRevocationList::from(parsed).issuer().to_vec(),
            revoked,
            signed: Signed::parse(&list).ok_or_else(damaged)?,
            key_id,
            next_update,
        })
    };
    lists.into_iter().map(parse).collect()
}

/// The parts of a list that webpki does not provide: when the next one is due, and the id of the key that signed it.
fn rest(list: &[u8]) -> Option<(Option<i64>, Option<Vec<u8>>)> {
    let (signed, _) = split(split(list)?.0.contents)?;
    let mut fields = signed.contents;
    let mut next = || {
        let (field, rest) = split(fields)?;
        fields = rest;
        Some(field)
    };
    // Version, algorithm, issuer, and the time of issue.
    for _ in 0..4 {
        next()?;
    }
    let (_, due) = ASN1Time::from_der(next()?.whole).ok()?;
    // Certificates, if any, then extensions, which webpki requires.
    let last = iter::from_fn(next).last()?;
    let mut extensions = split(last.contents)?.0.contents;
    let mut found = Vec::new();
    while !extensions.is_empty() {
        let (rest, extension) = X509Extension::from_der(extensions).ok()?;
        found.push(extension);
        extensions = rest;
    }
    Some((Some(due.timestamp()), key_id(&found)))
}

/// The id of the key that signed a certificate, according to the certificate.
fn issuer_key_id(certificate: &Cert<'_>) -> Option<Vec<u8>> {
    let der = certificate.der();
    let (_, read) = X509Certificate::from_der(&der).ok()?;
    key_id(read.extensions())
}

fn key_id(extensions: &[X509Extension<'_>]) -> Option<Vec<u8>> {
    extensions.iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(of) => Some(of.key_identifier.as_ref()?.0.to_vec()),
        _ => None,
    })
}
