//! The certificates that the aliases of a proxy are served with, found in a folder or created.

use std::{collections::HashMap, fs, io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use super::{
    Known, Stem, Store, StoreError,
    choice::{SUCCESSOR, fits},
    current_time, derived,
    draft::{CORRECTION, Draft, Entry, MANY, Made, make_missing},
    folder::{Stamp, read_file, write, write_soon},
    listing::Listing,
    may_pass, pem,
};
use crate::tls::{
    authority::{Authority, AuthorityError, DAY, Root, Seconds, Subject, timestamp},
    server::AliasCertificates,
};

/// A hundred long names in six certificates take 250 KiB.
const LARGEST_KEY: u64 = 1024 * 1024;

/// The clock is checked at least this often.
const LOOK: Seconds = DAY / 2;

/// The certificates that aliases are served with. Aliases that did not change share them with the previous value.
#[derive(Clone, Debug, Default)]
pub struct Serving {
    aliases: HashMap<String, Arc<Entry>>,
    at: Seconds,
    next: Seconds,
}

impl Serving {
    /// The certificates, by alias.
    pub fn certificates(&self) -> HashMap<String, Arc<AliasCertificates>> {
        let shown = |(alias, entry): (&String, &Arc<Entry>)| (alias.clone(), entry.shown.clone());
        self.aliases.iter().map(shown).collect()
    }

    /// Whether both serve the same certificates.
    pub fn shows_what(&self, other: &Self) -> bool {
        let same = |(alias, entry): (&String, &Arc<Entry>)| {
            other.aliases.get(alias).is_some_and(|other| Arc::ptr_eq(&other.shown, &entry.shown))
        };
        self.aliases.len() == other.aliases.len() && self.aliases.iter().all(same)
    }

    /// Whether the clock alone is no reason to look again.
    pub fn is_current(&self) -> bool {
        let now = current_time();
        now < self.next && now + CORRECTION >= self.at
    }

    /// The same in memory, if nothing can be written.
    pub fn in_memory(subjects: &[Subject], before: &Self) -> Result<Self, AuthorityError> {
        let now = current_time();
        let mut drafts: Vec<Draft<'_>> = subjects.iter().map(|s| before.draft(s, now)).collect();
        for made in make_missing(&drafts, now) {
            let (index, made) = (made.draft, made.authority?);
            drafts[index].add(Arc::new(made), now);
        }
        Ok(before.finish(drafts, now))
    }

    /// An alias with its previous certificates.
    fn draft<'a>(&'a self, subject: &'a Subject, now: Seconds) -> Draft<'a> {
        let before = self.aliases.get(&subject.alias);
        let held = before.map(|before| before.authorities.clone()).unwrap_or_default();
        let mut draft = Draft::new(subject, before, Vec::new());
        draft.choose(held, now);
        draft
    }

    fn finish(&self, drafts: Vec<Draft<'_>>, now: Seconds) -> Self {
        let mut serving = Self { aliases: HashMap::new(), at: now, next: now + LOOK };
        for draft in drafts {
            let alias = draft.subject.alias.clone();
            let entry = match draft.before {
                Some(before) if draft.same => before.clone(),
                _ => Arc::new(draft.entry(now)),
            };
            serving.next = entry.next.map_or(serving.next, |next| next.min(serving.next));
            serving.aliases.insert(alias, entry);
        }
        serving
    }

    /// The authorities in use whose files are not in the folder, although nobody removed them on purpose.
    fn missing<'a>(
        &'a self,
        listing: &'a Listing,
    ) -> impl Iterator<Item = (&'a Entry, Stem, &'a Arc<Authority>)> {
        let all = self.aliases.values().flat_map(|entry| {
            let stem = |one: &Arc<Authority>| Stem::new(&entry.subject.alias, one.root());
            entry.authorities.iter().map(move |one| (&**entry, stem(one), one))
        });
        all.filter(|(_, stem, _)| {
            let is_there = listing.roots.contains_key(stem) && listing.keys.contains(stem);
            !is_there && !listing.removed.contains(&stem.id)
        })
    }

    pub(super) fn held(&self) -> impl Iterator<Item = (Stem, &Arc<Authority>)> {
        self.aliases.values().flat_map(|entry| {
            let stem = |one: &Arc<Authority>| Stem::new(&entry.subject.alias, one.root());
            entry.authorities.iter().map(move |one| (stem(one), one))
        })
    }
}

impl Store {
    /// Serves `subjects` with the authorities in the folder, and creates missing ones. Those served `before`
    /// stay in use as far as possible, and are restored if their files are gone.
    ///
    /// In a folder that others can write to, nothing existing is used.
    pub fn serve(&self, subjects: &[Subject], before: &Serving) -> Result<Serving, StoreError> {
        let mut known = self.known.lock();
        let served = self.serve_knowing(&mut known, subjects, before);
        if served.is_err() {
            // It may succeed the next time, even if nothing in the folder changes.
            known.stamp = None;
        }
        served
    }

    fn serve_knowing(
        &self,
        known: &mut Known,
        subjects: &[Subject],
        before: &Serving,
    ) -> Result<Serving, StoreError> {
        let now = current_time();
        self.make_folder()?;
        let safe = self.is_safe(known)?;
        // Taken before the list is read, so that a change in between is noticed.
        known.stamp = Some(self.stamp());
        let (mut listing, mut maintenance) = (Listing::default(), None);
        if safe {
            listing = self.list(known)?;
            if self.put_back(before, &listing, known) {
                listing = self.list(known)?;
            }
            maintenance = self.begin_maintenance(&listing, known, now);
        }
        let mut drafts = Vec::with_capacity(subjects.len());
        for subject in subjects {
            drafts.push(match safe {
                true => self.draft(subject, before, &[], &listing, known, now)?,
                false => before.draft(subject, now),
            });
        }

        // If nothing in the folder is of use, another folder is better than memory.
        let is_used = |draft: &Draft<'_>| !draft.authorities.is_empty();
        let tolerant =
            self.best_effort && (!before.aliases.is_empty() || drafts.iter().any(is_used));
        let mut made: HashMap<usize, Vec<Arc<Authority>>> = HashMap::new();
        let (mut new, mut in_memory) = (Vec::new(), Vec::new());
        let mut unwritten = Unwritten::default();
        let missing = make_missing(&drafts, now);
        let sync = missing.len() <= MANY;
        for Made { draft: index, required, authority } in missing {
            let (authority, subject) = (Arc::new(authority?), drafts[index].subject);
            match self.save_new(
                &Stem::new(&subject.alias, authority.root()),
                &authority,
                sync,
                safe,
            ) {
                Err(error) if !required => unwritten.add(error, &drafts[index]),
                Err(error) if !tolerant => return Err(error),
                saved => {
                    match saved {
                        Ok(()) => new.push(subject),
                        Err(error) => in_memory.push((subject, error)),
                    }
                    made.entry(index).or_default().push(authority);
                }
            }
        }
        if safe && !made.is_empty() {
            // Another process may have created one for the same alias: both serve the older one.
            listing = self.list(known)?;
        }
        for (index, authorities) in &made {
            let subject = drafts[*index].subject;
            if safe {
                drafts[*index] = self.draft(subject, before, authorities, &listing, known, now)?;
            } else {
                for authority in authorities {
                    drafts[*index].add(authority.clone(), now);
                }
            }
        }
        let mut serving = before.finish(drafts, now);
        if unwritten.warn(now) {
            serving.next = serving.next.min(now + DAY);
        }

        let own: Vec<_> = serving.held().map(|(stem, one)| (stem, one.root().clone())).collect();
        let own = (!safe).then_some(own.as_slice());
        // In a folder that others can write to, the derived files belong to the process that started last.
        let is_due = safe || !made.is_empty() || !self.roots_file().exists();
        if is_due && let Err(error) = self.publish(known, own) {
            match tolerant {
                true => self.warn_of_roots(&error, known),
                false => self.excuse(error, &serving, before, known)?,
            }
        }
        if let Some(maintenance) = maintenance {
            self.maintain(maintenance, &listing, &serving, known);
        }
        if serving.aliases.values().any(|entry| entry.pending) {
            known.stamp = None;
        }
        self.announce(&new);
        self.warn_of_memory(&in_memory);
        Ok(serving)
    }

    /// Whether the folder has not changed since it was last looked at.
    pub fn is_unchanged(&self) -> bool {
        let now = self.stamp();
        self.known.lock().stamp.as_ref().is_some_and(|stamp| stamp.holds(&now))
    }

    pub(super) fn stamp(&self) -> Stamp {
        Stamp::of(&self.directory, &derived::FILES)
    }

    fn is_safe(&self, known: &mut Known) -> Result<bool, StoreError> {
        let error = match self.check_safety() {
            Ok(()) => return Ok(true),
            Err(error @ StoreError::Unsafe { .. }) => error,
            Err(error) => return Err(error),
        };
        if known.is_news(error.to_string()) {
            tracing::warn!(%error, "the existing certificates are not used; new ones are created");
        }
        Ok(false)
    }

    /// An alias with its authorities: those in the folder, and those in use that could not be written. Fails if
    /// there is nothing to serve it with and one in the folder cannot be read just now: applications trust that one.
    fn draft<'a>(
        &self,
        subject: &'a Subject,
        before: &'a Serving,
        made: &[Arc<Authority>],
        listing: &Listing,
        known: &mut Known,
        now: Seconds,
    ) -> Result<Draft<'a>, StoreError> {
        let entry = before.aliases.get(&subject.alias);
        let roots = listing.roots_of(&subject.alias).filter(|(_, root)| fits(root, subject));
        let roots: Vec<_> =
            roots.map(|(stem, root)| (stem, root, listing.keys.contains(stem))).collect();
        let considered = roots.iter().map(|(stem, _, has_key)| ((*stem).clone(), *has_key));
        let held = entry.map(|entry| entry.authorities.as_slice()).unwrap_or_default();
        let unwritten = held.iter().chain(made).filter_map(|one| {
            let stem = Stem::new(&subject.alias, one.root());
            let is_unwritten =
                !listing.roots.contains_key(&stem) && !listing.removed.contains(&stem.id);
            (is_unwritten && fits(one.root(), subject)).then(|| (stem, one.clone()))
        });
        let (unwritten, mut authorities): (Vec<_>, Vec<_>) = unwritten.unzip();
        let considered = considered.chain(unwritten.into_iter().map(|stem| (stem, false)));
        let mut draft = Draft::new(subject, entry, considered.collect());
        if draft.is_same(before.at, now) {
            return Ok(draft);
        }
        draft.pending = !authorities.is_empty();
        let mut unread = Vec::new();
        for (stem, root, has_key) in roots {
            let ours = held.iter().chain(made).find(|one| one.root() == root);
            let is_valid = root.not_before() <= now && now < root.not_after();
            if let Some(ours) = ours {
                authorities.push(ours.clone());
            } else if has_key && is_valid {
                match self.load(stem, root, known) {
                    Ok(loaded) => authorities.extend(loaded),
                    Err(error) => unread.push((stem.clone(), error)),
                }
            }
            let begin = Some(root.not_before()).filter(|begin| *begin > now);
            draft.next = [draft.next, begin].into_iter().flatten().min();
        }
        draft.choose(authorities, now);
        let is_lacking = draft.lacks.iter().any(|lack| lack.required);
        for (stem, error) in unread {
            if is_lacking {
                return Err(error);
            }
            draft.lacks.clear();
            draft.pending = true;
            // So that the next look finds a difference and reads it again.
            for (considered, has_key) in &mut draft.considered {
                *has_key &= *considered != stem;
            }
        }
        Ok(draft)
    }

    /// The key and the certificates of a root, if this user may read them and they are valid. Fails if they cannot
    /// be read just now.
    fn load(
        &self,
        stem: &Stem,
        root: &Arc<Root>,
        known: &mut Known,
    ) -> Result<Option<Arc<Authority>>, StoreError> {
        let path = self.key_file(stem);
        let loaded = match read_file(&path, LARGEST_KEY) {
            Ok(text) => Authority::from_pem(&text, root).map_err(|error| error.to_string()),
            Err(source) if may_pass(&source) => return Err(StoreError::Read { path, source }),
            Err(error) => Err(error.to_string()),
        };
        match loaded {
            Ok(authority) => {
                close(&path);
                Ok(Some(Arc::new(authority)))
            }
            Err(why) => {
                if known.is_news_of_file(&self.directory, stem.key_file()) {
                    tracing::warn!(
                        file = %path.display(),
                        why,
                        "the certificates in this file cannot be used; new ones are created",
                    );
                }
                Ok(None)
            }
        }
    }

    /// Writes an authority. The key is first, so that it exists when another process finds the root.
    fn save(
        &self,
        stem: &Stem,
        authority: &Authority,
        sync: bool,
        safe: bool,
    ) -> Result<(), StoreError> {
        if !safe {
            return Ok(());
        }
        let write = if sync { write } else { write_soon };
        write(&self.key_file(stem), 0o600, authority.to_pem().as_bytes())?;
        write(&self.root_file(stem), 0o644, pem(authority.root().der()).as_bytes())
    }

    /// The same for a new authority: if the root cannot be written, the key is removed again.
    pub(super) fn save_new(
        &self,
        stem: &Stem,
        authority: &Authority,
        sync: bool,
        safe: bool,
    ) -> Result<(), StoreError> {
        self.save(stem, authority, sync, safe).inspect_err(|_| {
            let _ = fs::remove_file(self.key_file(stem));
        })
    }

    /// Restores files that are in use and gone, and writes those that could not be written before.
    fn put_back(&self, before: &Serving, listing: &Listing, known: &mut Known) -> bool {
        let (mut put_back, mut new) = (0, Vec::new());
        for (entry, stem, authority) in before.missing(listing) {
            if !entry.is_written(&stem) {
                if self.save_new(&stem, authority, true, true).is_ok() {
                    new.push(&entry.subject);
                }
                continue;
            }
            match self.save(&stem, authority, true, true) {
                Ok(()) => put_back += 1,
                Err(error) if known.is_news(error.to_string()) => {
                    tracing::warn!(%error, "a file of the local authority is gone and cannot be restored");
                }
                Err(_) => {}
            }
        }
        if put_back > 0 {
            tracing::warn!(
                directory = %self.directory.display(),
                authorities = put_back,
                "files of the local authority were gone and have been restored; to remove an authority, \
                 use `truename ca remove ALIAS`",
            );
        }
        self.announce(&new);
        put_back + new.len() > 0
    }

    /// Accepts an error in writing the derived files if the folder is not writable, or if applications can already
    /// trust everything that is served. Otherwise it is returned.
    fn excuse(
        &self,
        error: StoreError,
        serving: &Serving,
        before: &Serving,
        known: &mut Known,
    ) -> Result<(), StoreError> {
        let (StoreError::Read { source, .. } | StoreError::Write { source, .. }) = &error else {
            return Err(error);
        };
        let read_only = matches!(
            source.kind(),
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
        );
        let served_before =
            serving.aliases.iter().all(|(alias, entry)| match before.aliases.get(alias) {
                Some(before) => entry
                    .authorities
                    .iter()
                    .all(|one| before.authorities.iter().any(|before| before.root() == one.root())),
                None => false,
            });
        if !read_only && !served_before {
            return Err(error);
        }
        let stamp = known.stamp.take().filter(|_| read_only);
        self.warn_of_roots(&error, known);
        known.stamp = stamp;
        Ok(())
    }

    fn warn_of_roots(&self, error: &StoreError, known: &mut Known) {
        known.stamp = None;
        if known.is_news(error.to_string()) {
            tracing::warn!(%error, "the roots that applications trust are not up to date");
        }
    }

    fn warn_of_memory(&self, in_memory: &[(&Subject, StoreError)]) {
        let Some((_, error)) = in_memory.first() else { return };
        let (aliases, more) = shown(in_memory.iter().map(|(subject, _)| *subject));
        tracing::warn!(
            aliases, more, %error,
            "the new certificate authorities of these aliases are in memory until they can be written: \
            applications cannot trust them yet",
        );
    }

    fn announce(&self, subjects: &[&Subject]) {
        if subjects.is_empty() {
            return;
        }
        let (aliases, more) = shown(subjects.iter().copied());
        tracing::info!(
            aliases, more,
            roots = %self.roots_file().display(),
            bundle = %self.bundle().display(),
            "new local certificate authorities: let applications that speak TLS trust their roots, and \
            restart those that are running",
        );
    }
}

/// Successors that could not be written.
#[derive(Default)]
struct Unwritten {
    aliases: usize,
    ends: Option<Seconds>,
    error: Option<StoreError>,
}

impl Unwritten {
    fn add(&mut self, error: StoreError, draft: &Draft<'_>) {
        let ends = draft.authorities.iter().map(|one| one.root().not_after());
        self.ends = self.ends.into_iter().chain(ends).min();
        self.aliases += 1;
        self.error.get_or_insert(error);
    }

    /// Warns, more urgently as the end approaches.
    fn warn(&self, now: Seconds) -> bool {
        let (Some(error), Some(ends)) = (&self.error, self.ends) else { return false };
        let (aliases, end) = (self.aliases, timestamp(ends));
        if ends > now + SUCCESSOR {
            tracing::warn!(
                aliases, %error,
                "the certificates of these aliases are not valid for all addresses that they listen on: \
                clients have to connect by name",
            );
        } else if ends > now + 30 * DAY {
            tracing::warn!(
                aliases, end, %error,
                "the certificates of these aliases have less than a year left, and new ones cannot be \
                 written",
            );
        } else {
            tracing::error!(
                aliases, end, %error,
                "the certificates of these aliases EXPIRE SOON, and new ones cannot be written",
            );
        }
        true
    }
}

/// The first aliases, and how many more there are.
fn shown<'a>(subjects: impl Iterator<Item = &'a Subject>) -> (String, usize) {
    let aliases: Vec<&str> = subjects.map(|subject| subject.alias.as_str()).collect();
    let shown = aliases.len().min(10);
    (aliases[..shown].join(", "), aliases.len() - shown)
}

/// Removes others' access to a key, if possible.
fn close(path: &Path) {
    let Ok(metadata) = fs::metadata(path) else { return };
    if metadata.permissions().mode() & 0o077 != 0 {
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    }
}
