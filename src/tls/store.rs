//! Where the local authority lives between runs: `ca.directory`.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::pki_types::CertificateDer;

use super::authority::{Authority, AuthorityError};

/// The root certificate.
const ROOT: &str = "ca.pem";
/// Its key: PKCS #8.
const KEY: &str = "ca-key.pem";
/// The root and the public roots: what a program's only trust store may be set to.
const BUNDLE: &str = "bundle.pem";

/// A folder with a local authority in it.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing.
    #[error("{}: {source}; name a folder that can be written in `ca.directory`", .path.display())]
    Io {
        /// What was read or written.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Making the authority.
    #[error("{0}")]
    Authority(#[from] AuthorityError),
}

/// An authority, and whether it is the one that clients may trust already.
#[derive(Debug)]
pub struct Opened {
    /// The authority.
    pub authority: Authority,
    /// Why it is a new one; `None` where it was there before.
    pub renewed: Option<&'static str>,
}

impl Store {
    /// The folder of the configuration, else `$XDG_STATE_HOME/truename`, else one of `$HOME`'s.
    pub fn new(configured: Option<&Path>) -> Option<Self> {
        let state = || {
            let absolute = |path: PathBuf| path.is_absolute().then_some(path);
            env::var_os("XDG_STATE_HOME")
                .map(PathBuf::from)
                .and_then(absolute)
                .or_else(|| Some(absolute(env::var_os("HOME")?.into())?.join(".local/state")))
        };
        let directory = match configured {
            Some(directory) => directory.to_owned(),
            None => state()?.join("truename"),
        };
        Some(Self { directory })
    }

    /// In a private folder of the system's temporary one, for where no other can be written.
    pub fn temporary() -> Result<Self, StoreError> {
        let name = format!("truename-{}-{:016x}", std::process::id(), fastrand::u64(..));
        let directory = env::temp_dir().join(name);
        // Not recursive: a folder that somebody put there first is an error.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(|source| StoreError::Io { path: directory.clone(), source })?;
        Ok(Self { directory })
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The root certificate's file.
    pub fn root(&self) -> PathBuf {
        self.directory.join(ROOT)
    }

    /// The file with the root and the public roots.
    pub fn bundle(&self) -> PathBuf {
        self.directory.join(BUNDLE)
    }

    /// The authority that is there, if it may vouch for `names`; else a new one, put there.
    pub fn open(&self, names: &BTreeSet<String>) -> Result<Opened, StoreError> {
        let renewed = match self.read()? {
            None => "there was none",
            Some(Err(_)) => "the one that was there cannot be read",
            Some(Ok(authority)) if !authority.covers(names) => {
                "the one that was there may not vouch for all aliases, or ends soon"
            }
            Some(Ok(authority)) => {
                // The public roots may have changed since.
                self.write(BUNDLE, 0o644, bundle(&authority).as_bytes())?;
                return Ok(Opened { authority, renewed: None });
            }
        };
        let authority = Authority::generate(names)?;
        self.save(&authority)?;
        Ok(Opened { authority, renewed: Some(renewed) })
    }

    /// The authority that is there; the inner error where its files are no authority.
    pub fn read(&self) -> Result<Option<Result<Authority, AuthorityError>>, StoreError> {
        let file = |name: &str| {
            let path = self.directory.join(name);
            match fs::read_to_string(&path) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(StoreError::Io { path, source }),
            }
        };
        Ok(match (file(ROOT)?, file(KEY)?) {
            (Some(root), Some(key)) => Some(Authority::from_pem(&root, &key)),
            _ => None,
        })
    }

    /// Writes key, root and bundle; each is there whole or not at all.
    pub fn save(&self, authority: &Authority) -> Result<(), StoreError> {
        let at = |source| StoreError::Io { path: self.directory.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(at)?;
        fs::set_permissions(&self.directory, fs::Permissions::from_mode(0o700)).map_err(at)?;
        // The key first: a root without its key would be taken for a broken one.
        self.write(KEY, 0o600, authority.key_pem().as_bytes())?;
        self.write(ROOT, 0o644, pem(authority.root()).as_bytes())?;
        self.write(BUNDLE, 0o644, bundle(authority).as_bytes())
    }

    /// Writes beside and renames over, so that no reader sees half a file.
    pub fn write(&self, name: &str, mode: u32, contents: &[u8]) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let beside = self.directory.join(format!(".{name}.{:016x}", fastrand::u64(..)));
        let written = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)
            .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&beside, &path));
        written.map_err(|source| {
            let _ = fs::remove_file(&beside);
            StoreError::Io { path, source }
        })
    }
}

/// RFC 7468.
pub fn pem(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn bundle(authority: &Authority) -> String {
    let public = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().map(pem);
    std::iter::once(pem(authority.root())).chain(public).collect()
}
