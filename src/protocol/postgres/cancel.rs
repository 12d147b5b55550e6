//! The keys by which a client has its query cancelled, on a connection of its own.

use std::{
    fmt,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use foldhash::HashMap;
use parking_lot::Mutex;

use super::packet::cancel_request;

/// Process id and secret. Protocol 3.0 has secrets of 4 bytes, servers of 3.2 send 32.
const LENGTHS: RangeInclusive<usize> = 4 + 4..=4 + 256;

/// What a server knows a session by: its process id and a secret.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CancelKey(Box<[u8]>);

impl CancelKey {
    /// From a BackendKeyData or a CancelRequest, as the body has it.
    pub(super) fn new(body: &[u8]) -> Option<Self> {
        LENGTHS.contains(&body.len()).then(|| Self(body.into()))
    }

    /// The packet that has the session's query cancelled.
    pub fn request(&self) -> Bytes {
        cancel_request(&self.0)
    }
}

/// Whoever knows a key may cancel queries: it is not printed.
impl fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CancelKey(..)")
    }
}

/// Who holds the session of each key.
#[derive(Debug)]
pub struct CancelKeys<T> {
    max: usize,
    next: AtomicU64,
    held: Mutex<HashMap<CancelKey, Entry<T>>>,
}

#[derive(Debug)]
struct Entry<T> {
    /// Which of the sessions that have had this key.
    number: u64,
    holder: T,
}

/// Keeps a session's key for as long as it lives.
#[derive(Debug)]
pub struct HeldKey<T> {
    keys: Arc<CancelKeys<T>>,
    key: CancelKey,
    number: u64,
}

impl<T: Clone> CancelKeys<T> {
    /// Room for the keys of so many sessions.
    pub fn new(max: usize) -> Self {
        Self { max, next: AtomicU64::new(0), held: Mutex::default() }
    }

    /// Notes that `holder` has the session with this key; `None` where there is no room.
    ///
    /// Two servers may give out the same key. Then it is the newer session's.
    pub fn hold(self: &Arc<Self>, key: CancelKey, holder: T) -> Option<HeldKey<T>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut held = self.held.lock();
        if held.len() >= self.max && !held.contains_key(&key) {
            return None;
        }
        held.insert(key.clone(), Entry { number, holder });
        Some(HeldKey { keys: self.clone(), key, number })
    }

    /// Who has the session with this key.
    pub fn holder(&self, key: &CancelKey) -> Option<T> {
        self.held.lock().get(key).map(|entry| entry.holder.clone())
    }

    /// How many sessions are known.
    pub fn len(&self) -> usize {
        self.held.lock().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> HeldKey<T> {
    /// The key.
    pub fn key(&self) -> &CancelKey {
        &self.key
    }
}

impl<T> Drop for HeldKey<T> {
    fn drop(&mut self) {
        let mut held = self.keys.held.lock();
        if held.get(&self.key).is_some_and(|entry| entry.number == self.number) {
            held.remove(&self.key);
            // Ten thousand sessions of yesterday leave no room behind.
            if held.len() * 4 < held.capacity() {
                held.shrink_to_fit();
            }
        }
    }
}
