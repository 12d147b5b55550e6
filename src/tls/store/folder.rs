//! Files in a folder that other processes may use at the same time, or attack.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
    time::{Duration, SystemTime},
};

use aws_lc_rs::rand;
use nix::{
    fcntl::OFlag,
    sys::statvfs::{FsFlags, statvfs},
    unistd::geteuid,
};

use super::{Store, StoreError};
use crate::{
    files::{reading, writing},
    folder::is_ending,
};

/// The prefix of files that are not complete yet.
pub(super) const BESIDE: &str = ".beside-";

const PRIVATE: u32 = 0o700;
/// The mode of a folder in a parent that everybody can write to, such as a Kubernetes emptyDir.
const SHARED: u32 = 0o755;
const OTHERS_WRITE: u32 = 0o022;
const ALL_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// The coarsest timestamps of file systems.
const COARSE: Duration = Duration::from_secs(2);

impl Store {
    /// Creates the folder if it does not exist.
    pub(super) fn make_folder(&self) -> Result<(), StoreError> {
        let _reading = reading(&self.directory);
        if self.directory.is_dir() {
            return Ok(());
        }
        // A private folder has been removed because the process is ending: nothing would remove a new one.
        if is_ending() {
            return Err(self.unwritable(io::Error::other("this process is ending")));
        }
        let made = (|| {
            let parent = self.directory.parent().unwrap_or(Path::new("/"));
            fs::DirBuilder::new().recursive(true).mode(PRIVATE).create(parent)?;
            make_private(&self.directory)?;
            let mode = fs::metadata(parent)?.mode();
            if mode & ALL_WRITE != 0 && mode & STICKY == 0 {
                // Such a parent is shared so that others can read from it. The keys have their own mode.
                fs::set_permissions(&self.directory, fs::Permissions::from_mode(SHARED))?;
            }
            Ok(())
        })();
        match made {
            Err(error) if !self.directory.is_dir() => Err(self.unwritable(error)),
            _ => Ok(()),
        }
    }

    /// Fails if anybody but this user and root can write to the folder.
    pub fn check_safety(&self) -> Result<(), StoreError> {
        let _reading = reading(&self.directory);
        let metadata = match fs::metadata(&self.directory) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.unreadable(error)),
        };
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        let why = if owner != 0 && owner != geteuid().as_raw() {
            format!("belongs to user {owner}")
        } else if mode & OTHERS_WRITE != 0 && !is_read_only(&self.directory) {
            format!("can be written by other users (its mode is {mode:04o})")
        } else {
            return Ok(());
        };
        Err(StoreError::Unsafe { directory: self.directory.clone(), why })
    }
}

/// Metadata that changes with a folder's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    parts: Vec<Option<Part>>,
    /// Whether a later change would be visible.
    settled: bool,
}

impl Stamp {
    /// The stamp of a folder and some of its files.
    pub(super) fn of(directory: &Path, files: &[&str]) -> Self {
        let _reading = reading(directory);
        let paths = std::iter::once(directory.to_owned());
        let paths = paths.chain(files.iter().map(|file| directory.join(file)));
        let parts: Vec<_> = paths
            .map(|path| {
                let metadata = fs::metadata(path).ok()?;
                let modified = metadata.modified().ok()?;
                let (device, inode, mode) = (metadata.dev(), metadata.ino(), metadata.mode());
                Some((device, inode, metadata.len(), modified, mode))
            })
            .collect();
        let newest = parts.iter().flatten().map(|(_, _, _, modified, _)| *modified).max();
        let age = newest.and_then(|newest| SystemTime::now().duration_since(newest).ok());
        Self { parts, settled: age.is_some_and(|age| age > COARSE) }
    }

    /// Whether nothing can have changed between this and `later`.
    pub(super) fn holds(&self, later: &Self) -> bool {
        self.settled && self.parts == later.parts
    }
}

/// For one file: device, inode, length, time and mode.
type Part = (u64, u64, u64, SystemTime, u32);

/// Creates a new folder with access for this user only.
pub(super) fn make_private(directory: &Path) -> io::Result<()> {
    // Not recursive, so that an existing folder is an error.
    fs::DirBuilder::new().mode(PRIVATE).create(directory)
}

/// On a read-only mount, such as a Secret's, nobody can write, whatever the mode.
fn is_read_only(directory: &Path) -> bool {
    statvfs(directory).is_ok_and(|status| status.flags().contains(FsFlags::ST_RDONLY))
}

/// Reads a file of at most this size. Does not wait: anything but a regular file, such as a pipe, is an error.
pub(super) fn read_file(path: &Path, largest: u64) -> io::Result<Vec<u8>> {
    let _reading = reading(path);
    let flags = OFlag::O_NONBLOCK.bits();
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut contents = Vec::new();
    file.take(largest + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > largest {
        let what = format!("it is larger than {} KiB", largest / 1024);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, what));
    }
    Ok(contents)
}

/// Writes a temporary file and renames it, so that no reader sees half a file, and a full disk leaves the
/// old one in place.
pub fn write(path: &Path, mode: u32, contents: &[u8]) -> Result<(), StoreError> {
    write_with(path, mode, true, |file| file.write_all(contents))
}

/// The same without syncing to disk: a file that is damaged by a power failure is detected and ignored.
pub(super) fn write_soon(path: &Path, mode: u32, contents: &[u8]) -> Result<(), StoreError> {
    write_with(path, mode, false, |file| file.write_all(contents))
}

fn write_with(
    path: &Path,
    mode: u32,
    sync: bool,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), StoreError> {
    let _writing = writing(path);
    let unwritten = |source| StoreError::Write { path: path.to_owned(), source };
    let beside = path.with_file_name(format!("{BESIDE}{}", random_name().map_err(unwritten)?));
    let written = (|| {
        let mut file = create_new(&beside, mode)?;
        fill(&mut file)?;
        if sync {
            file.sync_all()?;
        }
        fs::rename(&beside, path)
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&beside);
        unwritten(source)
    })
}

/// Writes a file that must not exist yet.
pub fn write_new(path: &Path, mode: u32, contents: &[u8]) -> io::Result<()> {
    let mut file = create_new(path, mode)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

fn create_new(path: &Path, mode: u32) -> io::Result<File> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // Regardless of the umask: public files must be readable for other users' applications.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(file)
}

/// A unique name: processes that start at the same time must not choose the same one.
pub(super) fn random_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
