//! The files that applications read, derived from the roots.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use super::{Known, Stem, Store, StoreError, folder::write, pem};
use crate::{
    files::reading,
    tls::{authority::Root, truststore},
};
use rustls::pki_types::CertificateDer;

/// All roots.
pub(super) const ROOTS: &str = "ca.pem";
/// All roots and the public ones: for programs with a single trust store.
pub(super) const BUNDLE: &str = "bundle.pem";
/// The same for Java.
pub(super) const TRUSTSTORE: &str = "truststore.p12";

pub(super) const FILES: [&str; 3] = [ROOTS, BUNDLE, TRUSTSTORE];

/// The most attempts: changes by other processes stop at some point, too.
const ROUNDS: usize = 1000;

impl Store {
    /// Writes the files that applications read: from the roots in the folder, or only from `own` if the folder's
    /// contents cannot be trusted.
    ///
    /// There is no lock, so another process may have listed the folder earlier and write after us. So each
    /// process lists the folder again after writing, until nothing has changed.
    pub(super) fn publish(
        &self,
        known: &mut Known,
        own: Option<&[(Stem, Arc<Root>)]>,
    ) -> Result<(), StoreError> {
        if let Some(own) = own {
            return self.write_derived(&own.iter().cloned().collect());
        }
        let mut roots = self.list(known)?.roots;
        for _ in 0..ROUNDS {
            self.write_derived(&roots)?;
            let now = self.list(known)?.roots;
            if now.keys().eq(roots.keys()) {
                break;
            }
            roots = now;
        }
        Ok(())
    }

    fn write_derived(&self, roots: &BTreeMap<Stem, Arc<Root>>) -> Result<(), StoreError> {
        let local: String = roots.values().map(|root| pem(root.der())).collect();
        let public = webpki_root_certs::TLS_SERVER_ROOT_CERTS;
        let bundle: String = std::iter::once(local.clone()).chain(public.iter().map(pem)).collect();
        let all: Vec<&CertificateDer<'_>> =
            roots.values().map(|root| root.der()).chain(public).collect();
        // The file that others wait for comes last.
        update(&self.truststore(), &truststore::to_pkcs12(&all))?;
        update(&self.bundle(), bundle.as_bytes())?;
        update(&self.roots_file(), local.as_bytes())
    }
}

/// Writes a file, unless it has these contents already.
fn update(path: &Path, contents: &[u8]) -> Result<(), StoreError> {
    let _reading = reading(path);
    let is_same_size = fs::metadata(path)
        .is_ok_and(|there| there.is_file() && there.len() == contents.len() as u64);
    if is_same_size && fs::read(path).is_ok_and(|there| there == contents) {
        return Ok(());
    }
    write(path, 0o644, contents)
}
