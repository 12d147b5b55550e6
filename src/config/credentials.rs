//! The forward proxy's credentials. They have their own file, so that the configuration contains no secret.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use crate::files::reading;

/// The largest file that is read: enough for thousands of users.
const MAX_SIZE: u64 = 64 * 1024;

/// Reads a file with one `USER:PASSWORD` per line, and returns these lines. Empty lines and those that
/// begin with `#` are ignored.
pub fn read_credentials(path: &Path) -> Result<Vec<String>, CredentialsError> {
    let _reading = reading(path);
    // Opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(CredentialsError::NoFile);
    }
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(CredentialsError::TooLarge);
    }
    parse(&bytes)
}

/// Why a file provides no credentials. Messages never show its contents: they are secret, and a password
/// may be in the place of a user.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// It does not exist, or may not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is a folder, a pipe or a device.
    #[error("not a regular file")]
    NoFile,
    /// It is too large.
    #[error("more than 64KiB")]
    TooLarge,
    /// It has no credentials.
    #[error("it contains no `USER:PASSWORD` line")]
    Empty,
    /// A line is invalid.
    #[error("line {line} {what}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

fn parse(bytes: &[u8]) -> Result<Vec<String>, CredentialsError> {
    let mut credentials = Vec::new();
    // Some editors begin a file with a byte order mark.
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let wrong = |what| CredentialsError::Line { line: index + 1, what };
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line = std::str::from_utf8(line).map_err(|_| wrong("is not UTF-8"))?;
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        // RFC 7617 §2: the first colon ends the user.
        let (user, password) =
            line.split_once(':').ok_or_else(|| wrong("has no colon: write `USER:PASSWORD`"))?;
        if user.is_empty() {
            return Err(wrong("has no user: write `USER:PASSWORD`"));
        }
        if password.is_empty() {
            return Err(wrong("has no password: write `USER:PASSWORD`"));
        }
        if line.chars().any(char::is_control) {
            return Err(wrong("contains a control character, which no client can send"));
        }
        credentials.push(line.to_owned());
    }
    if credentials.is_empty() { Err(CredentialsError::Empty) } else { Ok(credentials) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_user_up_to_the_first_colon_and_the_rest_is_the_password() {
        let file = "# who may come in\n\nann:one\r\n  # later\nann:two:three \n \t\nb c:ü";
        assert_eq!(parse(file.as_bytes()).unwrap(), ["ann:one", "ann:two:three ", "b c:ü"]);
        let marked = "\u{feff}ann:one\r\n";
        assert_eq!(parse(marked.as_bytes()).unwrap(), ["ann:one"], "written by Windows' Notepad");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_without_its_contents() {
        for (file, expected) in [
            (&b"ann:one\n\nsecret\n"[..], "line 3 has no colon: write `USER:PASSWORD`"),
            (b":secret", "line 1 has no user: write `USER:PASSWORD`"),
            (b"#\nann:", "line 2 has no password: write `USER:PASSWORD`"),
            (b"ann:one\nann:s\xff", "line 2 is not UTF-8"),
            (b"ann:se\tcret", "line 1 contains a control character, which no client can send"),
            (b"# nobody\n\n", "it contains no `USER:PASSWORD` line"),
            (b"", "it contains no `USER:PASSWORD` line"),
        ] {
            assert_eq!(parse(file).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn a_file_beyond_all_measure_and_what_is_no_file_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("credentials");
        fs::write(&file, "ann:one\n".repeat(8 * 1024)).unwrap();
        assert_eq!(read_credentials(&file).unwrap().len(), 8 * 1024);
        fs::write(&file, "ann:one\n".repeat(8 * 1024) + "#").unwrap();
        assert!(matches!(read_credentials(&file), Err(CredentialsError::TooLarge)));
        assert!(matches!(read_credentials(folder.path()), Err(CredentialsError::NoFile)));
        let nowhere = read_credentials(&folder.path().join("nowhere"));
        assert!(matches!(nowhere, Err(CredentialsError::Io(_))));
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(read_credentials(&pipe), Err(CredentialsError::NoFile)));
    }
}
