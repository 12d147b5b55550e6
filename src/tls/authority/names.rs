//! Which names a root can be constrained to.

use std::collections::{BTreeMap, BTreeSet};

use rustls::pki_types::DnsName;

/// The most names of one authority. Each takes two constraints and a name of the certificate. The lowest limit
/// of all libraries is that of rustls: 300.
pub const MOST: usize = 100;

/// An application on the same machine may use this name for a listener.
pub const LOCALHOST: &str = "localhost";

/// Whether a client can send `name` by SNI, and a certificate can be valid for it. `10`, for example, is a name in
/// DNS, but not such a name. One of these in the constraints would make the whole root invalid.
pub fn is_certifiable(name: &str) -> bool {
    DnsName::try_from(name).is_ok()
}

/// Divides names into sets. Each set gets an authority, and all that can have `localhost` do.
///
/// Within a set, no name is below another: a constraint permits a name with everything below it, so the names
/// below must be excluded, and that would exclude the other name.
pub fn sets(names: &BTreeSet<String>) -> Vec<BTreeSet<String>> {
    let mut layers: BTreeMap<usize, Vec<&String>> = BTreeMap::new();
    for name in names {
        // The names above a name are above one another, so no name of a layer is above another of the same layer.
        layers.entry(above(name, names).count()).or_default().push(name);
    }
    let mut sets: Vec<BTreeSet<String>> = Vec::new();
    for layer in layers.values() {
        for chunk in layer.chunks(MOST - 1) {
            let mut set: BTreeSet<String> = chunk.iter().map(|name| (*name).clone()).collect();
            if !set.iter().any(|name| is_below(name, LOCALHOST)) {
                set.insert(LOCALHOST.to_owned());
            }
            sets.push(set);
        }
    }
    if sets.is_empty() {
        sets.push(BTreeSet::from([LOCALHOST.to_owned()]));
    }
    sets
}

/// A name and another one below it, if there are any.
pub fn nested(names: &BTreeSet<String>) -> Option<(String, String)> {
    names.iter().find_map(|below| Some((above(below, names).next()?.to_owned(), below.clone())))
}

/// Whether `name` is `parent` with labels before it.
pub fn is_below(name: &str, parent: &str) -> bool {
    name.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
}

/// Those of `names` that `name` is below.
fn above<'a>(name: &'a str, names: &'a BTreeSet<String>) -> impl Iterator<Item = &'a str> {
    let parents = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
    parents.filter(|parent| names.contains(*parent))
}
