//! Follows changes of files that a configuration or an environment variable names, by polling.

use std::{
    ffi::OsString,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::file::{FileError, read_within, regular};
use crate::files::reading;

/// How many times in a row a file must be found unchanged before its metadata is trusted: two writes within a tick of
/// the file system's clock have the same timestamp.
const SETTLED: u32 = 5;

/// A file is read anyway each time after this many looks: not every file system keeps timestamps.
const READ_ANYWAY: u32 = 30;

/// Files that are followed.
#[derive(Clone, Debug)]
pub struct Followed {
    files: Vec<FollowedFile>,
    /// Larger files are not usable.
    limit: usize,
}

/// The contents of the files at one look, for comparison with another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents(Vec<Option<u64>>);

#[derive(Clone, Debug)]
struct FollowedFile {
    path: PathBuf,
    stamp: Option<Stamp>,
    /// The hash of its contents; `None` if it cannot be read or is too large.
    hash: Option<u64>,
    /// How many looks in a row have found it unchanged.
    looks: u32,
}

/// A file's metadata: it changes with the contents.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    /// Device and inode: a ConfigMap or a Secret changes by a swap of links, whose targets may have the same timestamp.
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    is_folder: bool,
}

impl Followed {
    /// Follows these files; those larger than `limit` are not usable. For a folder, the files in it are followed.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>, limit: usize) -> Self {
        let file = |path| FollowedFile { path, stamp: None, hash: None, looks: 0 };
        Self { files: paths.into_iter().map(file).collect(), limit }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Looks at the files. Reads those whose metadata has changed recently. Blocking.
    pub fn look(&mut self) -> Contents {
        Contents(self.files.iter_mut().map(|file| file.look(self.limit)).collect())
    }
}

impl Contents {
    /// Whether each file could be read.
    pub fn are_complete(&self) -> bool {
        self.0.iter().all(Option::is_some)
    }
}

impl FollowedFile {
    fn look(&mut self, limit: usize) -> Option<u64> {
        let _reading = reading(&self.path);
        let (stamp, hash) = match open(&self.path) {
            Ok((_, stamp)) if self.is_known(&stamp) => (Some(stamp), self.hash),
            Ok((_, stamp)) if stamp.is_folder => (Some(stamp), hash_folder(&self.path, limit)),
            Ok((file, stamp)) => (Some(stamp), read_within(file, limit).ok().map(hash)),
            Err(_) => (None, None),
        };
        let is_same = (&stamp, hash) == (&self.stamp, self.hash);
        self.looks = if is_same { self.looks.saturating_add(1) } else { 0 };
        (self.stamp, self.hash) = (stamp, hash);
        hash
    }

    fn is_known(&self, stamp: &Stamp) -> bool {
        let is_settled = self.looks >= SETTLED && !self.looks.is_multiple_of(READ_ANYWAY);
        is_settled && self.hash.is_some() && self.stamp.as_ref() == Some(stamp)
    }
}

/// Opens the file before its metadata is read: this makes a network file system refresh the metadata.
fn open(path: &Path) -> Result<(File, Stamp), FileError> {
    if !fs::metadata(path)?.is_dir() {
        regular(path)?;
    }
    let file = File::open(path)?;
    let stamp = Stamp::of(&file)?;
    Ok((file, stamp))
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let it = file.metadata()?;
        Ok(Self {
            file: (it.dev(), it.ino()),
            size: it.size(),
            modified: (it.mtime(), it.mtime_nsec()),
            changed: (it.ctime(), it.ctime_nsec()),
            is_folder: it.is_dir(),
        })
    }
}

fn hash(contents: Vec<u8>) -> u64 {
    let mut hasher = DefaultHasher::new();
    contents.hash(&mut hasher);
    hasher.finish()
}

/// The hash of the files in a folder and their names. A change within a file does not change the folder's metadata.
fn hash_folder(path: &Path, limit: usize) -> Option<u64> {
    let entries = fs::read_dir(path).ok()?;
    let names: io::Result<Vec<OsString>> =
        entries.map(|entry| entry.map(|entry| entry.file_name())).collect();
    let mut names = names.ok()?;
    names.sort_unstable();
    let mut hasher = DefaultHasher::new();
    for name in names {
        let file = path.join(&name);
        if regular(&file).is_ok() {
            let contents = File::open(file).ok().and_then(|file| read_within(file, limit).ok());
            (name, contents).hash(&mut hasher);
        }
    }
    Some(hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, time::SystemTime};

    use super::*;

    /// A file that has been looked at until its metadata is trusted, and its contents.
    fn settled(path: &Path) -> (Followed, Contents) {
        let mut followed = Followed::new([path.to_owned()], 1024);
        let contents = followed.look();
        for _ in 0..SETTLED {
            assert_eq!(followed.look(), contents);
        }
        (followed, contents)
    }

    /// Regression: many aliases with the same large revocation list read it over and over.
    #[test]
    fn a_file_that_stays_is_not_read_but_every_so_often() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "old").unwrap();
        let (mut followed, old) = settled(&path);
        // Simulates changed contents on a file system without timestamps.
        followed.files[0].hash = Some(1);
        let looks: Vec<_> = (0..READ_ANYWAY).map(|_| followed.look()).collect();
        let not_read = Contents(vec![Some(1)]);
        let read = looks.iter().position(|look| *look != not_read).unwrap();
        assert!(read > 20, "read at look {read}");
        assert_eq!(looks[read], old);
    }

    #[test]
    fn other_contents_show_at_the_next_look() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let written = |contents: &str, time: SystemTime| {
            let new = folder.path().join("new");
            fs::write(&new, contents).unwrap();
            File::options().write(true).open(&new).unwrap().set_modified(time).unwrap();
            new
        };
        let time = SystemTime::UNIX_EPOCH;
        fs::rename(written("one", time), &path).unwrap();

        // Written in place, with its timestamp set back.
        let (mut followed, before) = settled(&path);
        fs::write(&path, "two").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_ne!(followed.look(), before);
        // Replaced by another file with the same timestamp and size.
        let (mut followed, before) = settled(&path);
        fs::rename(written("six", time), &path).unwrap();
        assert_ne!(followed.look(), before);
        // A link to another one.
        let (mut followed, before) = settled(&path);
        let target = folder.path().join("target");
        fs::rename(written("ten", time), &target).unwrap();
        fs::remove_file(&path).unwrap();
        symlink(&target, &path).unwrap();
        assert_ne!(followed.look(), before);
        // A new file in a folder that is followed.
        let (mut followed, before) = settled(folder.path());
        fs::write(folder.path().join("beside"), "beside").unwrap();
        assert_ne!(followed.look(), before);
        // Removed, and then the same as before.
        let (mut followed, before) = settled(&path);
        fs::remove_file(&path).unwrap();
        assert!(!followed.look().are_complete());
        symlink(&target, &path).unwrap();
        assert_eq!(followed.look(), before);
    }
}
