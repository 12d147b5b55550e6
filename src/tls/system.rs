//! The CA certificates of this machine, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR` instead.

use std::{
    collections::HashSet,
    env, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::pem::{MAX_CERTIFICATES, on_lines_of_their_own, pem_error};
use crate::{
    config::{FileError, Followed, read_file_or_pipe},
    files::reading,
};

/// What is read if no variable is set, for messages.
const PLACE: &str = "/etc/ssl/certs";

/// The file and folders that the environment variables name.
pub(super) struct FromEnv {
    file: Option<PathBuf>,
    folders: Vec<PathBuf>,
}

/// The certificates that were found.
#[derive(Default)]
pub(super) struct Found {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// The errors of files and blocks that were ignored.
    pub(super) errors: Vec<String>,
}

/// The files and folders that the environment variables name, for following changes.
pub fn files_from_env() -> Vec<PathBuf> {
    FromEnv::read().map(|from_env| from_env.paths().cloned().collect()).unwrap_or_default()
}

/// Reads the certificates. Blocking.
pub(super) fn load() -> Found {
    let mut found = Found::default();
    let Some(from_env) = FromEnv::read() else {
        let _reading = reading(Path::new(PLACE));
        let native = rustls_native_certs::load_native_certs();
        found.certificates = native.certs;
        found.errors = native.errors.iter().map(ToString::to_string).collect();
        return found;
    };
    let mut seen = HashSet::new();
    if let Some(file) = &from_env.file {
        seen.extend(fs::metadata(file).map(|it| (it.dev(), it.ino())));
        found.add_file(file);
    }
    for folder in &from_env.folders {
        let added = found.add_folder(folder, &mut seen);
        found.errors.extend(added.err().map(|error| format!("{}: {error}", folder.display())));
    }
    found.certificates.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
    found.certificates.dedup();
    found
}

/// Where the certificates are, for messages.
pub(super) fn place() -> PathBuf {
    let from_env = FromEnv::read().and_then(|from_env| from_env.paths().next().cloned());
    from_env.unwrap_or_else(|| PLACE.into())
}

impl FromEnv {
    /// `None` if no variable is set.
    pub(super) fn read() -> Option<Self> {
        let file = env::var_os("SSL_CERT_FILE").map(PathBuf::from);
        let folders = env::var_os("SSL_CERT_DIR").unwrap_or_default();
        let folders = env::split_paths(&folders).filter(|path| !path.as_os_str().is_empty());
        let from_env = Self { file, folders: folders.collect() };
        (from_env.file.is_some() || !from_env.folders.is_empty()).then_some(from_env)
    }

    /// These files and folders, for detecting changes.
    pub(super) fn followed(&self) -> Followed {
        Followed::new(self.paths().cloned(), MAX_CERTIFICATES)
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.file.iter().chain(&self.folders)
    }
}

impl Found {
    /// Adds the certificates of a PEM file.
    pub(super) fn add_file(&mut self, path: &Path) {
        let contents = match read_file_or_pipe(path, MAX_CERTIFICATES) {
            Ok(contents) => on_lines_of_their_own(contents),
            Err(error) => return self.errors.push(format!("{}: {error}", path.display())),
        };
        for certificate in CertificateDer::pem_slice_iter(&contents) {
            match certificate {
                Ok(certificate) => self.certificates.push(certificate),
                Err(error) => {
                    self.errors.push(format!("{}: {}", path.display(), pem_error(&error)));
                }
            }
        }
    }

    /// Adds those of the files in a folder. `openssl rehash` adds a link to each file.
    fn add_folder(
        &mut self,
        folder: &Path,
        seen: &mut HashSet<(u64, u64)>,
    ) -> Result<(), FileError> {
        let _reading = reading(folder);
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match fs::metadata(&path) {
                Ok(it) if it.is_file() && seen.insert((it.dev(), it.ino())) => self.add_file(&path),
                Ok(_) => {}
                // A broken link.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => self.errors.push(format!("{}: {error}", path.display())),
            }
        }
        Ok(())
    }
}
