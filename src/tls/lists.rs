//! Certificate revocation lists: read from files, and asked for a certificate.

use std::{path::Path, sync::Arc};

use rustls::pki_types::{CertificateRevocationListDer, UnixTime, pem::PemObject};
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList};

use super::{
    failure::Date,
    roots::read_up_to,
    shared::{Digest, Shared},
};
use crate::tls::{TlsConfigError, TlsFault};

const KEY: &str = "tls.crls";

/// The largest file of revocation lists that is read: a million and more revoked certificates.
const MAX_LISTS: usize = 64 << 20;

static FILES: Shared<Vec<List>> = Shared::new();

/// All lists of an alias.
#[derive(Default)]
pub(super) struct Lists(Vec<Arc<Vec<List>>>);

struct List {
    parsed: CertRevocationList<'static>,
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

    pub(super) fn iter(&self) -> impl Iterator<Item = &CertRevocationList<'static>> {
        self.0.iter().flat_map(|lists| lists.iter()).map(|list| &list.parsed)
    }

    /// Whether a list of this issuer names the serial number.
    ///
    /// For certificates that are trusted by themselves: nobody's signature stands above them, and the lists are the
    /// operator's own files, so that a match of names is enough to refuse one.
    pub(super) fn revoke(&self, issuer: &[u8], serial: &[u8]) -> bool {
        self.iter()
            .filter(|list| list.issuer() == issuer)
            .any(|list| !matches!(list.find_serial(serial), Ok(None)))
    }

    #[cfg(test)]
    pub(super) fn shares_with(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

impl List {
    /// A list that should have been replaced still revokes what it revokes, but is silent on what came later.
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
        let parsed = OwnedCertRevocationList::from_der(&list)
            .map_err(|error| bad(format!("the TLS library cannot read it ({error})")))?;
        let next_update = match CertificateRevocationList::from_der(&list) {
            Ok((_, list)) => list.next_update().map(|time| time.timestamp()),
            Err(_) => None,
        };
        Ok(List { parsed: parsed.into(), next_update })
    };
    lists.into_iter().map(parse).collect()
}
