//! PEM files.

use std::path::Path;

use memchr::{memmem, memrchr2};
use rustls::pki_types::{
    CertificateDer,
    pem::{self, PemObject},
};

use super::{TlsConfigError, TlsFault};
use crate::config::read_file;

/// The largest file of certificates that is read: a hundred times the size of the public roots.
pub(super) const MAX_CERTIFICATES: usize = 16 << 20;

/// The one of UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The beginning of a PEM block, at the beginning of a line.
const BEGIN: &[u8] = b"-----BEGIN ";

/// The certificates of a PEM file; at least one.
pub(super) fn certificates(
    path: &Path,
    key: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let text = read(path, key)?;
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|error| {
            TlsConfigError::of(key, path, |path| TlsFault::Pem { path, detail: pem_error(&error) })
        })?;
    if certificates.is_empty() {
        return Err(TlsConfigError::of(key, path, |path| TlsFault::NoCertificate { path }));
    }
    Ok(certificates)
}

/// Why a file is not valid PEM, for messages.
pub(super) fn pem_error(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } => {
            "its last block has no `-----END` line: the file is truncated".to_owned()
        }
        pem::Error::NoItemsFound => "it contains no such PEM block".to_owned(),
        error => error.to_string(),
    }
}

pub(super) fn read(path: &Path, key: &'static str) -> Result<Vec<u8>, TlsConfigError> {
    read_up_to(MAX_CERTIFICATES, path, key)
}

pub(super) fn read_up_to(
    limit: usize,
    path: &Path,
    key: &'static str,
) -> Result<Vec<u8>, TlsConfigError> {
    let contents = read_file(path, limit)
        .map_err(|source| TlsConfigError::of(key, path, |path| TlsFault::Read { path, source }))?;
    Ok(on_lines_of_their_own(contents))
}

/// Puts each PEM block on its own line. The parser ignores blocks that begin within a line: after a byte order mark,
/// which Windows editors add, or where files were joined and the first had no newline at its end.
pub(super) fn on_lines_of_their_own(contents: Vec<u8>) -> Vec<u8> {
    let is_hidden = |begin: &usize| {
        let before = &contents[..*begin];
        let line = memrchr2(b'\n', b'\r', before).map_or(before, |end| &before[end + 1..]);
        line.ends_with(BYTE_ORDER_MARK) || line.trim_ascii_end().ends_with(b"-----")
    };
    let hidden: Vec<_> = memmem::find_iter(&contents, BEGIN).filter(is_hidden).collect();
    if hidden.is_empty() {
        return contents;
    }
    let mut lines = Vec::with_capacity(contents.len() + hidden.len());
    let mut done = 0;
    for begin in hidden {
        lines.extend_from_slice(&contents[done..begin]);
        lines.push(b'\n');
        done = begin;
    }
    lines.extend_from_slice(&contents[done..]);
    lines
}
