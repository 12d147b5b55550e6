//! Hosts that are no alias, through the forward proxy: their bytes pass, and nothing of them is
//! changed. What guards them is the policy, asked for each address before it is dialled.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, request};
use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::{StreamExt, stream::FuturesUnordered};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, sleep};

use super::{
    Body, ForwardError, Problem,
    destination::Destination,
    error::causes,
    headers,
    tunnel::{End, tunnel},
};
use crate::{
    body::{BoxError, Interim, RequestBody, strip_trailers},
    config::{Alias, Timeouts},
    connect::{self, AddressPolicy, ConnectError, Connected, UpstreamIo},
    drain::Drain,
    error::ProxyErrorType,
    http1::{Client, ExchangeError},
    idle::{Idle, IdleTimer},
    resolve::{ResolveError, Resolver},
    socket::ByteStream,
    telemetry::{Access, AliasMetrics, RequestTotals},
};

/// How long one address is tried alone before the next is tried beside it (RFC 8305 §5).
const HEAD_START: Duration = Duration::from_millis(250);

/// Of a host with more addresses, the others are not tried.
const MAX_ADDRESSES: usize = 8;

/// The way to hosts that are no alias.
pub struct Passthrough {
    resolver: Arc<Resolver>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    timeouts: Timeouts,
}

/// Why a host that is no alias cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// `proxy.passthrough: deny`.
    #[error("{0} is no alias, and `proxy.passthrough` is `deny`")]
    Refused(Destination),
    /// DNS does not lead to an address.
    #[error("{}", .0.what())]
    Resolve(ResolveError),
    /// Nobody answers, or nobody may be asked.
    #[error("{0}")]
    Connect(ConnectError),
    /// The connection failed while the request or its answer's head was on it.
    #[error("{endpoint}: {error}{}", causes(.error))]
    Exchange {
        /// With whom.
        endpoint: SocketAddr,
        /// How.
        error: ExchangeError,
    },
    /// The host said `101` to a request without `Upgrade`.
    #[error("{0} switched protocols, which the request did not ask for")]
    UnaskedSwitch(SocketAddr),
}

/// A connection to a host, for a client's tunnel.
pub struct Tunnel {
    connected: Connected,
    record: Record,
    idle: Duration,
}

impl Passthrough {
    /// With the DNS settings and the policy of the aliases, and the time limits of one that says
    /// nothing of them.
    pub fn new(resolver: Arc<Resolver>, policy: Arc<ArcSwap<AddressPolicy>>) -> Self {
        Self { resolver, policy, timeouts: Alias::named("").timeouts }
    }

    /// Connects, for a CONNECT. The error is the answer to give.
    pub async fn tunnel(
        &self,
        head: &request::Parts,
        destination: &Destination,
    ) -> Result<Box<Tunnel>, Response<Body>> {
        let mut record = Record::begin(head, destination);
        match self.connect(destination).await {
            Ok((connected, endpoint)) => {
                record.status = StatusCode::OK;
                record.endpoint = Some(endpoint);
                Ok(Box::new(Tunnel { connected, record, idle: self.timeouts.idle }))
            }
            Err(error) => Err(record.failed(error)),
        }
    }

    /// Sends a request on as plain HTTP, and gives its answer. Never fails: what goes wrong is
    /// answered.
    pub async fn forward(
        &self,
        request: Request<RequestBody>,
        destination: &Destination,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Response<Body> {
        let (head, body) = request.into_parts();
        let mut record = Record::begin(&head, destination);
        record.request = body.handle();
        match self.exchange(head, body, destination, &mut record, interim).await {
            Ok((response, client, nominated)) => {
                record.status = response.status();
                let idle = self.timeouts.idle;
                let passing = Passing {
                    client,
                    record,
                    idle,
                    timer: IdleTimer::default(),
                    request_bytes: 0,
                    nominated,
                };
                response.map(|()| Body::passing(passing))
            }
            Err(error) => record.failed(error),
        }
    }

    async fn exchange(
        &self,
        mut head: request::Parts,
        body: RequestBody,
        destination: &Destination,
        record: &mut Record,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Result<(Response<()>, Client<UpstreamIo>, Vec<HeaderName>), ForwardError> {
        body.confine(headers::strip_request(&mut head.headers, false));
        headers::strip_proxy(&mut head.headers);
        let host = destination.http_host();
        let host =
            HeaderValue::try_from(&host).map_err(|_| headers::BadRequest::InvalidHost(host))?;
        let streams = !body.is_end_stream();
        headers::address(&mut head, "http", &host, false, streams)?;
        if streams && headers::expects_continue(&head.headers) {
            body.hold();
        }

        let (connected, endpoint) = self.connect(destination).await?;
        record.endpoint = Some(endpoint);
        let sent = Instant::now();
        let failed = |error| PassthroughError::Exchange { endpoint, error };
        // Like an alias' requests, it may take its time to begin: `timeouts.response` is off.
        let mut client = Client::new(connected.io);
        body.set_idle(Some(self.timeouts.idle));
        let mut response = client.send(&head, body, false, interim).await.map_err(failed)?;
        record.request.set_idle(None);
        record.upstream_time = Some(sent.elapsed());
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(PassthroughError::UnaskedSwitch(endpoint).into());
        }
        let nominated = headers::strip_response(response.headers_mut(), false);
        *response.version_mut() = Version::HTTP_11;
        Ok((response, client, nominated))
    }

    async fn connect(
        &self,
        destination: &Destination,
    ) -> Result<(Connected, SocketAddr), PassthroughError> {
        let addresses = match destination.ip() {
            Some(ip) => vec![ip],
            None => {
                let addresses = self.resolver.addresses(destination.host()).await;
                addresses.map_err(PassthroughError::Resolve)?
            }
        };
        let policy = self.policy.load_full();
        let timeouts = &self.timeouts;
        let up = AtomicBool::new(false);
        let metrics = AliasMetrics::of_no_alias();
        let dial = |endpoint| {
            let (policy, up) = (&policy, &up);
            async move {
                let connected = connect::connect(endpoint, None, policy, timeouts, up).await;
                match &connected {
                    Ok(connected) => metrics.connected(&connected.facts),
                    Err(ConnectError::Denied(_)) => metrics.address_refused(),
                    Err(_) => {}
                }
                connected.map(|connected| (connected, endpoint))
            }
        };
        let endpoints = addresses.iter().take(MAX_ADDRESSES);
        let mut waiting = endpoints.map(|ip| SocketAddr::new(*ip, destination.port()));
        let mut dials = FuturesUnordered::new();
        let mut first_error = None;
        loop {
            if let Some(endpoint) = waiting.next() {
                dials.push(dial(endpoint));
            }
            let more = waiting.len() > 0;
            tokio::select! {
                Some(result) = dials.next() => match result {
                    Ok(connected) => return Ok(connected),
                    Err(error) if first_error.is_none() => first_error = Some(error),
                    Err(_) => {}
                },
                () = sleep(HEAD_START), if more => {}
                else => break,
            }
        }
        // DNS gives no empty answer: there was an address to fail at.
        let nobody = || ConnectError::Tcp {
            endpoint: SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), destination.port()),
            source: std::io::ErrorKind::AddrNotAvailable.into(),
        };
        Err(PassthroughError::Connect(first_error.unwrap_or_else(nobody)))
    }
}

impl PassthroughError {
    /// Who was dialled, or was not.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        match self {
            Self::Refused(_) | Self::Resolve(_) => None,
            Self::Connect(error) => error.endpoint(),
            Self::Exchange { endpoint, .. } | Self::UnaskedSwitch(endpoint) => Some(*endpoint),
        }
    }
}

impl Tunnel {
    /// Carries bytes both ways until both sides are done, nothing has moved for long, or the
    /// proxy stops.
    pub async fn run<D: ByteStream>(mut self, client: D, drain: &Drain) {
        let carried = tunnel(client, self.connected.io, self.idle, drain.stopped()).await;
        self.record.bytes_in = carried.bytes_in;
        self.record.bytes_out = carried.bytes_out;
        match carried.end {
            End::Closed | End::Killed => {}
            End::Broken(error) => tracing::debug!(%error, "a tunnel broke"),
            End::Idle => self.record.broke(ProxyErrorType::ConnectionTimeout),
        }
    }
}

/// One request or tunnel as metrics and access log see it. Written down when it drops.
struct Record {
    started: Instant,
    method: Method,
    /// Only where an access log is written: a URL without its query, or a tunnel's end.
    path: Option<Box<str>>,
    trace_id: Option<Box<str>>,
    status: StatusCode,
    error: Option<ProxyErrorType>,
    endpoint: Option<SocketAddr>,
    upstream_time: Option<Duration>,
    request: RequestBody,
    bytes_in: u64,
    bytes_out: u64,
}

impl Record {
    fn begin(head: &request::Parts, destination: &Destination) -> Self {
        AliasMetrics::of_no_alias().begun();
        let logged = tracing::enabled!(target: "access", tracing::Level::INFO);
        let path = || match head.method {
            Method::CONNECT => destination.to_string().into(),
            _ => format!("http://{}{}", destination.http_host(), head.uri.path()).into(),
        };
        Self {
            started: Instant::now(),
            method: head.method.clone(),
            path: logged.then(path),
            trace_id: logged.then(|| headers::trace_id(&head.headers).map(Into::into)).flatten(),
            // What a log calls a request whose client left before it was answered.
            status: StatusCode::from_u16(499).unwrap_or_default(),
            error: None,
            endpoint: None,
            upstream_time: None,
            request: RequestBody::empty(),
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    fn broke(&mut self, error: ProxyErrorType) {
        self.error = Some(error);
        AliasMetrics::of_no_alias().error(error);
    }

    fn failed(mut self, error: impl Into<ForwardError>) -> Response<Body> {
        let error = error.into();
        let problem = Problem::new(&error, None);
        self.status = problem.status();
        self.broke(problem.error());
        self.endpoint = error.endpoint();
        tracing::info!(
            stage = problem.stage().as_str(),
            error = problem.error().as_str(),
            fix = problem.fix(),
            "{}",
            problem.detail(),
        );
        problem.into_response()
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        let bytes_in = self.bytes_in + self.request.bytes();
        let totals = RequestTotals { duration, bytes_in, bytes_out: self.bytes_out };
        AliasMetrics::of_no_alias().finished(&self.method, self.status, &totals);
        let Some(path) = &self.path else { return };
        Access {
            alias: "",
            true_name: "",
            endpoint: self.endpoint,
            protocol: "http/1.1",
            method: self.method.as_str(),
            path,
            status: self.status.as_u16(),
            error: self.error.map_or("", ProxyErrorType::as_str),
            bytes_in,
            bytes_out: self.bytes_out,
            duration,
            upstream: self.upstream_time,
            retries: 0,
            reused: false,
            tls_version: "",
            trace_id: self.trace_id.as_deref().unwrap_or(""),
        }
        .log();
    }
}

/// The body of a host's answer, on its way to the client.
pub(super) struct Passing {
    /// The connection that the answer comes on.
    client: Client<UpstreamIo>,
    record: Record,
    idle: Duration,
    timer: IdleTimer,
    /// How much of the request's body had come when that was last looked at.
    request_bytes: u64,
    /// The connection options of its head, which cover its trailers.
    nominated: Vec<HeaderName>,
}

impl Passing {
    pub(super) fn is_end_stream(&self) -> bool {
        self.client.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.client.size_hint()
    }

    pub(super) fn idle(&self) -> Duration {
        self.idle
    }

    pub(super) fn poll_progress(&mut self, cx: &mut Context<'_>) {
        self.client.poll_progress(cx);
    }

    /// As a body has it.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Poll::Ready(mut frame) = self.client.poll_frame(cx) else {
            let request_bytes = self.record.request.bytes();
            if request_bytes != self.request_bytes {
                self.request_bytes = request_bytes;
                self.timer.moved();
            }
            ready!(self.timer.poll(cx, self.idle));
            self.record.broke(ProxyErrorType::HttpResponseTimeout);
            return Poll::Ready(Some(Err(Idle(self.idle).into())));
        };
        self.timer.moved();
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    strip_trailers(trailers, &self.nominated);
                }
                self.record.bytes_out += frame.data_ref().map_or(0, Bytes::len) as u64;
            }
            Some(Err(ExchangeError::RequestBody(_))) => {
                self.record.broke(ProxyErrorType::HttpRequestError);
            }
            Some(Err(_)) => self.record.broke(ProxyErrorType::HttpResponseIncomplete),
            None => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }
}
