//! An established and, with TLS, verified connection: its stream, its socket and how it was made.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;

use super::{Wire, WireStream};
use crate::{
    stream::{ByteStream, Socket},
    tls::Negotiated,
};

/// A connection to a target, ready for the first byte of the application protocol.
#[derive(Debug)]
pub struct Session {
    /// The byte stream of the application protocol.
    pub stream: TargetStream,
    /// The underlying socket, for the pool.
    pub wire: Arc<Wire>,
    /// How the connection was made.
    pub facts: Facts,
    /// What the target has said already that is for the client.
    pub early: Bytes,
    /// Whether there is a proxy between.
    pub is_tunnel: bool,
}

/// How a connection was made.
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

/// The target's side: TLS, or plain TCP if `tls.mode` is `plaintext`.
#[derive(Debug)]
pub enum TargetStream {
    /// `tls.mode: plaintext`.
    Plain(WireStream),
    /// Verified TLS.
    Tls(Box<TlsStream<WireStream>>),
}

impl TargetStream {
    fn wire(&self) -> &Wire {
        match self {
            Self::Plain(io) => io.wire(),
            Self::Tls(io) => io.get_ref().0.wire(),
        }
    }
}

impl ByteStream for TargetStream {
    fn socket(&self) -> Option<&Socket> {
        Some(self.wire().socket())
    }
}

impl AsyncRead for TargetStream {
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

impl AsyncWrite for TargetStream {
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
