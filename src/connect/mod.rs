//! From an endpoint to a byte stream that speaks to it: TCP, and TLS over it, under one deadline.

mod policy;
mod verdict;
mod wire;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use nix::errno::Errno;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::client::TlsStream;

pub use policy::{AddressPolicy, Denied};
pub use verdict::Verdict;
pub use wire::{Mark, Wire, WireStream};

use crate::{
    config::Timeouts,
    socket::{ByteStream, Socket},
    tls::{self, Alpn, ClientTls, Negotiated, TlsError},
};

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

/// A connection that is up; with TLS, one that is verified.
#[derive(Debug)]
pub struct Connected {
    /// The bytes of the application protocol.
    pub io: UpstreamIo,
    /// The socket beneath, for the pool's questions.
    pub wire: Arc<Wire>,
    /// How the connection came to be.
    pub facts: Facts,
}

/// What is known of a connection from its making.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The application protocol; [`Negotiated::None`] on plaintext.
    pub alpn: Negotiated,
    /// `None` on plaintext.
    pub tls_version: Option<&'static str>,
    /// Whether a TLS session was resumed.
    pub resumed: bool,
    /// Expiry of the server's certificate, in Unix seconds.
    pub not_after: Option<i64>,
    /// How long TCP took.
    pub tcp_time: Duration,
    /// How long TLS took, zero on plaintext.
    pub tls_time: Duration,
}

/// Dials `endpoint` and, with an identity, makes TLS to it; within `timeouts.connect` altogether. Sets
/// `up` as soon as TCP is.
pub async fn connect(
    endpoint: SocketAddr,
    identity: Option<Identity<'_>>,
    policy: &AddressPolicy,
    timeouts: &Timeouts,
    up: &AtomicBool,
) -> Result<Connected, ConnectError> {
    policy.check(endpoint)?;
    let limit = timeouts.connect;
    let started = Instant::now();
    let deadline = started + limit;

    // An IPv4-mapped address needs no IPv6, which may be switched off here.
    let address = match endpoint.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), endpoint.port()),
        IpAddr::V6(_) => endpoint,
    };
    let stream = match timeout_at(deadline, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(source)) => return Err(ConnectError::Tcp { endpoint, source }),
        Err(_) => return Err(ConnectError::Timeout { endpoint, limit, tcp_done: false }),
    };
    up.store(true, Ordering::Relaxed);
    if let Ok(local) = stream.local_addr() {
        // A port that dialled itself (simultaneous open on loopback) echoes instead of answering.
        if local == address {
            let source = io::Error::from(io::ErrorKind::ConnectionRefused);
            return Err(ConnectError::Tcp { endpoint, source });
        }
        policy.check_connected(local, address)?;
    }
    stream.set_nodelay(true).map_err(|source| ConnectError::Tcp { endpoint, source })?;
    let (stream, wire) = Wire::new(stream);
    let watched = wire.socket().watch(timeouts.keepalive);
    watched.map_err(|source| ConnectError::Tcp { endpoint, source })?;
    let tcp_time = started.elapsed();

    let Some(Identity { tls, server_name, alpn }) = identity else {
        let facts = Facts {
            alpn: Negotiated::None,
            tls_version: None,
            resumed: false,
            not_after: None,
            tcp_time,
            tls_time: Duration::ZERO,
        };
        return Ok(Connected { io: UpstreamIo::Plain(stream), wire, facts });
    };
    let handshake = tls::handshake(stream, tls, alpn, server_name);
    let handshake = match timeout_at(deadline, handshake).await {
        Ok(Ok(handshake)) => handshake,
        Ok(Err(source)) => return Err(ConnectError::Tls { endpoint, source }),
        Err(_) => return Err(ConnectError::Timeout { endpoint, limit, tcp_done: true }),
    };
    let facts = Facts {
        alpn: handshake.alpn,
        tls_version: Some(handshake.version),
        resumed: handshake.resumed,
        not_after: handshake.not_after,
        tcp_time,
        tls_time: started.elapsed().saturating_sub(tcp_time),
    };
    Ok(Connected { io: UpstreamIo::Tls(Box::new(handshake.stream)), wire, facts })
}

/// The upstream side of a connection: TLS, or bare TCP where `tls.mode` is `plaintext`.
#[derive(Debug)]
pub enum UpstreamIo {
    /// `tls.mode: plaintext`.
    Plain(WireStream),
    /// Verified TLS.
    Tls(Box<TlsStream<WireStream>>),
}

impl UpstreamIo {
    fn wire(&self) -> &Wire {
        match self {
            Self::Plain(io) => io.wire(),
            Self::Tls(io) => io.get_ref().0.wire(),
        }
    }
}

impl ByteStream for UpstreamIo {
    fn socket(&self) -> Option<&Socket> {
        Some(self.wire().socket())
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = match &mut *self {
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
        };
        let read = buf.filled().len() - before;
        self.wire().count_received(read);
        result
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Self::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(io) => io.is_write_vectored(),
            Self::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
