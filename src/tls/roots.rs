//! The root certificates that an alias trusts, parsed once however many aliases trust them.

use crate::{config, tls::TlsConfigError};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use std::{collections::HashSet, fs, path::Path, sync::Arc};

/// Root stores already parsed during one load, so that aliases with equal trust share one.
///
/// Keep it for the length of a load and drop it then: the next load reads the files anew.
#[derive(Default)]
pub struct RootStores {
    loaded: Vec<(config::Trust, Arc<Roots>)>,
    system: Option<Vec<CertificateDer<'static>>>,
}

/// What one [`config::Trust`] comes to.
pub(super) struct Roots {
    pub(super) store: Arc<RootCertStore>,
    /// The certificates of `tls.ca.files`: a server may show one of them as its own.
    pub(super) files: Vec<CertificateDer<'static>>,
}

impl RootStores {
    pub(super) fn load(&mut self, trust: &config::Trust) -> Result<Arc<Roots>, TlsConfigError> {
        if let Some((_, roots)) = self.loaded.iter().find(|(known, _)| known == trust) {
            return Ok(roots.clone());
        }
        let roots = Arc::new(self.read(trust)?);
        self.loaded.push((trust.clone(), roots.clone()));
        Ok(roots)
    }

    fn read(&mut self, trust: &config::Trust) -> Result<Roots, TlsConfigError> {
        let mut store = RootCertStore::empty();
        let mut files = Vec::new();
        for path in &trust.files {
            for certificate in certificates(path, "tls.ca.files")? {
                store.add(certificate.clone()).map_err(|error| TlsConfigError::Root {
                    path: path.clone(),
                    detail: error.to_string(),
                })?;
                files.push(certificate);
            }
        }
        if trust.system {
            // Distributions carry certificates that do not parse; the others serve all the same.
            store.add_parsable_certificates(self.system().iter().cloned());
        }
        if trust.webpki {
            // Mostly the system's own roots over again, which would only cost memory.
            let known: HashSet<_> = store
                .roots
                .iter()
                .map(|root| (root.subject.clone(), root.subject_public_key_info.clone()))
                .collect();
            store.extend(
                webpki_roots::TLS_SERVER_ROOTS
                    .iter()
                    .filter(|root| {
                        let key = (root.subject.clone(), root.subject_public_key_info.clone());
                        !known.contains(&key)
                    })
                    .cloned(),
            );
        }
        if store.is_empty() {
            return Err(TlsConfigError::NoRoots);
        }
        Ok(Roots { store: Arc::new(store), files })
    }

    /// Where `SSL_CERT_FILE` or `SSL_CERT_DIR` is set, it stands for the system's roots. It replaces
    /// neither the built-in ones nor those of `tls.ca.files`.
    fn system(&mut self) -> &[CertificateDer<'static>] {
        self.system.get_or_insert_with(|| {
            let found = rustls_native_certs::load_native_certs();
            for error in found.errors {
                tracing::debug!(%error, "some of the system's root certificates cannot be read");
            }
            found.certs
        })
    }
}

/// The certificates of a PEM file, of which there must be one at least.
pub(super) fn certificates(
    path: &Path,
    key: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let text = read(path, key)?;
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|error| {
            TlsConfigError::Pem { key, path: path.into(), detail: error.to_string() }
        })?;
    if certificates.is_empty() {
        return Err(TlsConfigError::NoCertificate { key, path: path.into() });
    }
    Ok(certificates)
}

pub(super) fn read(path: &Path, key: &'static str) -> Result<Vec<u8>, TlsConfigError> {
    fs::read(path).map_err(|source| TlsConfigError::Read { key, path: path.into(), source })
}
