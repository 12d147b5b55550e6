//! Creates the listeners of a configuration, and determines which of them existed before.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    slice,
    sync::Arc,
};

use super::listen_sockets::{ListenSockets, Purpose};
use crate::{
    config::{self, Config, Protocol},
    drain::Drain,
    forward::Passthrough,
    serve::{
        Credentials, ForwardProxy, Listener, ListenerId, Reached, Service, Serving, UNBOUND, covers,
    },
    tls::server::ServerCertificates,
    upstream::Alias,
};

/// Everything that the listeners of a configuration need.
pub struct Parts<'a> {
    pub config: &'a Config,
    /// In the configuration's order.
    pub aliases: &'a [Arc<Alias>],
    pub sockets: &'a ListenSockets,
    /// For hosts of the forward proxy that are not an alias.
    pub passthrough: Option<Passthrough>,
    pub credentials: Option<Arc<Credentials>>,
    pub certificates: ServerCertificates,
    /// The drain of the process.
    pub drain: &'a Drain,
}

impl Parts<'_> {
    /// Creates the listeners. One that existed `before` keeps its id, even at another address.
    pub fn serving(self, before: &Serving) -> Serving {
        let settings = Arc::new(self.config.listener.clone());
        let mut known = Known::new(before, self.drain);
        let shared = shared(self.aliases);
        let ids = known.aliases(&shared);
        let mut serving =
            Serving { certificates: Arc::new(self.certificates), ..Serving::default() };
        let mut at: HashMap<Purpose, Arc<Listener>> = HashMap::new();
        for ((address, aliases), identity) in shared.into_iter().zip(ids) {
            let service = Service::of_aliases(&aliases);
            let listener = Arc::new(identity.listener(address, service, settings.clone()));
            at.insert(Purpose::Aliases(address), listener);
        }
        if let Some(purpose) = self.config.proxy.listen.map(Purpose::Proxy)
            && let Some(address) = self.sockets.address(purpose)
        {
            let identity = known.forward_proxy();
            let service = Service::ForwardProxy(ForwardProxy {
                aliases: known.reached(self.aliases, &at, &settings),
                passthrough: self.passthrough,
                credentials: self.credentials,
            });
            at.insert(purpose, Arc::new(identity.listener(address, service, settings)));
        }
        serving.sockets = self.sockets.uses(|purpose| at.get(&purpose).map(|at| at.id));
        serving.listeners = at.into_values().map(|listener| (listener.id, listener)).collect();
        serving
    }
}

/// The aliases of each address, in the configuration's order.
fn shared(aliases: &[Arc<Alias>]) -> Vec<(SocketAddr, Vec<Arc<Alias>>)> {
    let mut shared: Vec<(SocketAddr, Vec<Arc<Alias>>)> = Vec::new();
    let mut index: HashMap<SocketAddr, usize> = HashMap::new();
    for alias in aliases {
        for address in listens(alias) {
            let nth = *index.entry(address).or_insert_with(|| {
                shared.push((address, Vec::new()));
                shared.len() - 1
            });
            shared[nth].1.push(alias.clone());
        }
    }
    shared
}

/// The addresses of an alias.
fn listens(alias: &Alias) -> impl Iterator<Item = SocketAddr> {
    let config = alias.config();
    let listen = &config.listen;
    // Only aliases of HTTP can share a listener.
    let unbound = listen.is_empty() && config.protocol == Protocol::Http;
    let unbound = unbound.then_some(UNBOUND);
    listen.iter().copied().chain(unbound)
}

/// What a listener keeps across configurations.
struct Identity {
    id: ListenerId,
    drain: Drain,
    /// Of a listener that existed before.
    widest: Option<SocketAddr>,
}

impl Identity {
    fn listener(
        self,
        address: SocketAddr,
        service: Service,
        settings: Arc<config::Listener>,
    ) -> Listener {
        let widest = self.widest.filter(|widest| !includes(address, *widest)).unwrap_or(address);
        Listener { id: self.id, address, widest, service, settings, drain: self.drain }
    }
}

/// The listeners that existed before and have not been matched yet.
struct Known<'a> {
    /// The listeners of aliases. No two have the same address.
    by_address: HashMap<SocketAddr, &'a Listener>,
    forward_proxy: Option<&'a Listener>,
    drain: &'a Drain,
}

impl<'a> Known<'a> {
    fn new(before: &'a Serving, drain: &'a Drain) -> Self {
        let mut known = Self { by_address: HashMap::new(), forward_proxy: None, drain };
        for listener in before.listeners.values() {
            match listener.service {
                Service::Http(_) | Service::Alias(..) => {
                    known.by_address.insert(listener.address, listener);
                }
                Service::ForwardProxy(_) => known.forward_proxy = Some(listener),
            }
        }
        known
    }

    /// The identities of the listeners of aliases. A listener with an alias of a previous one continues it:
    /// one with the same address, or else one at any address.
    fn aliases(&mut self, shared: &[(SocketAddr, Vec<Arc<Alias>>)]) -> Vec<Identity> {
        let stay = shared.iter().map(|(address, aliases)| {
            let old = self.by_address.get(address).filter(|old| has_any(old, aliases))?;
            let same = may_follow(old, *address, aliases).then(|| same(old))?;
            self.by_address.remove(address);
            Some(same)
        });
        let mut found: Vec<_> = stay.collect();
        let mut by_alias: HashMap<String, BTreeSet<SocketAddr>> = HashMap::new();
        for (address, old) in self.by_address.iter().filter(|(address, _)| **address != UNBOUND) {
            for name in names(old.routes().aliases()) {
                by_alias.entry(name.to_owned()).or_default().insert(*address);
            }
        }
        for (found, (address, aliases)) in found.iter_mut().zip(shared) {
            if found.is_none() && *address != UNBOUND {
                let mut addresses = names(aliases).filter_map(|name| by_alias.get(name)).flatten();
                let old = addresses.find(|old| {
                    let old = self.by_address.get(old);
                    old.is_some_and(|old| may_follow(old, *address, aliases))
                });
                *found = old.and_then(|old| self.by_address.remove(old)).map(same);
            }
        }
        found.into_iter().map(|found| found.unwrap_or_else(|| self.new_one())).collect()
    }

    fn forward_proxy(&self) -> Identity {
        self.forward_proxy.map_or_else(|| self.new_one(), same)
    }

    /// The aliases that the forward proxy reaches, by their names that do not depend on DNS.
    fn reached(
        &self,
        aliases: &[Arc<Alias>],
        at: &HashMap<Purpose, Arc<Listener>>,
        settings: &Arc<config::Listener>,
    ) -> foldhash::HashMap<String, Reached> {
        let mut reached = foldhash::HashMap::default();
        let listeners: Vec<_> =
            aliases.iter().map(|alias| self.listener(alias, at, settings)).collect();
        // As for the routes of a listener, an alias' own name comes before the forms of others' names.
        let own = aliases.iter().map(|alias| slice::from_ref(&alias.config().name));
        let all = aliases.iter().map(|alias| alias.hosts());
        let both = aliases.iter().zip(&listeners);
        for ((alias, listener), names) in both.clone().zip(own).chain(both.zip(all)) {
            for host in names {
                let found = || Reached { alias: alias.clone(), listener: listener.clone() };
                reached.entry(host.clone()).or_insert_with(found);
            }
        }
        reached
    }

    /// The listener whose rules apply to tunnels to an alias. An alias of another protocol than HTTP without a `listen`
    /// gets one that only the forward proxy knows.
    fn listener(
        &self,
        alias: &Arc<Alias>,
        at: &HashMap<Purpose, Arc<Listener>>,
        settings: &Arc<config::Listener>,
    ) -> Arc<Listener> {
        let first = listens(alias).next();
        let bound = first.and_then(|first| at.get(&Purpose::Aliases(first)));
        bound.cloned().unwrap_or_else(|| {
            let service = Service::of_aliases(slice::from_ref(alias));
            Arc::new(self.new_one().listener(UNBOUND, service, settings.clone()))
        })
    }

    fn new_one(&self) -> Identity {
        Identity { id: ListenerId::unique(), drain: self.drain.of_part(), widest: None }
    }
}

fn same(old: &Listener) -> Identity {
    Identity { id: old.id, drain: old.drain.clone(), widest: Some(old.widest) }
}

/// Whether connections may follow their listener to an address. If the address does not include all addresses that
/// they may have connected to, they must not reach other aliases than before.
fn may_follow(old: &Listener, address: SocketAddr, aliases: &[Arc<Alias>]) -> bool {
    let before: HashSet<&str> = names(old.routes().aliases()).collect();
    // A connection cannot change from HTTP to another protocol.
    let is_http = aliases.iter().all(|alias| alias.config().protocol == Protocol::Http);
    if is_http == old.alias().is_some() {
        return false;
    }
    includes(address, old.widest) || names(aliases).all(|name| before.contains(name))
}

/// Whether clients that can reach `inner` can reach `outer`, regardless of ports.
fn includes(outer: SocketAddr, inner: SocketAddr) -> bool {
    let at_port = |address: SocketAddr| SocketAddr::new(address.ip(), 0);
    covers(at_port(outer), false, at_port(inner))
}

fn has_any(listener: &Listener, aliases: &[Arc<Alias>]) -> bool {
    let old: HashSet<&str> = names(listener.routes().aliases()).collect();
    names(aliases).any(|name| old.contains(name))
}

fn names(aliases: &[Arc<Alias>]) -> impl Iterator<Item = &str> {
    aliases.iter().map(|alias| alias.config().name.as_str())
}
