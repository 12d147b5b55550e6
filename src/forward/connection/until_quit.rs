//! The end of a MySQL session.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stream::{ByteStream, Socket};

/// The client ends its session. Compressed packets that are as short hold the same bytes.
const COM_QUIT: &[u8] = &[1, 0, 0, 0, 1];

/// A connection to a MySQL server. Servers end TLS without `close_notify`: once the client has said that it ends the
/// session, or has closed its connection, that is no failure.
#[derive(Debug)]
pub(super) struct UntilQuit<T> {
    stream: T,
    has_quit: bool,
}

impl<T> UntilQuit<T> {
    pub(super) fn new(stream: T) -> Self {
        Self { stream, has_quit: false }
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
            Err(error) if self.has_quit && is_end(&error) => Poll::Ready(Ok(())),
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
        self.has_quit = written == buf.len() && buf.ends_with(COM_QUIT);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.has_quit = true;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
