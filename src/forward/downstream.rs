//! The side that a request comes from.

use std::{net::SocketAddr, sync::Arc};

use crate::{
    drain::Drain, proxy_header::Addresses, telemetry::DownstreamConnection, upstream::Caller,
};

/// What an exchange knows of the client's connection.
#[derive(Clone, Debug)]
pub struct Downstream {
    /// The listener, as configured.
    pub listener: SocketAddr,
    /// The application's connection. If it began with a PROXY header, this is what the header says.
    pub client: Arc<Addresses>,
    /// The socket's own address, whatever a PROXY header says.
    pub local: SocketAddr,
    /// `http`, or `https` on TLS.
    pub scheme: &'static str,
    /// The SNI, if the application sent one.
    pub server_name: Option<String>,
    /// The worker that serves the connection.
    pub worker: usize,
    /// Tunnels hold a guard of it, so that a drain waits for them.
    pub drain: Drain,
    /// Whether the client can switch to another protocol on it; a call by the library cannot.
    pub can_switch: bool,
    /// The connection in the metrics; none for calls by the library.
    pub connection: Option<Arc<DownstreamConnection>>,
}

impl Downstream {
    /// Whom connections to a target are made for.
    pub(super) fn caller(&self) -> Caller<'_> {
        // Nobody has connected for a call by the library.
        let client = self.connection.is_some().then_some(&self.client);
        Caller { worker: self.worker, client }
    }
}
