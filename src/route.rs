//! From a listener and a Host to the alias that serves it.

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
    time::Duration,
};

// Clients choose only what is looked up, not the keys: no defence against deliberate collisions is needed.
use foldhash::{HashMap, HashSet};

use crate::{
    fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken},
    upstream::Alias,
};

/// The aliases of one listener. Immutable: a reload makes new ones.
#[derive(Default)]
pub struct Routes {
    by_host: HashMap<String, Arc<Alias>>,
    aliases: Vec<Arc<Alias>>,
    /// The alias with `*` in its `hosts`.
    any: Option<Arc<Alias>>,
}

/// How many of a listener's names an error lists: there may be ten thousand, and the error is in a header.
const LISTED: usize = 10;

/// The longest name in DNS. An error shows only the beginning of a longer Host.
const LONGEST_NAME: usize = 253;
const SHOWN: usize = 64;

/// No alias has this Host. This stops web pages that use DNS rebinding.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} is not a name that this listener serves; it serves {served}", shown(.host.as_deref()))]
pub struct RouteError {
    host: Option<String>,
    /// The names, or the first of many.
    served: String,
}

fn shown(host: Option<&str>) -> String {
    match host {
        None => "a request without Host".into(),
        Some(host) if host.len() <= LONGEST_NAME => format!("`{host}`"),
        Some(host) => {
            let beginning: String = host.chars().take(SHOWN).collect();
            format!("`{beginning}...` ({} characters)", host.chars().count())
        }
    }
}

/// Names for an error: the first few, and how many more there are.
fn listed<'a>(names: impl Iterator<Item = &'a str>, count: usize) -> String {
    let first: Vec<&str> = names.take(LISTED).collect();
    match count - first.len() {
        _ if first.is_empty() => "none".into(),
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

impl Cause for RouteError {
    fn fix(&self) -> Option<String> {
        Some(match &self.host {
            Some(host) if host.len() > LONGEST_NAME => "ask for one of the names served".into(),
            Some(host) => {
                format!("ask for one of the names served, or add \"{host}\" to the alias' `hosts`")
            }
            None => "send a Host".into(),
        })
    }
}

impl From<RouteError> for Fault {
    fn from(error: RouteError) -> Self {
        let diagnosis = Diagnosis {
            kind: Kind::NoRoute,
            stage: Stage::Route,
            blame: Blame::Client,
            taken: Taken::Nothing,
            endpoint: None,
        };
        Self::new(diagnosis, error)
    }
}

impl Routes {
    /// The routes of a listener without aliases.
    pub fn none() -> &'static Self {
        static NONE: LazyLock<Routes> = LazyLock::new(Routes::default);
        &NONE
    }

    /// The routes to these aliases.
    pub fn new(aliases: &[Arc<Alias>]) -> Self {
        let mut routes = Self { aliases: aliases.to_vec(), ..Self::default() };
        // An alias' own name leads to it, even if it is a form of an earlier alias' name.
        for alias in aliases {
            let name = alias.config().name.clone();
            routes.by_host.entry(name).or_insert_with(|| alias.clone());
        }
        for alias in aliases {
            for host in alias.hosts() {
                // The alias listed first keeps any other name that two could claim.
                routes.by_host.entry(host.clone()).or_insert_with(|| alias.clone());
            }
            if alias.config().hosts.iter().any(|host| host == "*") {
                routes.any.get_or_insert_with(|| alias.clone());
            }
        }
        routes
    }

    /// The alias that serves `host` (without port, in any case) on a listener whose address is `local`.
    pub fn find(&self, local: IpAddr, host: Option<&str>) -> Result<Arc<Alias>, RouteError> {
        let found = match host {
            Some(host) => self.by_name(local, host),
            None => self.only().or(self.any.as_ref()),
        };
        found.cloned().ok_or_else(|| {
            let aliases = self.aliases.iter().map(|alias| alias.config().name.as_str());
            let served = listed(aliases, self.aliases.len());
            RouteError { host: host.map(Into::into), served }
        })
    }

    fn by_name(&self, local: IpAddr, host: &str) -> Option<&Arc<Alias>> {
        if let Some(alias) = self.by_host.get(host) {
            return Some(alias);
        }
        let host = folded(host);
        let by_true_name = || self.aliases.iter().find(|alias| alias.is_true_name(&host));
        self.by_host
            .get(&host)
            .or_else(by_true_name)
            .or_else(|| self.only().filter(|_| is_own(local, &host)))
            .or(self.any.as_ref())
    }

    /// The alias whose certificate is presented to a client with this SNI, and whether the listener
    /// accepts any name. Without SNI, it is the listener's first alias.
    pub fn shown(&self, name: Option<&str>) -> Option<(&Arc<Alias>, bool)> {
        let Some(name) = name else { return Some((self.aliases.first()?, false)) };
        let folded = folded(name);
        let by_true_name = || self.aliases.iter().find(|u| u.is_true_name(&folded));
        let known = self.by_host.get(&folded).or_else(by_true_name);
        let local = || self.only().filter(|_| folded == "localhost");
        let alias = known.or_else(local).or(self.any.as_ref())?;
        Some((alias, self.any.is_some()))
    }

    /// The names that are served regardless of DNS, for an error; the first few of many.
    pub fn served(&self) -> String {
        let mut seen = HashSet::default();
        let names = self.aliases.iter().flat_map(|alias| alias.hosts());
        let names = names.map(String::as_str).filter(|name| seen.insert(*name));
        listed(names, self.by_host.len())
    }

    /// The aliases, in the configuration's order.
    pub fn aliases(&self) -> &[Arc<Alias>] {
        &self.aliases
    }

    /// The alias of a listener that has only one.
    pub fn only(&self) -> Option<&Arc<Alias>> {
        match self.aliases.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The longest `timeouts.keepalive` of the aliases: when a connection begins, the alias of its requests is not
    /// known yet.
    pub fn keepalive(&self) -> Duration {
        let of_aliases = self.aliases.iter().map(|alias| alias.config().timeouts.keepalive);
        of_aliases.max().unwrap_or_default()
    }
}

/// Without the dot of an absolute name. With two dots, it is no valid name.
fn folded(host: &str) -> String {
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

fn is_own(local: IpAddr, host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.parse().is_ok_and(|ip: IpAddr| ip.to_canonical() == local.to_canonical())
}

#[cfg(test)]
mod tests;
