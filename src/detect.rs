//! What a client speaks, from its first bytes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout_at},
};

/// RFC 9113 §3.4.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The content type of a handshake record (RFC 8446 §5.1): no HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// What the first read takes: a usual request whole.
const FIRST_READ: usize = 4096;

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS handshake record.
    Tls,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1, or something that an HTTP/1 parser will refuse.
    Http1,
}

/// Why nothing was detected.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// The client left without a word, as a port check does.
    #[error("the client closed the connection without a word")]
    Silent,
    /// The first bytes did not come by `listener.header_timeout`.
    #[error("the client said too little within `listener.header_timeout`")]
    Timeout,
    /// The connection broke.
    #[error("reading the first bytes: {0}")]
    Io(#[from] io::Error),
}

/// Reads as little as decides, and gives the stream back with what was read in front.
pub async fn detect(
    mut stream: TcpStream,
    deadline: Instant,
) -> Result<(Protocol, Prefixed<TcpStream>), DetectError> {
    let timed_out = |_| DetectError::Timeout;
    // The buffer is not allocated before there is something to put into it.
    timeout_at(deadline, stream.readable()).await.map_err(timed_out)??;
    let mut prefix = BytesMut::with_capacity(FIRST_READ);
    loop {
        let read =
            timeout_at(deadline, stream.read_buf(&mut prefix)).await.map_err(timed_out)??;
        if read == 0 && prefix.is_empty() {
            return Err(DetectError::Silent);
        }
        match classify(&prefix) {
            // An end in the middle of a preface is for the HTTP/1 parser to complain about.
            None if read > 0 => {}
            protocol => {
                let protocol = protocol.unwrap_or(Protocol::Http1);
                return Ok((protocol, Prefixed { prefix: prefix.freeze(), stream }));
            }
        }
    }
}

/// The protocol that begins with `bytes`; `None` while more bytes are needed.
pub fn classify(bytes: &[u8]) -> Option<Protocol> {
    let first = *bytes.first()?;
    if first == TLS_HANDSHAKE {
        return Some(Protocol::Tls);
    }
    let compared = bytes.len().min(HTTP2_PREFACE.len());
    if bytes[..compared] != HTTP2_PREFACE[..compared] {
        return Some(Protocol::Http1);
    }
    (compared == HTTP2_PREFACE.len()).then_some(Protocol::Http2)
}

/// A stream with the bytes that were read from it already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
    /// What was read already, and the stream beneath.
    pub fn into_parts(self) -> (Bytes, S) {
        (self.prefix, self.stream)
    }

    /// The stream beneath.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..length]);
        self.prefix.advance(length);
        if self.prefix.is_empty() {
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preface_is_known_at_its_last_byte_and_a_method_at_its_first_difference() {
        for length in 0..HTTP2_PREFACE.len() {
            assert_eq!(classify(&HTTP2_PREFACE[..length]), None, "{length}");
        }
        assert_eq!(classify(HTTP2_PREFACE), Some(Protocol::Http2));
        assert_eq!(classify(b"G"), Some(Protocol::Http1));
        assert_eq!(classify(b"PO"), Some(Protocol::Http1));
        assert_eq!(classify(b"PRI * HTTP/1"), Some(Protocol::Http1));
        assert_eq!(classify(&[0x16]), Some(Protocol::Tls));
    }
}
