//! Where the local authority lives between runs: `ca.directory`.
//!
//! Several processes may share a folder. The authority is one file, replaced whole; the others
//! follow from it, and who writes holds the lock.

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use rustls::pki_types::CertificateDer;

use super::authority::{Authority, AuthorityError};

/// The root certificate.
const ROOT: &str = "ca.pem";
/// The whole authority, with its key.
const KEY: &str = "ca-key.pem";
/// The root and the public roots: what a program's only trust store may be set to.
const BUNDLE: &str = "bundle.pem";
/// Locked by whoever writes the others.
const LOCK: &str = ".lock";

/// Another process holds the lock for milliseconds, unless it is stuck.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Names beyond which those of former aliases are no longer kept in a new root.
const MAX_NAMES: usize = 1024;

/// A folder with a local authority in it.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
    _temporary: Option<Arc<Temporary>>,
}

/// A folder that goes with the process.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Reading or writing.
    #[error(
        "the local authority: {}: {source}; name a folder that can be written in `ca.directory`",
        .path.display()
    )]
    Io {
        /// What was read or written.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process does not let go of the folder.
    #[error(
        "the local authority: another process has held the lock {} for {LOCK_PATIENCE:?}; end it, or \
         name another folder in `ca.directory`",
        .path.display()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
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
    /// In this folder, which is made when it is needed.
    pub fn at(directory: &Path) -> Self {
        // What is said of it is for programs that run elsewhere.
        let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        Self { directory: absolute, _temporary: None }
    }

    /// In `$XDG_STATE_HOME/truename`, else in the same of `$HOME`; `None` where neither is set.
    pub fn of_user() -> Option<Self> {
        let absolute =
            |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let state = absolute("XDG_STATE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
        Some(Self { directory: state.join("truename"), _temporary: None })
    }

    /// In a private folder of the system's temporary one, for where no other can be written. It is
    /// removed with the last clone of this.
    pub fn temporary() -> Result<Self, StoreError> {
        let name = format!("truename-{}-{:016x}", std::process::id(), fastrand::u64(..));
        let directory = env::temp_dir().join(name);
        // Not recursive: a folder that somebody put there first is an error.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(|source| StoreError::Io { path: directory.clone(), source })?;
        Ok(Self { _temporary: Some(Arc::new(Temporary(directory.clone()))), directory })
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The root certificate's file.
    pub fn root(&self) -> PathBuf {
        self.directory.join(ROOT)
    }

    /// The file of the authority with its key.
    pub fn key(&self) -> PathBuf {
        self.directory.join(KEY)
    }

    /// The file with the root and the public roots.
    pub fn bundle(&self) -> PathBuf {
        self.directory.join(BUNDLE)
    }

    /// The authority that is there, if it may vouch for `names`; else a new one, put there.
    ///
    /// `held` is the one in use: it goes back where its files are gone or broken.
    pub fn open(
        &self,
        names: &BTreeSet<String>,
        held: Option<&Authority>,
    ) -> Result<Opened, StoreError> {
        let there = self.read()?.and_then(Result::ok).filter(|there| there.covers(names));
        let Some(authority) = there else { return self.open_locked(names, held) };
        if self.is_published(&authority) {
            return Ok(Opened { authority, renewed: None });
        }
        match self.open_locked(names, held) {
            // A Secret can only ever be read: good enough.
            Err(StoreError::Io { .. }) => Ok(Opened { authority, renewed: None }),
            result => result,
        }
    }

    fn open_locked(
        &self,
        names: &BTreeSet<String>,
        held: Option<&Authority>,
    ) -> Result<Opened, StoreError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(|source| StoreError::Io { path: self.directory.clone(), source })?;
        let _lock = self.lock()?;
        let mut wanted = names.clone();
        // Read again: another process may have been faster.
        let renewed = match self.read()? {
            Some(Ok(authority)) if authority.covers(names) => {
                self.publish(&authority)?;
                return Ok(Opened { authority, renewed: None });
            }
            Some(Ok(authority)) => {
                // Another process may serve the others: a root for all is one that both can use.
                if authority.names().len() + names.len() <= MAX_NAMES {
                    wanted.extend(authority.names().iter().cloned());
                }
                if authority.ends_soon() {
                    "the one that was there ends soon"
                } else {
                    "the one that was there may not vouch for all aliases"
                }
            }
            broken => {
                if broken.is_some() {
                    self.put_aside()?;
                }
                if let Some(held) = held.filter(|held| held.covers(names)) {
                    let authority = Authority::from_pem(held.to_pem().as_bytes())?;
                    self.save(&authority)?;
                    return Ok(Opened { authority, renewed: None });
                }
                match broken {
                    Some(_) => "the one that was there cannot be used; it is in `ca-key.pem.old`",
                    None => "there was none",
                }
            }
        };
        let authority = Authority::generate(&wanted)?;
        self.save(&authority)?;
        Ok(Opened { authority, renewed: Some(renewed) })
    }

    /// The authority that is there; the inner error where its file is no authority.
    pub fn read(&self) -> Result<Option<Result<Authority, AuthorityError>>, StoreError> {
        let path = self.key();
        match fs::read(&path) {
            Ok(text) => Ok(Some(Authority::from_pem(&text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::Io { path, source }),
        }
    }

    /// Locked until the value is dropped. Not where the file system knows no locks.
    fn lock(&self) -> Result<Option<Flock<File>>, StoreError> {
        let path = self.directory.join(LOCK);
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| StoreError::Io { path: path.clone(), source })?;
        let mut waited = Duration::ZERO;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Some(lock)),
                Err((_, Errno::EWOULDBLOCK)) if waited >= LOCK_PATIENCE => {
                    return Err(StoreError::Locked { path });
                }
                Err((unlocked, Errno::EWOULDBLOCK | Errno::EINTR)) => file = unlocked,
                Err(_) => return Ok(None),
            }
            thread::sleep(LOCK_PAUSE);
            waited += LOCK_PAUSE;
        }
    }

    fn save(&self, authority: &Authority) -> Result<(), StoreError> {
        write(&self.key(), 0o600, authority.to_pem().as_bytes())?;
        self.publish(authority)
    }

    /// Writes what applications read.
    fn publish(&self, authority: &Authority) -> Result<(), StoreError> {
        let key = self.key();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))
            .map_err(|source| StoreError::Io { path: key, source })?;
        write(&self.root(), 0o644, authority.root_pem().as_bytes())?;
        write(&self.bundle(), 0o644, bundle(authority).as_bytes())
    }

    /// Whether nothing is missing, of another authority, or open to others.
    fn is_published(&self, authority: &Authority) -> bool {
        let holds = |path, text: String| fs::read(path).is_ok_and(|there| there == text.as_bytes());
        fs::metadata(self.key()).is_ok_and(|key| key.permissions().mode() & 0o077 == 0)
            && holds(self.root(), authority.root_pem())
            && holds(self.bundle(), bundle(authority))
    }

    /// What is not ours to lose: somebody may have put an authority of their own here.
    fn put_aside(&self) -> Result<(), StoreError> {
        let path = self.key();
        fs::rename(&path, self.directory.join(format!("{KEY}.old")))
            .map_err(|source| StoreError::Io { path, source })
    }
}

/// Writes beside and renames over, so that no reader sees half a file.
pub fn write(path: &Path, mode: u32, contents: &[u8]) -> Result<(), StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{:016x}", fastrand::u64(..)));
    let fill = |mut file: File| {
        // Whatever the umask: what is public must be so for other users' applications.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(contents)?;
        file.sync_all()
    };
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .and_then(fill)
        .and_then(|()| fs::rename(&beside, path));
    written.map_err(|source| {
        let _ = fs::remove_file(&beside);
        StoreError::Io { path: path.to_owned(), source }
    })
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
    std::iter::once(authority.root_pem()).chain(public).collect()
}
