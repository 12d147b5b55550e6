//! Files on volumes that may hang (NFS, FUSE): read on threads of their own, under a deadline, so that
//! neither signals nor DNS nor probes wait for them.
//!
//! A read that hangs cannot be called back. Its thread is left behind, and ends with the process.
//!
//! And files that change: what is still being written is not taken ([`Settling`]).

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, ThreadId},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

/// How long a file may take to be read. Longer than a network file system's usual hiccup.
pub const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// How long work may take in all, where nobody said which file it reads.
const LIMIT: Duration = Duration::from_secs(60);

/// How often it is asked whether a file hangs.
const CHECK: Duration = Duration::from_millis(500);

/// Threads that may be reading at once. As many as are left behind are no longer replaced.
const MAX_THREADS: usize = 8;

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// What is being read: by whom, since when.
static READING: Mutex<Vec<(ThreadId, Instant, PathBuf)>> = Mutex::new(Vec::new());

/// Files were not read in time.
#[derive(Debug, thiserror::Error)]
#[error(
    "{} could not be read within {READ_TIMEOUT:?}: the volume or pipe it is on does not respond",
    What(.file)
)]
pub struct Stuck {
    /// The one that hangs, as far as that is known.
    pub file: Option<PathBuf>,
}

struct What<'a>(&'a Option<PathBuf>);

impl fmt::Display for What<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(file) => write!(f, "`{}`", file.display()),
            None => f.write_str("the configuration's files"),
        }
    }
}

/// Why there is no result of some work.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// It reads a file that hangs.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// There was no thread for it, or it panicked.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
}

/// Does work that reads files on a thread of its own; gives up on it where one of them hangs.
pub async fn work<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, WorkError> {
    let Some(slot) = Slot::take() else {
        let file = READING.lock().first().map(|(_, _, file)| file.clone());
        return Err(Stuck { file }.into());
    };
    let (done, mut result) = oneshot::channel();
    let thread = thread::Builder::new().name("files".into()).spawn(move || {
        let _slot = slot;
        // Nobody waits any longer where it took too long.
        let _ = done.send(work());
    })?;
    let begun = Instant::now();
    loop {
        match timeout(CHECK, &mut result).await {
            Ok(Ok(result)) => return Ok(result),
            Ok(Err(_)) => {
                return Err(io::Error::other("a thread that reads files has panicked").into());
            }
            Err(_) => {}
        }
        let hangs = hanging(thread.thread().id());
        if hangs.is_some() || begun.elapsed() > LIMIT {
            return Err(Stuck { file: hangs }.into());
        }
    }
}

/// What `reader` has been reading for too long.
fn hanging(reader: ThreadId) -> Option<PathBuf> {
    let reading = READING.lock();
    let mut hanging = reading.iter().filter(|(_, since, _)| since.elapsed() > READ_TIMEOUT);
    hanging.find(|(other, ..)| *other == reader).map(|(_, _, file)| file.clone())
}

/// Says which file is being read, for as long as the value lives.
pub fn reading(file: &Path) -> Reading {
    let reader = thread::current().id();
    READING.lock().push((reader, Instant::now(), file.to_owned()));
    Reading { reader }
}

/// See [`reading`].
#[must_use]
pub struct Reading {
    reader: ThreadId,
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut reading = READING.lock();
        if let Some(index) = reading.iter().rposition(|(reader, ..)| *reader == self.reader) {
            reading.remove(index);
        }
    }
}

/// What files held when they were looked at. A change counts once two looks in a row have found the same:
/// half of a file that is being written may well be a whole one, too.
#[derive(Clone, Debug)]
pub struct Settling<T> {
    settled: T,
    /// Something else, at the last look.
    unsettled: Option<T>,
}

impl<T: PartialEq> Settling<T> {
    /// Of files that are in use as they were found.
    pub fn new(settled: T) -> Self {
        Self { settled, unsettled: None }
    }

    /// A look has found `now`: whether that is a change which the look before has found, too. It is one
    /// until it is [taken](Self::take).
    pub fn has_changed(&mut self, now: T) -> bool {
        if now == self.settled {
            self.unsettled = None;
            return false;
        }
        let same = self.unsettled.as_ref() == Some(&now);
        self.unsettled = Some(now);
        same
    }

    /// Whether another look should follow soon.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled.is_some()
    }

    /// What was found last is what counts from now on.
    pub fn take(&mut self) -> &T {
        if let Some(now) = self.unsettled.take() {
            self.settled = now;
        }
        &self.settled
    }
}

/// A thread's place among [`MAX_THREADS`].
struct Slot;

impl Slot {
    fn take() -> Option<Self> {
        let room = |taken| (taken < MAX_THREADS).then_some(taken + 1);
        THREADS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).ok().map(|_| Self)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_at_the_second_look_that_finds_it() {
        let mut files = Settling::new("old");
        assert!(!files.has_changed("old"));
        // It grows from look to look.
        for found in ["n", "ne", "new"] {
            assert!(!files.has_changed(found));
        }
        assert!(files.has_changed("new"));
        assert!(files.has_changed("new"), "it was not taken");
        assert_eq!(files.take(), &"new");
        assert!(!files.has_changed("new"));
        // It was there for a moment, and again.
        for found in ["half", "new", "half"] {
            assert!(!files.has_changed(found));
        }
        assert!(files.has_changed("half"));
    }
}
