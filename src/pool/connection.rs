//! HTTP over one upstream connection, driven by a task of its own.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{EndpointConnections, Lead};
use crate::{
    body::RequestBody,
    connect::{Connected, Facts, UpstreamIo, Wire},
    tls::Negotiated,
};

/// Streams that one HTTP/2 connection carries at most, if its peer allows as many. More than
/// this goes to a further connection, so that one lost packet does not hold up everything.
const MAX_STREAMS: usize = 100;

/// What a peer's `SETTINGS_MAX_CONCURRENT_STREAMS` is taken for until it has said one: a number
/// that none would choose, since that is how its saying so is noticed.
const STREAMS_UNKNOWN: usize = 0x7fff_fff1;

/// For how long a peer's say about its streams is awaited, before it is taken for no limit.
const STREAMS_PATIENCE: Duration = Duration::from_secs(5);

/// Response heads larger than this are refused.
const MAX_RESPONSE_HEAD: usize = 256 * 1024;

/// HTTP/2 keep-alive: a peer that vanished is noticed before the kernel would.
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
const H2_PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that a request can be sent on.
#[derive(Debug)]
pub enum Connection {
    /// For one request at a time.
    Http1(Http1),
    /// Shared by many.
    Http2(Http2),
}

/// What all requests on one connection share; alive until its socket closes.
#[derive(Debug)]
pub struct Line {
    /// The socket, for questions about lost requests.
    pub wire: Arc<Wire>,
    /// How it was made.
    pub facts: Facts,
    /// When it has to be replaced (`pool.max_lifetime`, less some jitter).
    pub expires: Instant,
    pub(super) endpoint: Arc<EndpointConnections>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    /// Its connection.
    pub line: Arc<Line>,
}

/// A handle on an HTTP/2 connection; counts one stream.
#[derive(Debug)]
pub struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    /// Its connection.
    pub line: Arc<Line>,
    streams: Arc<Streams>,
}

#[derive(Debug)]
struct Streams {
    /// Handles: one a stream, and the pool's own.
    open: AtomicUsize,
    /// How many streams the peer allows, as it last said.
    limit: AtomicUsize,
    /// Those who wait for the connection learn of it when its limit is known. Were they to use it
    /// before, those past the limit would wait for the others' streams to end.
    flight: Mutex<Option<Lead>>,
    /// Milliseconds between `since` and the last time at which a stream began or ended.
    used: AtomicU64,
    since: Instant,
}

impl Connection {
    /// Starts HTTP on a new connection: HTTP/2 where ALPN chose it or `prior_knowledge` says so.
    ///
    /// The task that drives it ends with the connection, at the latest when `kill` is cancelled.
    pub async fn start(
        connected: Connected,
        prior_knowledge: bool,
        expires: Instant,
        endpoint: Arc<EndpointConnections>,
        permit: Option<OwnedSemaphorePermit>,
        kill: CancellationToken,
    ) -> Result<Self, hyper::Error> {
        let Connected { io, wire, facts } = connected;
        let http2 = prior_knowledge || facts.alpn == Negotiated::Http2;
        let line = Arc::new(Line { wire, facts, expires, endpoint, _permit: permit });
        line.endpoint.opened();
        let io = TokioIo::new(io);
        if http2 {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(H2_PING_INTERVAL)
                .keep_alive_timeout(H2_PING_TIMEOUT)
                .max_header_list_size(MAX_RESPONSE_HEAD as u32)
                .initial_max_send_streams(STREAMS_UNKNOWN)
                .handshake(io)
                .await?;
            let streams = Arc::new(Streams {
                open: AtomicUsize::new(1),
                limit: AtomicUsize::new(STREAMS_UNKNOWN),
                flight: Mutex::default(),
                used: AtomicU64::new(0),
                since: Instant::now(),
            });
            let connection = learn_streams(connection, streams.clone());
            drive(connection, line.clone(), kill);
            Ok(Self::Http2(Http2 { sender, line, streams }))
        } else {
            let (sender, connection) = http1::Builder::new()
                .preserve_header_case(true)
                .max_header_size(MAX_RESPONSE_HEAD)
                .handshake(io)
                .await?;
            drive(connection.with_upgrades(), line.clone(), kill);
            Ok(Self::Http1(Http1 { sender, line }))
        }
    }

    /// Its connection.
    pub fn line(&self) -> &Arc<Line> {
        match self {
            Self::Http1(http1) => &http1.line,
            Self::Http2(http2) => &http2.line,
        }
    }

    /// Whether requests are to be written as HTTP/2 has them.
    pub fn is_http2(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// Ends the flight that made it, as soon as others can know what it is good for.
    pub fn land(&self, flight: Lead) {
        if let Self::Http2(http2) = self {
            http2.land(flight);
        }
    }

    /// Sends a request. Where nothing of it was written, the error gives it back.
    pub async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        match self {
            Self::Http1(http1) => http1.sender.try_send_request(request).await,
            Self::Http2(http2) => http2.sender.try_send_request(request).await,
        }
    }
}

/// Polls a connection until it ends, and holds its line that long.
fn drive<F>(connection: F, line: Arc<Line>, kill: CancellationToken)
where
    F: Future<Output = Result<(), hyper::Error>> + Send + 'static,
{
    tokio::spawn(async move {
        tokio::select! {
            // What went wrong reaches the request that it went wrong for.
            _ = connection => {}
            () = kill.cancelled() => {}
        }
        drop(line);
    });
}

/// Polls an HTTP/2 connection and keeps `streams` informed of what its peer allows.
///
/// hyper tells that to who asks, and nobody when it changes: so it is asked again and again until
/// the peer has first spoken, which takes a round trip, and then whenever a request is sent.
async fn learn_streams(
    mut connection: http2::Connection<TokioIo<UpstreamIo>, RequestBody, TokioExecutor>,
    streams: Arc<Streams>,
) -> Result<(), hyper::Error> {
    let deadline = Instant::now() + STREAMS_PATIENCE;
    let mut pause = Duration::from_millis(1);
    while !streams.learn(connection.current_max_send_streams()) {
        if Instant::now() >= deadline {
            streams.learn(MAX_STREAMS);
            break;
        }
        tokio::select! {
            end = &mut connection => {
                streams.flight.lock().take();
                return end;
            }
            () = sleep(pause) => pause = (pause * 2).min(Duration::from_millis(20)),
        }
    }
    poll_fn(|cx| {
        let end = Pin::new(&mut connection).poll(cx);
        streams.learn(connection.current_max_send_streams());
        end
    })
    .await
}

impl Http1 {
    /// Whether the connection can take a request now, later, or never again.
    pub fn readiness(&mut self) -> Readiness {
        match self.sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Readiness::Ready,
            Poll::Ready(Err(_)) => Readiness::Closed,
            Poll::Pending => Readiness::Busy,
        }
    }
}

/// Whether a pooled connection can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Now.
    Ready,
    /// Not yet: the rest of the last request's body is still on its way.
    Busy,
    /// Never again.
    Closed,
}

impl Http2 {
    /// One more stream of the same connection, unless it is full or closing.
    pub fn share(&self) -> Option<Self> {
        if !self.sender.is_ready() {
            return None;
        }
        let limit = self.streams.limit.load(Ordering::Relaxed);
        // The handle that is asked is the pool's, and no stream.
        let streams = self.streams.open.load(Ordering::Relaxed) - 1;
        (limit != STREAMS_UNKNOWN && streams < limit.min(MAX_STREAMS)).then(|| self.handle())
    }

    /// A further handle, for the pool.
    pub(super) fn handle(&self) -> Self {
        self.streams.open.fetch_add(1, Ordering::Relaxed);
        Self { sender: self.sender.clone(), line: self.line.clone(), streams: self.streams.clone() }
    }

    /// Ends the flight that made it, once it is known how many may share it.
    fn land(&self, flight: Lead) {
        // Under the lock, so that the limit does not become known in between.
        let mut waiting = self.streams.flight.lock();
        if self.streams.limit.load(Ordering::Relaxed) == STREAMS_UNKNOWN && !self.is_closed() {
            *waiting = Some(flight);
        }
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// For how long no stream has been open, apart from the handle asked.
    pub fn idle_for(&self, now: Instant) -> Option<Duration> {
        let streams = &self.streams;
        (streams.open.load(Ordering::Relaxed) <= 1).then(|| {
            let used = Duration::from_millis(streams.used.load(Ordering::Relaxed));
            now.saturating_duration_since(streams.since + used)
        })
    }
}

impl Streams {
    /// Takes note of how many streams the peer allows; `false` while it has not said.
    fn learn(&self, limit: usize) -> bool {
        if limit == STREAMS_UNKNOWN {
            return false;
        }
        if self.limit.load(Ordering::Relaxed) != limit {
            let mut flight = self.flight.lock();
            self.limit.store(limit, Ordering::Relaxed);
            flight.take();
        }
        true
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        let used = self.streams.since.elapsed().as_millis() as u64;
        self.streams.used.store(used, Ordering::Relaxed);
        self.streams.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.endpoint.closed();
    }
}
