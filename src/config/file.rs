//! Reads configured files as a whole, up to a size limit.

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::FileTypeExt,
    path::Path,
};

use super::quantity::print_size;
use crate::files::reading;

/// Reads the regular file at `path`, which must not be larger than `limit` bytes.
pub fn read_file(path: &Path, limit: usize) -> Result<Vec<u8>, FileError> {
    let _reading = reading(path);
    regular(path)?;
    read_within(fs::File::open(path)?, limit)
}

/// The same for a file that may be a pipe, as in `SSL_CERT_FILE=<(…)`. Waits for its writer.
pub fn read_file_or_pipe(path: &Path, limit: usize) -> Result<Vec<u8>, FileError> {
    let _reading = reading(path);
    refuse_devices(path)?;
    read_within(fs::File::open(path)?, limit)
}

/// Refuses anything but a regular file, without opening it: opening a pipe waits for its writer.
pub(super) fn regular(path: &Path) -> Result<(), FileError> {
    match refuse_devices(path)? {
        true => Err(FileError::Kind("a pipe")),
        false => Ok(()),
    }
}

/// Refuses anything but regular files and pipes. Returns whether it is a pipe.
pub(super) fn refuse_devices(path: &Path) -> Result<bool, FileError> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() || kind.is_fifo() {
        return Ok(kind.is_fifo());
    }
    Err(FileError::Kind(match kind {
        _ if kind.is_dir() => "a directory",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    }))
}

/// Reads to the end, but no more than `limit` bytes.
pub(super) fn read_within(reader: impl Read, limit: usize) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    reader.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(FileError::TooLarge(limit));
    }
    Ok(bytes)
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It does not exist, or may not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is a directory, a pipe or a device.
    #[error("it is {0}, not a regular file")]
    Kind(&'static str),
    /// It is a configuration in another encoding.
    #[error("it is not UTF-8")]
    NotText,
    /// It is too large.
    #[error("it is larger than {}", print_size(*.0))]
    TooLarge(usize),
}

impl FileError {
    /// Whether it is a regular file that is too large.
    pub fn is_size(&self) -> bool {
        matches!(self, Self::TooLarge(_))
    }

    /// Whether nothing could be read, which can happen while a file is being replaced.
    pub fn is_io(&self) -> bool {
        matches!(self, Self::Io(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read_and_only_within_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, [7; 1024]).unwrap();
        assert_eq!(read_file(&file, 1024).unwrap().len(), 1024);
        let error = |path: &Path| read_file(path, 1023).unwrap_err().to_string();
        assert_eq!(error(&file), "it is larger than 1023B");
        assert_eq!(error(folder.path()), "it is a directory, not a regular file");
        assert_eq!(error(Path::new("/dev/zero")), "it is a device, not a regular file");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(error(&pipe), "it is a pipe, not a regular file");
        assert!(
            matches!(error(&folder.path().join("nowhere")), text if text.contains("os error 2"))
        );
    }
}
