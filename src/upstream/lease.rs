//! Acquires a connection for a request: balance, pool, connect.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Response, request};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;

use super::{
    Alias, Generation,
    dial::{Caller, DialRequest, Dialled},
};
use crate::{
    balance::{Endpoint, InFlight},
    body::{Interim, RequestBody},
    connect::{Deadline, Mark, Session, TargetStream, Verdict, Wire},
    fault::Fault,
    pool::{
        AcquireError, ClientId, Connection, ConnectionInfo, Counted, Flight, PoolKey, SendError,
    },
    stream::Prefixed,
    tls::{Alpn, Negotiated},
};

/// What kind of connection a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// HTTP/1.1: the application speaks it, or the request is an upgrade.
    Http1,
    /// HTTP/2 only (`http.version: "2"`).
    Http2,
    /// HTTP/2 if the origin supports it: the application speaks it.
    Http2Or1,
}

impl Want {
    /// The protocols to look for in the pool, the preferred one first.
    fn protocols(self) -> &'static [Negotiated] {
        match self {
            Self::Http1 => &[Negotiated::Http1],
            Self::Http2 => &[Negotiated::Http2],
            Self::Http2Or1 => &[Negotiated::Http2, Negotiated::Http1],
        }
    }

    /// The protocols to offer in a handshake.
    fn alpn(self) -> Alpn {
        match self {
            Self::Http1 => Alpn::Http1,
            Self::Http2 => Alpn::Http2,
            Self::Http2Or1 => Alpn::Http2Or1,
        }
    }
}

/// A connection for one request, with everything that has to be reported when the request ends.
pub struct Lease {
    connection: Connection,
    key: PoolKey,
    in_flight: InFlight,
    generation: Arc<Generation>,
    alias: Arc<Alias>,
    worker: usize,
    /// Where the connection stood when it was leased.
    mark: Mark,
    reused: bool,
    reusable: bool,
}

impl Alias {
    /// A connection to one of the generation's endpoints: a pooled one, unless `fresh`, else a
    /// new one, within `timeouts.connect`.
    ///
    /// Endpoints in `tried` are passed over while there are others.
    pub async fn acquire(
        self: &Arc<Self>,
        caller: Caller<'_>,
        generation: &Arc<Generation>,
        want: Want,
        tried: &[SocketAddr],
        fresh: bool,
    ) -> Result<Lease, Fault> {
        let now = Instant::now();
        let pick = |tried: &[SocketAddr]| {
            generation.balancer().pick(now, &mut fastrand::Rng::new(), tried)
        };
        let endpoint = pick(tried).ok_or(AcquireError::NoEndpoint)?;
        let deadline = Deadline::new(now, self.config.timeouts.connect);
        let (destination, alpn) = (generation.destination(), want.alpn());
        let destination = destination.as_ref();
        let dial = DialRequest { alias: self, caller, generation, destination, alpn, deadline };
        let acquiring = Acquiring { dial, want };
        if !fresh && let Some(lease) = acquiring.pooled(&endpoint, now) {
            return Ok(lease);
        }
        // A request that waits for its connection counts as in flight too: otherwise a burst would see load only
        // at endpoints with idle connections.
        let _waiting = endpoint.begin(now);
        // Boxed, because most requests do not need it, and their futures would have room for it.
        Box::pin(acquiring.dial(endpoint, tried, fresh)).await
    }
}

/// Acquires a connection for one request.
struct Acquiring<'a> {
    dial: DialRequest<'a>,
    want: Want,
}

impl Acquiring<'_> {
    fn key(&self, endpoint: SocketAddr, protocol: Negotiated) -> PoolKey {
        let DialRequest { alias, caller, generation, destination, .. } = self.dial;
        let mut key = generation.pool_key(endpoint, protocol, destination);
        // A connection whose PROXY header names a client serves no other.
        if alias.config.proxy_protocol.send.is_some() {
            key.client = caller.client.map(ClientId::of);
        }
        key
    }

    fn pooled(&self, endpoint: &Arc<Endpoint>, now: Instant) -> Option<Lease> {
        let pool = &self.dial.alias.worker(self.dial.caller.worker).pool;
        self.want.protocols().iter().find_map(|protocol| {
            let key = self.key(endpoint.address(), *protocol);
            // Idle HTTP/1.1 connections are no reason to speak HTTP/1.1 to an origin that supports HTTP/2.
            if self.want == Want::Http2Or1
                && *protocol == Negotiated::Http1
                && !pool.has_no_http2(&self.key(endpoint.address(), Negotiated::Http2))
            {
                return None;
            }
            let connection = pool.take(&key, now)?;
            let mark = connection.info().wire.reuse();
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
            mark: connection.info().wire.mark(),
            connection,
            key,
            in_flight: endpoint.begin(now),
            generation: self.dial.generation.clone(),
            alias: self.dial.alias.clone(),
            worker: self.dial.caller.worker,
            reused: false,
            reusable: true,
        }
    }

    /// A new connection, or one that was returned, or made by another request, in the meantime.
    async fn dial(
        &self,
        mut endpoint: Arc<Endpoint>,
        tried: &[SocketAddr],
        mut fresh: bool,
    ) -> Result<Lease, Fault> {
        if self.want == Want::Http1 {
            return self.connect(&endpoint, tried).await;
        }
        let pool = &self.dial.alias.worker(self.dial.caller.worker).pool;
        let mut tried = tried.to_vec();
        loop {
            match pool.flight(&self.key(endpoint.address(), Negotiated::Http2)) {
                None => return self.connect(&endpoint, &tried).await,
                Some(Flight::Lead(lead)) => {
                    let result = self.connect(&endpoint, &tried).await;
                    match &result {
                        Ok(lease) => lease.connection.land(lead),
                        Err(fault) => lead.failed(fault),
                    }
                    return result;
                }
                Some(Flight::Follow(flight)) => {
                    match self.dial.deadline.within(flight.ended()).await {
                        Some(None) => {}
                        Some(Some(fault)) => return Err(fault),
                        None => {
                            let limit = self.dial.deadline.limit();
                            let endpoint = endpoint.address();
                            return Err(AcquireError::Late { endpoint, limit }.into());
                        }
                    }
                }
            }
            if std::mem::take(&mut fresh) {
                // That dial may have made the connection that has just failed.
                continue;
            }
            if let Some(lease) = self.pooled(&endpoint, Instant::now()) {
                return Ok(lease);
            }
            // It is full already, or another endpoint connected first: that one may have room.
            if let Some(other) = self.dial.another(&mut tried, &endpoint) {
                if let Some(lease) = self.pooled(&other, Instant::now()) {
                    return Ok(lease);
                }
                endpoint = other;
            }
        }
    }

    /// Dials, and starts HTTP on the session.
    async fn connect(
        &self,
        endpoint: &Arc<Endpoint>,
        tried: &[SocketAddr],
    ) -> Result<Lease, Fault> {
        let kept = |endpoint: &Arc<Endpoint>| self.pooled(endpoint, Instant::now());
        match self.dial.dial(endpoint, tried, kept).await? {
            Dialled::Kept(lease) => Ok(lease),
            Dialled::New(session, counted, endpoint) => {
                self.start(session, counted, &endpoint).await
            }
        }
    }

    async fn start(
        &self,
        session: Session,
        counted: Counted,
        endpoint: &Arc<Endpoint>,
    ) -> Result<Lease, Fault> {
        let DialRequest { alias, caller, generation, .. } = self.dial;
        let address = endpoint.address();
        // Without TLS there is no ALPN: HTTP/2 is then spoken with prior knowledge.
        let prior_knowledge = generation.tls().is_none() && self.want != Want::Http1;
        let lifetime = alias.config().pool.max_lifetime.mul_f64(0.9 + 0.1 * fastrand::f64());
        let started = Connection::start(
            session,
            prior_knowledge,
            Instant::now() + lifetime,
            counted,
            generation.killed(),
        );
        let connection =
            started.await.map_err(|error| AcquireError::Http { endpoint: address, error })?;
        let pool = &alias.worker(caller.worker).pool;
        let http2_key = self.key(address, Negotiated::Http2);
        let key = match &connection {
            Connection::Http2(http2) => {
                if !generation.is_retired() {
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
}

impl Lease {
    /// Sends the request and returns its response's head.
    pub async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Result<Response<()>, SendError> {
        let limit = self.alias.config().timeouts.connect;
        self.connection.send(head, body, self.reused, interim, limit).await
    }

    /// The response's body, as [`Body::poll_frame`](http_body::Body::poll_frame) has it.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        self.connection.poll_frame(cx)
    }

    /// Continues with the request's body, for a caller that is not reading the response's.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        self.connection.poll_progress(cx);
    }

    /// Whether the response's body has ended.
    pub fn is_end_stream(&self) -> bool {
        self.connection.is_end_stream()
    }

    /// How much of the response's body is still to come.
    pub fn size_hint(&self) -> SizeHint {
        self.connection.size_hint()
    }

    /// How much the origin's kernel has acknowledged, if the connection carries only this request.
    pub fn acknowledged(&self) -> u64 {
        self.connection.acknowledged()
    }

    /// The stream after a `101`.
    pub fn take_tunnel(&mut self) -> Option<Prefixed<TargetStream>> {
        self.connection.take_tunnel()
    }

    /// The response's head arrived. Returns how long that took.
    pub fn responded(&mut self) -> Duration {
        self.in_flight.endpoint().succeeded();
        self.in_flight.responded(Instant::now())
    }

    /// The exchange failed on the transport.
    pub fn failed(&self, error: &str) {
        self.alias.endpoint_failed(&self.generation, self.in_flight.endpoint(), error);
    }

    /// Whether the connection had served requests before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// How much of a request the origin has read, if the request failed with `error`, or, without an error, if its
    /// response was sent before the request had arrived. May take a second.
    pub async fn verdict(&self, error: Option<&SendError>) -> Verdict {
        let said = error.map_or(Verdict::Unknown, SendError::verdict);
        match &self.connection {
            _ if said.proves_unread() => said,
            Connection::Http1(_) if error.is_some() && self.has_begun_response() => Verdict::Begun,
            Connection::Http1(http1) if self.reused => http1.info.wire.verdict(self.mark).await,
            _ => said,
        }
    }

    /// Whether any byte of a response has arrived.
    pub fn has_begun_response(&self) -> bool {
        match &self.connection {
            Connection::Http1(http1) => http1.info.wire.has_received_since(self.mark),
            Connection::Http2(http2) => {
                http2.exchange().is_some_and(|exchange| exchange.has_begun())
            }
        }
    }

    /// The underlying connection, if it carries only this request.
    pub fn own_wire(&self) -> Option<Arc<Wire>> {
        match &self.connection {
            Connection::Http1(http1) => Some(http1.info.wire.clone()),
            Connection::Http2(_) => None,
        }
    }

    /// Whether the response on a reused connection was sent before the request arrived, so that it does not belong
    /// to the request.
    pub fn is_response_unsolicited(&self) -> bool {
        match &self.connection {
            Connection::Http1(http1) if self.reused => {
                http1.info.wire.is_unacknowledged_since(self.mark)
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
            && (!self.generation.is_retired() || self.alias.makes(&self.key))
            && self.key.is_allowed(&self.alias.policy.load())
        {
            self.alias.worker(self.worker).pool.give(self.key, http1, keep_alive);
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
    pub fn info(&self) -> &Arc<ConnectionInfo> {
        self.connection.info()
    }

    /// The generation that it belongs to.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }
}
