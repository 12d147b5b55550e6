//! Connects to one endpoint: policy, TCP and TLS, under one deadline. Nothing is remembered of it: no permits, no
//! counts, no failures.

mod deadline;
mod error;
mod policy;
mod session;
mod verdict;
mod via;
mod wire;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::Instant,
};

pub use deadline::Deadline;
pub use error::ConnectError;
pub use policy::{AddressPolicy, Denied};
pub use session::{Facts, Session, TargetStream};
pub use verdict::Verdict;
pub use via::{Destination, Secret, Via, ViaError};
pub use wire::{Mark, Wire, WireStream};

use crate::{
    fault::{Blame, Fault},
    protocol::{Opening, Step},
    tls::{self, Alpn, ClientTls, Negotiated},
};

/// One endpoint to connect to.
#[derive(Clone, Copy)]
pub struct ConnectRequest<'a> {
    /// Its address.
    pub endpoint: SocketAddr,
    /// Whether it may be dialled.
    pub policy: &'a AddressPolicy,
    /// `timeouts.keepalive`.
    pub keepalive: Duration,
    /// The deadline for the connection, including TLS.
    pub deadline: Deadline,
    /// The HTTP proxy to go through: `endpoint` is then an address of it.
    pub via: Option<Via<'a>>,
    /// The PROXY header to send to the target first.
    pub header: Option<&'a [u8]>,
}

/// What the handshake verifies and offers.
#[derive(Clone, Copy)]
pub struct Identity<'a> {
    /// The settings, loaded.
    pub tls: &'a ClientTls,
    /// The true name, as a server name of TLS.
    pub server_name: &'a ServerName<'static>,
    /// The application protocols to offer.
    pub alpn: Alpn,
}

/// A TCP connection to an endpoint, or through a proxy. Nothing of the application's was sent on it, and the endpoint is not verified.
#[derive(Debug)]
pub struct Opened {
    endpoint: SocketAddr,
    stream: WireStream,
    wire: Arc<Wire>,
    tcp_time: Duration,
    local: Option<IpAddr>,
    early: Bytes,
    /// The connection goes on to the target, behind the proxy.
    is_tunnel: bool,
}

/// Dials an endpoint, if the policy allows it.
pub async fn open(request: &ConnectRequest<'_>) -> Result<Opened, Fault> {
    let ConnectRequest { endpoint, policy, keepalive, deadline, via, .. } = *request;
    policy.check(endpoint).map_err(ConnectError::Denied)?;
    if let Some(address) = via.and_then(|via| via.destination.address()) {
        policy.check(address).map_err(ConnectError::Denied)?;
    }
    let started = Instant::now();
    let tcp = |source| match via {
        None => ConnectError::Tcp { endpoint, source },
        Some(via) => ConnectError::Proxy { endpoint, proxy: via.proxy.to_owned(), source },
    };
    // An IPv4-mapped address does not need IPv6, which may be disabled.
    let address = match endpoint.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), endpoint.port()),
        IpAddr::V6(_) => endpoint,
    };
    let Some(stream) = deadline.within(TcpStream::connect(address)).await else {
        let limit = deadline.limit();
        return Err(ConnectError::Timeout { endpoint, limit, tcp_done: false }.into());
    };
    let stream = stream.map_err(tcp)?;
    let local = stream.local_addr();
    if let Ok(local) = local {
        // A port that has dialled itself (a simultaneous open on loopback) would echo everything.
        if local == address {
            return Err(tcp(io::ErrorKind::ConnectionRefused.into()).into());
        }
        policy.check_connected(local, address).map_err(ConnectError::Denied)?;
    }
    stream.set_nodelay(true).map_err(tcp)?;
    let (stream, wire) = Wire::new(stream);
    wire.socket().watch(keepalive).map_err(tcp)?;
    Ok(Opened {
        endpoint,
        stream,
        wire,
        tcp_time: started.elapsed(),
        local: local.ok().map(|local| local.ip()),
        early: Bytes::new(),
        is_tunnel: false,
    })
}

impl Opened {
    /// Goes on through the proxy to the target, if there is one, and sends the PROXY header.
    pub async fn reach_target(&mut self, request: &ConnectRequest<'_>) -> Result<(), Fault> {
        let endpoint = self.endpoint;
        if let Some(via) = &request.via {
            let opens = via::open_tunnel(&mut self.stream, &self.wire, via);
            let limit = request.deadline.limit();
            let opened = request.deadline.within(opens).await;
            opened.unwrap_or(Err(ViaError::Late(limit))).map_err(|source| ConnectError::Via {
                endpoint,
                proxy: via.proxy.to_owned(),
                source,
            })?;
            self.is_tunnel = true;
        }
        if let Some(header) = request.header {
            // It fits into an empty socket's buffer.
            let sent = self.stream.write_all(header).await;
            sent.map_err(|source| self.fault(ConnectError::Tcp { endpoint, source }))?;
        }
        Ok(())
    }

    fn fault(&self, error: ConnectError) -> Fault {
        fault(error, self.is_tunnel)
    }

    /// Says what comes before TLS in its protocol. Nothing that the target sends before TLS is left behind it.
    pub async fn negotiate(
        &mut self,
        mut opening: Opening,
        deadline: Deadline,
    ) -> Result<(), Fault> {
        let endpoint = self.endpoint;
        if let Some(local) = self.local {
            opening.made_from(local);
        }
        let Some(opened) = deadline.within(self.run(&mut opening)).await else {
            let timeout = match opening.timed_out() {
                Some(source) => ConnectError::Opening { endpoint, source },
                None => {
                    let limit = deadline.limit();
                    ConnectError::Timeout { endpoint, limit, tcp_done: true }
                }
            };
            return Err(self.fault(timeout));
        };
        self.early = opened.map_err(|error| self.fault(error))?;
        Ok(())
    }

    /// Returns what the client is to have of it.
    async fn run(&mut self, opening: &mut Opening) -> Result<Bytes, ConnectError> {
        let endpoint = self.endpoint;
        let failed = |source| ConnectError::Opening { endpoint, source };
        let lost = |source| ConnectError::Negotiation { endpoint, source };
        let mut received = BytesMut::new();
        loop {
            match opening.next(&mut received).map_err(failed)? {
                Step::Send(bytes) => self.stream.write_all(&bytes).await.map_err(lost)?,
                Step::Receive => {
                    if self.stream.read_buf(&mut received).await.map_err(lost)? == 0 {
                        return Err(failed(opening.closed()));
                    }
                }
                Step::StartTls(early) => return Ok(early),
            }
        }
    }

    /// Completes TLS and verifies the endpoint; without an identity, uses the connection as it is.
    pub async fn verify(
        self,
        identity: Option<Identity<'_>>,
        deadline: Deadline,
    ) -> Result<Session, Fault> {
        let Self { endpoint, stream, wire, tcp_time, early, is_tunnel, .. } = self;
        let facts = Facts {
            alpn: Negotiated::None,
            tls_version: None,
            resumed: false,
            not_after: None,
            tcp_time,
            tls_time: Duration::ZERO,
        };
        let plain = Plain { stream, wire, facts, early, is_tunnel };
        match identity {
            Some(identity) => plain.verify(endpoint, identity, deadline).await,
            None => Ok(plain.into_session()),
        }
    }
}

/// A connection without TLS.
struct Plain {
    stream: WireStream,
    wire: Arc<Wire>,
    facts: Facts,
    early: Bytes,
    is_tunnel: bool,
}

impl Plain {
    fn into_session(self) -> Session {
        let Self { stream, wire, facts, early, is_tunnel } = self;
        Session { stream: TargetStream::Plain(stream), wire, facts, early, is_tunnel }
    }

    async fn verify(
        self,
        endpoint: SocketAddr,
        Identity { tls, server_name, alpn }: Identity<'_>,
        deadline: Deadline,
    ) -> Result<Session, Fault> {
        let Self { stream, wire, facts, early, is_tunnel } = self;
        let started = Instant::now();
        let handshake = deadline.within(tls::handshake(stream, tls, alpn, server_name)).await;
        let Some(handshake) = handshake else {
            let limit = deadline.limit();
            return Err(fault(
                ConnectError::Timeout { endpoint, limit, tcp_done: true },
                is_tunnel,
            ));
        };
        let failed = |source| fault(ConnectError::Tls { endpoint, source }, is_tunnel);
        let handshake = handshake.map_err(failed)?;
        let facts = Facts {
            alpn: handshake.alpn,
            tls_version: Some(handshake.version),
            resumed: handshake.resumed,
            not_after: handshake.not_after,
            tls_time: started.elapsed(),
            ..facts
        };
        let stream = TargetStream::Tls(Box::new(handshake.stream));
        Ok(Session { stream, wire, facts, early, is_tunnel })
    }
}

impl Session {
    /// Completes TLS on a connection that has none, where its protocol has it begin later, and verifies the endpoint.
    pub async fn verify(
        self,
        endpoint: SocketAddr,
        identity: Identity<'_>,
        deadline: Deadline,
    ) -> Result<Self, Fault> {
        let Self { stream, wire, facts, early, is_tunnel } = self;
        match stream {
            TargetStream::Plain(stream) => {
                Plain { stream, wire, facts, early, is_tunnel }
                    .verify(endpoint, identity, deadline)
                    .await
            }
            stream => Ok(Self { stream, wire, facts, early, is_tunnel }),
        }
    }
}

/// What fails behind a proxy is not the fault of the proxy, whose address the endpoint is.
fn fault(error: ConnectError, is_tunnel: bool) -> Fault {
    let mut diagnosis = error.diagnosis();
    if is_tunnel && diagnosis.blame == Blame::Endpoint {
        diagnosis.blame = Blame::Target;
    }
    Fault::new(diagnosis, error)
}

#[cfg(test)]
mod tests;
