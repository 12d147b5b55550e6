//! Reads files on separate threads and with a deadline, because volumes may hang (NFS, FUSE):
//! signals, DNS and probes must not wait for them.
//!
//! A read that hangs cannot be cancelled. Its thread is abandoned and ends with the process.
//!
//! [`Settling`] keeps files from being used while they are being written.

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

/// The time limit for reading a file. Longer than the usual delays of a network file system.
pub const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// The total time limit, if it is not known which file is being read.
const LIMIT: Duration = Duration::from_secs(60);

/// How often to check whether a file hangs.
const CHECK: Duration = Duration::from_millis(500);

/// The most threads that read at once, including the abandoned ones.
const MAX_THREADS: usize = 8;

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// The files that are being read or written, by which thread and since when.
static IN_USE: Mutex<Vec<Access>> = Mutex::new(Vec::new());

/// A thread's use of a file.
#[derive(Clone, Debug)]
struct Access {
    thread: ThreadId,
    since: Instant,
    file: PathBuf,
    /// What it does, in the passive: "read", "written".
    done: &'static str,
}

/// Files were not read or written in time.
#[derive(Debug, thiserror::Error)]
pub struct Stuck {
    /// The file that hangs, if it is known.
    hanging: Option<Access>,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = match &self.hanging {
            Some(access) => {
                write!(f, "`{}`", access.file.display())?;
                access.done
            }
            None => {
                f.write_str("the configuration's files")?;
                "read"
            }
        };
        write!(
            f,
            " could not be {done} within {READ_TIMEOUT:?}: the volume or pipe it is on does not respond"
        )
    }
}

/// Why the work has no result.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// A file hangs.
    #[error(transparent)]
    Stuck(#[from] Stuck),
    /// The thread could not be started, or it panicked.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
}

/// Runs work that reads files on a separate thread. Fails if one of the files hangs.
pub async fn work<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, WorkError> {
    let Some(slot) = Slot::take() else {
        return Err(Stuck { hanging: IN_USE.lock().first().cloned() }.into());
    };
    let (done, mut result) = oneshot::channel();
    let thread = thread::Builder::new().name("files".into()).spawn(move || {
        let _slot = slot;
        // The caller no longer waits if it took too long.
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
            return Err(Stuck { hanging: hangs }.into());
        }
    }
}

/// The file that `thread` has been reading or writing for too long.
fn hanging(thread: ThreadId) -> Option<Access> {
    let in_use = IN_USE.lock();
    let mut hanging = in_use.iter().filter(|access| access.since.elapsed() > READ_TIMEOUT);
    hanging.find(|access| access.thread == thread).cloned()
}

/// Registers the file that is being read, until the value is dropped.
pub fn reading(file: &Path) -> InUse {
    InUse::new(file, "read")
}

/// Registers the file that is being written, until the value is dropped.
pub fn writing(file: &Path) -> InUse {
    InUse::new(file, "written")
}

/// See [`reading`] and [`writing`].
#[must_use]
pub struct InUse {
    thread: ThreadId,
}

impl InUse {
    fn new(file: &Path, done: &'static str) -> Self {
        let thread = thread::current().id();
        IN_USE.lock().push(Access { thread, since: Instant::now(), file: file.to_owned(), done });
        Self { thread }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut in_use = IN_USE.lock();
        if let Some(index) = in_use.iter().rposition(|access| access.thread == self.thread) {
            in_use.remove(index);
        }
    }
}

/// The contents of files at each check. A change is accepted once two consecutive checks have found the same
/// contents, because a half-written file may be valid, too.
#[derive(Clone, Debug)]
pub struct Settling<T> {
    settled: T,
    /// Other contents, found by the last check.
    unsettled: Option<T>,
}

impl<T: PartialEq> Settling<T> {
    /// Starts with the contents that are in use.
    pub fn new(settled: T) -> Self {
        Self { settled, unsettled: None }
    }

    /// A check has found `now`. Returns whether this is a change that the previous check has found, too. It is a
    /// change until it is [taken](Self::take).
    pub fn has_changed(&mut self, now: T) -> bool {
        if now == self.settled {
            self.unsettled = None;
            return false;
        }
        let same = self.unsettled.as_ref() == Some(&now);
        self.unsettled = Some(now);
        same
    }

    /// Whether another check should follow soon.
    pub fn is_unsettled(&self) -> bool {
        self.unsettled.is_some()
    }

    /// Accepts the change.
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
