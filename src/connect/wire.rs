//! One upstream TCP connection, with the two questions that reuse raises.
//!
//! An origin may close an idle connection at the moment it is used again. Two checks keep that from the client:
//!
//! - **Is it still open?** A runtime learns of a FIN only when it next polls the kernel. So the first read after
//!   [`Wire::reuse`] goes to the socket itself, in the same poll that would write the request: the HTTP client
//!   then knows what the kernel knows before it writes.
//! - **Did the origin read any of it?** If the close happens between that read and the write, the request is lost.
//!   What the kernel saw of it gives a [`Verdict`]: [`Wire::verdict`].

use std::{
    io::{self, Read},
    net::{Shutdown, SocketAddr},
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use nix::{getsockopt_impl, sockopt_impl, sys::socket::getsockopt};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, tcp::OwnedReadHalf},
    time::{Instant, sleep},
};
use tokio_util::{io::poll_read_buf, sync::CancellationToken};

use super::verdict::{End, Observation, Verdict};
use crate::stream::{Backlog, Socket};

sockopt_impl!(
    /// Linux' `struct tcp_info`, as far as it is needed.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    Progress
);

/// The beginning of Linux' `struct tcp_info`, as of 4.1. The whole struct of libc would ask an older kernel for more
/// than it has, which `getsockopt` treats as an error.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Progress {
    state: u8,
    _options: [u8; 7],
    _path: [u32; 24],
    _pacing: [u64; 2],
    bytes_acked: u64,
}

/// States of the kernel's machine (`net/tcp_states.h`). In these the peer's FIN has arrived:
/// `TIME_WAIT`, `CLOSE_WAIT`, `LAST_ACK`, `CLOSING`.
const STATES_PEER_DONE: [u8; 4] = [6, 8, 9, 11];

/// `CLOSE`: reset, or closed by both sides.
const STATE_CLOSED: u8 = 7;

/// How long a verdict on a lost request may take: the proof may arrive a round trip later.
const VERDICT_DEADLINE: Duration = Duration::from_secs(1);

/// The most that the probe reads: an idle connection has at most a few session tickets to read.
const PROBE_SIZE: usize = 4096;

/// How much is read at once from a peer that sends much.
const READ_AHEAD: usize = 64 * 1024;

/// A connected socket that the HTTP client writes to and the pool watches.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    probe: AtomicBool,
    /// Bytes handed to the kernel since the connection was made.
    written: AtomicU64,
    /// Bytes of the application protocol that were received, without those of TLS.
    received: AtomicU64,
    /// The first end that a read or a write reported: the kernel reports it only once.
    ended: AtomicU8,
    /// Set by [`cut`](Self::cut).
    cut: AtomicBool,
    /// Cancelled by [`cut`](Self::cut), once a tunnel has taken the connection over.
    tunnel: OnceLock<CancellationToken>,
}

/// The values of [`Wire::ended`].
const NOT_ENDED: u8 = 0;
const RESET: u8 = 1;
const RESET_BEHIND_FIN: u8 = 2;
const ENDED_OTHERWISE: u8 = 3;

/// Where a connection stood when a request was given to it.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    written: u64,
    received: u64,
}

impl Wire {
    /// Wraps a connection that nothing has been written to yet, and returns its stream.
    pub fn new(stream: TcpStream) -> (WireStream, Arc<Self>) {
        let (read, socket) = Socket::split(stream);
        let wire = Arc::new(Self {
            socket,
            probe: AtomicBool::new(false),
            written: AtomicU64::new(0),
            received: AtomicU64::new(0),
            ended: AtomicU8::new(NOT_ENDED),
            cut: AtomicBool::new(false),
            tunnel: OnceLock::new(),
        });
        let stream = WireStream { read, wire: wire.clone(), ahead: BytesMut::new(), bulk: false };
        (stream, wire)
    }

    /// For a connection that waits for its next request.
    pub fn rest(&self) {
        self.socket.rest();
    }

    /// Whether a slow peer has taken some of what waited for it in the kernel when `backlog` was last checked.
    pub fn has_moved(&self, backlog: &mut Backlog) -> bool {
        backlog.has_moved(Some(&self.socket))
    }

    /// The socket itself.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Who is at its other end.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.socket.stream().peer_addr().ok()
    }

    /// Where the connection stands.
    pub fn mark(&self) -> Mark {
        Mark {
            written: self.written.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }

    /// Notes that the next request is sent on this idle connection.
    pub fn reuse(&self) -> Mark {
        self.probe.store(true, Ordering::Relaxed);
        self.mark()
    }

    /// Whether the peer has sent anything of a response since `mark`.
    pub fn has_received_since(&self, mark: Mark) -> bool {
        self.received.load(Ordering::Relaxed) > mark.received
    }

    /// Whether anything was given to the kernel since `mark`.
    pub fn has_written_since(&self, mark: Mark) -> bool {
        self.written.load(Ordering::Relaxed) > mark.written
    }

    /// Whether what was written since `mark` is known not to have reached the peer yet.
    ///
    /// If so, what the peer has sent until now is not a response to it. It may still arrive.
    pub fn is_unacknowledged_since(&self, mark: Mark) -> bool {
        self.written.load(Ordering::Relaxed) > mark.written
            && getsockopt(self.socket.stream(), TcpInfo).is_ok_and(|info| mark.is_all_of(&info))
    }

    /// How much the kernel took and how much of that the peer has, until it has all of it.
    pub fn undelivered(&self) -> Option<(u64, u64)> {
        let written = self.written.load(Ordering::Relaxed);
        let info = getsockopt(self.socket.stream(), TcpInfo).ok()?;
        // The count starts with the SYN. It stays 0 on a kernel that does not keep it.
        (1..=written).contains(&info.bytes_acked).then_some((written, info.bytes_acked))
    }

    /// What the peer had of what was written since `mark`. Everything before `mark` must have had its response.
    ///
    /// Only for a connection that has failed. May take a second.
    pub async fn verdict(&self, mark: Mark) -> Verdict {
        let deadline = Instant::now() + VERDICT_DEADLINE;
        let mut pause = Duration::from_micros(100);
        loop {
            match self.observe(mark).verdict() {
                Some(verdict) => return verdict,
                None if Instant::now() >= deadline => return Verdict::Unknown,
                None => sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn observe(&self, mark: Mark) -> Observation {
        let written = self.written.load(Ordering::Relaxed) > mark.written;
        // Read first: what is acknowledged after it goes with a later end.
        let Ok(info) = getsockopt(self.socket.stream(), TcpInfo) else {
            return Observation { written, unacknowledged: false, end: End::Other };
        };
        let end = match info.state {
            STATE_CLOSED => self.how_closed(),
            state if STATES_PEER_DONE.contains(&state) => End::Fin,
            _ => End::Open,
        };
        Observation { written, unacknowledged: mark.is_all_of(&info), end }
    }

    /// How a connection was closed. Linux reports a RST as `EPIPE` if the peer's FIN had arrived before it and we had
    /// not ended our side (`tcp_reset` in `net/ipv4/tcp_input.c`), and as `ECONNRESET` otherwise; a read only shows
    /// that the peer has ended.
    fn how_closed(&self) -> End {
        if let Ok(Some(error)) = self.socket.stream().take_error() {
            self.note(error);
        }
        match self.ended.load(Ordering::Relaxed) {
            RESET => End::Reset,
            RESET_BEHIND_FIN => End::FinThenReset,
            _ => End::Other,
        }
    }

    /// Ends the connection, even while others read from it or write to it: they get an error.
    pub fn cut(&self) {
        // From now on a broken pipe is our own doing.
        self.end(ENDED_OTHERWISE);
        self.cut.store(true, Ordering::SeqCst);
        match self.tunnel.get() {
            Some(tunnel) => tunnel.cancel(),
            None => {
                // It may have ended already.
                let _ = SockRef::from(self.socket.stream()).shutdown(Shutdown::Both);
            }
        }
    }

    /// Makes closing a reset.
    pub fn reset_on_close(&self) {
        self.socket.reset_on_close();
    }

    /// Whether [`cut`](Self::cut) was called.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// A tunnel takes the connection over. From now on it is the tunnel that ends what is [`cut`](Self::cut), when this
    /// is cancelled, because only closing the socket can be a reset: shutting it down looks like the end of the data.
    pub fn take_over(&self) -> CancellationToken {
        let tunnel = self.tunnel.get_or_init(CancellationToken::new).clone();
        if self.is_cut() {
            tunnel.cancel();
        }
        tunnel
    }

    fn note(&self, error: io::Error) -> io::Error {
        self.end(match error.kind() {
            io::ErrorKind::ConnectionReset => RESET,
            io::ErrorKind::BrokenPipe => RESET_BEHIND_FIN,
            _ => ENDED_OTHERWISE,
        });
        error
    }

    /// The first report counts: afterwards, a failed socket reports only a broken pipe.
    fn end(&self, how: u8) {
        let first = (Ordering::Relaxed, Ordering::Relaxed);
        let _ = self.ended.compare_exchange(NOT_ENDED, how, first.0, first.1);
    }

    /// Counts bytes received for the application protocol.
    pub(super) fn count_received(&self, bytes: usize) {
        if bytes > 0 {
            self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// What the kernel knows now; `None` if nothing.
    fn probe(&self, buf: &mut ReadBuf<'_>) -> Option<io::Result<()>> {
        let len = buf.remaining().min(PROBE_SIZE);
        let mut socket = &*SockRef::from(self.socket.stream());
        match socket.read(buf.initialize_unfilled_to(len)) {
            Ok(n) => {
                buf.advance(n);
                Some(Ok(()))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
            Err(e) => Some(Err(self.note(e))),
        }
    }

    /// Notes the result of a write.
    fn poll_written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let written = ready!(written).map_err(|e| self.note(e))?;
        self.written.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }
}

impl Mark {
    /// Whether exactly what was written before the mark is acknowledged. The count starts with the SYN. On a kernel
    /// that does not keep it, it stays below that, which proves nothing.
    fn is_all_of(self, info: &Progress) -> bool {
        info.bytes_acked == self.written + 1
    }
}

/// The byte stream of a [`Wire`].
#[derive(Debug)]
pub struct WireStream {
    read: OwnedReadHalf,
    wire: Arc<Wire>,
    /// What was read and not consumed yet. Allocated only while a peer sends much.
    ahead: BytesMut,
    /// The last read was filled: there may be much more.
    bulk: bool,
}

impl WireStream {
    /// The connection.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Reads what the kernel has, even what does not fit into `buf`: rustls asks for 4 KiB at a time, which would
    /// take five reads for each record of a large body.
    fn poll_read_ahead(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() && self.bulk {
            self.ahead.reserve(READ_AHEAD);
            let read = poll_read_buf(Pin::new(&mut self.read), cx, &mut self.ahead);
            if !matches!(read, Poll::Ready(Ok(_))) {
                self.bulk = false;
                self.ahead = BytesMut::new();
            }
            ready!(read)?;
        }
        if !self.ahead.is_empty() {
            let length = self.ahead.len().min(buf.remaining());
            buf.put_slice(&self.ahead[..length]);
            self.ahead.advance(length);
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.read).poll_read(cx, buf))?;
        self.bulk = buf.remaining() == 0;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for WireStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ahead.is_empty()
            && self.wire.probe.swap(false, Ordering::Relaxed)
            && let Some(result) = self.wire.probe(buf)
        {
            return Poll::Ready(result);
        }
        let before = buf.filled().len();
        let result = ready!(self.poll_read_ahead(cx, buf));
        // What was shut down here reads as if the peer had ended.
        if result.is_ok() && buf.filled().len() == before && self.wire.is_cut() {
            let cut = "the proxy has cut the connection";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, cut)));
        }
        Poll::Ready(result.map_err(|e| self.wire.note(e)))
    }
}

impl AsyncWrite for WireStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.wire.poll_written(self.wire.socket.poll_write(cx, |stream| stream.try_write(buf)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.wire.poll_written(self.wire.socket.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.end(ENDED_OTHERWISE);
        Poll::Ready(self.wire.socket.shutdown())
    }
}

#[cfg(test)]
mod tests;
