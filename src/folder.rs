//! Private temporary folders: no other user can read them, and they are removed at the end of the process.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg, OFlag},
    unistd::geteuid,
};
use parking_lot::Mutex;

/// The prefix of all names.
const PREFIX: &str = "truename-private-";

/// A younger folder may not be locked yet.
const MIN_AGE: Duration = Duration::from_secs(60);

/// How often removal is tried. It fails while another thread still writes into the folder.
const TRIES: usize = 3;

/// The folders of this process; `None` once it ends, so that no thread creates another one after the removal.
static FOLDERS: Folders = Folders(Mutex::new(Some(Vec::new())));

struct Folders(Mutex<Option<Vec<PathBuf>>>);

/// A private temporary folder, removed with its contents when dropped, or by [`remove_all`].
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
    /// Shows other processes that this process is alive.
    _lock: Option<Flock<File>>,
}

impl PrivateFolder {
    /// Creates one in the system's temporary folder, and removes those of processes that were killed.
    pub fn create() -> io::Result<Self> {
        let parent = parent();
        remove_stale(&parent);
        let path = FOLDERS.create(&parent)?;
        // Not every file system has locks. Without one, no other process will remove it.
        Ok(Self { _lock: lock(&path), path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a new file into it, and returns its path.
    pub fn write(&self, name: &str, contents: &str) -> io::Result<PathBuf> {
        let path = self.path.join(name);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(contents.as_bytes()))
            .map_err(|error| at(&path, &error))?;
        Ok(path)
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        remove(&self.path);
        if let Some(folders) = FOLDERS.0.lock().as_mut() {
            folders.retain(|path| *path != self.path);
        }
    }
}

/// Removes all folders of this process, which is about to end. No more are created.
pub fn remove_all() {
    FOLDERS.remove_all();
}

/// Whether [`remove_all`] was called. Removed folders must not be created again.
pub fn is_ending() -> bool {
    FOLDERS.0.lock().is_none()
}

impl Folders {
    fn create(&self, parent: &Path) -> io::Result<PathBuf> {
        let mut folders = self.0.lock();
        let Some(folders) = folders.as_mut() else {
            return Err(ending());
        };
        let path = parent.join(format!("{PREFIX}{:016x}", fastrand::u64(..)));
        make(&path)?;
        folders.push(path.clone());
        Ok(path)
    }

    fn remove_all(&self) {
        for path in self.0.lock().take().unwrap_or_default() {
            remove(&path);
        }
    }
}

/// The system's temporary folder. An empty TMPDIR is ignored, because it would mean the working directory.
fn parent() -> PathBuf {
    let parent = env::temp_dir();
    if parent.as_os_str().is_empty() { PathBuf::from("/tmp") } else { parent }
}

fn ending() -> io::Error {
    io::Error::other("this process is ending")
}

fn make(path: &Path) -> io::Result<()> {
    // Not recursive, so that a folder (or a link) that already exists is an error.
    DirBuilder::new().mode(0o700).create(path).map_err(|error| at(path, &error))
}

/// If this fails, the system removes the folder when it cleans up its temporary folder.
fn remove(path: &Path) {
    // Renamed first, so that a thread that is still writing into it does not find it.
    let mut removed = path.as_os_str().to_owned();
    removed.push("-removed");
    let path = match fs::rename(path, &removed) {
        Ok(()) => Path::new(&removed),
        Err(_) => path,
    };
    for _ in 0..TRIES {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            _ => return,
        }
    }
}

/// Removes this user's folders whose processes have ended.
fn remove_stale(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        if is_ours && is_old_and_private(&entry) && lock(&entry.path()).is_some() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn is_old_and_private(entry: &fs::DirEntry) -> bool {
    let Ok(folder) = entry.metadata() else { return false };
    let age = folder.modified().ok().and_then(|modified| modified.elapsed().ok());
    folder.is_dir()
        && folder.uid() == geteuid().as_raw()
        && folder.mode() & 0o077 == 0
        && age.is_some_and(|age| age > MIN_AGE)
}

/// Locks a folder; `None` if another process has locked it.
fn lock(path: &Path) -> Option<Flock<File>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let folder = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).ok()?;
    Flock::lock(folder, FlockArg::LockExclusiveNonblock).ok()
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_private_folder_is_private_and_goes() {
        let folder = PrivateFolder::create().unwrap();
        let path = folder.path().to_owned();
        let file = folder.write("root.pem", "a root").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&file)), (0o700, 0o600));
        assert_eq!(fs::read_to_string(file).unwrap(), "a root");

        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_that_is_being_written_into_is_removed_and_no_other_is_made() {
        let parent = tempfile::tempdir().unwrap();
        for _ in 0..50 {
            let folders = Folders(Mutex::new(Some(Vec::new())));
            let path = folders.create(parent.path()).unwrap();
            std::thread::scope(|scope| {
                for writer in 0..2 {
                    let path = &path;
                    scope.spawn(move || {
                        for number in 0.. {
                            if fs::write(path.join(format!("{writer}-{number}")), "a key").is_err()
                            {
                                return;
                            }
                        }
                    });
                }
                while fs::read_dir(&path).unwrap().count() < 10 {}
                folders.remove_all();
            });
            assert!(folders.create(parent.path()).is_err());
            assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn folders_of_processes_that_are_gone_are_removed_and_no_others() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, mode, age: u64| {
            let path = parent.path().join(name);
            DirBuilder::new().mode(mode).create(&path).unwrap();
            fs::write(path.join("key"), "a key").unwrap();
            let then = std::time::SystemTime::now() - Duration::from_secs(age);
            File::open(&path).unwrap().set_modified(then).unwrap();
            path
        };
        let stale = make("truename-private-1", 0o700, 3600);
        let kept = [
            make("truename-private-2", 0o700, 1),
            make("truename-private-3", 0o755, 3600),
            make("something-else", 0o700, 3600),
            make("truename-private-4", 0o700, 3600),
        ];
        let _alive = lock(&kept[3]).unwrap();
        remove_stale(parent.path());
        assert!(!stale.exists());
        for path in kept {
            assert!(path.join("key").exists(), "{}", path.display());
        }
    }
}
