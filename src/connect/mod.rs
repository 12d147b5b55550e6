//! From an endpoint to a byte stream that speaks to it: policy, TCP, and TLS over it, under one
//! deadline. One endpoint, and nothing is remembered of it: no permits, no counts, no failures.

mod deadline;
mod policy;
mod session;
mod verdict;
mod wire;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::errno::Errno;
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::Instant};

pub use deadline::Deadline;
pub use policy::{AddressPolicy, Denied};
pub use session::{Facts, Session, TargetStream};
pub use verdict::Verdict;
pub use wire::{Mark, Wire, WireStream};

use crate::tls::{self, Alpn, ClientTls, Negotiated, TlsError};

/// One endpoint to connect to.
#[derive(Clone, Copy)]
pub struct ConnectRequest<'a> {
    /// Its address.
    pub endpoint: SocketAddr,
    /// Whether it may be dialled.
    pub policy: &'a AddressPolicy,
    /// `timeouts.keepalive`.
    pub keepalive: Duration,
    /// By when the connection must be there, TLS included.
    pub deadline: Deadline,
}

/// A connection that could not be made. No byte of any request has left.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// `policy` or the loop check forbids the address.
    #[error("{0}")]
    Denied(#[from] Denied),
    /// The TCP connection failed.
    #[error("connecting to {endpoint}: {source}")]
    Tcp {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// TCP and TLS together took longer than `timeouts.connect`.
    #[error("{} with {endpoint} took longer than {limit:?}", if *tcp_done { "the TLS handshake" } else { "connecting" })]
    Timeout {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// `timeouts.connect`.
        limit: Duration,
        /// Whether TCP was up and TLS was not.
        tcp_done: bool,
    },
    /// The TLS handshake failed.
    #[error("TLS with {endpoint}: {source}")]
    Tls {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// Why.
        source: TlsError,
    },
}

impl ConnectError {
    /// Whether it was this process or machine that lacked something: that says nothing of the endpoint.
    pub fn is_own_lack(&self) -> bool {
        let Self::Tcp { source, .. } = self else { return false };
        let lacks = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
        source.raw_os_error().is_some_and(|error| lacks.contains(&Errno::from_raw(error)))
    }

    /// Who was dialled, or was not.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        match self {
            Self::Denied(denied) => Some(denied.endpoint()),
            Self::Tcp { endpoint, .. }
            | Self::Timeout { endpoint, .. }
            | Self::Tls { endpoint, .. } => Some(*endpoint),
        }
    }

    /// Whether another endpoint of the same target may do better.
    ///
    /// A certificate that is wrong counts too: one of several addresses may be misconfigured.
    pub fn is_worth_another_endpoint(&self) -> bool {
        !matches!(self, Self::Tls { source: TlsError::Name { .. }, .. })
    }
}

/// What to say in the handshake.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    /// The settings, loaded.
    pub tls: &'a ClientTls,
    /// The true name, as TLS wants it.
    pub server_name: &'a ServerName<'static>,
    /// The application protocols to offer.
    pub alpn: Alpn,
}

/// A TCP connection to an endpoint. Nothing was said on it, and nobody was verified.
#[derive(Debug)]
pub struct Opened {
    endpoint: SocketAddr,
    stream: WireStream,
    wire: Arc<Wire>,
    tcp_time: Duration,
}

/// Dials an endpoint, where the policy allows it.
pub async fn open(request: &ConnectRequest<'_>) -> Result<Opened, ConnectError> {
    let ConnectRequest { endpoint, policy, keepalive, deadline } = *request;
    policy.check(endpoint)?;
    let started = Instant::now();
    let tcp = |source| ConnectError::Tcp { endpoint, source };
    // An IPv4-mapped address needs no IPv6, which may be switched off here.
    let address = match endpoint.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), endpoint.port()),
        IpAddr::V6(_) => endpoint,
    };
    let Some(stream) = deadline.within(TcpStream::connect(address)).await else {
        return Err(ConnectError::Timeout { endpoint, limit: deadline.limit(), tcp_done: false });
    };
    let stream = stream.map_err(tcp)?;
    if let Ok(local) = stream.local_addr() {
        // A port that dialled itself (simultaneous open on loopback) echoes instead of answering.
        if local == address {
            return Err(tcp(io::ErrorKind::ConnectionRefused.into()));
        }
        policy.check_connected(local, address)?;
    }
    stream.set_nodelay(true).map_err(tcp)?;
    let (stream, wire) = Wire::new(stream);
    wire.socket().watch(keepalive).map_err(tcp)?;
    Ok(Opened { endpoint, stream, wire, tcp_time: started.elapsed() })
}

impl Opened {
    /// Makes TLS and verifies who is there; without an identity, takes the connection as it is.
    pub async fn verify(
        self,
        identity: Option<Identity<'_>>,
        deadline: Deadline,
    ) -> Result<Session, ConnectError> {
        let Self { endpoint, stream, wire, tcp_time } = self;
        let Some(Identity { tls, server_name, alpn }) = identity else {
            let facts = Facts {
                alpn: Negotiated::None,
                tls_version: None,
                resumed: false,
                not_after: None,
                tcp_time,
                tls_time: Duration::ZERO,
            };
            return Ok(Session { stream: TargetStream::Plain(stream), wire, facts });
        };
        let started = Instant::now();
        let handshake = deadline.within(tls::handshake(stream, tls, alpn, server_name)).await;
        let Some(handshake) = handshake else {
            return Err(ConnectError::Timeout {
                endpoint,
                limit: deadline.limit(),
                tcp_done: true,
            });
        };
        let handshake = handshake.map_err(|source| ConnectError::Tls { endpoint, source })?;
        let facts = Facts {
            alpn: handshake.alpn,
            tls_version: Some(handshake.version),
            resumed: handshake.resumed,
            not_after: handshake.not_after,
            tcp_time,
            tls_time: started.elapsed(),
        };
        let stream = TargetStream::Tls(Box::new(handshake.stream));
        Ok(Session { stream, wire, facts })
    }
}
