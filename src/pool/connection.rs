//! HTTP over one upstream connection. A task of its own drives HTTP/2; HTTP/1.1 is driven by whoever
//! has a request on it.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode, request};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Counted, Lead};
use crate::{
    body::{Interim, RequestBody},
    connect::{Facts, Session, TargetStream, Verdict, Wire},
    http1::{self, ExchangeError},
    socket::Prefixed,
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

/// Response heads of HTTP/2 larger than this are refused.
const MAX_RESPONSE_HEAD: u32 = 256 * 1024;

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
    pub(super) counted: Counted,
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub struct Http1 {
    /// None once it speaks another protocol.
    client: Option<Box<http1::Client<TargetStream>>>,
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
    /// The body of the answer on this stream.
    answer: Option<Incoming>,
}

/// Why a request has no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// On HTTP/1.1.
    #[error(transparent)]
    Http1(#[from] ExchangeError),
    /// On HTTP/2.
    #[error(transparent)]
    Http2(Http2Error),
}

/// What hyper said, and whether it wrote anything of the request before it did.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Http2Error {
    unsent: bool,
    #[source]
    error: hyper::Error,
}

impl SendError {
    /// What the error by itself says of how much the origin had of the request: more than its
    /// connection can tell of HTTP/2, where many requests share it.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Http1(ExchangeError::NotFree) => Verdict::Unsent,
            Self::Http1(_) => Verdict::Unknown,
            Self::Http2(error) if error.unsent => Verdict::Unsent,
            Self::Http2(error) => said_by_http2(&error.error),
        }
    }

    /// Whether the origin stopped reading the request.
    pub fn is_unread(&self) -> bool {
        matches!(self, Self::Http1(ExchangeError::Unread(_)))
    }

    /// Whether the request's own body broke off. hyper blames its user for that, and also for a
    /// connection whose task was ended, as those to an old true name are.
    pub fn is_of_the_body(&self) -> bool {
        match self {
            Self::Http1(error) => matches!(error, ExchangeError::RequestBody(_)),
            Self::Http2(error) => error.error.is_user(),
        }
    }

    /// Whether the connection's end is what went wrong, as it is where that was ended on purpose.
    pub fn is_cut_off(&self) -> bool {
        match self {
            Self::Http1(error) => !matches!(error, ExchangeError::RequestBody(_)),
            Self::Http2(error) => error.error.is_user() || error.error.is_canceled(),
        }
    }

    /// Whether the connection ended before the answer's head was complete.
    pub fn is_incomplete(&self) -> bool {
        match self {
            Self::Http1(error) => matches!(error, ExchangeError::Closed | ExchangeError::NotFree),
            Self::Http2(error) => error.error.is_incomplete_message(),
        }
    }

    /// Whether what came is not HTTP.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => matches!(error, ExchangeError::Head(_)),
            Self::Http2(error) => error.error.is_parse(),
        }
    }
}

/// RFC 9113 §8.7: a stream refused, or beyond the last one of a GOAWAY, was not processed.
fn said_by_http2(error: &hyper::Error) -> Verdict {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            return match h2.reason() {
                _ if !h2.is_remote() => Verdict::Unknown,
                Some(h2::Reason::REFUSED_STREAM) => Verdict::StreamRefused,
                // With an error, h2 says the same of streams that were taken.
                Some(h2::Reason::NO_ERROR) if h2.is_go_away() => Verdict::BeyondGoaway,
                _ => Verdict::Unknown,
            };
        }
        source = cause.source();
    }
    Verdict::Unknown
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
        session: Session,
        prior_knowledge: bool,
        expires: Instant,
        counted: Counted,
        kill: CancellationToken,
    ) -> Result<Self, hyper::Error> {
        let Session { stream, wire, facts } = session;
        let http2 = prior_knowledge || facts.alpn == Negotiated::Http2;
        let line = Arc::new(Line { wire, facts, expires, counted });
        if http2 {
            let io = TokioIo::new(stream);
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(H2_PING_INTERVAL)
                .keep_alive_timeout(H2_PING_TIMEOUT)
                .max_header_list_size(MAX_RESPONSE_HEAD)
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
            Ok(Self::Http2(Http2 { sender, line, streams, answer: None }))
        } else {
            let client = Some(Box::new(http1::Client::new(stream)));
            Ok(Self::Http1(Http1 { client, line }))
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

    /// Sends a request and gives its answer's head, behind which [`poll_frame`](Self::poll_frame) has
    /// the body. `probe`: the connection has served before.
    pub async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        probe: bool,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Result<Response<()>, SendError> {
        match self {
            Self::Http1(http1) => match &mut http1.client {
                Some(client) => Ok(client.send(head, body, probe, interim).await?),
                None => Err(ExchangeError::NotFree.into()),
            },
            // Boxed, for a request on HTTP/1.1 has no room for it.
            Self::Http2(http2) => Box::pin(http2.send(head, body, interim)).await,
        }
    }

    /// The answer's body, as [`Body::poll_frame`] has it.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        match self {
            Self::Http1(Http1 { client: Some(client), .. }) => {
                client.poll_frame(cx).map_err(SendError::Http1)
            }
            Self::Http2(Http2 { answer: Some(answer), .. }) => Pin::new(answer)
                .poll_frame(cx)
                .map_err(|error| SendError::Http2(Http2Error { unsent: false, error })),
            _ => Poll::Ready(None),
        }
    }

    /// Goes on with the request's body, for a caller who does not ask for the answer's.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        if let Self::Http1(Http1 { client: Some(client), .. }) = self {
            client.poll_progress(cx);
        }
    }

    /// Whether the answer's body has ended.
    pub fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(http1) => http1.client.as_ref().is_none_or(|client| client.is_end_stream()),
            Self::Http2(http2) => http2.answer.as_ref().is_none_or(Body::is_end_stream),
        }
    }

    /// How much of the answer's body comes.
    pub fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(Http1 { client: Some(client), .. }) => client.size_hint(),
            Self::Http2(Http2 { answer: Some(answer), .. }) => answer.size_hint(),
            _ => SizeHint::with_exact(0),
        }
    }

    /// The stream behind a `101`; none of HTTP/2, which has no such answer.
    pub fn take_tunnel(&mut self) -> Option<Prefixed<TargetStream>> {
        match self {
            Self::Http1(http1) => http1.client.take().and_then(|client| client.into_tunnel()),
            Self::Http2(_) => None,
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
    mut connection: http2::Connection<TokioIo<TargetStream>, RequestBody, TokioExecutor>,
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
    /// Whether it can take the next request, as far as anybody has looked.
    pub fn is_free(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.is_free())
    }

    /// Whether its idle peer is still there, and has said nothing.
    pub fn is_still_free(&mut self) -> bool {
        self.client.as_mut().is_some_and(|client| client.is_still_free())
    }

    /// Holds no memory that it does not need while it waits.
    pub(super) fn rest(&mut self) {
        if let Some(client) = &mut self.client {
            client.rest();
        }
        self.line.wire.rest();
    }
}

impl Drop for Http1 {
    fn drop(&mut self) {
        if let Some(client) = &mut self.client {
            client.close();
        }
    }
}

impl Http2 {
    async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Result<Response<()>, SendError> {
        let mut request = Request::from_parts(head.clone(), body);
        let held = request.body().is_held().then(|| request.body().handle());
        let interim = interim.cloned();
        if held.is_some() || interim.is_some() {
            hyper::ext::on_informational(&mut request, move |response| {
                if response.status() == StatusCode::CONTINUE {
                    held.iter().for_each(RequestBody::proceed);
                } else if let Some(interim) = &interim {
                    let (mut head, ()) = Response::new(()).into_parts();
                    head.status = response.status();
                    head.headers.clone_from(response.headers());
                    interim.pass_on(head);
                }
            });
        }
        let response = self.sender.try_send_request(request).await.map_err(|mut error| {
            let unsent = error.take_message().is_some();
            SendError::Http2(Http2Error { unsent, error: error.into_error() })
        })?;
        let (head, answer) = response.into_parts();
        self.answer = Some(answer);
        Ok(Response::from_parts(head, ()))
    }

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
        Self {
            sender: self.sender.clone(),
            line: self.line.clone(),
            streams: self.streams.clone(),
            answer: None,
        }
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
