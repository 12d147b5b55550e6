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
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tokio_util::sync::CancellationToken;

use super::EndpointConnections;
use crate::{
    body::RequestBody,
    connect::{Connected, Facts, Wire},
    tls::Negotiated,
};

/// Streams that one HTTP/2 connection carries at most, if its peer allows as many. More than
/// this goes to a further connection, so that one lost packet does not hold up everything.
const MAX_STREAMS: usize = 100;

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
    open: AtomicUsize,
    /// How many the peer allows, as it last said.
    limit: AtomicUsize,
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
                .handshake(io)
                .await?;
            let streams = Arc::new(Streams {
                open: AtomicUsize::new(1),
                limit: AtomicUsize::new(connection.current_max_send_streams()),
                used: AtomicU64::new(0),
                since: Instant::now(),
            });
            let learning = streams.clone();
            let mut connection = connection;
            let connection = poll_fn(move |cx| {
                let end = Pin::new(&mut connection).poll(cx);
                let limit = connection.current_max_send_streams();
                learning.limit.store(limit, Ordering::Relaxed);
                end
            });
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
        let limit = self.streams.limit.load(Ordering::Relaxed).min(MAX_STREAMS);
        if self.streams.open.load(Ordering::Relaxed) >= limit {
            return None;
        }
        self.streams.open.fetch_add(1, Ordering::Relaxed);
        Some(Self {
            sender: self.sender.clone(),
            line: self.line.clone(),
            streams: self.streams.clone(),
        })
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
