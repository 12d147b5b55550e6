//! Byte streams and their TCP sockets: the kernel's state of a connection, and how it ends.

use std::{
    fmt::Debug,
    future::poll_fn,
    io,
    mem::MaybeUninit,
    net::Shutdown,
    pin::Pin,
    sync::{
        LazyLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use nix::{getsockopt_impl, sockopt_impl, sys::socket::getsockopt};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::Instant,
};
use tokio_util::either::Either;

/// How often, and how many times, a silent peer is probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
const PROBES: u32 = 6;

/// Seconds: `MAX_TCP_KEEPIDLE`.
const MAX_KEEPALIVE: u64 = 32_767;

/// How long a connection goes without the limit for a peer that acknowledges nothing, at least.
const LIFTED_FOR: u32 = 10;

/// How much every peer's kernel accepts although the peer does not read.
const TAKEN_BY_ALL: u64 = 4 * 1024;

sockopt_impl!(
    /// The part of Linux' `struct tcp_info` that is needed here.
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
    /// Segments that are sent and not yet acknowledged.
    unacknowledged: u32,
    _path: [u32; 19],
    _pacing: [u64; 2],
    /// Bytes, plus one for the SYN.
    acknowledged: u64,
    _received: u64,
    _segments: [u32; 2],
    /// Bytes that are written and not yet sent.
    unsent: u32,
    _min_rtt: u32,
}

impl TcpState {
    /// Whether the peer's kernel has acknowledged everything written, or never will.
    fn is_delivered(&self) -> bool {
        self.state == STATE_CLOSED || self.unacknowledged == 0 && self.unsent == 0
    }
}

/// States of the kernel's machine (`net/tcp_states.h`) in which the peer has ended its side:
/// `TIME_WAIT`, `CLOSE`, `CLOSE_WAIT`, `LAST_ACK`, `CLOSING`.
const STATES_PEER_LEFT: [u8; 5] = [6, 7, 8, 9, 11];

/// `CLOSE`: reset, or ended by both sides.
const STATE_CLOSED: u8 = 7;

/// The socket, for writing and for queries to the kernel. Its bytes are read from the other half.
///
/// tokio's own half reads, because it knows that a read which did not fill its buffer has emptied the kernel's:
/// with `try_read`, each read would need a second one.
#[derive(Debug)]
pub struct Socket {
    half: Option<OwnedWriteHalf>,
    /// Bytes handed to the kernel.
    written: AtomicU64,
    user_timeout: UserTimeout,
    /// Dropped with it.
    place: Option<Place>,
}

/// Something that a connection holds until its socket is closed, such as a permit.
pub type Place = Box<dyn Debug + Send + Sync>;

/// How long the kernel waits for a peer that acknowledges nothing (`TCP_USER_TIMEOUT`).
///
/// Linux treats a peer that does not read like one that is gone, although it acknowledges every probe of its closed
/// window. So the limit applies only while so little was written that any peer's kernel accepts it whether the peer
/// reads or not, and is lifted before more is written.
#[derive(Debug, Default)]
struct UserTimeout {
    /// Milliseconds. 0 is no limit.
    limit: AtomicU32,
    /// What had been written when it was set.
    mark: AtomicU64,
    lifted: AtomicBool,
    /// Where it is lifted, when to check whether it may apply again: by [`seconds`].
    next_check: AtomicU32,
}

/// Seconds since the first call.
fn seconds() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_secs().try_into().unwrap_or(u32::MAX)
}

impl Socket {
    /// The half to read from, and the socket.
    pub fn split(stream: TcpStream) -> (OwnedReadHalf, Self) {
        let (read, write) = stream.into_split();
        let (written, user_timeout) = (AtomicU64::new(0), UserTimeout::default());
        (read, Self { half: Some(write), written, user_timeout, place: None })
    }

    /// Makes the stream hold this place until it is closed.
    pub fn hold(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// Enables TCP keep-alive: once the peer has been silent for `keepalive`, it is probed every ten seconds, six
    /// times.
    pub fn watch(&self, keepalive: Duration) -> io::Result<()> {
        // What Linux allows.
        let idle = Duration::from_secs(keepalive.as_secs().clamp(1, MAX_KEEPALIVE));
        let probes =
            TcpKeepalive::new().with_time(idle).with_interval(PROBE_INTERVAL).with_retries(PROBES);
        SockRef::from(self.stream()).set_tcp_keepalive(&probes)?;
        let limit = (idle + PROBE_INTERVAL * PROBES).as_millis();
        self.user_timeout.limit.store(limit.try_into().unwrap_or(u32::MAX), Ordering::Relaxed);
        self.set_user_timeout(false)
    }

    /// Bytes handed to the kernel since the connection was made.
    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// For a connection that waits for its next message.
    pub fn rest(&self) {
        if self.user_timeout.lifted.load(Ordering::Relaxed) && self.is_delivered() {
            let _ = self.set_user_timeout(false);
        }
    }

    /// The same before a write, for connections that are never idle, such as tunnels and streams of events.
    fn limit_again(&self) {
        if !self.user_timeout.lifted.load(Ordering::Relaxed) {
            return;
        }
        let now = seconds();
        if now >= self.user_timeout.next_check.load(Ordering::Relaxed) {
            self.user_timeout.next_check.store(now.saturating_add(LIFTED_FOR), Ordering::Relaxed);
            self.rest();
        }
    }

    fn set_user_timeout(&self, lifted: bool) -> io::Result<()> {
        let limit = if lifted { 0 } else { self.user_timeout.limit.load(Ordering::Relaxed) };
        self.user_timeout.lifted.store(lifted, Ordering::Relaxed);
        if lifted {
            let next_check = seconds().saturating_add(LIFTED_FOR);
            self.user_timeout.next_check.store(next_check, Ordering::Relaxed);
        }
        self.user_timeout.mark.store(self.written(), Ordering::Relaxed);
        let limit = Duration::from_millis(limit.into());
        SockRef::from(self.stream()).set_tcp_user_timeout(Some(limit))
    }

    /// Notes how much the kernel took.
    fn wrote(&self, count: usize) {
        // There is only one writer.
        let written = self.written() + count as u64;
        self.written.store(written, Ordering::Relaxed);
        if !self.user_timeout.lifted.load(Ordering::Relaxed)
            && written - self.user_timeout.mark.load(Ordering::Relaxed) > TAKEN_BY_ALL
        {
            // The connection may be gone already.
            let _ = self.set_user_timeout(true);
        }
    }

    /// The socket itself.
    pub fn stream(&self) -> &TcpStream {
        match &self.half {
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
        self.limit_again();
        let stream = self.stream();
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(count) => {
                    self.wrote(count);
                    return Poll::Ready(Ok(count));
                }
                error => return Poll::Ready(error),
            }
        }
    }

    /// Writes several pieces at once. A single piece, which TLS writes for most messages, takes a shorter path through
    /// the kernel.
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

    /// Whether the connection was reset, or ended by both sides.
    pub fn is_closed(&self) -> bool {
        getsockopt(self.stream(), TcpInfo).is_ok_and(|info| info.state == STATE_CLOSED)
    }

    /// Whether the peer's kernel has acknowledged everything written, or never will.
    pub fn is_delivered(&self) -> bool {
        getsockopt(self.stream(), TcpInfo).is_ok_and(|info| info.is_delivered())
    }

    /// How much the peer's kernel has acknowledged.
    pub fn acknowledged(&self) -> u64 {
        getsockopt(self.stream(), TcpInfo).map_or(0, |info| info.acknowledged)
    }

    /// How much the peer's kernel has acknowledged, as long as that is not everything written. This shows that a slow
    /// peer reads: the socket becomes writable only after much of its buffer has drained.
    pub fn acknowledged_so_far(&self) -> Option<u64> {
        let info = getsockopt(self.stream(), TcpInfo).ok()?;
        (!info.is_delivered()).then_some(info.acknowledged)
    }

    /// How much it has acknowledged, and whether there is more that could not be sent yet.
    fn backlog(&self) -> (u64, bool) {
        let info = getsockopt(self.stream(), TcpInfo);
        info.map_or((0, false), |info| (info.acknowledged, info.unsent > 0))
    }

    /// Turns closing into a reset, so that a cut-off response does not look complete.
    pub fn reset_on_close(&self) {
        // The connection may be gone already.
        let _ = SockRef::from(self.stream()).set_linger(Some(Duration::ZERO));
    }

    /// Takes [`reset_on_close`](Self::reset_on_close) back: the response is complete.
    pub fn deliver_on_close(&self) {
        let _ = SockRef::from(self.stream()).set_linger(None);
    }

    /// Ends our side. Does not fail if the peer is gone already: reads and writes report that.
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
        if let Some(half) = self.half.take() {
            half.forget();
        }
    }
}

/// Any byte stream.
pub trait ByteStream: AsyncRead + AsyncWrite + Debug + Send + Unpin {
    /// Its own socket; none for a stream that shares one, such as an HTTP/2 stream.
    fn socket(&self) -> Option<&Socket>;
}

impl<S: ByteStream + ?Sized> ByteStream for Box<S> {
    fn socket(&self) -> Option<&Socket> {
        (**self).socket()
    }
}

impl<S: ByteStream + ?Sized> ByteStream for &mut S {
    fn socket(&self) -> Option<&Socket> {
        (**self).socket()
    }
}

impl<L: ByteStream, R: ByteStream> ByteStream for Either<L, R> {
    fn socket(&self) -> Option<&Socket> {
        match self {
            Self::Left(stream) => stream.socket(),
            Self::Right(stream) => stream.socket(),
        }
    }
}

/// Whether reading failed because of TLS, such as with an alert. That is the reason, even if writing to the same peer
/// has failed before: a peer that sends an alert closes the connection.
pub fn is_from_tls(error: &io::Error) -> bool {
    // The kind that tokio_rustls gives all errors of rustls.
    error.kind() == io::ErrorKind::InvalidData
}

#[cfg(test)]
impl ByteStream for tokio::io::DuplexStream {
    fn socket(&self) -> Option<&Socket> {
        None
    }
}

/// How much [`receive`] reads at once: a usual request fits.
const RECEIVED: usize = 4096;

/// Appends the next input, and returns its length. Holds no buffer while it waits, because many connections may wait here.
pub async fn receive<S: AsyncRead + Unpin>(
    stream: &mut S,
    read: &mut BytesMut,
) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut space = [const { MaybeUninit::uninit() }; RECEIVED];
        let mut space = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut space))?;
        read.extend_from_slice(space.filled());
        Poll::Ready(Ok(space.filled().len()))
    })
    .await
}

/// How much [`take`] looks at at once.
const GLANCE: usize = 512;

/// Takes what `parse` finds at the beginning of a stream, and nothing behind it: that stays in the kernel. `parse` gets
/// all bytes so far and returns the length of what it has found, or `None` while more of them are needed. `None` if the
/// stream ends before.
///
/// The socket itself is read, because a stream may read ahead.
pub async fn take<T, E>(
    socket: &Socket,
    mut parse: impl FnMut(&[u8]) -> Result<Option<(usize, T)>, E>,
) -> Result<Option<T>, E>
where
    E: From<io::Error>,
{
    let stream = socket.stream();
    let mut taken = Vec::new();
    loop {
        let mut glance = [0; GLANCE];
        let before = taken.len();
        let seen = stream.peek(&mut glance).await?;
        if seen == 0 {
            return Ok(None);
        }
        taken.extend_from_slice(&glance[..seen]);
        let found = parse(&taken)?;
        // What is seen while it is incomplete is part of it.
        taken.truncate(found.as_ref().map_or(before + seen, |(length, _)| *length));
        let mut left = taken.len() - before;
        while left > 0 {
            stream.readable().await?;
            match stream.try_read(&mut glance[..left]) {
                Ok(0) => return Ok(None),
                Ok(count) => left -= count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        if let Some((_, found)) = found {
            return Ok(Some(found));
        }
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
            // Releases the memory.
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

/// Whether a slow peer takes what waits for it in our kernel.
///
/// Nothing else shows that for a long time: a socket becomes writable only after much of its buffer has drained, and
/// what is written last, such as a PING, waits for all of it.
#[derive(Debug, Default)]
pub struct Backlog {
    /// How much the peer had acknowledged at the last check. None if nothing waited then.
    acknowledged: Option<u64>,
}

impl Backlog {
    /// Whether the peer has taken some of what waited for it at the last check.
    pub fn has_moved(&mut self, socket: Option<&Socket>) -> bool {
        let (acknowledged, waits) = socket.map_or((0, false), Socket::backlog);
        let before = std::mem::replace(&mut self.acknowledged, waits.then_some(acknowledged));
        before.is_some_and(|before| acknowledged > before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    /// Linux would treat a peer that does not read like one that is gone.
    #[tokio::test]
    async fn a_peer_that_may_not_read_is_under_no_limit_of_the_kernels() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        let (_read, socket) = Socket::split(stream);
        let limit = || SockRef::from(socket.stream()).tcp_user_timeout().unwrap();
        socket.watch(Duration::from_millis(1500)).unwrap();
        let least = Duration::from_secs(1 + 6 * 10);
        assert_eq!(limit(), Some(least));

        let write = async |bytes: &[u8]| {
            let written = poll_fn(|cx| socket.poll_write(cx, |stream| stream.try_write(bytes)));
            assert_eq!(written.await.unwrap(), bytes.len());
        };
        let much = [0; TAKEN_BY_ALL as usize];
        write(&much).await;
        assert_eq!(limit(), Some(least), "any kernel takes that");
        write(b"x").await;
        assert!(limit().is_none_or(|limit| limit.is_zero()), "{:?}", limit());
        peer.read_exact(&mut [0; TAKEN_BY_ALL as usize + 1]).await.unwrap();
        while !socket.is_delivered() {
            tokio::task::yield_now().await;
        }
        socket.rest();
        assert_eq!(limit(), Some(least), "again once nothing is on its way");
        write(b"x").await;
        assert_eq!(limit(), Some(least));

        write(&much).await;
        peer.read_exact(&mut [0; TAKEN_BY_ALL as usize + 1]).await.unwrap();
        while !socket.is_delivered() {
            tokio::task::yield_now().await;
        }
        write(b"x").await;
        assert!(limit().is_none_or(|limit| limit.is_zero()), "not looked at with every write");
        peer.read_exact(&mut [0]).await.unwrap();
        while !socket.is_delivered() {
            tokio::task::yield_now().await;
        }
        socket.user_timeout.next_check.store(0, Ordering::Relaxed);
        write(b"x").await;
        assert_eq!(limit(), Some(least), "again without a rest");
        peer.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn a_backlog_moves_as_long_as_its_peer_takes_some_of_it() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        let (_read, socket) = Socket::split(stream);
        let mut backlog = Backlog::default();
        assert!(!backlog.has_moved(Some(&socket)));
        let block = [0; 64 * 1024];
        socket.stream().writable().await.unwrap();
        while socket.stream().try_write(&block).is_ok() {}
        // What is acknowledged until the peer's kernel has no more room.
        let mut taken = 0;
        while taken != socket.acknowledged() || taken == 0 {
            taken = socket.acknowledged();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        backlog.has_moved(Some(&socket));
        assert!(!backlog.has_moved(Some(&socket)), "the peer reads nothing");
        let mut bytes = [0; 64 * 1024];
        while taken == socket.acknowledged() {
            peer.read_exact(&mut bytes).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert!(backlog.has_moved(Some(&socket)), "the peer reads");
        let sink = async { while peer.read(&mut bytes).await.unwrap() > 0 {} };
        let all = async {
            while !socket.is_delivered() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = sink => unreachable!("the connection is open"),
            () = all => {}
        }
        assert!(backlog.has_moved(Some(&socket)), "the peer has read the rest");
        poll_fn(|cx| socket.poll_write(cx, |stream| stream.try_write(b"x"))).await.unwrap();
        while !socket.is_delivered() {
            tokio::task::yield_now().await;
        }
        assert!(!backlog.has_moved(Some(&socket)), "nothing waited");
    }
}
