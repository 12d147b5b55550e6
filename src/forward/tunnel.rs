//! Bytes both ways, until both sides have said their last.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// Buffers grow with what was carried: an idle tunnel stays small.
const SIZES: [(u64, usize); 3] = [(0, 4 * 1024), (64 * 1024, 16 * 1024), (1024 * 1024, 64 * 1024)];

/// How a tunnel ended.
#[derive(Debug)]
pub enum End {
    /// Both sides closed.
    Closed,
    /// A side broke.
    Broken(io::Error),
    /// Nothing moved for `timeouts.idle`.
    Idle,
    /// The true name changed, or the proxy stops.
    Killed,
}

/// What a tunnel carried.
#[derive(Debug)]
pub struct Carried {
    /// From the application.
    pub bytes_in: u64,
    /// To the application.
    pub bytes_out: u64,
    /// Why it ended.
    pub end: End,
}

/// Copies both ways. A side that closes is closed at the other, and the rest still flows.
pub async fn tunnel<D, U>(
    downstream: D,
    upstream: U,
    idle: Duration,
    kill: CancellationToken,
) -> Carried
where
    D: AsyncRead + AsyncWrite,
    U: AsyncRead + AsyncWrite,
{
    let (down_read, down_write) = split(downstream);
    let (up_read, up_write) = split(upstream);
    let moved = Moved { since: Instant::now(), millis: AtomicU64::new(0) };
    let (bytes_in, bytes_out) = (AtomicU64::new(0), AtomicU64::new(0));
    let end = tokio::select! {
        result = async {
            tokio::try_join!(
                pump(down_read, up_write, &bytes_in, &moved),
                pump(up_read, down_write, &bytes_out, &moved),
            )
        } => match result {
            Ok(_) => End::Closed,
            Err(error) => End::Broken(error),
        },
        () = until_idle(&moved, idle) => End::Idle,
        () = kill.cancelled() => End::Killed,
    };
    Carried { bytes_in: bytes_in.into_inner(), bytes_out: bytes_out.into_inner(), end }
}

async fn pump<R: AsyncRead, W: AsyncWrite>(
    mut from: ReadHalf<R>,
    mut to: WriteHalf<W>,
    bytes: &AtomicU64,
    moved: &Moved,
) -> io::Result<()> {
    let mut buffer = vec![0; SIZES[0].1];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            // The other side may be gone already; it has had everything.
            let _ = to.shutdown().await;
            return Ok(());
        }
        to.write_all(&buffer[..read]).await?;
        to.flush().await?;
        let carried = bytes.fetch_add(read as u64, Ordering::Relaxed) + read as u64;
        moved.now();
        if read == buffer.len()
            && let Some((_, size)) = SIZES.iter().rfind(|(from, _)| carried >= *from)
            && *size > buffer.len()
        {
            buffer = vec![0; *size];
        }
    }
}

/// When bytes last moved, in either direction.
struct Moved {
    since: Instant,
    millis: AtomicU64,
}

impl Moved {
    fn now(&self) {
        self.millis.store(self.since.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.since + Duration::from_millis(self.millis.load(Ordering::Relaxed))
    }
}

async fn until_idle(moved: &Moved, idle: Duration) {
    loop {
        let deadline = moved.last() + idle;
        sleep_until(deadline).await;
        if moved.last() + idle <= deadline {
            return;
        }
    }
}
