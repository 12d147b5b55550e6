//! Stores local authorities between runs, in `ca.directory`.
//!
//! Any number of processes may share a folder without a lock. Files with an id in their name are written
//! once and never replaced, so there is nothing to coordinate: a process that adds an alias adds files, and
//! all roots are trusted. `ca.pem` and the other files without an id are derived from the roots in the
//! folder; a process that changes the folder writes them again.

mod choice;
mod derived;
mod draft;
mod folder;
mod listing;
mod maintenance;
mod serving;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    env, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::errno::Errno;
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;

use super::authority::{AuthorityError, Issued, Root, Seconds, now, pem};
use crate::folder::PrivateFolder;
pub use folder::{write, write_new};
pub use listing::{Stem, alias_part};
pub use serving::Serving;

use derived::{BUNDLE, ROOTS, TRUSTSTORE};
use folder::Stamp;
use listing::Listing;

/// The most unusable files that are logged.
const MAX_LOGGED_FILES: usize = 20;

const OPEN_FILES: &str =
    "let the proxy open more files (`ulimit -Hn`), or lower `listener.max_connections`";

/// A folder with local authorities. Clones share what is known about it. All methods may block.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
    known: Arc<Mutex<Known>>,
    best_effort: bool,
    _temporary: Option<Arc<PrivateFolder>>,
}

/// What is remembered about a folder's contents.
#[derive(Debug, Default)]
struct Known {
    /// Roots that passed the checks. The id is a digest, so a root with a known id cannot have changed.
    roots: HashMap<Stem, Arc<Root>>,
    /// What has been logged: each thing is logged once.
    logged: HashSet<String>,
    /// The folder's stamp when it was last listed.
    stamp: Option<Stamp>,
    maintained: Seconds,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It, or an authority in it, cannot be read.
    #[error("the local authority: cannot read {}: {source}; {}", .path.display(), way_to_read(.source))]
    Read {
        /// What was read.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("the local authority: cannot write {}: {source}; {}", .path.display(), way_to_write(.source))]
    Write {
        /// What was written.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Other users can write to it.
    #[error(
        "the local authority: {} {why}, and anyone who can write there decides whom applications trust; \
        remove that permission (`chmod go-w`), or set `ca.directory` to another folder",
        .directory.display()
    )]
    Unsafe {
        /// The folder.
        directory: PathBuf,
        /// Who can.
        why: String,
    },
    /// It has more roots than applications can use.
    #[error(
        "the local authority: {roots} roots are in {}, and applications can use {} at most; remove them by \
        alias with `truename ca remove`, or set `ca.directory` to another folder",
        .directory.display(),
        listing::MOST_ROOTS
    )]
    TooMany {
        /// The folder.
        directory: PathBuf,
        /// How many there are.
        roots: usize,
    },
    /// The authority cannot be created.
    #[error("the local authority: {0}")]
    Authority(#[from] AuthorityError),
}

/// An authority in the folder, for display.
#[derive(Debug)]
pub struct Found {
    /// Its root.
    pub root: Arc<Root>,
    /// The alias that it is for, or the first name of an issued certificate.
    pub alias: String,
    /// The root's file.
    pub root_file: PathBuf,
    /// The file of the key and the certificates, if there is one: `ca issue` does not store it.
    pub key_file: Option<PathBuf>,
}

impl Store {
    /// In this folder, which is created when it is needed.
    pub fn at(directory: &Path) -> Self {
        // Programs that run in other folders use its path.
        let absolute = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        Self { directory: absolute, known: Arc::default(), best_effort: false, _temporary: None }
    }

    /// In `$XDG_STATE_HOME/truename`, or else in `$HOME/.local/state/truename`; `None` if neither variable is set.
    pub fn of_user() -> Option<Self> {
        let absolute =
            |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let state = absolute("XDG_STATE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
        Some(Self::at(&state.join("truename")))
    }

    /// In a private folder in the system's temporary folder, for use if no other one is writable. It is
    /// removed with the last clone of this.
    pub fn temporary() -> Result<Self, StoreError> {
        let folder = PrivateFolder::create()
            .map_err(|source| StoreError::Write { path: env::temp_dir(), source })?;
        let mut store = Self::at(folder.path());
        store._temporary = Some(Arc::new(folder));
        Ok(store)
    }

    /// Serves aliases whose authorities cannot be written beside those that are in the folder: such an authority
    /// is kept in memory, and written as soon as that is possible.
    pub fn best_effort(mut self) -> Self {
        self.best_effort = true;
        self
    }

    /// Whether [`best_effort`](Self::best_effort) was called.
    pub fn is_best_effort(&self) -> bool {
        self.best_effort
    }

    /// The folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file of all roots: what applications trust.
    pub fn roots_file(&self) -> PathBuf {
        self.directory.join(ROOTS)
    }

    /// The file of all roots and the public ones.
    pub fn bundle(&self) -> PathBuf {
        self.directory.join(BUNDLE)
    }

    /// The same for Java.
    pub fn truststore(&self) -> PathBuf {
        self.directory.join(TRUSTSTORE)
    }

    /// All authorities in the folder; none if it does not exist.
    pub fn find(&self) -> Result<Vec<Found>, StoreError> {
        self.check_safety()?;
        let listing = self.list(&mut self.known.lock())?;
        let found = listing.roots.iter().map(|(stem, root)| {
            let key_file = listing.keys.contains(stem).then(|| self.key_file(stem));
            Found {
                root: root.clone(),
                alias: stem.alias.clone(),
                root_file: self.root_file(stem),
                key_file,
            }
        });
        Ok(found.collect())
    }

    /// The roots that applications should trust.
    pub fn roots(&self) -> Result<Vec<CertificateDer<'static>>, StoreError> {
        Ok(self.find()?.into_iter().map(|found| found.root.der().clone()).collect())
    }

    /// Adds the root of a certificate for another server.
    pub fn add_issued(&self, alias: &str, issued: &Issued) -> Result<(), StoreError> {
        self.make_folder()?;
        self.check_safety()?;
        let stem = Stem::new(alias, &issued.root);
        write(&self.root_file(&stem), 0o644, pem(issued.root.der()).as_bytes())?;
        self.publish(&mut self.known.lock(), None)
    }

    /// Removes all authorities of an alias, including those of running proxies. Returns how many there were.
    pub fn remove(&self, alias: &str) -> Result<usize, StoreError> {
        self.check_safety()?;
        let mut known = self.known.lock();
        // Without a limit on their number.
        let listing = listing::list(&self.directory, &mut known)?;
        let stems: Vec<Stem> = listing.of_alias(alias).collect();
        for stem in &stems {
            self.remove_one(stem)?;
        }
        if !stems.is_empty() {
            self.publish(&mut known, None)?;
        }
        Ok(stems.len())
    }

    fn root_file(&self, stem: &Stem) -> PathBuf {
        self.directory.join(stem.root_file())
    }

    fn key_file(&self, stem: &Stem) -> PathBuf {
        self.directory.join(stem.key_file())
    }

    fn list(&self, known: &mut Known) -> Result<Listing, StoreError> {
        let listing = listing::list(&self.directory, known)?;
        let roots = listing.roots.len();
        if roots > listing::MOST_ROOTS {
            return Err(StoreError::TooMany { directory: self.directory.clone(), roots });
        }
        Ok(listing)
    }

    fn unreadable(&self, source: io::Error) -> StoreError {
        StoreError::Read { path: self.directory.clone(), source }
    }

    fn unwritable(&self, source: io::Error) -> StoreError {
        StoreError::Write { path: self.directory.clone(), source }
    }
}

impl StoreError {
    /// Whether something that exists cannot be read just now.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Read { source, .. } if may_pass(source))
    }
}

impl Known {
    /// Whether this has not been logged yet.
    fn is_news(&mut self, what: String) -> bool {
        self.logged.insert(what)
    }

    /// The same for a file, with a limit on the number of files.
    fn is_news_of_file(&mut self, directory: &Path, file: String) -> bool {
        if self.logged.len() < MAX_LOGGED_FILES {
            return self.logged.insert(file);
        }
        let is_more = !self.logged.contains(&file) && self.logged.insert("more files".to_owned());
        if is_more {
            tracing::warn!(directory = %directory.display(), "more files there cannot be used");
        }
        false
    }
}

/// Whether an error in reading a file says nothing about the file: it may exist and be good.
fn may_pass(error: &io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw).is_some_and(|errno| {
        !matches!(
            errno,
            Errno::ENOENT
                | Errno::ENOTDIR
                | Errno::EISDIR
                | Errno::EACCES
                | Errno::EPERM
                | Errno::ELOOP
                | Errno::ENAMETOOLONG
                | Errno::ENXIO
                | Errno::ENODEV
        )
    })
}

fn way_to_read(error: &io::Error) -> &'static str {
    if is_out_of_files(error) {
        return OPEN_FILES;
    }
    if may_pass(error) {
        return "applications may trust an authority there, so no other is created: check the volume, or delete \
                the file if it is lost";
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "let truename read it, or set `ca.directory` to another folder"
        }
        _ => "set `ca.directory` to another folder",
    }
}

fn way_to_write(error: &io::Error) -> &'static str {
    if is_out_of_files(error) {
        return OPEN_FILES;
    }
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space there, or set `ca.directory` to another folder"
        }
        _ => "set `ca.directory` to a writable folder",
    }
}

fn is_out_of_files(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

fn current_time() -> Seconds {
    now()
}
