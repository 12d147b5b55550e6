//! Which names one root can be constrained to.

use std::collections::{BTreeMap, BTreeSet};

use rustls::pki_types::DnsName;

/// The most names of one authority. Each is two constraints and a name of the certificate; rustls takes
/// the fewest of all libraries: 300.
pub const MOST: usize = 100;

/// What an application on the same machine may call a listener.
pub const LOCALHOST: &str = "localhost";

/// Whether a client can ask for `name` by SNI, and a certificate be valid for it. `10` is a name in DNS,
/// yet none of these; one of them among its constraints would spoil a whole root.
pub fn is_certifiable(name: &str) -> bool {
    DnsName::try_from(name).is_ok()
}

/// Divides names into the sets that get an authority each, `localhost` among all that can have it.
///
/// Within a set, no name lies below another: a constraint permits a name with everything below it, so
/// what lies below has to be excluded, and that would exclude the other name.
pub fn sets(names: &BTreeSet<String>) -> Vec<BTreeSet<String>> {
    let mut layers: BTreeMap<usize, Vec<&String>> = BTreeMap::new();
    for name in names {
        // Those above a name lie above one another, so that names of one layer never do.
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

/// A name, and one of the others that lies below it, where there are such.
pub fn nested(names: &BTreeSet<String>) -> Option<(String, String)> {
    names.iter().find_map(|below| Some((above(below, names).next()?.to_owned(), below.clone())))
}

/// Whether `name` is `parent` with labels before it.
pub fn is_below(name: &str, parent: &str) -> bool {
    name.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
}

/// Those of `names` that `name` lies below.
fn above<'a>(name: &'a str, names: &'a BTreeSet<String>) -> impl Iterator<Item = &'a str> {
    let parents = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
    parents.filter(|parent| names.contains(*parent))
}
