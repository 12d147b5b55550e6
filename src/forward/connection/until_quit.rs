//! The end of a MySQL session.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    protocol::mysql::ClientPackets,
    stream::{ByteStream, Socket},
};

/// A connection to a MySQL server. Servers end TLS without `close_notify`: once the client has said that it ends the
/// session, or has closed its connection, that is no failure.
#[derive(Debug)]
pub(super) struct UntilQuit<T> {
    stream: T,
    packets: ClientPackets,
    has_closed: bool,
}

impl<T> UntilQuit<T> {
    pub(super) fn new(stream: T, packets: ClientPackets) -> Self {
        Self { stream, packets, has_closed: false }
    }

    fn may_end(&self) -> bool {
        self.has_closed || self.packets.has_quit()
    }
}

impl<T: ByteStream> ByteStream for UntilQuit<T> {
    fn socket(&self) -> Option<&Socket> {
        self.stream.socket()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for UntilQuit<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        let is_end = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
        };
        match result {
            Err(error) if self.may_end() && is_end(&error) => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for UntilQuit<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.packets.pass(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.has_closed = true;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
