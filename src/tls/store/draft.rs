//! An alias while its certificates are being chosen, and the creation of missing authorities.

use std::{sync::Arc, thread};

use super::{
    Stem,
    choice::{Lack, changes, fits, lacks, preferred},
};
use crate::tls::{
    authority::{Authority, AuthorityError, EARLY, Seconds, Subject},
    server::AliasCertificates,
};

/// If the clock goes back by less, it was only corrected.
pub(super) const CORRECTION: Seconds = 60;

/// More new files than this are not synced to disk one by one.
pub(super) const MANY: usize = 32;

/// The certificates of one alias.
#[derive(Debug)]
pub(super) struct Entry {
    pub subject: Subject,
    pub authorities: Vec<Arc<Authority>>,
    /// The roots that there were for it, and whether each had a key in the folder that could be read.
    pub considered: Vec<(Stem, bool)>,
    pub shown: Arc<AliasCertificates>,
    pub next: Option<Seconds>,
    /// Whether a file could not be read or written, which may succeed soon.
    pub pending: bool,
}

impl Entry {
    /// Whether an authority was in the folder when this was chosen.
    pub fn is_written(&self, stem: &Stem) -> bool {
        self.considered.iter().any(|(considered, has_key)| considered == stem && *has_key)
    }
}

/// An alias while its certificates are being chosen.
pub(super) struct Draft<'a> {
    pub subject: &'a Subject,
    pub before: Option<&'a Arc<Entry>>,
    pub considered: Vec<(Stem, bool)>,
    pub authorities: Vec<Arc<Authority>>,
    pub next: Option<Seconds>,
    pub lacks: Vec<Lack>,
    /// As [`Entry::pending`].
    pub pending: bool,
    /// Nothing has changed.
    pub same: bool,
}

impl<'a> Draft<'a> {
    pub fn new(
        subject: &'a Subject,
        before: Option<&'a Arc<Entry>>,
        considered: Vec<(Stem, bool)>,
    ) -> Self {
        Self {
            subject,
            before,
            considered,
            authorities: Vec::new(),
            next: None,
            lacks: Vec::new(),
            pending: false,
            same: false,
        }
    }

    /// Whether nothing has changed since `before`; sets [`same`](Self::same).
    pub fn is_same(&mut self, before: Seconds, now: Seconds) -> bool {
        let Some(entry) = self.before else { return false };
        self.same = entry.subject == *self.subject
            && entry.considered == self.considered
            && now + CORRECTION >= before
            && entry.next.is_none_or(|next| now < next);
        self.same
    }

    pub fn choose(&mut self, authorities: Vec<Arc<Authority>>, now: Seconds) {
        let held = self.before.map(|before| before.authorities.as_slice()).unwrap_or_default();
        let fitting = authorities.into_iter().filter(|one| fits(one.root(), self.subject));
        self.authorities = preferred(fitting.collect(), held, now);
        self.lacks = lacks(self.subject, &self.authorities, now);
        self.next = [self.next, changes(&self.authorities, now)].into_iter().flatten().min();
    }

    pub fn add(&mut self, made: Arc<Authority>, now: Seconds) {
        let mut authorities = std::mem::take(&mut self.authorities);
        authorities.push(made);
        self.choose(authorities, now);
    }

    pub fn entry(self, now: Seconds) -> Entry {
        let served = self.authorities.iter().map(|one| (one.clone(), one.certified(now)));
        let mut shown =
            Arc::new(AliasCertificates::new(self.subject.main.clone(), served.collect()));
        // So that a comparison shows at once that nothing has changed.
        if let Some(before) = self.before.filter(|before| before.shown == shown) {
            shown = before.shown.clone();
        }
        Entry {
            subject: self.subject.clone(),
            authorities: self.authorities,
            considered: self.considered,
            shown,
            next: self.next,
            pending: self.pending,
        }
    }
}

/// A new authority for an alias.
pub(super) struct Made {
    pub draft: usize,
    pub required: bool,
    pub authority: Result<Authority, AuthorityError>,
}

/// Creates all missing authorities; many of them on all CPUs.
pub(super) fn make_missing(drafts: &[Draft<'_>], now: Seconds) -> Vec<Made> {
    let lacking = drafts.iter().enumerate();
    let lacking =
        lacking.flat_map(|(draft, of)| of.lacks.iter().map(move |lack| (draft, of, lack)));
    let lacking: Vec<_> = lacking.collect();
    let make = |(draft, of, lack): &(usize, &Draft<'_>, &Lack)| {
        let subject = of.subject;
        // The older authority is preferred, so this one must be younger, although times are whole seconds.
        let newest = of.authorities.iter().map(|one| one.root().not_before()).max();
        let now = newest.map_or(now, |newest| now.max(newest + EARLY + 1));
        let authority = Authority::make(&subject.alias, &lack.names, &subject.addresses, now);
        Made { draft: *draft, required: lack.required, authority }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = lacking.len().div_ceil(threads).max(MANY);
    if lacking.len() <= share {
        return lacking.iter().map(make).collect();
    }
    thread::scope(|scope| {
        let chunks = lacking.chunks(share);
        let threads: Vec<_> = chunks
            .map(|chunk| scope.spawn(move || chunk.iter().map(make).collect::<Vec<_>>()))
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    })
}
