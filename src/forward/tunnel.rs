//! Copies bytes both ways, until both sides have ended.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::Poll,
    time::Duration,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{io::poll_read_buf, sync::CancellationToken};

pub use crate::protocol::Side;
use crate::stream::{ByteStream, Socket, is_from_tls};

/// How long the open direction of a tunnel may be idle once the other has ended. A peer that has closed both
/// directions looks the same until something is written to it.
const HALF_CLOSED: Duration = Duration::from_secs(300);

/// The same towards a side that broke off.
const LAST_MOMENT: Duration = Duration::from_secs(1);

/// `Instant`s cannot be arbitrarily far away, and `timeouts.idle` can.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// How many times within an idle timeout it is checked whether a peer reads: one that is slow must not be taken for one
/// that has stopped.
const LOOKS: u32 = 4;

/// Buffers grow with the bytes copied. An idle tunnel has none.
const SIZES: [(u64, usize); 3] = [(0, 4 * 1024), (64 * 1024, 16 * 1024), (1024 * 1024, 64 * 1024)];

/// How a tunnel ended.
#[derive(Debug)]
pub enum End {
    /// Both sides closed.
    Closed,
    /// The connection to one side broke.
    Broken(Side, io::Error),
    /// Nothing moved for `timeouts.idle`.
    Idle,
    /// One direction had ended, and nothing moved in the other for too long.
    HalfClosed,
    /// The true name changed, or the proxy stops.
    Killed,
    /// The watch stopped it. Both connections are open, and are for the caller to close.
    Stopped,
}

/// Sees the bytes of a tunnel before they are passed on.
pub trait Watch {
    /// These bytes are about to be passed on. If it returns `false`, they are dropped, and the tunnel is stopped.
    fn admits(&self, from: Side, bytes: &[u8]) -> bool;

    /// The bytes admitted last were passed on.
    fn passed(&self, from: Side);

    /// This side has closed, and what it sent was passed on.
    fn ended(&self, side: Side);

    /// This side is gone.
    fn left(&self, side: Side);
}

/// For tunnels whose bytes nobody looks at.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn admits(&self, _: Side, _: &[u8]) -> bool {
        true
    }

    fn passed(&self, _: Side) {}

    fn ended(&self, _: Side) {}

    fn left(&self, _: Side) {}
}

/// What a tunnel needs besides its two streams.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a, W> {
    /// How long nothing may move.
    pub idle: Duration,
    /// Counts what is transferred.
    pub traffic: &'a Traffic,
    /// Sees it first.
    pub watch: &'a W,
}

/// What a tunnel has transferred so far.
#[derive(Debug, Default)]
pub struct Traffic {
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl Traffic {
    /// Bytes from the application.
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in.load(Ordering::Relaxed)
    }

    /// Bytes to the application.
    pub fn bytes_out(&self) -> u64 {
        self.bytes_out.load(Ordering::Relaxed)
    }

    /// Adds what was transferred before the tunnel.
    pub fn add(&self, bytes_in: u64, bytes_out: u64) {
        self.bytes_in.fetch_add(bytes_in, Ordering::Relaxed);
        self.bytes_out.fetch_add(bytes_out, Ordering::Relaxed);
    }
}

/// What a tunnel transferred.
#[derive(Debug)]
pub struct Carried {
    /// From the application.
    pub bytes_in: u64,
    /// To the application.
    pub bytes_out: u64,
    /// Why it ended.
    pub end: End,
}

/// The same as [`carry`], and returns how much was transferred.
pub async fn tunnel<D, U>(
    downstream: D,
    upstream: U,
    idle: Duration,
    kill: CancellationToken,
) -> Carried
where
    D: ByteStream,
    U: ByteStream,
{
    let traffic = Traffic::default();
    let settings = Settings { idle, traffic: &traffic, watch: &Unwatched };
    let killed = async {
        kill.cancelled().await;
        End::Killed
    };
    let end = carry(downstream, upstream, killed, settings).await;
    Carried { bytes_in: traffic.bytes_in(), bytes_out: traffic.bytes_out(), end }
}

/// Copies both ways. An end in one direction is passed on, and the other direction stays open: from then
/// on it may be idle for [`HALF_CLOSED`] only.
///
/// A side that breaks off (by a reset, or by TLS without `close_notify`) ends the tunnel: the other side gets
/// everything that was sent before, and then a reset, so that it does not take this for a clean end.
///
/// Ends when `kill` does, with its result.
pub async fn carry<D, U, W>(
    downstream: D,
    upstream: U,
    kill: impl Future<Output = End>,
    settings: Settings<'_, W>,
) -> End
where
    D: ByteStream,
    U: ByteStream,
    W: Watch,
{
    let Settings { idle, traffic, watch } = settings;
    let idle = idle.min(FAR);
    let mut kill = pin!(kill);
    let (mut downstream, mut upstream) = (Shared::new(downstream), Shared::new(upstream));
    let moved = Moved::default();
    let reading = || [downstream.acknowledged_so_far(), upstream.acknowledged_so_far()];
    let end = {
        let onward = Direction {
            side: Side::Client,
            from: &downstream.stream,
            to: &upstream.stream,
            bytes: &traffic.bytes_in,
            moved: &moved,
            watch,
        };
        let back = Direction {
            side: Side::Target,
            from: &upstream.stream,
            to: &downstream.stream,
            bytes: &traffic.bytes_out,
            moved: &moved,
            watch,
        };
        tokio::select! {
            // First: a connection that was cut reads as if it had ended.
            biased;
            end = &mut kill => end,
            end = both(onward.run(), back.run(), &moved, idle, &reading) => end,
            () = until_idle(&moved, idle, &reading) => End::Idle,
        }
    };
    if matches!(end, End::Broken(..)) {
        let (down, up) = (&*downstream.stream.get_mut(), &*upstream.stream.get_mut());
        let (down, up) = (ByteStream::socket(down), ByteStream::socket(up));
        tokio::select! {
            _ = async { tokio::join!(delivered(down), delivered(up)) } => {}
            _ = &mut kill => {}
        }
    }
    if matches!(end, End::Closed | End::Stopped) {
        (downstream.has_ended, upstream.has_ended) = (true, true);
    }
    end
}

/// Runs both directions to their end.
async fn both<O, B>(
    onward: O,
    back: B,
    moved: &Moved,
    idle: Duration,
    reading: &impl Fn() -> Reading,
) -> End
where
    O: Future<Output = Result<(), Break>>,
    B: Future<Output = Result<(), Break>>,
{
    let (mut onward, mut back) = (pin!(onward), pin!(back));
    let (first, onward_ended) = tokio::select! {
        first = onward.as_mut() => (first, true),
        first = back.as_mut() => (first, false),
    };
    let rest = match first {
        Err(Break::Stopped) => return End::Stopped,
        // The other direction's bytes are for a side that has left.
        Err(Break::Read(_)) => LAST_MOMENT,
        _ => HALF_CLOSED,
    };
    moved.now();
    moved.broken.store(first.is_err(), Ordering::Relaxed);
    let second = poll_fn(|cx| match onward_ended {
        true => back.as_mut().poll(cx),
        false => onward.as_mut().poll(cx),
    });
    // The source of the direction that has ended first, and that of the other.
    let (from, other) = match onward_ended {
        true => (Side::Client, Side::Target),
        false => (Side::Target, Side::Client),
    };
    let ends = tokio::select! {
        second = second => match (first, second) {
            (Err(Break::Write(_)), Err(Break::Read(error))) if is_from_tls(&error) => {
                Err(Break::Read(error).end(other, from))
            }
            (first, second) => first
                .map_err(|broken| broken.end(from, other))
                .and(second.map_err(|broken| broken.end(other, from)))
                .map(|()| End::Closed),
        },
        () = until_idle(moved, rest.min(idle), reading) => {
            first.map_err(|broken| broken.end(from, other)).map(|()| End::HalfClosed)
        }
    };
    ends.unwrap_or_else(|broken| broken)
}

/// The stream of one side, which both directions use. Unless the tunnel has ended, dropping it is a reset, even if the
/// tunnel's task is dropped with its worker: the peer must not take what it has received for all there is.
struct Shared<S: ByteStream> {
    stream: Mutex<S>,
    has_ended: bool,
}

impl<S: ByteStream> Shared<S> {
    fn new(stream: S) -> Self {
        Self { stream: Mutex::new(stream), has_ended: false }
    }

    fn acknowledged_so_far(&self) -> Option<u64> {
        self.stream.lock().socket().and_then(Socket::acknowledged_so_far)
    }
}

impl<S: ByteStream> Drop for Shared<S> {
    fn drop(&mut self) {
        if !self.has_ended {
            self.stream.get_mut().socket().into_iter().for_each(Socket::reset_on_close);
        }
    }
}

/// How a direction failed.
#[derive(Debug)]
enum Break {
    /// The side that was read from broke off; everything it sent has been written.
    Read(io::Error),
    /// The side that was written to takes no more.
    Write(io::Error),
    /// The watch stopped it.
    Stopped,
}

impl Break {
    /// The tunnel's end that this failure of the direction between these sides leads to.
    fn end(self, from: Side, to: Side) -> End {
        match self {
            Self::Read(error) => End::Broken(from, error),
            Self::Write(error) => End::Broken(to, error),
            Self::Stopped => End::Stopped,
        }
    }
}

/// One direction of a tunnel.
struct Direction<'a, R, T, W> {
    /// Where its bytes come from.
    side: Side,
    from: &'a Mutex<R>,
    to: &'a Mutex<T>,
    bytes: &'a AtomicU64,
    moved: &'a Moved,
    watch: &'a W,
}

impl<R: AsyncRead + Unpin, T: AsyncWrite + Unpin, W: Watch> Direction<'_, R, T, W> {
    /// Copies until the side ends.
    async fn run(self) -> Result<(), Break> {
        let end = self.copy().await;
        match end {
            Ok(()) => self.watch.ended(self.side),
            Err(Break::Read(_)) => self.watch.left(self.side),
            Err(Break::Write(_)) => self.watch.left(self.side.other()),
            Err(Break::Stopped) => {}
        }
        end
    }

    async fn copy(&self) -> Result<(), Break> {
        let Self { side, from, to, bytes, moved, watch } = *self;
        let mut buffer = BytesMut::new();
        let mut size = SIZES[0].1;
        loop {
            let read = poll_fn(|cx| {
                buffer.reserve(size);
                if let Poll::Ready(read) =
                    poll_read_buf(Pin::new(&mut *from.lock()), cx, &mut buffer)
                {
                    return Poll::Ready(read.map_err(Break::Read));
                }
                // Many tunnels are idle for days: they hold no buffer.
                buffer = BytesMut::new();
                // An HTTP/2 stream learns that it is lost even if nothing is written to it.
                match Pin::new(&mut *to.lock()).poll_flush(cx) {
                    Poll::Ready(Err(error)) => Poll::Ready(Err(Break::Write(error))),
                    Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
                }
            })
            .await?;
            if read == 0 {
                // After a reset, which a write has noticed, an end of the stream is not a clean one.
                if moved.broken.load(Ordering::Relaxed) {
                    return Err(Break::Read(io::ErrorKind::ConnectionReset.into()));
                }
                // The other side may be gone already; it has received everything.
                let _ = poll_fn(|cx| Pin::new(&mut *to.lock()).poll_shutdown(cx)).await;
                return Ok(());
            }
            if !watch.admits(side, &buffer) {
                return Err(Break::Stopped);
            }
            let mut left = &buffer[..];
            while !left.is_empty() {
                let written = poll_fn(|cx| Pin::new(&mut *to.lock()).poll_write(cx, left));
                let written = written.await.map_err(Break::Write)?;
                left = &left[written..];
                moved.now();
            }
            poll_fn(|cx| Pin::new(&mut *to.lock()).poll_flush(cx)).await.map_err(Break::Write)?;
            let carried = bytes.fetch_add(read as u64, Ordering::Relaxed) + read as u64;
            moved.now();
            if read >= size
                && let Some((_, larger)) = SIZES.iter().rfind(|(from, _)| carried >= *from)
            {
                size = size.max(*larger);
            }
            watch.passed(side);
            buffer.clear();
        }
    }
}

/// Waits until the peer's kernel has acknowledged everything written, because a reset discards the rest. The
/// kernel does not report this, so it is polled, as long as the peer reads some of it from time to time.
async fn delivered(socket: Option<&Socket>) {
    let Some(socket) = socket else { return };
    let mut deadline = Instant::now() + HALF_CLOSED;
    let mut pause = Duration::from_millis(1);
    let mut before = None;
    while let acknowledged @ Some(_) = socket.acknowledged_so_far()
        && Instant::now() < deadline
    {
        if acknowledged != before {
            (before, deadline) = (acknowledged, Instant::now() + HALF_CLOSED);
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// When bytes last moved, in either direction.
struct Moved {
    since: Instant,
    millis: AtomicU64,
    /// A direction has broken off.
    broken: AtomicBool,
}

impl Default for Moved {
    fn default() -> Self {
        Self { since: Instant::now(), millis: AtomicU64::new(0), broken: AtomicBool::new(false) }
    }
}

impl Moved {
    fn now(&self) {
        self.millis.store(self.since.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.since + Duration::from_millis(self.millis.load(Ordering::Relaxed))
    }
}

/// What each side has acknowledged of what was written to it, while that is not everything.
type Reading = [Option<u64>; 2];

/// Waits until no bytes have moved for `idle`, and nobody has read any of those on the way.
async fn until_idle(moved: &Moved, idle: Duration, reading: &impl Fn() -> Reading) {
    let mut before = reading();
    loop {
        let end = moved.last() + idle;
        sleep_until(end.min(Instant::now() + idle / LOOKS)).await;
        let now = reading();
        if before.iter().zip(&now).any(|(before, now)| before.is_some() && before != now) {
            moved.now();
        }
        before = now;
        if moved.last() + idle <= Instant::now() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Context;

    use tokio::io::{AsyncWriteExt as _, ReadBuf, duplex};

    use super::*;

    /// A peer that has sent an alert and closed.
    #[derive(Debug)]
    struct Refusing;

    impl AsyncRead for Refusing {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "an alert")))
        }
    }

    impl AsyncWrite for Refusing {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl ByteStream for Refusing {
        fn socket(&self) -> Option<&Socket> {
            None
        }
    }

    /// Regression: of the two, the error in writing was reported.
    #[tokio::test]
    async fn an_alert_is_the_reason_of_a_write_that_failed_before_it_was_read() {
        // Which direction is polled first is random.
        for _ in 0..100 {
            let (mut client, downstream) = duplex(1024);
            client.write_all(b"hello").await.unwrap();
            let idle = Duration::from_secs(5);
            let carried = tunnel(downstream, Refusing, idle, CancellationToken::new()).await;
            let End::Broken(Side::Target, error) = carried.end else { panic!("{carried:?}") };
            assert!(is_from_tls(&error), "{error}");
        }
    }
}
