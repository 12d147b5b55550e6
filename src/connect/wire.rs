//! One upstream TCP connection, with the two questions that reuse asks of it.
//!
//! An origin may close an idle connection at the very moment at which it is used again. Two
//! things keep that from the client:
//!
//! - **Is it still open?** A runtime learns of a FIN only when it next polls the kernel. So the
//!   first read after [`Wire::reuse`] goes to the socket itself, in the same poll that would
//!   write the request: what the kernel knows by then is known to the HTTP client before it
//!   takes the request up.
//! - **Did the origin take a byte?** Where the close comes between that read and the write, the
//!   request is lost on the way. The kernel knows: bytes that the peer's TCP never acknowledged,
//!   of one TLS record that left in one piece, cannot have been read by any application.
//!   [`Wire::refused_since`] asks for `TCP_INFO`'s count of acknowledged bytes.

use std::{
    io::{self, Read},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::{getsockopt_impl, sockopt_impl, sys::socket::getsockopt};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, sleep},
};

sockopt_impl!(
    /// Linux' `struct tcp_info`.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    libc::tcp_info
);

/// `TCP_CLOSE` of the kernel's state machine: reset, or closed by both sides.
const STATE_CLOSED: u8 = 7;

/// How long a verdict on a lost request may take: a round trip, and a retransmission of it.
const VERDICT_DEADLINE: Duration = Duration::from_secs(1);

/// What the probe reads at most: an idle connection has a few session tickets to read, if anything.
const PROBE_SIZE: usize = 4096;

/// The largest TLS record with its overhead (RFC 8446 §5.2).
const RECORD_SIZE: u64 = 16 * 1024 + 256 + 5;

/// A connected socket that the HTTP client writes to and the pool keeps an eye on.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    probe: AtomicBool,
    /// Bytes handed to the kernel since the connection was made.
    written: AtomicU64,
    /// Writes since then: a request that left in one write left in one record.
    writes: AtomicU64,
}

/// Where a connection stood when a request was given to it.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    written: u64,
    writes: u64,
}

impl Wire {
    /// Takes a stream that nothing has been written to yet.
    pub fn new(stream: TcpStream) -> Arc<Self> {
        Arc::new(Self {
            stream,
            probe: AtomicBool::new(false),
            written: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        })
    }

    /// Says that the next request goes out on this idle connection.
    pub fn reuse(&self) -> Mark {
        self.probe.store(true, Ordering::Relaxed);
        Mark {
            written: self.written.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
        }
    }

    /// Whether it is certain that the peer accepted no byte of what was written since `mark`.
    ///
    /// Waits up to a second while the bytes are on their way. `false` where it cannot be known.
    pub async fn refused_since(&self, mark: Mark) -> bool {
        let deadline = Instant::now() + VERDICT_DEADLINE;
        let mut pause = Duration::from_millis(1);
        loop {
            let written = self.written.load(Ordering::Relaxed) - mark.written;
            if written == 0 {
                return true;
            }
            let writes = self.writes.load(Ordering::Relaxed) - mark.writes;
            if writes > 1 || written > RECORD_SIZE {
                return false;
            }
            let Ok(info) = getsockopt(&self.stream, TcpInfo) else { return false };
            // The count starts with the SYN.
            if info.tcpi_bytes_acked > mark.written + 1 {
                return false;
            }
            if info.tcpi_state == STATE_CLOSED {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.probe.swap(false, Ordering::Relaxed) {
            let len = buf.remaining().min(PROBE_SIZE);
            match (&*SockRef::from(&self.stream)).read(buf.initialize_unfilled_to(len)) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read_buf(buf) {
                Ok(_) => return Poll::Ready(Ok(())),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn poll_write(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match write(&self.stream) {
                Ok(n) => {
                    self.written.fetch_add(n as u64, Ordering::Relaxed);
                    self.writes.fetch_add(1, Ordering::Relaxed);
                    return Poll::Ready(Ok(n));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

/// The byte stream of a [`Wire`].
#[derive(Debug)]
pub struct WireStream(pub Arc<Wire>);

impl AsyncRead for WireStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.poll_read(cx, buf)
    }
}

impl AsyncWrite for WireStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, |stream| stream.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, |stream| stream.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match SockRef::from(&self.0.stream).shutdown(std::net::Shutdown::Write) {
            Err(e) if e.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(e)),
            _ => Poll::Ready(Ok(())),
        }
    }
}
