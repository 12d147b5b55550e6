//! What a connection is for, which its listener decides before the first byte.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use foldhash::HashMap;
use tokio::net::TcpStream;

use super::{
    Credentials,
    listen_socket::{ListenSocketId, ListenSocketUse, ListenerId},
};
use crate::{
    config, drain::Drain, forward::Passthrough, route::Routes, tls::server::ServerCertificates,
    upstream::Alias,
};

/// Stands for the listener of aliases without `listen`, which are reached through the forward proxy only: no
/// socket can have this address.
pub const UNBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::BROADCAST), 0);

/// Everything workers read from the configuration. Immutable, and replaced as a whole.
#[derive(Default)]
pub struct Serving {
    /// The listeners.
    pub listeners: HashMap<ListenerId, Arc<Listener>>,
    /// The sockets that their connections arrive on.
    pub sockets: HashMap<ListenSocketId, ListenSocketUse>,
    /// The certificates shown to clients that speak TLS.
    pub certificates: Arc<ServerCertificates>,
}

/// A listener as it is configured.
pub struct Listener {
    /// Which listener.
    pub id: ListenerId,
    /// As configured; for the forward proxy, as bound.
    pub address: SocketAddr,
    /// The widest address that its open connections may have arrived on, before a reload narrowed it.
    pub widest: SocketAddr,
    /// What its connections are for.
    pub service: Service,
    /// The settings that all listeners share.
    pub settings: Arc<config::Listener>,
    /// Ends its connections once it is removed. The same in all configurations that have the listener.
    pub drain: Drain,
}

/// What connections are for.
///
/// Redirected connections will get a variant of their own.
pub enum Service {
    /// HTTP requests for aliases, by `Host`.
    Http(Routes),
    /// One alias of another protocol. The routes lead to it alone, and have the names of its certificates.
    Alias(Arc<Alias>, Routes),
    /// HTTP requests that name their destination, and tunnels.
    ForwardProxy(ForwardProxy),
}

/// The forward proxy, as configured.
pub struct ForwardProxy {
    /// The aliases, by their own names. True names are not among them: a client that gives a proxy the
    /// vendor's name means the vendor.
    pub aliases: HashMap<String, Reached>,
    /// For hosts that are not aliases; `None` if they are refused.
    pub passthrough: Option<Passthrough>,
    /// The credentials that clients need; `None` if none are required.
    pub credentials: Option<Arc<Credentials>>,
}

/// An alias that is reached through the forward proxy.
#[derive(Clone)]
pub struct Reached {
    /// The alias.
    pub alias: Arc<Alias>,
    /// The listener whose settings tunnels to it are served with.
    pub listener: Arc<Listener>,
}

impl Serving {
    /// The listener of a new connection; `None` if there no longer is one.
    pub fn listener_of(
        &self,
        socket: ListenSocketId,
        stream: &TcpStream,
    ) -> Option<&Arc<Listener>> {
        self.listeners.get(&self.sockets.get(&socket)?.listener(stream)?)
    }

    /// The forward proxy, if there is one.
    pub fn forward_proxy(&self) -> Option<&ForwardProxy> {
        self.listeners.values().find_map(|listener| match &listener.service {
            Service::ForwardProxy(proxy) => Some(proxy),
            Service::Http(_) | Service::Alias(..) => None,
        })
    }

    /// The same with other certificates.
    pub fn showing(&self, certificates: ServerCertificates) -> Self {
        Self {
            listeners: self.listeners.clone(),
            sockets: self.sockets.clone(),
            certificates: Arc::new(certificates),
        }
    }
}

impl Service {
    /// The service of a listener with these aliases, which are all HTTP, or one of another protocol.
    pub fn of_aliases(aliases: &[Arc<Alias>]) -> Self {
        let routes = Routes::new(aliases);
        match aliases {
            [alias] if alias.config().protocol != config::Protocol::Http => {
                Self::Alias(alias.clone(), routes)
            }
            _ => Self::Http(routes),
        }
    }
}

impl Listener {
    /// The alias of another protocol than HTTP that all its connections are for, if there is one.
    pub fn alias(&self) -> Option<&Arc<Alias>> {
        match &self.service {
            Service::Alias(alias, _) => Some(alias),
            Service::Http(_) | Service::ForwardProxy(_) => None,
        }
    }

    /// The aliases that its connections are for.
    pub fn routes(&self) -> &Routes {
        match &self.service {
            Service::Http(routes) | Service::Alias(_, routes) => routes,
            Service::ForwardProxy(_) => Routes::none(),
        }
    }

    /// Whether connections from this address begin with a PROXY header. All aliases of a listener agree on that: the
    /// configuration is checked for it.
    pub(super) fn has_proxy_header(&self, from: IpAddr) -> bool {
        self.routes().aliases().first().is_some_and(|alias| {
            let networks = &alias.config().proxy_protocol.accept;
            networks.iter().any(|network| network.contains(&from.to_canonical()))
        })
    }

    /// The keep-alive of its connections.
    pub(super) fn keepalive(&self) -> Duration {
        match &self.service {
            Service::Http(routes) | Service::Alias(_, routes) => routes.keepalive(),
            Service::ForwardProxy(_) => config::Timeouts::default().keepalive,
        }
    }
}
