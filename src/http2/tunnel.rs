//! A stream as a byte stream, after an extended CONNECT (RFC 8441).

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Gone, Incoming, Sender};
use crate::stream::{ByteStream, Socket};

/// How much is given to the stream at once.
const PIECE: usize = 16 * 1024;

/// Both sides of a stream. If dropped before both have ended, it resets the stream.
pub struct Tunnel {
    incoming: Option<Incoming>,
    /// Data that was received and not read yet.
    unread: Bytes,
    sender: Sender,
}

impl Tunnel {
    /// For a stream whose heads have passed. `incoming`: none if the peer's side ended with its head.
    pub fn new(incoming: Option<Incoming>, sender: Sender) -> Self {
        Self { incoming, unread: Bytes::new(), sender }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { incoming, unread, .. } = &mut *self;
        let Some(incoming) = incoming else { return Poll::Ready(Ok(())) };
        if unread.is_empty() {
            match ready!(incoming.poll_data(cx)) {
                Some(Ok(data)) => *unread = data,
                Some(Err(error)) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
                }
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = unread.len().min(buf.remaining());
        buf.put_slice(&unread[..length]);
        unread.advance(length);
        incoming.release(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wanted = bytes.len().min(PIECE);
        let length = ready!(self.sender.poll_ready(cx, wanted)).map_err(broken)?;
        let mut data = Bytes::copy_from_slice(&bytes[..length]);
        ready!(self.sender.poll_send(cx, &mut data, false)).map_err(broken)?;
        Poll::Ready(Ok(length))
    }

    /// Nothing is buffered here. Fails, and wakes its caller, once the peer has reset the stream.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.sender.poll_gone(cx) {
            Poll::Ready(()) => Poll::Ready(Err(broken(Gone))),
            Poll::Pending => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sender.poll_send(cx, &mut Bytes::new(), true).map_err(broken)
    }
}

impl ByteStream for Tunnel {
    fn socket(&self) -> Option<&Socket> {
        None
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").finish_non_exhaustive()
    }
}

fn broken(gone: Gone) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, gone)
}
