//! A request's record from its head to its response's end, and the body that carries it there.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{HeaderName, Method, StatusCode, request};
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{ForwardError, Problem, headers, http::is_of_the_body, passthrough::Passing};
use crate::{
    body::{BoxError, RequestBody, strip_trailers},
    error::ProxyErrorType,
    idle::{Idle, IdleTimer},
    telemetry::{Access, RequestFailure, RequestTotals},
    upstream::{Generation, Lease, Upstream},
};

/// How long a client may read nothing of a response that belongs to no alias.
const OWN_IDLE: Duration = Duration::from_secs(60);

/// One request as metrics and access log see it. Written down when it drops.
pub struct Exchange {
    upstream: Arc<Upstream>,
    worker: usize,
    started: Instant,
    protocol: &'static str,
    method: Method,
    /// Only where an access log is written.
    path: Option<Box<str>>,
    trace_id: Option<Box<str>>,
    status: StatusCode,
    error: Option<ProxyErrorType>,
    generation: Option<Arc<Generation>>,
    endpoint: Option<SocketAddr>,
    reused: bool,
    tls_version: &'static str,
    upstream_time: Option<Duration>,
    retries: u32,
    request: RequestBody,
    bytes_in: u64,
    bytes_out: u64,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Exchange {
    /// Begins the record of a request that came at `started` and was routed to `upstream`.
    pub fn begin(
        upstream: Arc<Upstream>,
        worker: usize,
        head: &request::Parts,
        protocol: &'static str,
        request: RequestBody,
        started: Instant,
    ) -> Box<Self> {
        upstream.worker(worker).metrics.begun();
        let logged = tracing::enabled!(target: "access", tracing::Level::INFO);
        Box::new(Self {
            worker,
            started,
            protocol,
            method: head.method.clone(),
            path: logged.then(|| head.uri.path().into()),
            trace_id: logged.then(|| headers::trace_id(&head.headers).map(Into::into)).flatten(),
            // What a log calls a request whose client left before it was answered.
            status: StatusCode::from_u16(499).unwrap_or_default(),
            error: None,
            generation: None,
            endpoint: None,
            reused: false,
            tls_version: "",
            upstream_time: None,
            retries: 0,
            request,
            bytes_in: 0,
            bytes_out: 0,
            _permit: None,
            upstream,
        })
    }

    /// Holds on to the leave to serve it.
    pub fn admit(&mut self, permit: Option<OwnedSemaphorePermit>) {
        self._permit = permit;
    }

    /// It was sent again.
    pub fn retried(&mut self, reason: &'static str) {
        self.retries += 1;
        self.upstream.worker(self.worker).metrics.retry(reason);
    }

    /// The origin's head arrived on `lease`, this long after the request was given to it.
    pub fn answered(&mut self, status: StatusCode, lease: &Lease, took: Duration) {
        self.status = status;
        self.generation = Some(lease.generation().clone());
        self.endpoint = Some(lease.endpoint());
        self.reused = lease.is_reused();
        self.tls_version = lease.line().facts.tls_version.unwrap_or("");
        self.upstream_time = Some(took);
    }

    /// truename answers itself.
    pub fn failed(&mut self, problem: &Problem, error: &ForwardError) {
        self.status = problem.status();
        self.endpoint = error.endpoint();
        self.generation = error.generation().cloned();
        self.broke(problem.error());
    }

    /// It went wrong after the head was passed on.
    pub fn broke(&mut self, error: ProxyErrorType) {
        self.error = Some(error);
        self.upstream.worker(self.worker).metrics.error(error);
    }

    /// A tunnel has carried this much.
    pub fn carried(&mut self, bytes_in: u64, bytes_out: u64) {
        self.bytes_in += bytes_in;
        self.bytes_out += bytes_out;
    }

    /// Says in the log why a request failed, with everything a person would ask next. Only once, where
    /// others fail for the same reason.
    pub fn explain(&self, problem: &Problem) {
        let kind = RequestFailure {
            true_name: self
                .generation
                .as_ref()
                .map_or_else(String::new, |generation| generation.true_name().as_str().to_owned()),
            stage: problem.stage().as_str(),
            error: problem.error().as_str(),
            fix: problem.fix().map(str::to_owned),
        };
        if !self.upstream.failures().begins(kind, problem.detail()) {
            return;
        }
        tracing::warn!(
            alias = self.upstream.config().name,
            stage = problem.stage().as_str(),
            error = problem.error().as_str(),
            endpoint = self.endpoint.map(tracing::field::display),
            fix = problem.fix(),
            "{}",
            problem.detail(),
        );
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let metrics = &self.upstream.worker(self.worker).metrics;
        let duration = self.started.elapsed();
        let bytes_in = self.bytes_in + self.request.bytes();
        let totals = RequestTotals { duration, bytes_in, bytes_out: self.bytes_out };
        metrics.finished(&self.method, self.status, &totals);
        let Some(path) = &self.path else { return };
        Access {
            alias: &self.upstream.config().name,
            true_name: self.generation.as_ref().map_or("", |g| g.true_name().as_str()),
            endpoint: self.endpoint,
            protocol: self.protocol,
            method: self.method.as_str(),
            path,
            status: self.status.as_u16(),
            error: self.error.map_or("", ProxyErrorType::as_str),
            bytes_in,
            bytes_out: self.bytes_out,
            duration,
            upstream: self.upstream_time,
            retries: self.retries,
            reused: self.reused,
            tls_version: self.tls_version,
            trace_id: self.trace_id.as_deref().unwrap_or(""),
        }
        .log();
    }
}

/// The body of every response, whoever made it.
pub struct Body(Kind);

enum Kind {
    /// truename's own answer.
    Whole(Option<Bytes>, Option<Box<Exchange>>),
    /// The origin's.
    Streaming(Box<Streaming>),
    /// That of a host that is no alias.
    Passing(Box<Passing>),
}

/// A response on its way: keeps the connection until its end, and then gives it back.
struct Streaming {
    lease: Option<Lease>,
    keep_alive: Option<Duration>,
    exchange: Box<Exchange>,
    idle: Duration,
    timer: IdleTimer,
    /// How much of the request's body had come when that was last looked at.
    request_bytes: u64,
    /// The connection options of its head, which cover its trailers.
    nominated: Vec<HeaderName>,
}

impl Body {
    /// All of a short answer.
    pub fn whole(bytes: Bytes) -> Self {
        Self(Kind::Whole(Some(bytes), None))
    }

    /// The origin's body. `keep_alive` as [`headers::keep_alive`] has it.
    pub(super) fn streaming(
        mut lease: Lease,
        (reusable, keep_alive): (bool, Option<Duration>),
        exchange: Box<Exchange>,
        idle: Duration,
        nominated: Vec<HeaderName>,
    ) -> Self {
        if !reusable {
            lease.refuse_reuse();
        }
        let lease = Some(lease);
        let mut streaming = Box::new(Streaming {
            lease,
            keep_alive,
            exchange,
            idle,
            timer: IdleTimer::default(),
            request_bytes: 0,
            nominated,
        });
        if streaming.is_end_stream() {
            streaming.give_back();
        }
        Self(Kind::Streaming(streaming))
    }

    /// The body of a host that is no alias.
    pub(super) fn passing(passing: Passing) -> Self {
        Self(Kind::Passing(Box::new(passing)))
    }

    /// Whether truename made it, and nothing more of the request is wanted.
    pub fn is_own(&self) -> bool {
        matches!(self.0, Kind::Whole(..))
    }

    /// Leaves the content of truename's own response out, as one to HEAD has it.
    pub fn omit_own_content(&mut self) {
        if let Kind::Whole(bytes, _) = &mut self.0 {
            *bytes = None;
        }
    }

    /// How long its client may read nothing of it.
    pub fn idle(&self) -> Duration {
        match &self.0 {
            Kind::Whole(_, Some(exchange)) => exchange.upstream.config().timeouts.idle,
            Kind::Whole(_, None) => OWN_IDLE,
            Kind::Streaming(streaming) => streaming.idle,
            Kind::Passing(passing) => passing.idle(),
        }
    }

    /// Goes on with the request's own body, while nothing of this one can be written.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match &mut self.0 {
            Kind::Whole(..) => {}
            Kind::Streaming(streaming) => {
                streaming.lease.iter_mut().for_each(|lease| lease.poll_progress(cx));
            }
            Kind::Passing(passing) => passing.poll_progress(cx),
        }
    }

    /// Attaches the record of the request to truename's own answer.
    pub(super) fn record(&mut self, record: Box<Exchange>) {
        if let Kind::Whole(_, exchange) = &mut self.0 {
            *exchange = Some(record);
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Whole(bytes, exchange) => {
                let bytes = bytes.take().filter(|bytes| !bytes.is_empty());
                if let (Some(bytes), Some(exchange)) = (&bytes, exchange) {
                    exchange.bytes_out += bytes.len() as u64;
                }
                Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            Kind::Streaming(streaming) => streaming.poll_frame(cx),
            Kind::Passing(passing) => passing.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes, _) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Kind::Streaming(streaming) => streaming.is_end_stream(),
            Kind::Passing(passing) => passing.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Streaming(streaming) => streaming.size_hint(),
            Kind::Passing(passing) => passing.size_hint(),
        }
    }
}

impl Streaming {
    fn is_end_stream(&self) -> bool {
        self.lease.as_ref().is_none_or(Lease::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.lease.as_ref().map_or(SizeHint::with_exact(0), Lease::size_hint)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(lease) = &mut self.lease else { return Poll::Ready(None) };
        let Poll::Ready(mut frame) = lease.poll_frame(cx) else {
            // One side may be silent for as long as the other sends.
            let request_bytes = self.exchange.request.bytes();
            if request_bytes != self.request_bytes {
                self.request_bytes = request_bytes;
                self.timer.moved();
            }
            ready!(self.timer.poll(cx, self.idle));
            self.exchange.broke(ProxyErrorType::HttpResponseTimeout);
            self.lease = None;
            return Poll::Ready(Some(Err(Idle(self.idle).into())));
        };
        self.timer.moved();
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    strip_trailers(trailers, &self.nominated);
                }
                self.exchange.bytes_out += frame.data_ref().map_or(0, Bytes::len) as u64;
                if self.is_end_stream() {
                    self.give_back();
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "a response broke off");
                let lease = self.lease.take();
                // The client's own end of it is none of the origin's failures.
                let of_the_body =
                    lease.as_ref().is_some_and(|lease| is_of_the_body(error, lease.generation()));
                if of_the_body {
                    self.exchange.broke(ProxyErrorType::HttpRequestError);
                } else {
                    self.exchange.broke(ProxyErrorType::HttpResponseIncomplete);
                    lease.iter().for_each(|lease| lease.failed("the response broke off"));
                }
            }
            None => self.give_back(),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn give_back(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.give_back(self.keep_alive);
        }
    }
}
