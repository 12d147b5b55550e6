//! Deletes authorities that are no longer used.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use super::{Known, Serving, Stem, Store, StoreError, folder::write, listing::Listing};
use crate::tls::authority::{DAY, Seconds};

const INTERVAL: Seconds = DAY / 2;

/// A process touches the roots of the authorities that it uses at least this often.
const TOUCH: Seconds = DAY;

/// An authority whose root has not been touched for this long is unused.
const UNUSED: Seconds = 30 * DAY;

/// Maintenance is due.
pub(super) struct Maintenance {
    now: Seconds,
    /// Whether, according to the clock, something in the folder was used recently.
    is_clock_right: bool,
}

impl Store {
    /// Begins maintenance if it is due. Called before anything is added to the folder.
    pub(super) fn begin_maintenance(
        &self,
        listing: &Listing,
        known: &mut Known,
        now: Seconds,
    ) -> Option<Maintenance> {
        if (0..INTERVAL).contains(&(now - known.maintained)) {
            return None;
        }
        known.maintained = now;
        let mut ages = listing.roots.keys().filter_map(|stem| age(&self.root_file(stem), now));
        let is_clock_right = ages.any(|age| (0..UNUSED).contains(&age));
        Some(Maintenance { now, is_clock_right })
    }

    /// Marks the served authorities as used, and deletes expired ones and those that have been unused for long.
    pub(super) fn maintain(
        &self,
        Maintenance { now, is_clock_right }: Maintenance,
        listing: &Listing,
        serving: &Serving,
        known: &mut Known,
    ) {
        let mut used: HashSet<Stem> = HashSet::new();
        for (stem, _) in serving.held() {
            let file = self.root_file(&stem);
            if age(&file, now).is_some_and(|age| age >= TOUCH) {
                touch(&file);
            }
            used.insert(stem);
        }
        // The clock may have jumped ahead and may be corrected later, when what seemed to have expired is needed again.
        // If the clock is right, the next maintenance finds what was marked as used today.
        if !is_clock_right {
            return;
        }
        let mut deleted = 0;
        for (stem, root) in &listing.roots {
            if used.contains(stem) {
                continue;
            }
            // Without a key, its certificate is for another server (`ca issue`), and no process touches it.
            let is_unused =
                listing.keys.contains(stem) && self.is_old(&stem.root_file(), now, UNUSED);
            if is_unused || root.not_after() <= now {
                let _ = fs::remove_file(self.root_file(stem));
                let _ = fs::remove_file(self.key_file(stem));
                deleted += 1;
            }
        }
        if deleted > 0 {
            tracing::info!(
                directory = %self.directory.display(),
                authorities = deleted,
                "local authorities that had expired or had not been used for a month have been deleted",
            );
            let _ = self.publish(known, None);
        }
        // A root that is there and cannot be read may be readable later.
        let is_alone = |stem: &&Stem| {
            let root = fs::symlink_metadata(self.root_file(stem));
            root.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let keys = listing.keys.iter().filter(is_alone).map(|stem| (stem.key_file(), DAY));
        let marks = listing.removed.iter().map(|id| (Stem::removed(id), UNUSED));
        let leftovers = listing.leftovers.iter().map(|name| (name.clone(), DAY));
        for (name, after) in keys.chain(marks).chain(leftovers) {
            if self.is_old(&name, now, after) {
                let _ = fs::remove_file(self.directory.join(name));
            }
        }
    }

    /// Removes an authority, and marks it as removed for processes that have it in memory. Once the mark exists,
    /// it is no longer trusted, whatever happens next.
    pub(super) fn remove_one(&self, stem: &Stem) -> Result<(), StoreError> {
        write(&self.directory.join(stem.removed_file()), 0o644, b"")?;
        for path in [self.root_file(stem), self.key_file(stem)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(|source| StoreError::Write { path, source })?,
            }
        }
        Ok(())
    }

    fn is_old(&self, name: &str, now: Seconds, after: Seconds) -> bool {
        age(&self.directory.join(name), now).is_some_and(|age| age >= after)
    }
}

/// How long ago a file was written or touched.
fn age(path: &Path, now: Seconds) -> Option<Seconds> {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified()).ok()?;
    let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    Some(now - Seconds::try_from(since.as_secs()).ok()?)
}

fn touch(path: &Path) {
    // If it cannot be touched, nothing in this folder can be deleted either.
    let touched = File::options().append(true).open(path);
    let _ = touched.and_then(|file| file.set_modified(SystemTime::now()));
}
