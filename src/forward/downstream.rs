//! The side that a request comes from.

use std::{net::SocketAddr, sync::Arc};

use crate::{drain::Drain, telemetry::DownstreamConnection};

/// What an exchange knows of the client's connection.
#[derive(Clone, Debug)]
pub struct Downstream {
    /// The listener, as configured.
    pub listener: SocketAddr,
    /// The application's end.
    pub peer: SocketAddr,
    /// Our end.
    pub local: SocketAddr,
    /// `http`, or `https` on TLS.
    pub scheme: &'static str,
    /// The name that the application asked for by TLS' SNI, if it did.
    pub server_name: Option<String>,
    /// The worker that serves the connection.
    pub worker: usize,
    /// What a tunnel must not outlive unnoticed.
    pub drain: Drain,
    /// The connection in the metrics; none where a program called without one.
    pub connection: Option<Arc<DownstreamConnection>>,
}
