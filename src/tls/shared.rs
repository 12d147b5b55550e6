//! Shares values that were built from the same bytes, for as long as they are used.
//!
//! Each alias follows its own files, but many aliases use the same ones. The roots of a machine take hundreds
//! of kilobytes, and a revocation list several times the size of its file.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustls::{SupportedCipherSuite, crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256};

/// The values in use, by the SHA-256 of their source.
pub(super) struct Shared<T>(Mutex<Vec<(Digest, Weak<T>)>>);

/// A SHA-256 hash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Digest(Vec<u8>);

impl<T> Shared<T> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// The value for `digest`. It is built if it is not in use, and only once if it is requested several times at once.
    pub(super) fn find_or_make<E>(
        &self,
        digest: Digest,
        make: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let mut known = self.0.lock();
        known.retain(|(_, value)| value.strong_count() > 0);
        let found = known.iter().find(|(known, _)| *known == digest);
        if let Some(value) = found.and_then(|(_, value)| value.upgrade()) {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        known.push((digest, Arc::downgrade(&value)));
        Ok(value)
    }
}

impl Digest {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(sha256(bytes))
    }

    /// The digest of several digests in this order.
    pub(super) fn of_all<'a>(parts: impl IntoIterator<Item = &'a Self>) -> Self {
        let bytes: Vec<u8> = parts.into_iter().flat_map(|part| part.0.iter().copied()).collect();
        Self::of(&bytes)
    }
}

/// From the TLS provider, to avoid a second implementation.
pub(super) fn sha256(data: &[u8]) -> Vec<u8> {
    let hash = match TLS13_AES_128_GCM_SHA256 {
        SupportedCipherSuite::Tls13(suite) => suite.common.hash_provider,
        SupportedCipherSuite::Tls12(suite) => suite.common.hash_provider,
    };
    hash.hash(data).as_ref().to_vec()
}
