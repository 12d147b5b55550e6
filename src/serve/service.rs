//! What a connection is for, which its listener says before the first byte.

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

/// The address of the listener of aliases that have none, and are reached by the forward proxy only: no
/// socket can have it.
pub const UNBOUND: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::BROADCAST), 0);

/// All that workers read. Immutable, and replaced whole.
#[derive(Default)]
pub struct Serving {
    /// The listeners.
    pub listeners: HashMap<ListenerId, Arc<Listener>>,
    /// The sockets that their connections come by.
    pub sockets: HashMap<ListenSocketId, ListenSocketUse>,
    /// What clients are shown that speak TLS.
    pub certificates: Arc<ServerCertificates>,
}

/// A listener as it is configured.
pub struct Listener {
    /// Which listener.
    pub id: ListenerId,
    /// As configured; of the forward proxy, as bound.
    pub address: SocketAddr,
    /// The widest address that connections of it may have come to, before a reload narrowed it.
    pub widest: SocketAddr,
    /// What its connections are for.
    pub service: Service,
    /// What holds for all listeners.
    pub settings: Arc<config::Listener>,
    /// Ends what came by it, once it is removed. The same in all configurations that have it.
    pub drain: Drain,
}

/// What connections are for.
///
/// One alias of another protocol, and connections that were redirected here, get a variant each.
pub enum Service {
    /// HTTP requests for aliases, by `Host`.
    Http(Routes),
    /// HTTP requests that say whom they are for, and tunnels.
    ForwardProxy(ForwardProxy),
}

/// The forward proxy, as configured.
pub struct ForwardProxy {
    /// The aliases, by the names that are theirs whatever DNS says. A true name is none of them: who tells
    /// a proxy the vendor's name means the vendor.
    pub aliases: HashMap<String, Reached>,
    /// The way to hosts that are no alias; `None` where they are refused.
    pub passthrough: Option<Passthrough>,
    /// What clients have to know; `None` where nothing is asked of them.
    pub credentials: Option<Arc<Credentials>>,
}

/// An alias that is reached by the forward proxy.
#[derive(Clone)]
pub struct Reached {
    /// The alias.
    pub alias: Arc<Alias>,
    /// The listener as whose connections tunnels to it are served.
    pub listener: Arc<Listener>,
}

impl Serving {
    /// The listener of a new connection; `None` where nobody listens there any more.
    pub fn listener_of(
        &self,
        socket: ListenSocketId,
        stream: &TcpStream,
    ) -> Option<&Arc<Listener>> {
        self.listeners.get(&self.sockets.get(&socket)?.listener(stream)?)
    }

    /// The forward proxy, where there is one.
    pub fn forward_proxy(&self) -> Option<&ForwardProxy> {
        self.listeners.values().find_map(|listener| match &listener.service {
            Service::ForwardProxy(proxy) => Some(proxy),
            Service::Http(_) => None,
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

impl Listener {
    /// The aliases that its connections are for.
    pub fn routes(&self) -> &Routes {
        match &self.service {
            Service::Http(routes) => routes,
            Service::ForwardProxy(_) => Routes::none(),
        }
    }

    /// The keep-alive of its connections.
    pub(super) fn keepalive(&self) -> Duration {
        match &self.service {
            Service::Http(routes) => routes.keepalive(),
            Service::ForwardProxy(_) => config::Timeouts::default().keepalive,
        }
    }
}
