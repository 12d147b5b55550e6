//! One record per exchange of any protocol, for metrics and the access log.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ::http::{Method, StatusCode, Version, request};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::{
    destination::Destination,
    http::{Problem, headers},
    tunnel::{Carried, End},
};
use crate::{
    body::RequestBody,
    fault::{Fault, ProxyErrorType},
    telemetry::{Access, AliasMetrics, Failures, RequestFailure, RequestTotals, RetryReason},
    upstream::{Alias, Generation, Lease},
};

/// One request or tunnel, for metrics and the access log. Written when it is dropped.
pub struct Record {
    /// None where it belongs to no alias.
    alias: Option<Arc<Alias>>,
    worker: usize,
    started: Instant,
    protocol: &'static str,
    method: Method,
    /// Only where an access log is written: a path or a URL without its query, or a tunnel's destination.
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

impl Record {
    /// Begins the record of a request that came at `started` and was routed to `alias`, on one of its
    /// workers.
    pub fn of_alias(
        alias: &Arc<Alias>,
        worker: usize,
        head: &request::Parts,
        started: Instant,
    ) -> Box<Self> {
        let path = || head.uri.path().into();
        Self::begin(Some(alias.clone()), worker, head, path, started)
    }

    /// The same for a request to a host that is not an alias.
    pub fn of_host(
        head: &request::Parts,
        destination: &Destination,
        started: Instant,
    ) -> Box<Self> {
        let path = || match head.method {
            Method::CONNECT => destination.to_string().into(),
            _ => format!("http://{}{}", destination.http_host(), head.uri.path()).into(),
        };
        Self::begin(None, 0, head, path, started)
    }

    /// The same for a request that is not forwarded.
    pub fn of_no_alias(head: &request::Parts, started: Instant) -> Box<Self> {
        Self::begin(None, 0, head, || head.uri.path().into(), started)
    }

    fn begin(
        alias: Option<Arc<Alias>>,
        worker: usize,
        head: &request::Parts,
        path: impl FnOnce() -> Box<str>,
        started: Instant,
    ) -> Box<Self> {
        let logged = tracing::enabled!(target: "access", tracing::Level::INFO);
        let record = Box::new(Self {
            alias,
            worker,
            started,
            protocol: protocol(head.version),
            method: head.method.clone(),
            path: logged.then(path),
            trace_id: logged.then(|| headers::trace_id(&head.headers).map(Into::into)).flatten(),
            // What logs call a request whose client left before the response.
            status: StatusCode::from_u16(499).unwrap_or_default(),
            error: None,
            generation: None,
            endpoint: None,
            reused: false,
            tls_version: "",
            upstream_time: None,
            retries: 0,
            request: RequestBody::empty(),
            bytes_in: 0,
            bytes_out: 0,
            _permit: None,
        });
        record.metrics().begun();
        record
    }

    fn metrics(&self) -> &AliasMetrics {
        match &self.alias {
            Some(alias) => &alias.worker(self.worker).metrics,
            None => AliasMetrics::of_no_alias(),
        }
    }

    /// The alias it belongs to.
    pub fn alias(&self) -> Option<&Arc<Alias>> {
        self.alias.as_ref()
    }

    /// The request has this body.
    pub fn reads(&mut self, body: &RequestBody) {
        self.request = body.handle();
    }

    /// The request's body, as far as it has come.
    pub(super) fn request(&self) -> &RequestBody {
        &self.request
    }

    /// Holds the request's permit until it ends.
    pub fn admit(&mut self, permit: Option<OwnedSemaphorePermit>) {
        self._permit = permit;
    }

    /// It was retried.
    pub fn retried(&mut self, reason: RetryReason) {
        self.retries += 1;
        self.metrics().retry(reason);
    }

    /// The origin's head arrived on `lease`, this long after the request was given to it.
    pub fn responded(&mut self, status: StatusCode, lease: &Lease, took: Duration) {
        self.status = status;
        self.generation = Some(lease.generation().clone());
        self.endpoint = Some(lease.endpoint());
        self.reused = lease.is_reused();
        self.tls_version = lease.info().facts.tls_version.unwrap_or("");
        self.upstream_time = Some(took);
    }

    /// A connection to this endpoint of a host that is not an alias has been made.
    pub fn connected(&mut self, endpoint: SocketAddr) {
        self.endpoint = Some(endpoint);
    }

    /// The host's head arrived, this long after the request was given to it; or its tunnel is open.
    pub fn host_responded(&mut self, status: StatusCode, took: Option<Duration>) {
        self.status = status;
        self.upstream_time = took;
    }

    /// truename responds itself.
    pub fn failed(
        &mut self,
        problem: &Problem,
        fault: &Fault,
        generation: Option<Arc<Generation>>,
    ) {
        self.status = problem.status();
        self.endpoint = fault.endpoint();
        self.generation = generation;
        self.broke(problem.error());
    }

    /// It failed after the head was passed on.
    pub fn broke(&mut self, error: ProxyErrorType) {
        self.error = Some(error);
        self.metrics().error(error);
    }

    /// This much of the response was passed on.
    pub fn passed_on(&mut self, bytes: usize) {
        self.bytes_out += bytes as u64;
    }

    /// A tunnel has ended.
    pub(super) fn carried(&mut self, carried: Carried) {
        self.bytes_in += carried.bytes_in;
        self.bytes_out += carried.bytes_out;
        match carried.end {
            End::Closed | End::Killed | End::Stopped => {}
            End::Broken(_, error) => tracing::debug!(%error, "a tunnel broke"),
            End::Idle | End::HalfClosed => self.broke(ProxyErrorType::ConnectionTimeout),
        }
    }

    /// Logs why a request failed, with everything a person would ask next. Logged only once while other requests
    /// to the same alias, or to none, fail for the same reason.
    pub fn explain(&self, problem: &Problem) {
        let Some(alias) = &self.alias else {
            if problem.begins(Failures::of_other_hosts()) {
                tracing::info!(
                    stage = problem.stage().as_str(),
                    error = problem.error().as_str(),
                    fix = problem.fix(),
                    "{}",
                    problem.detail(),
                );
            }
            return;
        };
        explain(alias, self.generation.as_deref(), self.endpoint, problem);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        let bytes_in = self.bytes_in + self.request.bytes();
        let totals = RequestTotals { duration, bytes_in, bytes_out: self.bytes_out };
        self.metrics().finished(&self.method, self.status, &totals);
        let Some(path) = &self.path else { return };
        Access {
            alias: self.alias.as_ref().map_or("", |alias| &alias.config().name),
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

/// Logs why a request or a connection to an alias failed. Only once while others fail for the same reason.
pub(super) fn explain(
    alias: &Alias,
    generation: Option<&Generation>,
    endpoint: Option<SocketAddr>,
    problem: &Problem,
) {
    let kind = RequestFailure {
        true_name: generation
            .map_or_else(String::new, |generation| generation.true_name().as_str().to_owned()),
        stage: problem.stage().as_str(),
        error: problem.error().as_str(),
        fix: problem.fix().map(str::to_owned),
    };
    if !alias.failures().begins(kind, problem.detail()) {
        return;
    }
    tracing::warn!(
        alias = alias.config().name,
        stage = problem.stage().as_str(),
        error = problem.error().as_str(),
        endpoint = endpoint.map(tracing::field::display),
        fix = problem.fix(),
        "{}",
        problem.detail(),
    );
}

/// What the access log calls a version of HTTP.
fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "h2",
        Version::HTTP_10 => "http/1.0",
        _ => "http/1.1",
    }
}
