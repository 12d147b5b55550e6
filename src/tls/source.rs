//! Where the certificates of listeners come from: configured files, or local authorities.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    Error,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::{
    TlsConfigError, TlsFault,
    authority::{AuthorityError, Subject},
    pem::{MAX_CERTIFICATES, certificates, pem_error, read},
    server::{ServerCertificates, is_valid_for},
    store::{Serving, Store, StoreError},
};
use crate::{
    config::{Contents, Followed},
    files::Settling,
};

/// Where the certificates for aliases come from. All its methods may block.
#[derive(Clone)]
pub enum Source {
    /// `listener.tls`: one certificate, with its key, for all names.
    Files {
        /// The file of the chain (PEM).
        certificate: PathBuf,
        /// The file of its key (PEM).
        key: PathBuf,
        /// Both.
        files: Followed,
        /// The files' contents, usable or not.
        looks: Settling<Contents>,
    },
    /// Local authorities.
    Local {
        /// Where they are stored; `None` if nothing can be written.
        store: Option<Store>,
        /// The certificates in use.
        serving: Serving,
    },
}

/// Why there is no certificate for an alias.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A file of `listener.tls` cannot be read or used.
    #[error("{0}")]
    Files(#[from] TlsConfigError),
    /// The two files of `listener.tls` do not match.
    #[error(
        "`listener.tls`: {} and {} do not match: {detail}",
        .certificate.display(), .key.display()
    )]
    Pair {
        /// `listener.tls.certificate`
        certificate: PathBuf,
        /// `listener.tls.key`
        key: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A local authority cannot be used.
    #[error("{0}")]
    Authority(#[from] AuthorityError),
    /// The configured folder of the authorities cannot be used.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl Source {
    /// One certificate for all names.
    pub fn files(certificate: &Path, key: &Path) -> Self {
        // Looked at before they are read, so that a change in between is noticed.
        let mut files = Followed::new([certificate.into(), key.into()], MAX_CERTIFICATES);
        let looks = Settling::new(files.look());
        Self::Files { certificate: certificate.into(), key: key.into(), files, looks }
    }

    /// Local authorities in `directory`. If none is configured, a temporary folder or this process' memory is used
    /// if necessary: a certificate that no application trusts yet should not prevent the start.
    pub fn local(directory: Option<&Path>, subjects: &[Subject]) -> Result<Self, SourceError> {
        let open = |store: Store| -> Result<Self, StoreError> {
            let serving = store.serve(subjects, &Serving::default())?;
            Ok(Self::Local { store: Some(store), serving })
        };
        if let Some(directory) = directory {
            return Ok(open(Store::at(directory))?);
        }
        let of_user = Store::of_user()
            .map(|store| store.check_safety().and_then(|()| open(store.best_effort())));
        let temporary = || Store::temporary().and_then(|store| open(store.best_effort()));
        let first = match of_user {
            Some(Ok(source)) => return Ok(source),
            // Applications may trust what is there.
            Some(Err(error)) if error.may_pass() => return Err(error.into()),
            Some(Err(error)) => {
                tracing::warn!(%error, "the local certificate authorities are in a temporary folder");
                temporary()
            }
            None => temporary(),
        };
        first.or_else(|error| {
            tracing::warn!(%error, "the local certificate authorities are in memory only: applications cannot trust them");
            let serving = Serving::in_memory(subjects, &Serving::default())?;
            Ok(Self::Local { store: None, serving })
        })
    }

    /// Whether both use the same files.
    pub fn has_files_of(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Files { certificate, key, .. },
                Self::Files { certificate: other_certificate, key: other_key, .. },
            ) => certificate == other_certificate && key == other_key,
            _ => false,
        }
    }

    /// The certificates to serve.
    pub fn certificates(&self) -> Result<ServerCertificates, SourceError> {
        match self {
            Self::Files { certificate, key, .. } => {
                Ok(ServerCertificates::configured(Arc::new(certified_key(certificate, key)?)))
            }
            Self::Local { serving, .. } => Ok(ServerCertificates::local(serving.certificates())),
        }
    }

    /// The names of aliases that a configured certificate is not valid for.
    pub fn uncovered<'a>(
        &self,
        subjects: &'a [Subject],
        certificates: &ServerCertificates,
    ) -> Vec<&'a str> {
        let Some(key) = certificates.configured_key() else { return Vec::new() };
        let names = subjects.iter().flat_map(|subject| &subject.names);
        names.filter(|name| !is_valid_for(key, name)).map(String::as_str).collect()
    }

    /// Looks at the files and the clock. Returns whether other certificates are to be served, until they are
    /// [taken](Self::take). `subjects` may differ from the previous ones only if `new` is set.
    pub fn look(&mut self, subjects: &[Subject], new: bool) -> Result<bool, SourceError> {
        match self {
            Self::Files { files, looks, .. } => Ok(looks.has_changed(files.look())),
            Self::Local { store, serving } => {
                let unchanged = store.as_ref().is_none_or(Store::is_unchanged);
                if !new && unchanged && serving.is_current() {
                    return Ok(false);
                }
                let now = match store {
                    None => Serving::in_memory(subjects, serving)?,
                    Some(store) => match store.serve(subjects, serving) {
                        // Nobody has configured the folder, so a reload does not depend on it.
                        Err(error) if new && store.is_best_effort() && !error.may_pass() => {
                            tracing::warn!(%error, "new local certificate authorities are in memory until they can be written: applications cannot trust them yet");
                            Serving::in_memory(subjects, serving)?
                        }
                        served => served?,
                    },
                };
                let changed = !now.shows_what(serving);
                *serving = now;
                Ok(changed)
            }
        }
    }

    /// Takes note of the result of loading the certificates. Returns `false` if they must be loaded again: because the
    /// files have changed in the meantime, or because they could not be read although they exist (for example, because
    /// the process has no descriptors left).
    pub fn take<T>(&mut self, loaded: &Result<T, SourceError>) -> bool {
        let Self::Files { files, looks, .. } = self else { return true };
        let now = files.look();
        let is_read = loaded.as_ref().err().is_none_or(|error| !error.is_io());
        let is_done = (is_read || !now.are_complete()) && looks.has_changed(now);
        if is_done {
            looks.take();
        }
        is_done
    }
}

impl SourceError {
    fn is_io(&self) -> bool {
        matches!(self, Self::Files(error) if error.is_io())
    }
}

const KEY: &str = "listener.tls.key";

fn certified_key(certificate: &Path, key: &Path) -> Result<CertifiedKey, SourceError> {
    let no_pair = |detail: String| SourceError::Pair {
        certificate: certificate.into(),
        key: key.into(),
        detail,
    };
    let chain = certificates(certificate, "listener.tls.certificate")?;
    let no_key = |detail: String| {
        TlsConfigError::of(KEY, key, |path| TlsFault::PrivateKey { path, detail }).into()
    };
    let der = PrivateKeyDer::from_pem_slice(&read(key, KEY)?)
        .map_err(|error| no_key(pem_error(&error)))?;
    CertifiedKey::from_der(chain, der, &aws_lc_rs::default_provider()).map_err(
        |error| match error {
            Error::General(detail) => no_key(detail),
            error => no_pair(error.to_string()),
        },
    )
}
