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
//!   request is lost on the way. Every segment of the origin's bears the count of what its kernel
//!   had received when it left. So where the origin said that it is done (FIN) and no byte of the
//!   request is acknowledged, it was done before it had any: [`Wire::refused_since`].
//!
//! A bare RST proves nothing: a kernel may delay its acknowledgement for 40 ms, in which the
//! application can read the request, act upon it and reset the connection. A RST after TLS'
//! farewell (`close_notify`) is another matter: an application that closes politely sends a FIN,
//! unless its kernel holds bytes that it never read. Where these can only be of the one record
//! that the request is, it has not been read.

use std::{
    io::{self, Read},
    net::Shutdown,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
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
use tokio_util::io::poll_read_buf;

use crate::socket::Socket;

sockopt_impl!(
    /// Linux' `struct tcp_info`, as far as it is needed.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    Progress
);

/// The beginning of Linux' `struct tcp_info`, as it has been since 4.1. The whole of libc's would
/// ask an older kernel for more than it has, which `getsockopt` takes for an error.
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

/// How long a verdict on a lost request may take: a FIN may be behind TLS' own farewell.
const VERDICT_DEADLINE: Duration = Duration::from_secs(1);

/// How long after a polite end a reset may come: whoever shuts down and closes does both at once.
const RESET_DEADLINE: Duration = Duration::from_millis(100);

/// The largest TLS record with its overhead (RFC 8446 §5.2).
const RECORD_SIZE: u64 = 16 * 1024 + 256 + 5;

/// What the probe reads at most: an idle connection has a few session tickets to read, if anything.
const PROBE_SIZE: usize = 4096;

/// What is read at once from a peer that sends much.
const READ_AHEAD: usize = 64 * 1024;

/// A connected socket that the HTTP client writes to and the pool keeps an eye on.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    probe: AtomicBool,
    /// Bytes handed to the kernel since the connection was made.
    written: AtomicU64,
    /// Bytes of the application protocol that came: without TLS' own.
    received: AtomicU64,
    /// Whether it ended with a RST and no FIN before it. The kernel says so once.
    reset: AtomicBool,
    /// Whether TLS' `close_notify` came.
    farewell: AtomicBool,
    /// Whether a request was sent on an idle connection and nothing of an answer has come.
    asked: AtomicBool,
    /// Writes that the kernel took.
    writes: AtomicU64,
}

/// Where a connection stood when a request was given to it.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    written: u64,
    writes: u64,
    received: u64,
}

impl Wire {
    /// Takes a connection that nothing has been written to yet, and gives its bytes.
    pub fn new(stream: TcpStream) -> (WireStream, Arc<Self>) {
        let (read, socket) = Socket::split(stream);
        let wire = Arc::new(Self {
            socket,
            probe: AtomicBool::new(false),
            written: AtomicU64::new(0),
            received: AtomicU64::new(0),
            reset: AtomicBool::new(false),
            farewell: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        });
        let stream = WireStream { read, wire: wire.clone(), ahead: BytesMut::new(), bulk: false };
        (stream, wire)
    }

    /// The socket itself.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Where the connection stands.
    pub fn mark(&self) -> Mark {
        Mark {
            written: self.written.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }

    /// Says that the next request goes out on this idle connection.
    pub fn reuse(&self) -> Mark {
        self.probe.store(true, Ordering::Relaxed);
        self.asked.store(true, Ordering::Relaxed);
        self.mark()
    }

    /// Whether the peer has sent anything of an answer since `mark`.
    pub fn has_received_since(&self, mark: Mark) -> bool {
        self.received.load(Ordering::Relaxed) > mark.received
    }

    /// Whether what was written since `mark` is known not to have reached the peer yet.
    ///
    /// What the peer has sent until now is then no answer to it. It may still arrive.
    pub fn is_unacknowledged_since(&self, mark: Mark) -> bool {
        self.written.load(Ordering::Relaxed) > mark.written
            && getsockopt(self.socket.stream(), TcpInfo).is_ok_and(|info| mark.is_all_of(&info))
    }

    /// Whether it is certain that the peer took no byte of what was written since `mark`, and
    /// will take none. `mark` is that of a connection that had answered all before it.
    ///
    /// Only of a connection that has failed. May take a second; `false` where it cannot be known.
    pub async fn refused_since(&self, mark: Mark) -> bool {
        if self.written.load(Ordering::Relaxed) == mark.written {
            return true;
        }
        let one_farewell = self.is_farewell_to_one_record(mark);
        let deadline = Instant::now() + VERDICT_DEADLINE;
        let reset_deadline = Instant::now() + RESET_DEADLINE;
        let mut pause = Duration::from_millis(1);
        while Instant::now() < deadline {
            let Ok(info) = getsockopt(self.socket.stream(), TcpInfo) else { return false };
            let none_taken = mark.is_all_of(&info);
            if info.state == STATE_CLOSED {
                let was_reset = !self.is_at_end() || self.has_failed();
                return none_taken && !self.reset.load(Ordering::Relaxed)
                    || one_farewell && was_reset;
            }
            if none_taken && STATES_PEER_DONE.contains(&info.state) {
                return true;
            }
            let hopeless = !none_taken && !one_farewell;
            if hopeless || !none_taken && Instant::now() >= reset_deadline {
                return false;
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        false
    }

    /// Whether a FIN came before whatever closed the connection: then, and only then, the kernel
    /// has no reset to report, once all before it is read.
    fn is_at_end(&self) -> bool {
        let mut rest = [0; PROBE_SIZE];
        while !self.reset.load(Ordering::Relaxed) {
            match (&*SockRef::from(self.socket.stream())).read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.note(e);
                    return false;
                }
            }
        }
        false
    }

    /// Whether the peer closes politely, and all that was written since `mark` is one record. If
    /// its kernel then resets the connection, it had bytes that were never read.
    fn is_farewell_to_one_record(&self, mark: Mark) -> bool {
        self.farewell.load(Ordering::Relaxed)
            && self.writes.load(Ordering::Relaxed) == mark.writes + 1
            && self.written.load(Ordering::Relaxed) - mark.written <= RECORD_SIZE
    }

    /// Whether a reset came behind the FIN: reading does not tell.
    fn has_failed(&self) -> bool {
        !matches!(self.socket.stream().take_error(), Ok(None))
    }

    /// Whether TLS' own farewell is better left out: a verdict may depend on whether the peer resets
    /// the connection, and it would answer one to a closed one with a reset, too.
    pub(super) fn is_silent_end(&self) -> bool {
        self.asked.load(Ordering::Relaxed) && self.farewell.load(Ordering::Relaxed)
    }

    /// Ends the connection, whoever is reading or writing on it.
    pub fn cut(&self) {
        // One that has ended already is as good.
        let _ = SockRef::from(self.socket.stream()).shutdown(Shutdown::Both);
    }

    /// TLS' `close_notify` came.
    pub(super) fn note_farewell(&self) {
        self.farewell.store(true, Ordering::Relaxed);
    }

    fn note(&self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::ConnectionReset {
            self.reset.store(true, Ordering::Relaxed);
        }
        error
    }

    /// Counts bytes that came for the application protocol.
    pub(super) fn count_received(&self, bytes: usize) {
        if bytes > 0 {
            self.received.fetch_add(bytes as u64, Ordering::Relaxed);
            self.asked.store(false, Ordering::Relaxed);
        }
    }

    /// What the kernel knows now; `None` where that is nothing.
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

    /// Takes note of what a write came to.
    fn poll_written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let written = ready!(written).map_err(|e| self.note(e))?;
        self.written.fetch_add(written as u64, Ordering::Relaxed);
        self.writes.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }
}

impl Mark {
    /// Whether exactly what was written until the mark is acknowledged. The count starts with the
    /// SYN. A kernel that does not keep it stays below, which proves nothing.
    fn is_all_of(self, info: &Progress) -> bool {
        info.bytes_acked == self.written + 1
    }
}

/// The byte stream of a [`Wire`].
#[derive(Debug)]
pub struct WireStream {
    read: OwnedReadHalf,
    wire: Arc<Wire>,
    /// What was read and not yet asked for. It has room only while a peer sends much.
    ahead: BytesMut,
    /// The last read was filled: there may be much more.
    bulk: bool,
}

impl WireStream {
    /// The connection.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Reads what the kernel has, also what does not fit `buf`: rustls asks for 4 KiB at a time,
    /// which makes five reads of each record of a large body.
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
        let result = ready!(self.poll_read_ahead(cx, buf));
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
        Poll::Ready(self.wire.socket.shutdown())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    /// A connection that has served one request, and its other end.
    async fn kept() -> (Arc<Wire>, WireStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mut stream, wire) = Wire::new(TcpStream::connect(address).await.unwrap());
        let (mut peer, _) = listener.accept().await.unwrap();
        stream.write_all(b"request").await.unwrap();
        peer.read_exact(&mut [0; 7]).await.unwrap();
        peer.write_all(b"answer").await.unwrap();
        stream.read_exact(&mut [0; 6]).await.unwrap();
        (wire, stream, peer)
    }

    #[tokio::test]
    async fn a_request_to_a_peer_that_had_closed_was_refused() {
        let (wire, mut stream, peer) = kept().await;
        drop(peer);
        let mark = wire.mark();
        stream.write_all(b"lost").await.unwrap();
        assert!(wire.refused_since(mark).await);
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        assert!(wire.refused_since(mark).await, "also once the end was read");
    }

    #[tokio::test]
    async fn a_request_that_the_kernel_did_not_take_was_refused() {
        let (wire, mut stream, peer) = kept().await;
        SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        let mark = wire.mark();
        assert!(stream.write_all(b"lost").await.is_err());
        assert!(wire.refused_since(mark).await);
    }

    #[tokio::test]
    async fn a_request_unread_by_a_peer_that_said_farewell_was_refused() {
        for fin_first in [true, false] {
            let (wire, mut stream, mut peer) = kept().await;
            let mark = wire.reuse();
            stream.write_all(b"unread").await.unwrap();
            peer.readable().await.unwrap();
            if fin_first {
                peer.shutdown().await.unwrap();
            }
            drop(peer);
            wire.note_farewell();
            assert!(wire.refused_since(mark).await, "fin_first: {fin_first}");
        }
    }

    #[tokio::test]
    async fn a_request_read_by_a_peer_that_said_farewell_was_not_refused() {
        let (wire, mut stream, mut peer) = kept().await;
        let mark = wire.reuse();
        stream.write_all(b"read").await.unwrap();
        peer.read_exact(&mut [0; 4]).await.unwrap();
        peer.shutdown().await.unwrap();
        drop(peer);
        wire.note_farewell();
        assert!(!wire.refused_since(mark).await);
    }

    #[tokio::test]
    async fn a_farewell_proves_nothing_of_a_request_in_several_pieces() {
        let (wire, mut stream, mut peer) = kept().await;
        let mark = wire.reuse();
        stream.write_all(b"read").await.unwrap();
        peer.read_exact(&mut [0; 4]).await.unwrap();
        stream.write_all(b"unread").await.unwrap();
        peer.readable().await.unwrap();
        drop(peer);
        wire.note_farewell();
        assert!(!wire.refused_since(mark).await);
    }

    #[tokio::test]
    async fn a_request_that_the_peer_read_was_not_refused_however_the_peer_ends() {
        for (reset, read) in [(false, false), (false, true), (true, false), (true, true)] {
            let (wire, mut stream, mut peer) = kept().await;
            let mark = wire.mark();
            stream.write_all(b"taken").await.unwrap();
            peer.read_exact(&mut [0; 5]).await.unwrap();
            if reset {
                SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop(peer);
            if read {
                assert_eq!(stream.read(&mut [0]).await.is_err(), reset);
            }
            for _ in 0..2 {
                assert!(!wire.refused_since(mark).await, "reset: {reset}, read: {read}");
            }
        }
    }

    #[tokio::test]
    async fn what_comes_before_the_request_is_there_is_told_apart() {
        let (wire, mut stream, mut peer) = kept().await;
        let mark = wire.mark();
        stream.write_all(b"request").await.unwrap();
        peer.write_all(b"answer").await.unwrap();
        stream.read_exact(&mut [0; 6]).await.unwrap();
        assert!(!wire.is_unacknowledged_since(mark), "an answer acknowledges its request");
        assert!(!wire.is_unacknowledged_since(wire.mark()), "nothing was written");
    }
}
