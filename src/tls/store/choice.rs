//! Chooses the authorities that an alias is served with, and finds missing ones. Pure.

use std::{cmp::Reverse, collections::BTreeSet, net::Ipv4Addr, sync::Arc};

use crate::tls::authority::{Authority, DAY, Root, Seconds, Subject, names::LOCALHOST};

/// An authority that expires sooner is served only if there is no other one.
const LAST_DAYS: Seconds = 30 * DAY;

/// A successor is published this long before the expiry, because programs read their roots only at start.
pub(super) const SUCCESSOR: Seconds = 365 * DAY;

/// An authority that an alias lacks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lack {
    /// Its names.
    pub names: BTreeSet<String>,
    /// Whether nothing can be served without it. Otherwise it is a successor.
    pub required: bool,
}

/// Whether an authority fits this alias as it is configured: not if it is valid for a name that the alias
/// no longer has.
pub(super) fn fits(root: &Root, subject: &Subject) -> bool {
    root.names().iter().all(|name| name == LOCALHOST || subject.names.contains(name))
}

/// Those that can be served now, in order of preference. A name is served with the first one that has it.
///
/// Those already served come first, because clients may have read the roots before others were added. Then the
/// oldest, because all processes choose the same one, and most clients know it.
pub(super) fn preferred(
    mut authorities: Vec<Arc<Authority>>,
    held: &[Arc<Authority>],
    now: Seconds,
) -> Vec<Arc<Authority>> {
    authorities.retain(|one| is_valid(one, now));
    authorities.sort_by_cached_key(|one| {
        let root = one.root();
        let ending = root.not_after() <= now + LAST_DAYS;
        let served = held.iter().any(|held| held.root().id() == root.id());
        let last = if ending { Reverse(root.not_after()) } else { Reverse(0) };
        (ending, last, !served, root.not_before(), root.id().to_owned())
    });
    authorities
}

/// The authorities that an alias lacks, given those that can be served now.
pub(super) fn lacks(subject: &Subject, authorities: &[Arc<Authority>], now: Seconds) -> Vec<Lack> {
    let last = |names: &BTreeSet<String>, address: Option<&Ipv4Addr>| {
        let with = |name: &String| {
            let having = authorities.iter().filter(|one| {
                let has_address = |address| one.addresses().any(|has| has == address);
                one.root().names().contains(name) && address.is_none_or(has_address)
            });
            having.map(|one| one.root().not_after()).max()
        };
        // If there is another name, `localhost` is served with it.
        let names = names.iter().filter(|name| names.len() == 1 || *name != LOCALHOST);
        names.map(with).min().flatten()
    };
    let sets = subject.sets();
    let mut lacks = Vec::new();
    for set in sets {
        let mut ends = vec![last(&set, None)];
        let required = ends[0].is_none();
        // A client without SNI gets the certificate of the shortest name.
        if subject.main.as_ref().is_none_or(|main| set.contains(main)) {
            let main = subject.main.as_deref().unwrap_or(LOCALHOST);
            let main = BTreeSet::from([main.to_owned()]);
            ends.extend(subject.addresses.iter().map(|address| last(&main, Some(address))));
        }
        if ends.iter().any(|end| end.is_none_or(|end| end <= now + SUCCESSOR)) {
            lacks.push(Lack { names: set, required });
        }
    }
    lacks
}

/// When the results of the functions above may change.
pub(super) fn changes(authorities: &[Arc<Authority>], now: Seconds) -> Option<Seconds> {
    let times = authorities.iter().flat_map(|one| {
        let root = one.root();
        let end = root.not_after();
        let times = [root.not_before(), end - SUCCESSOR, end - LAST_DAYS, end];
        times.into_iter().chain(one.changes(now))
    });
    times.filter(|time| *time > now).min()
}

fn is_valid(authority: &Authority, now: Seconds) -> bool {
    let root = authority.root();
    root.not_before() <= now && now < root.not_after() && authority.is_valid(now)
}
