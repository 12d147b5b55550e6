//! A folder that nobody else can read, gone when the demo is.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// A private temporary folder, removed with all it holds when dropped.
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
}

impl PrivateFolder {
    /// Makes one in the system's temporary folder.
    pub fn create() -> io::Result<Self> {
        let name = format!("truename-demo-{:016x}", fastrand::u64(..));
        let path = std::env::temp_dir().join(name);
        // Not recursive, so that a folder (or a link) that somebody put there first is an error.
        DirBuilder::new().mode(0o700).create(&path).map_err(|error| at(&path, &error))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a new file into it, and says where that is.
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
        // What cannot be removed is left to the system, which empties its temporary folder.
        let _ = fs::remove_dir_all(&self.path);
    }
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
}
