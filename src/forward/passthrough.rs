//! Hosts that are not aliases, through the forward proxy: bytes pass unchanged. The policy checks each
//! address before it is dialled.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ::http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version, request};
use arc_swap::ArcSwap;
use http_body::Body as _;
use tokio::time::Instant;

use super::{
    Record,
    destination::Destination,
    error::{causes, kind_of},
    http::{Body, Origin, Problem, headers},
    tunnel::tunnel,
};
use crate::{
    body::RequestBody,
    config::{Alias, Timeouts},
    connect::{AddressPolicy, Deadline, Session, TargetStream},
    drain::Drain,
    fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken},
    http1::ClientConnection,
    resolve::{ResolveError, Resolver},
    stream::ByteStream,
    telemetry::AliasMetrics,
    upstream::{Attempts, SendError},
};

/// Connects clients of the forward proxy to hosts that are not aliases.
pub struct Passthrough {
    resolver: Arc<Resolver>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    timeouts: Timeouts,
}

/// Why a host that is not an alias cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// `proxy.passthrough: deny`.
    #[error("{0} is not an alias, and `proxy.passthrough` is `deny`")]
    Refused(Destination),
    /// DNS has no address for it.
    #[error("{}", .0.what())]
    Resolve(ResolveError),
    /// The connection failed while the request or its response's head was on it.
    #[error("{endpoint}: {error}{}", causes(.error))]
    Exchange {
        /// With whom.
        endpoint: SocketAddr,
        /// How.
        error: SendError,
    },
    /// The host sent a `101` although the request had no `Upgrade`.
    #[error("{0} switched protocols, which the request did not ask for")]
    UnaskedSwitch(SocketAddr),
}

/// A connection to a host, for a client's tunnel.
pub struct Tunnel {
    session: Session,
    record: Box<Record>,
    idle: Duration,
}

impl Passthrough {
    /// With the DNS settings and the policy of the aliases, and the default timeouts.
    pub fn new(resolver: Arc<Resolver>, policy: Arc<ArcSwap<AddressPolicy>>) -> Self {
        Self { resolver, policy, timeouts: Alias::named("").timeouts }
    }

    /// Connects, for a CONNECT. The error is the response to send.
    pub async fn tunnel(
        &self,
        head: &request::Parts,
        destination: &Destination,
        started: Instant,
    ) -> Result<Box<Tunnel>, Response<Body>> {
        let mut record = Record::of_host(head, destination, started);
        match self.connect(destination).await {
            Ok((session, endpoint)) => {
                record.connected(endpoint);
                record.host_responded(StatusCode::OK, None);
                Ok(Box::new(Tunnel { session, record, idle: self.timeouts.idle }))
            }
            Err(fault) => Err(failed(record, &fault)),
        }
    }

    /// Forwards a request as plain HTTP and returns its response. Never fails: errors become responses.
    pub async fn forward(
        &self,
        request: Request<RequestBody>,
        destination: &Destination,
        started: Instant,
    ) -> Response<Body> {
        let (head, body) = request.into_parts();
        let mut record = Record::of_host(&head, destination, started);
        record.reads(&body);
        match self.exchange(head, body, destination, &mut record).await {
            Ok((response, client, nominated)) => {
                let origin = Origin::Host(client);
                response.map(|()| Body::streaming(origin, record, self.timeouts.idle, nominated))
            }
            Err(fault) => failed(record, &fault),
        }
    }

    async fn exchange(
        &self,
        mut head: request::Parts,
        body: RequestBody,
        destination: &Destination,
        record: &mut Record,
    ) -> Result<(Response<()>, ClientConnection<TargetStream>, Vec<HeaderName>), Fault> {
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

        let (session, endpoint) = self.connect(destination).await?;
        record.connected(endpoint);
        let sent = Instant::now();
        let failed =
            |error| PassthroughError::Exchange { endpoint, error: SendError::Http1(error) };
        // As for an alias by default, the response may take any time to begin: `timeouts.response` is off.
        let mut client = ClientConnection::new(session.stream);
        body.set_idle(Some(self.timeouts.idle));
        let interim = record.request().interim();
        let mut response = client.send(&head, body, false, interim).await.map_err(failed)?;
        record.request().set_idle(None);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(PassthroughError::UnaskedSwitch(endpoint).into());
        }
        record.host_responded(response.status(), Some(sent.elapsed()));
        let nominated = headers::strip_response(response.headers_mut(), false);
        *response.version_mut() = Version::HTTP_11;
        Ok((response, client, nominated))
    }

    async fn connect(&self, destination: &Destination) -> Result<(Session, SocketAddr), Fault> {
        let addresses = match destination.ip() {
            Some(ip) => vec![ip],
            None => {
                let addresses = self.resolver.addresses(destination.host()).await;
                addresses.map_err(PassthroughError::Resolve)?
            }
        };
        let mut endpoints = addresses.iter().map(|ip| SocketAddr::new(*ip, destination.port()));
        let attempts = Attempts {
            via: None,
            header: None,
            policy: &self.policy,
            identity: None,
            timeouts: &self.timeouts,
            opening: None,
            deadline: Deadline::new(Instant::now(), self.timeouts.connect),
            metrics: AliasMetrics::of_no_alias(),
        };
        // The resolver never returns an empty list.
        let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), destination.port());
        let first = endpoints.next().unwrap_or(nowhere);
        attempts.any_of(first, endpoints).await
    }
}

/// Explains what went wrong, to the log and to the client.
fn failed(mut record: Box<Record>, fault: &Fault) -> Response<Body> {
    let problem = Problem::new(fault, None, None);
    record.failed(&problem, fault, None);
    record.explain(&problem);
    problem.into_response().map(Body::whole)
}

impl PassthroughError {
    fn diagnosis(&self) -> Diagnosis {
        let (kind, stage, blame, endpoint) = match self {
            Self::Refused(_) => (Kind::NameNotAllowed, Stage::Policy, Blame::Client, None),
            Self::Resolve(error) => (error.kind(), Stage::Resolve, Blame::Target, None),
            Self::Exchange { endpoint, error } => {
                let (kind, stage) = kind_of(error);
                let own = error.is_of_the_body();
                let blame = if own { Blame::Client } else { Blame::Endpoint };
                (kind, stage, blame, Some(*endpoint))
            }
            Self::UnaskedSwitch(endpoint) => {
                (Kind::UpgradeFailed, Stage::Response, Blame::Target, Some(*endpoint))
            }
        };
        // Nothing is retried for hosts that are not aliases, so this needs no proof.
        Diagnosis { kind, stage, blame, taken: Taken::Unknown, endpoint }
    }
}

impl Cause for PassthroughError {
    fn fix(&self) -> Option<String> {
        match self {
            Self::Refused(_) => {
                Some("make the host an alias, or set `proxy.passthrough: allow`".into())
            }
            Self::Resolve(error) => Some(error.fix()),
            Self::Exchange { .. } | Self::UnaskedSwitch(_) => None,
        }
    }

    fn chain(&self) -> Option<&[Arc<str>]> {
        match self {
            Self::Resolve(error) => Some(error.chain()),
            _ => None,
        }
    }
}

impl From<PassthroughError> for Fault {
    fn from(error: PassthroughError) -> Self {
        Self::new(error.diagnosis(), error)
    }
}

impl Tunnel {
    /// Copies bytes both ways until both sides are done, the tunnel is idle for too long, or the proxy
    /// stops.
    pub async fn run<D: ByteStream>(mut self, client: D, drain: &Drain) {
        let carried = tunnel(client, self.session.stream, self.idle, drain.stopped()).await;
        self.record.carried(carried);
    }
}
