//! The certificates that the aliases of a proxy are served with, found in a folder or created.

use std::{collections::HashMap, fs, io, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use super::{
    Known, Stem, Store, StoreError,
    choice::{SUCCESSOR, fits},
    current_time, derived,
    draft::{Draft, Made, make_missing},
    folder::{Stamp, read_file, write, write_soon},
    listing::Listing,
    pem,
};
use crate::tls::{
    authority::{Authority, AuthorityError, DAY, Root, Seconds, Subject, timestamp},
    server::AliasCertificates,
};

/// A hundred long names in six certificates take 250 KiB.
const LARGEST_KEY: u64 = 1024 * 1024;

/// The clock is checked at least this often.
const LOOK: Seconds = DAY / 2;

/// If the clock goes back by less, it was only corrected.
pub(super) const CORRECTION: Seconds = 60;

/// More new files than this are not synced to disk one by one.
pub(super) const MANY: usize = 32;

/// The certificates that aliases are served with. Aliases that did not change share them with the previous value.
#[derive(Clone, Debug, Default)]
pub struct Serving {
    aliases: HashMap<String, Arc<Entry>>,
    at: Seconds,
    next: Seconds,
}

/// The certificates of one alias.
#[derive(Debug)]
pub(super) struct Entry {
    pub subject: Subject,
    pub authorities: Vec<Arc<Authority>>,
    /// The roots that were in the folder for it, and whether each had a key.
    pub considered: Vec<(Stem, bool)>,
    pub shown: Arc<AliasCertificates>,
    pub next: Option<Seconds>,
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

    pub(super) fn at(&self) -> Seconds {
        self.at
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
        let safe = self.is_safe(known);
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
                true => self.draft(subject, before, &[], &listing, known, now),
                false => before.draft(subject, now),
            });
        }

        let mut made: HashMap<usize, Vec<Arc<Authority>>> = HashMap::new();
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
                Ok(()) => made.entry(index).or_default().push(authority),
                Err(error) if required => return Err(error),
                Err(error) => unwritten.add(error, &drafts[index]),
            }
        }
        if safe && !made.is_empty() {
            // Another process may have created one for the same alias: both serve the older one.
            listing = self.list(known)?;
        }
        for (index, authorities) in &made {
            let subject = drafts[*index].subject;
            if safe {
                drafts[*index] = self.draft(subject, before, authorities, &listing, known, now);
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
            self.excuse(error, &serving, before, known)?;
        }
        if let Some(maintenance) = maintenance {
            self.maintain(maintenance, &listing, &serving, known);
        }
        if !made.is_empty() {
            self.announce(made.keys().map(|index| &subjects[*index]));
        }
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

    fn is_safe(&self, known: &mut Known) -> bool {
        let Err(error) = self.check_safety() else { return true };
        if known.is_news(error.to_string()) {
            tracing::warn!(%error, "the existing certificates are not used; new ones are created");
        }
        false
    }

    /// An alias with its authorities in the folder.
    fn draft<'a>(
        &self,
        subject: &'a Subject,
        before: &'a Serving,
        made: &[Arc<Authority>],
        listing: &Listing,
        known: &mut Known,
        now: Seconds,
    ) -> Draft<'a> {
        let entry = before.aliases.get(&subject.alias);
        let roots = listing.roots_of(&subject.alias).filter(|(_, root)| fits(root, subject));
        let roots: Vec<_> =
            roots.map(|(stem, root)| (stem, root, listing.keys.contains(stem))).collect();
        let considered = roots.iter().map(|(stem, _, has_key)| ((*stem).clone(), *has_key));
        let mut draft = Draft::new(subject, entry, considered.collect());
        if draft.is_same(before, now) {
            return draft;
        }
        let held = entry.map(|entry| entry.authorities.as_slice()).unwrap_or_default();
        let mut authorities = Vec::new();
        for (stem, root, has_key) in roots {
            let ours = held.iter().chain(made).find(|one| one.root() == root);
            let is_valid = root.not_before() <= now && now < root.not_after();
            if let Some(ours) = ours {
                authorities.push(ours.clone());
            } else if has_key && is_valid {
                authorities.extend(self.load(stem, root, known));
            }
            let begin = Some(root.not_before()).filter(|begin| *begin > now);
            draft.next = [draft.next, begin].into_iter().flatten().min();
        }
        draft.choose(authorities, now);
        draft
    }

    /// The key and the certificates of a root, if this user may read them and they are valid.
    fn load(&self, stem: &Stem, root: &Arc<Root>, known: &mut Known) -> Option<Arc<Authority>> {
        let path = self.key_file(stem);
        let loaded = read_file(&path, LARGEST_KEY).map_err(|error| error.to_string());
        let loaded = loaded
            .and_then(|text| Authority::from_pem(&text, root).map_err(|error| error.to_string()));
        match loaded {
            Ok(authority) => {
                close(&path);
                Some(Arc::new(authority))
            }
            Err(why) => {
                if known.is_news_of_file(&self.directory, stem.key_file()) {
                    tracing::warn!(
                        file = %path.display(),
                        why,
                        "the certificates in this file cannot be used; new ones are created",
                    );
                }
                None
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

    /// Restores files that are in use and gone, unless they were removed on purpose.
    fn put_back(&self, before: &Serving, listing: &Listing, known: &mut Known) -> bool {
        let mut put_back = 0;
        for (stem, authority) in before.held() {
            let is_there = listing.roots.contains_key(&stem) && listing.keys.contains(&stem);
            if is_there || listing.removed.contains(&stem.id) {
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
        put_back > 0
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
        let StoreError::Io { source, .. } = &error else { return Err(error) };
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
        if !read_only {
            known.stamp = None;
        }
        if known.is_news(error.to_string()) {
            tracing::warn!(%error, "the roots that applications trust are not up to date");
        }
        Ok(())
    }

    fn announce<'a>(&self, subjects: impl Iterator<Item = &'a Subject>) {
        let aliases: Vec<&str> = subjects.map(|subject| subject.alias.as_str()).collect();
        let shown = aliases.len().min(10);
        tracing::info!(
            aliases = aliases[..shown].join(", "),
            more = aliases.len() - shown,
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

/// Removes others' access to a key, if possible.
fn close(path: &Path) {
    let Ok(metadata) = fs::metadata(path) else { return };
    if metadata.permissions().mode() & 0o077 != 0 {
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o600));
    }
}
