//! An HTTP/2 connection that many requests share, and the tasks that drive it.

use std::{
    fmt,
    future::{pending, poll_fn},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use http::{Response, request};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, futures::Notified},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{ConnectionInfo, Lead};
use crate::{
    body::{Interim, RequestBody},
    connect::{Mark, TargetStream},
    http2,
    stream::Backlog,
};

/// The most streams on one HTTP/2 connection, if its peer allows that many. Beyond this another connection is
/// made, so that one lost packet does not delay everything.
const MAX_STREAMS: usize = 100;

/// How long a peer's first SETTINGS are awaited before other requests share its connection anyway, and how long a
/// connection whose peer allows no streams remains the only one.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(5);

/// A handle to an HTTP/2 connection: the pool's, or one stream's.
pub struct Http2 {
    client: http2::ClientConnection,
    /// Its connection.
    pub info: Arc<ConnectionInfo>,
    streams: Arc<Streams>,
    is_stream: bool,
    /// The request on this stream.
    exchange: Option<Box<http2::Exchange>>,
}

/// What all handles to one HTTP/2 connection share.
#[derive(Debug)]
struct Streams {
    open: AtomicUsize,
    /// How many there may be; [`UNKNOWN`] until the peer has announced its limit.
    limit: AtomicUsize,
    /// Requests that wait for the connection get it once its limit is known. Otherwise those beyond the limit
    /// would have to wait for the others' streams to end.
    flight: Mutex<Option<Lead>>,
    /// The peer allows no streams at present, perhaps only for a moment.
    barred: Notify,
    /// Nothing more is read or written.
    ended: AtomicBool,
    /// Milliseconds between `since` and the last time at which a stream began or ended.
    used: AtomicU64,
    since: Instant,
}

const UNKNOWN: usize = usize::MAX;

impl Http2 {
    /// Starts HTTP/2. The task that drives it ends with the connection, at the latest when `kill` is
    /// cancelled.
    pub(super) async fn start(
        stream: TargetStream,
        info: Arc<ConnectionInfo>,
        kill: CancellationToken,
    ) -> Result<Self, http2::ExchangeError> {
        let (client, connection, keep_alive) = http2::handshake(stream, MAX_STREAMS).await?;
        let streams = Arc::new(Streams::new());
        let mark = info.wire.mark();
        let ended = Ended(streams.clone());
        let driver = Driver { connection, streams: ended, mark, info: info.clone() };
        tokio::spawn(watch(driver, keep_alive, kill));
        Ok(Self { client, info, streams, is_stream: true, exchange: None })
    }

    /// Sends a request and gives its response's head.
    pub(super) async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        interim: Option<&Arc<dyn Interim>>,
        limit: Duration,
    ) -> Result<Response<()>, http2::ExchangeError> {
        let mark = self.info.wire.mark();
        // From here on, notifications take this stream into account.
        let barred = self.streams.barred.notified();
        let exchange = self.exchange.insert(Box::new(self.client.begin(head, body)?));
        let head = tokio::select! {
            biased;
            head = poll_fn(|cx| exchange.poll_head(cx, interim)) => head,
            () = self.streams.unopened(barred, &mut self.client, limit) => {
                return Err(http2::ExchangeError::NoStream(limit));
            }
        };
        head.map_err(|error| self.judge(error, mark))
    }

    /// The request on this stream.
    pub fn exchange(&self) -> Option<&http2::Exchange> {
        self.exchange.as_deref()
    }

    /// The same, mutably.
    pub(super) fn exchange_mut(&mut self) -> Option<&mut http2::Exchange> {
        self.exchange.as_deref_mut()
    }

    /// What an error means for a request that was begun at `mark`.
    fn judge(&self, error: http2::ExchangeError, mark: Mark) -> http2::ExchangeError {
        match error {
            // Nothing will be written any more, and no stream has written anything.
            http2::ExchangeError::Connection(error)
                if self.streams.ended.load(Ordering::Acquire)
                    && !self.info.wire.has_written_since(mark) =>
            {
                http2::ExchangeError::NotSent(error)
            }
            error => error,
        }
    }

    /// One more stream of the same connection, unless it is full or closing.
    pub fn share(&self) -> Option<Self> {
        let limit = self.streams.limit.load(Ordering::Relaxed);
        let has_room = limit != UNKNOWN && self.streams.open.load(Ordering::Relaxed) < limit;
        if !has_room {
            return None;
        }
        let mut stream = self.handle();
        if !stream.client.is_open() {
            return None;
        }
        self.streams.open.fetch_add(1, Ordering::Relaxed);
        stream.is_stream = true;
        Some(stream)
    }

    /// A further handle, for the pool.
    pub(super) fn handle(&self) -> Self {
        Self {
            client: self.client.clone(),
            info: self.info.clone(),
            streams: self.streams.clone(),
            is_stream: false,
            exchange: None,
        }
    }

    /// Ends the flight that made it, once it is known how many may share it.
    pub(super) fn land(&self, flight: Lead) {
        // Under the lock, so that the limit does not become known, and the connection does not end, in between.
        let mut waiting = self.streams.flight.lock();
        let ended = self.streams.ended.load(Ordering::Acquire);
        let limit = self.streams.limit.load(Ordering::Relaxed);
        if (limit == UNKNOWN || limit == 0 && self.streams.is_new()) && !ended {
            *waiting = Some(flight);
        }
    }

    /// Whether no further streams can be begun, or none are allowed and that is not expected to change.
    pub fn is_closed(&self) -> bool {
        let is_barred = self.streams.limit.load(Ordering::Relaxed) == 0;
        is_barred && !self.streams.is_new() || !self.client.clone().is_open()
    }

    /// How long no stream has been open.
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        let streams = &self.streams;
        (streams.open.load(Ordering::SeqCst) == 0).then(|| {
            let used = Duration::from_millis(streams.used.load(Ordering::Relaxed));
            now.saturating_duration_since(streams.since + used)
        })
    }
}

impl fmt::Debug for Http2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http2").field("info", &self.info).field("streams", &self.streams).finish()
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        if self.is_stream {
            let used = self.streams.since.elapsed().as_millis() as u64;
            self.streams.used.store(used, Ordering::Relaxed);
            let is_last = self.streams.open.fetch_sub(1, Ordering::SeqCst) == 1;
            self.info.counted.has_room(is_last);
        }
    }
}

impl Streams {
    /// For a new connection with one stream.
    fn new() -> Self {
        Self {
            open: AtomicUsize::new(1),
            limit: AtomicUsize::new(UNKNOWN),
            flight: Mutex::default(),
            barred: Notify::new(),
            ended: AtomicBool::new(false),
            used: AtomicU64::new(0),
            since: Instant::now(),
        }
    }

    /// Takes note of how many streams the peer allows; whether that is another number than before.
    fn learn(&self, limit: usize) -> bool {
        let limit = limit.min(MAX_STREAMS);
        if self.limit.load(Ordering::Relaxed) == limit {
            return false;
        }
        let mut flight = self.flight.lock();
        self.limit.store(limit, Ordering::Relaxed);
        if limit > 0 {
            flight.take();
        } else {
            self.barred.notify_waiters();
        }
        true
    }

    /// Has waiting requests look for another connection if they cannot use this one any more.
    fn give_up(&self) {
        let mut flight = self.flight.lock();
        if self.limit.load(Ordering::Relaxed) == 0 {
            flight.take();
        }
    }

    fn is_new(&self) -> bool {
        self.since.elapsed() < SETTINGS_TIMEOUT
    }

    /// Ready once a stream that was begun with `client` has waited for `limit` since the peer allowed none,
    /// and has not been opened.
    async fn unopened(
        &self,
        barred: Notified<'_>,
        client: &mut http2::ClientConnection,
        limit: Duration,
    ) {
        if self.limit.load(Ordering::Relaxed) != 0 {
            barred.await;
        }
        // Boxed, because most requests do not need it, and their futures would have room for it.
        Box::pin(sleep(limit)).await;
        if client.is_open() {
            pending().await
        }
    }
}

/// Polls an HTTP/2 connection until it ends, and keeps it counted until then.
struct Driver {
    // Dropped before the end is reported: after that, nothing is written any more.
    connection: http2::Connection<TargetStream>,
    streams: Ended,
    mark: Mark,
    info: Arc<ConnectionInfo>,
}

/// Reports a connection's end when dropped.
struct Ended(Arc<Streams>);

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let ended = Pin::new(&mut self.connection).poll(cx).map(|ended| {
            if let Err(flood) = ended {
                let endpoint = self.info.wire.peer().map(tracing::field::display);
                tracing::warn!(endpoint, %flood, "closed an HTTP/2 connection to an origin");
            }
        });
        // RFC 9113 §3.4: the peer's first frame is SETTINGS.
        if self.info.wire.has_received_since(self.mark) {
            let is_news = self.streams.0.learn(self.connection.max_streams());
            if is_news {
                self.info.counted.has_room(false);
            }
        }
        ended
    }
}

/// Runs an HTTP/2 connection's driver until it ends, is killed, or its peer is gone. Apart from the driver, which
/// is woken by every frame.
async fn watch(driver: Driver, keep_alive: http2::OriginKeepAlive, kill: CancellationToken) {
    let (streams, wire) = (driver.streams.0.clone(), driver.info.wire.clone());
    let mut driven = tokio::spawn(driver);
    let lost = async {
        sleep(SETTINGS_TIMEOUT).await;
        streams.learn(streams.limit.load(Ordering::Relaxed));
        streams.give_up();
        let mut mark = wire.mark();
        let has_spoken = || wire.has_received_since(std::mem::replace(&mut mark, wire.mark()));
        let mut backlog = Backlog::default();
        let takes = || wire.has_moved(&mut backlog);
        keep_alive.lost(|| streams.open.load(Ordering::Relaxed) > 0, has_spoken, takes).await;
    };
    tokio::select! {
        _ = &mut driven => return,
        () = kill.cancelled() => {}
        () = lost => {}
    }
    driven.abort();
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
        // Requests that wait for it look for another.
        self.0.flight.lock().take();
    }
}
