//! From a listener and a Host to the alias that serves it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

// Clients choose what is looked up, and nothing of what is kept: no defence against collisions made
// on purpose is needed.
use foldhash::{HashMap, HashMapExt};

use crate::upstream::Upstream;

/// Stands for the listener of aliases that have none, and are reached by the forward proxy only:
/// no socket can have this address.
const UNBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::BROADCAST), 0);

/// Every listener's aliases. Immutable: a reload makes a new one.
#[derive(Default)]
pub struct Routes {
    listeners: HashMap<SocketAddr, ListenerRoutes>,
    /// By the names that are theirs whatever DNS says.
    aliases: HashMap<String, Arc<Upstream>>,
}

#[derive(Default)]
struct ListenerRoutes {
    by_host: HashMap<String, Arc<Upstream>>,
    upstreams: Vec<Arc<Upstream>>,
    /// The alias whose `hosts` say `*`.
    any: Option<Arc<Upstream>>,
    /// The longest `timeouts.keepalive` of its aliases.
    keepalive: Duration,
}

/// Nobody answers to a Host. That is what stops a web page whose name was rebound to loopback.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} is not a name that this listener serves; it serves {}",
    .host.as_ref().map_or("a request without Host".into(), |host| format!("`{host}`")),
    if .served.is_empty() { "none".into() } else { .served.join(", ") })]
pub struct RouteError {
    host: Option<String>,
    served: Vec<String>,
}

impl RouteError {
    /// What mends it.
    pub fn fix(&self) -> String {
        match &self.host {
            Some(host) => {
                format!("ask for one of the names served, or add \"{host}\" to the alias' `hosts`")
            }
            None => "send a Host".into(),
        }
    }
}

impl Routes {
    /// The routes of these aliases, each on the listeners that its configuration names.
    pub fn new(upstreams: &[Arc<Upstream>]) -> Self {
        let mut listeners: HashMap<SocketAddr, ListenerRoutes> = HashMap::new();
        let mut aliases = HashMap::new();
        for upstream in upstreams {
            for host in upstream.hosts() {
                aliases.entry(host.clone()).or_insert_with(|| upstream.clone());
            }
            let unbound = upstream.config().listen.is_empty().then_some(UNBOUND);
            for listen in upstream.config().listen.iter().copied().chain(unbound) {
                let routes = listeners.entry(listen).or_default();
                routes.upstreams.push(upstream.clone());
                routes.keepalive = routes.keepalive.max(upstream.config().timeouts.keepalive);
                for host in upstream.hosts() {
                    // The alias listed first keeps a name that two could claim.
                    routes.by_host.entry(host.clone()).or_insert_with(|| upstream.clone());
                }
                if upstream.config().hosts.iter().any(|host| host == "*") {
                    routes.any.get_or_insert_with(|| upstream.clone());
                }
            }
        }
        Self { listeners, aliases }
    }

    /// The alias that serves `host` (without port, in any case) on `listener`, whose address is
    /// `local`.
    pub fn find(
        &self,
        listener: SocketAddr,
        local: IpAddr,
        host: Option<&str>,
    ) -> Result<Arc<Upstream>, RouteError> {
        let Some(routes) = self.listeners.get(&listener) else {
            return Err(RouteError { host: host.map(Into::into), served: Vec::new() });
        };
        match host {
            Some(host) => routes.find(local, host),
            None => routes.only().or(routes.any.as_ref()).cloned(),
        }
        .ok_or_else(|| RouteError { host: host.map(Into::into), served: routes.served() })
    }

    /// The alias that the forward proxy knows `host` (in lower case, without the final dot) by. A
    /// true name is none of its names here: who tells a proxy the vendor's name means the vendor.
    pub fn alias(&self, host: &str) -> Option<&Arc<Upstream>> {
        self.aliases.get(host)
    }

    /// The longest `timeouts.keepalive` of a listener's aliases.
    pub fn keepalive(&self, listener: SocketAddr) -> Option<Duration> {
        self.listeners.get(&listener).map(|routes| routes.keepalive)
    }

    /// The listener as which the tunnels of an alias are served.
    pub fn entrance(upstream: &Upstream) -> SocketAddr {
        upstream.config().listen.first().copied().unwrap_or(UNBOUND)
    }

    /// The alias of `listener` whose certificate a client is shown that gave this name by SNI, and whether
    /// the listener answers to any name. Without a name, it is the listener's first alias.
    pub fn shown(
        &self,
        listener: SocketAddr,
        name: Option<&str>,
    ) -> Option<(&Arc<Upstream>, bool)> {
        let routes = self.listeners.get(&listener)?;
        let Some(name) = name else { return Some((routes.upstreams.first()?, false)) };
        let folded = folded(name);
        let by_true_name = || routes.upstreams.iter().find(|u| u.is_true_name(&folded));
        let known = routes.by_host.get(&folded).or_else(by_true_name);
        let local = || routes.only().filter(|_| folded == "localhost");
        let upstream = known.or_else(local).or(routes.any.as_ref())?;
        Some((upstream, routes.any.is_some()))
    }

    /// The names that a listener answers to whatever DNS says, in order.
    pub fn names(&self, listener: SocketAddr) -> Vec<String> {
        let routes = self.listeners.get(&listener);
        let mut names: Vec<String> =
            routes.into_iter().flat_map(|routes| routes.by_host.keys().cloned()).collect();
        names.sort();
        names
    }

    /// The aliases of a listener.
    pub fn upstreams(&self, listener: SocketAddr) -> &[Arc<Upstream>] {
        self.listeners.get(&listener).map_or(&[], |routes| &routes.upstreams)
    }
}

impl ListenerRoutes {
    fn find(&self, local: IpAddr, host: &str) -> Option<Arc<Upstream>> {
        if let Some(upstream) = self.by_host.get(host) {
            return Some(upstream.clone());
        }
        let host = folded(host);
        let by_true_name = || self.upstreams.iter().find(|upstream| upstream.is_true_name(&host));
        self.by_host
            .get(&host)
            .or_else(by_true_name)
            .or_else(|| self.only().filter(|_| is_own(local, &host)))
            .or(self.any.as_ref())
            .cloned()
    }

    /// The alias of a listener that has but one.
    fn only(&self) -> Option<&Arc<Upstream>> {
        match self.upstreams.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    fn served(&self) -> Vec<String> {
        self.upstreams.iter().map(|upstream| upstream.config().name.clone()).collect()
    }
}

/// Without the dot of an absolute name. Two dots make it no name at all.
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
