//! A TCP socket that has an owner beside its byte stream: one who asks the kernel about it, or
//! closes it in the end. And a stream whose beginning was read before its reader came.

use std::{
    fmt::Debug,
    io,
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use nix::{getsockopt_impl, sockopt_impl, sys::socket::getsockopt};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

sockopt_impl!(
    /// Linux' `struct tcp_info`, as far as it is needed here.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    TcpState
);

/// The beginning of Linux' `struct tcp_info`, as it has been since 4.6.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TcpState {
    state: u8,
    _options: [u8; 7],
    _timeouts: [u32; 4],
    /// Segments that are sent and not acknowledged.
    unacknowledged: u32,
    _path: [u32; 19],
    _pacing: [u64; 2],
    _bytes: [u64; 2],
    _segments: [u32; 2],
    /// Bytes that are written and not sent.
    unsent: u32,
    _min_rtt: u32,
}

/// States of the kernel's machine (`net/tcp_states.h`) in which the peer has ended its side:
/// `TIME_WAIT`, `CLOSE`, `CLOSE_WAIT`, `LAST_ACK`, `CLOSING`.
const STATES_PEER_LEFT: [u8; 5] = [6, 7, 8, 9, 11];

/// `CLOSE`: reset, or ended by both sides.
const STATE_CLOSED: u8 = 7;

/// The socket, for writing and for questions. Its bytes are read from the other half.
///
/// tokio's own half reads, because it knows that a read which did not fill its buffer has emptied
/// the kernel's: one that goes through `try_read` asks once more for each read.
#[derive(Debug)]
pub struct Socket(Option<OwnedWriteHalf>);

impl Socket {
    /// The half to read from, and the socket.
    pub fn split(stream: TcpStream) -> (OwnedReadHalf, Self) {
        let (read, write) = stream.into_split();
        (read, Self(Some(write)))
    }

    /// The socket itself.
    pub fn stream(&self) -> &TcpStream {
        match &self.0 {
            Some(half) => half.as_ref(),
            None => unreachable!("taken by drop only"),
        }
    }

    /// Writes as soon as the kernel takes something, with `write`, which must not wait.
    pub fn poll_write(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let stream = self.stream();
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Writes several pieces at once. One alone, as TLS has it for most messages, goes the shorter
    /// way through the kernel.
    pub fn poll_write_vectored(
        &self,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match bufs {
            [only] => self.poll_write(cx, |stream| stream.try_write(only)),
            bufs => self.poll_write(cx, |stream| stream.try_write_vectored(bufs)),
        }
    }

    /// Whether the peer has ended its side, or is gone; what it sent before may be unread.
    pub fn has_peer_left(&self) -> bool {
        getsockopt(self.stream(), TcpInfo).is_ok_and(|info| STATES_PEER_LEFT.contains(&info.state))
    }

    /// Whether nothing that was written is still on its way to the peer's kernel, or never will be.
    pub fn is_delivered(&self) -> bool {
        getsockopt(self.stream(), TcpInfo).is_ok_and(|info| {
            info.state == STATE_CLOSED || info.unacknowledged == 0 && info.unsent == 0
        })
    }

    /// Makes closing a reset: what follows was cut off, and must not look like an end.
    pub fn reset_on_close(&self) {
        // One that is gone already is as good.
        let _ = SockRef::from(self.stream()).set_linger(Some(Duration::ZERO));
    }

    /// Says that nothing more will be written. Not that the peer is gone already: others learn that.
    pub fn shutdown(&self) -> io::Result<()> {
        match SockRef::from(self.stream()).shutdown(Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Socket {
    /// Closing is left to the kernel: tokio's half would shut down for writing first.
    fn drop(&mut self) {
        if let Some(half) = self.0.take() {
            half.forget();
        }
    }
}

/// A byte stream of whatever kind.
pub trait ByteStream: AsyncRead + AsyncWrite + Debug + Send + Unpin {
    /// The socket that is its own; none of a stream that shares one, as those of HTTP/2 do.
    fn socket(&self) -> Option<&Socket>;
}

impl<S: ByteStream + ?Sized> ByteStream for Box<S> {
    fn socket(&self) -> Option<&Socket> {
        (**self).socket()
    }
}

#[cfg(test)]
impl ByteStream for tokio::io::DuplexStream {
    fn socket(&self) -> Option<&Socket> {
        None
    }
}

/// A stream whose first bytes were read already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
    /// `prefix` comes before what `stream` still has.
    pub fn new(prefix: Bytes, stream: S) -> Self {
        Self { prefix, stream }
    }
}

impl<S: ByteStream> ByteStream for Prefixed<S> {
    fn socket(&self) -> Option<&Socket> {
        self.stream.socket()
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
            // Gives the memory back.
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
