//! From a generation to a connection: balance, pool, connect.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Response, request};
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, sleep, timeout};

use super::{Generation, Upstream};
use crate::{
    balance::{Endpoint, InFlight},
    body::{Interim, RequestBody},
    connect::{self, ConnectError, Connected, Identity, Mark, UpstreamIo, Verdict, Wire},
    pool::{Connection, Flight, Line, PoolKey, SendError},
    socket::Prefixed,
    tls::{Alpn, Negotiated, TlsError},
};

/// RFC 8305 §5: after this long without a connection, the next address is tried beside it.
const HAPPY_EYEBALLS_DELAY: Duration = Duration::from_millis(250);

/// What kind of connection a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// HTTP/1.1: so the application speaks, or the request is an upgrade.
    Http1,
    /// HTTP/2 only (`http.version: "2"`).
    Http2,
    /// HTTP/2 if the origin has it: so the application speaks.
    Http2Or1,
}

/// No connection. No byte of the request has left.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AcquireError {
    /// The true name has no endpoint.
    #[error("the true name has no addresses")]
    NoEndpoint,
    /// An endpoint could not be reached.
    #[error("{0}")]
    Connect(Arc<ConnectError>),
    /// HTTP could not be started on a fresh connection.
    #[error("starting HTTP with {endpoint}: {error}")]
    Http {
        /// With whom.
        endpoint: SocketAddr,
        /// What hyper said.
        error: Arc<hyper::Error>,
    },
    /// `pool.max_connections` were busy for as long as `timeouts.connect`.
    #[error("{limit} connections to {endpoint} are busy, as many as `pool.max_connections` allows")]
    ConnectionLimit {
        /// To whom.
        endpoint: SocketAddr,
        /// `pool.max_connections`.
        limit: usize,
    },
}

impl AcquireError {
    /// The endpoint in question.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        match self {
            Self::NoEndpoint => None,
            Self::Connect(error) => error.endpoint(),
            Self::Http { endpoint, .. } | Self::ConnectionLimit { endpoint, .. } => Some(*endpoint),
        }
    }
}

/// A connection for one request, with everything that must be told when the request ends.
pub struct Lease {
    connection: Connection,
    key: PoolKey,
    in_flight: InFlight,
    generation: Arc<Generation>,
    upstream: Arc<Upstream>,
    worker: usize,
    /// Where the connection stood when it was leased.
    mark: Mark,
    reused: bool,
    reusable: bool,
}

impl Upstream {
    /// A connection to one of the generation's endpoints: a pooled one, unless `fresh`, else a
    /// new one, within `timeouts.connect`.
    ///
    /// Endpoints in `tried` are passed over while there are others.
    pub async fn acquire(
        self: &Arc<Self>,
        worker: usize,
        generation: &Arc<Generation>,
        want: Want,
        tried: &[SocketAddr],
        fresh: bool,
    ) -> Result<Lease, AcquireError> {
        let now = Instant::now();
        let pick = |tried: &[SocketAddr]| {
            generation.balancer().pick(now, &mut fastrand::Rng::new(), tried)
        };
        let endpoint = pick(tried).ok_or(AcquireError::NoEndpoint)?;
        let dialling = Dialling { upstream: self, worker, generation, want };
        if !fresh && let Some(lease) = dialling.pooled(&endpoint, now) {
            return Ok(lease);
        }
        // A request that waits for its connection is on its way too: without this a burst would
        // see no load anywhere, but on the endpoint whose connection it found idle.
        let _waiting = endpoint.begin(now);
        // Boxed, for most requests need it not and would carry its weight.
        Box::pin(dialling.dial(endpoint, tried, fresh)).await
    }
}

/// The way to a connection, for one request.
#[derive(Clone, Copy)]
struct Dialling<'a> {
    upstream: &'a Arc<Upstream>,
    worker: usize,
    generation: &'a Arc<Generation>,
    want: Want,
}

impl Dialling<'_> {
    fn key(&self, endpoint: SocketAddr, protocol: Negotiated) -> PoolKey {
        self.generation.pool_key(endpoint, protocol)
    }

    /// The protocols to look for in the pool, the preferred one first.
    fn protocols(&self) -> &'static [Negotiated] {
        match self.want {
            Want::Http1 => &[Negotiated::Http1],
            Want::Http2 => &[Negotiated::Http2],
            Want::Http2Or1 => &[Negotiated::Http2, Negotiated::Http1],
        }
    }

    fn pooled(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Option<Lease> {
        let pool = &self.upstream.worker(self.worker).pool;
        self.protocols().iter().find_map(|protocol| {
            let key = self.key(endpoint.address(), *protocol);
            // What other requests left idle is no reason to speak HTTP/1.1 to who has HTTP/2.
            if self.want == Want::Http2Or1
                && *protocol == Negotiated::Http1
                && !pool.has_no_http2(&self.key(endpoint.address(), Negotiated::Http2))
            {
                return None;
            }
            let connection = pool.take(&key, now)?;
            let mark = connection.line().wire.reuse();
            Some(Lease { mark, reused: true, ..self.lease(connection, key, endpoint, now) })
        })
    }

    fn lease(
        &self,
        connection: Connection,
        key: PoolKey,
        endpoint: &Arc<Endpoint>,
        now: Instant,
    ) -> Lease {
        Lease {
            mark: connection.line().wire.mark(),
            connection,
            key,
            in_flight: endpoint.begin(now),
            generation: self.generation.clone(),
            upstream: self.upstream.clone(),
            worker: self.worker,
            reused: false,
            reusable: true,
        }
    }

    /// A new connection, or one that came back or was made by another request meanwhile.
    async fn dial(
        &self,
        mut endpoint: Arc<Endpoint>,
        tried: &[SocketAddr],
        mut fresh: bool,
    ) -> Result<Lease, AcquireError> {
        if self.want == Want::Http1 {
            return self.dial_beside(endpoint, tried).await;
        }
        let pool = &self.upstream.worker(self.worker).pool;
        let mut tried = tried.to_vec();
        loop {
            match pool.flight(&self.key(endpoint.address(), Negotiated::Http2)) {
                None => return self.dial_beside(endpoint, &tried).await,
                Some(Flight::Lead(lead)) => {
                    let result = self.dial_beside(endpoint, &tried).await;
                    match &result {
                        Ok(lease) => lease.connection.land(lead),
                        Err(AcquireError::Connect(error)) => lead.failed(error),
                        Err(_) => {}
                    }
                    return result;
                }
                Some(Flight::Follow(mut flight)) => {
                    let _ = flight.changed().await;
                    if let Some(error) = flight.borrow().clone() {
                        return Err(AcquireError::Connect(error));
                    }
                }
            }
            if std::mem::take(&mut fresh) {
                // That flight may have been the one whose connection has just failed.
                continue;
            }
            if let Some(lease) = self.pooled(&endpoint, Instant::now()) {
                return Ok(lease);
            }
            // Full already, or another endpoint was quicker: that one may have room.
            if let Some(other) = self.another(&mut tried, &endpoint) {
                if let Some(lease) = self.pooled(&other, Instant::now()) {
                    return Ok(lease);
                }
                endpoint = other;
            }
        }
    }

    /// An endpoint that is neither `endpoint`, which is now tried, nor one tried before.
    fn another(
        &self,
        tried: &mut Vec<SocketAddr>,
        endpoint: &Arc<Endpoint>,
    ) -> Option<Arc<Endpoint>> {
        tried.push(endpoint.address());
        let mut rng = fastrand::Rng::new();
        let picked = self.generation.balancer().pick(Instant::now(), &mut rng, tried);
        picked.filter(|picked| !tried.contains(&picked.address()))
    }

    /// Dials an endpoint; if that takes long, another one beside it. The first to be up wins.
    async fn dial_beside(
        &self,
        endpoint: Arc<Endpoint>,
        tried: &[SocketAddr],
    ) -> Result<Lease, AcquireError> {
        let up = AtomicBool::new(false);
        let mut first = std::pin::pin!(self.dial_endpoint(&endpoint, &up));
        tokio::select! {
            result = &mut first => return result,
            () = sleep(HAPPY_EYEBALLS_DELAY) => {}
        }
        // A slow handshake is a sign of distance, not of a dead address.
        if up.load(Ordering::Relaxed) {
            return first.await;
        }
        let Some(second) = self.another(&mut tried.to_vec(), &endpoint) else {
            return first.await;
        };
        let _waiting = second.begin(Instant::now());
        let up = AtomicBool::new(false);
        let mut second = std::pin::pin!(self.dial_endpoint(&second, &up));
        tokio::select! {
            result = &mut first => match result {
                Ok(lease) => Ok(lease),
                Err(_) => second.await,
            },
            result = &mut second => match result {
                Ok(lease) => {
                    // Nobody waits for its own end, so this is what can be held against it: else
                    // a share of all requests would pay for a black hole for ever.
                    let late = "another endpoint was connected while this one was dialled";
                    self.upstream.endpoint_failed(self.generation, &endpoint, late);
                    Ok(lease)
                }
                Err(_) => first.await,
            },
        }
    }

    /// Dials one endpoint; sets `up` when TCP is.
    async fn dial_endpoint(
        &self,
        endpoint: &Arc<Endpoint>,
        up: &AtomicBool,
    ) -> Result<Lease, AcquireError> {
        let address = endpoint.address();
        let config = self.upstream.config();
        let connections = self.upstream.connections(address);
        let pool = &self.upstream.worker(self.worker).pool;
        let permit = loop {
            // An idle connection of a sibling counts too: it makes way.
            let make_way = || {
                let siblings = self.upstream.workers.iter();
                siblings.map(|sibling| &sibling.pool).any(|pool| pool.evict(address));
            };
            let limit = config.timeouts.connect;
            let permit = timeout(limit, pool.permit(&connections, make_way)).await;
            match permit.map_err(|_| self.limit_reached(address))? {
                Some(permit) => break permit,
                None => {
                    if let Some(lease) = self.pooled(endpoint, Instant::now()) {
                        return Ok(lease);
                    }
                }
            }
        };
        let metrics = &self.upstream.worker(self.worker).metrics;
        let identity = self.generation.tls().map(|(tls, server_name)| Identity {
            tls,
            server_name,
            alpn: match self.want {
                Want::Http1 => Alpn::Http1,
                Want::Http2 => Alpn::Http2,
                Want::Http2Or1 => Alpn::Http2Or1,
            },
        });
        let policy = self.upstream.policy.load_full();
        let connected = connect::connect(address, identity, &policy, &config.timeouts, up).await;
        let connected: Connected = match connected {
            Ok(connected) => connected,
            Err(error) => {
                self.failed(endpoint, &error);
                return Err(AcquireError::Connect(Arc::new(error)));
            }
        };
        metrics.connected(&connected.facts);
        // A reload may have made it stricter meanwhile.
        if let Err(denied) = self.upstream.policy.load().check(address) {
            return Err(AcquireError::Connect(Arc::new(denied.into())));
        }
        // Without TLS there is no ALPN: HTTP/2 is then spoken with prior knowledge.
        let prior_knowledge = identity.is_none() && self.want != Want::Http1;
        let lifetime = config.pool.max_lifetime.mul_f64(0.9 + 0.1 * fastrand::f64());
        let started = Connection::start(
            connected,
            prior_knowledge,
            Instant::now() + lifetime,
            connections,
            permit,
            self.generation.killed(),
        );
        let connection = started
            .await
            .map_err(|error| AcquireError::Http { endpoint: address, error: Arc::new(error) })?;
        self.generation.made(address, &connection.line().wire);
        let http2_key = self.key(address, Negotiated::Http2);
        let key = match &connection {
            Connection::Http2(http2) => {
                if !self.generation.is_retired() {
                    pool.share(http2_key.clone(), http2);
                }
                http2_key
            }
            Connection::Http1(_) => {
                if self.want == Want::Http2Or1 {
                    pool.refuses_http2(http2_key);
                }
                self.key(address, Negotiated::Http1)
            }
        };
        Ok(self.lease(connection, key, endpoint, Instant::now()))
    }

    fn limit_reached(&self, endpoint: SocketAddr) -> AcquireError {
        let limit = self.upstream.config().pool.max_connections;
        AcquireError::ConnectionLimit { endpoint, limit }
    }

    fn failed(&self, endpoint: &Arc<Endpoint>, error: &ConnectError) {
        let metrics = &self.upstream.worker(self.worker).metrics;
        match error {
            ConnectError::Denied(_) => metrics.address_refused(),
            ConnectError::Tls { source: TlsError::Certificate(failure), .. } => {
                metrics.certificate(failure.not_after);
            }
            _ => {}
        }
        if !error.is_own_lack() {
            self.upstream.endpoint_failed(self.generation, endpoint, &error.to_string());
        }
    }
}

impl Upstream {
    /// Counts a transport failure, and says so where it ejects the endpoint.
    fn endpoint_failed(&self, generation: &Generation, endpoint: &Endpoint, error: &str) {
        if let Some(ejected) = endpoint.failed(Instant::now()) {
            tracing::warn!(
                alias = self.config.name,
                true_name = generation.true_name().as_str(),
                endpoint = %endpoint.address(),
                for_seconds = ejected.as_secs_f64(),
                error,
                "endpoint ejected",
            );
        }
    }
}

impl Lease {
    /// Sends the request, and gives its answer's head.
    pub async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Result<Response<()>, SendError> {
        self.connection.send(head, body, self.reused, interim).await
    }

    /// The answer's body, as [`Body::poll_frame`](http_body::Body::poll_frame) has it.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        self.connection.poll_frame(cx)
    }

    /// Goes on with the request's body, for a caller who does not ask for the answer's.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        self.connection.poll_progress(cx);
    }

    /// Whether the answer's body has ended.
    pub fn is_end_stream(&self) -> bool {
        self.connection.is_end_stream()
    }

    /// How much of the answer's body comes.
    pub fn size_hint(&self) -> SizeHint {
        self.connection.size_hint()
    }

    /// The stream behind a `101`.
    pub fn take_tunnel(&mut self) -> Option<Prefixed<UpstreamIo>> {
        self.connection.take_tunnel()
    }

    /// The response's head arrived. Gives how long that took.
    pub fn answered(&mut self) -> Duration {
        self.in_flight.endpoint().succeeded();
        self.in_flight.answered(Instant::now())
    }

    /// The exchange failed on the transport.
    pub fn failed(&self, error: &str) {
        self.upstream.endpoint_failed(&self.generation, self.in_flight.endpoint(), error);
    }

    /// Whether the connection had served before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// What the origin had of a request that `error` was met with; of one whose answer was sent
    /// before it was there, where there is none. May take a second.
    pub async fn verdict(&self, error: Option<&SendError>) -> Verdict {
        let said = error.map_or(Verdict::Unknown, SendError::verdict);
        match &self.connection {
            _ if said.proves_unread() => said,
            Connection::Http1(_) if error.is_some() && self.has_begun_to_answer() => Verdict::Begun,
            Connection::Http1(http1) if self.reused => http1.line.wire.verdict(self.mark).await,
            _ => said,
        }
    }

    /// Whether any byte of an answer has come. HTTP/2 gives an answer's head whole or not at all.
    pub fn has_begun_to_answer(&self) -> bool {
        match &self.connection {
            Connection::Http1(http1) => http1.line.wire.has_received_since(self.mark),
            Connection::Http2(_) => false,
        }
    }

    /// The connection beneath, where it carries this request alone.
    pub fn own_wire(&self) -> Option<Arc<Wire>> {
        match &self.connection {
            Connection::Http1(http1) => Some(http1.line.wire.clone()),
            Connection::Http2(_) => None,
        }
    }

    /// Whether what came on a reused connection was sent before the request was there: then it
    /// answers something else.
    pub fn is_answer_unsolicited(&self) -> bool {
        match &self.connection {
            Connection::Http1(http1) if self.reused => {
                http1.line.wire.is_unacknowledged_since(self.mark)
            }
            _ => false,
        }
    }

    /// The connection must not serve again.
    pub fn refuse_reuse(&mut self) {
        self.reusable = false;
    }

    /// The response has been read to its end: an HTTP/1.1 connection goes back to the pool.
    ///
    /// A killed or refused one is closed.
    pub fn give_back(self, keep_alive: Option<Duration>) {
        if let Connection::Http1(http1) = self.connection
            && self.reusable
            && !self.generation.is_retired()
            && self.upstream.policy.load().check(self.key.endpoint).is_ok()
        {
            self.upstream.worker(self.worker).pool.give(self.key, http1, keep_alive);
        }
    }

    /// Whether requests on it are written as HTTP/2 has them.
    pub fn is_http2(&self) -> bool {
        self.connection.is_http2()
    }

    /// The endpoint.
    pub fn endpoint(&self) -> SocketAddr {
        self.key.endpoint
    }

    /// The connection beneath.
    pub fn line(&self) -> &Arc<Line> {
        self.connection.line()
    }

    /// The generation that it belongs to.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }
}
