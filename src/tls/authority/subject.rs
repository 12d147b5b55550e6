//! What the certificates of one alias must be valid for.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use super::names::{is_certifiable, sets};

/// An alias, as far as its certificates are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The alias' name.
    pub alias: String,
    /// All names of the alias that a certificate can be valid for.
    pub names: BTreeSet<String>,
    /// The shortest of them.
    pub main: Option<String>,
    /// The loopback addresses of its listeners, and 127.0.0.1.
    pub addresses: BTreeSet<Ipv4Addr>,
}

impl Subject {
    /// An alias with its names, the shortest first, and the addresses that it listens on.
    pub fn new<N, L>(alias: &str, names: N, listen: L) -> Self
    where
        N: IntoIterator<Item = String>,
        L: IntoIterator<Item = IpAddr>,
    {
        let names: Vec<String> = names.into_iter().filter(|name| is_certifiable(name)).collect();
        // The constraints permit no IPv6 addresses, so certificates have none.
        let loopback = listen.into_iter().filter_map(|address| match address.to_canonical() {
            IpAddr::V4(address) => Some(address).filter(Ipv4Addr::is_loopback),
            IpAddr::V6(_) => None,
        });
        Self {
            alias: alias.to_owned(),
            main: names.first().cloned(),
            names: names.into_iter().collect(),
            addresses: loopback.chain([Ipv4Addr::LOCALHOST]).collect(),
        }
    }

    /// The names of each of its authorities.
    pub fn sets(&self) -> Vec<BTreeSet<String>> {
        sets(&self.names)
    }
}
