//! One request: routed, rewritten, sent, sent again where that is safe, and answered.

use std::{net::SocketAddr, sync::Arc};

use ::http::{
    HeaderValue, Method, Request, Response, StatusCode, Version, header::HOST, request,
    uri::Authority,
};
use hyper::{body::Incoming, client::conn::TrySendError};
use tokio::time::{Instant, timeout};

use super::{
    Body, Exchange, ForwardError, Problem,
    headers::{self, ClientView, TargetView},
    upgrade,
};
use crate::{
    body::RequestBody,
    config::{HostHeader, HttpVersion, RetryOn},
    drain::Drain,
    route::Routes,
    telemetry::{Access, DownstreamConnection},
    tls::TlsError,
    upstream::{AcquireError, Generation, Lease, Upstream, Want},
};

/// What a request's connection says of it.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The listener, as configured.
    pub listener: SocketAddr,
    /// The application's end.
    pub peer: SocketAddr,
    /// Our end.
    pub local: SocketAddr,
    /// `http`, or `https` on TLS.
    pub scheme: &'static str,
    /// The name that the application asked for by TLS' SNI; none without TLS.
    pub server_name: Option<String>,
    /// The worker that serves the connection.
    pub worker: usize,
    /// What a tunnel must not outlive unnoticed.
    pub drain: Drain,
    /// The connection in the metrics; none where a program called without one.
    pub connection: Option<Arc<DownstreamConnection>>,
}

/// Answers a request from wherever: with the origin's answer, or with an explanation.
pub async fn serve(
    request: Request<RequestBody>,
    arrival: &Arrival,
    routes: &Routes,
) -> Response<Body> {
    let started = Instant::now();
    let (head, body) = request.into_parts();
    let upstream = match route(&head, arrival, routes).await {
        Ok(upstream) => upstream,
        Err(error) => return refuse(&head, &error, arrival, started),
    };
    if let Some(connection) = &arrival.connection {
        connection.belongs_to(&upstream.worker(arrival.worker).metrics);
    }
    forward(Request::from_parts(head, body), &upstream, arrival).await
}

/// Answers a request that is for no alias, and has not gone anywhere.
pub fn refuse(
    head: &request::Parts,
    error: &ForwardError,
    arrival: &Arrival,
    started: Instant,
) -> Response<Body> {
    let problem = Problem::new(error, None);
    log_refused(head, &problem, started);
    tracing::info!(
        listener = %arrival.listener,
        error = problem.error().as_str(),
        "{}",
        problem.detail(),
    );
    problem.into_response()
}

/// The access log's line for a request that no alias answers to.
fn log_refused(head: &request::Parts, problem: &Problem, started: Instant) {
    Access {
        alias: "",
        true_name: "",
        endpoint: None,
        protocol: protocol(head.version),
        method: head.method.as_str(),
        path: head.uri.path(),
        status: problem.status().as_u16(),
        error: problem.error().as_str(),
        bytes_in: 0,
        bytes_out: 0,
        duration: started.elapsed(),
        upstream: None,
        retries: 0,
        reused: false,
        tls_version: "",
        trace_id: headers::trace_id(&head.headers).unwrap_or(""),
    }
    .log();
}

/// The access log's word for a version of HTTP.
fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "h2",
        Version::HTTP_10 => "http/1.0",
        _ => "http/1.1",
    }
}

async fn route(
    head: &request::Parts,
    arrival: &Arrival,
    routes: &Routes,
) -> Result<Arc<Upstream>, ForwardError> {
    if head.method == Method::CONNECT && !upgrade::is_extended_connect(head) {
        return Err(ForwardError::Connect);
    }
    let authority = headers::authority(head)?;
    let host = authority.as_ref().map(|authority| authority.host());
    // HTTP/1.0 need not say a Host; TLS has said it for it.
    let host = host.or(arrival.server_name.as_deref());
    let find = || routes.find(arrival.listener, arrival.local.ip(), host);
    if let Ok(upstream) = find() {
        return Ok(upstream);
    }
    // It may be the true name of an alias that DNS has yet to answer for the first time.
    for upstream in routes.upstreams(arrival.listener) {
        let _ = upstream.target().await;
    }
    Ok(find()?)
}

/// Sends a request to an alias, and gives its answer. Never fails: what goes wrong is answered.
pub async fn forward(
    request: Request<RequestBody>,
    upstream: &Arc<Upstream>,
    arrival: &Arrival,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let exchange = Exchange::begin(
        upstream.clone(),
        arrival.worker,
        &head,
        protocol(head.version),
        body.handle(),
    );
    let mut journey = Journey { upstream, arrival, exchange };
    match journey.run(head, body).await {
        Ok(answer) => answer.into_response(journey.exchange, upstream, &arrival.drain),
        Err(error) => {
            let problem = Problem::new(&error, Some(upstream));
            journey.exchange.failed(&problem, &error);
            journey.exchange.explain(&problem);
            let mut response = problem.into_response();
            response.body_mut().record(journey.exchange);
            response
        }
    }
}

/// A request between its routing and its answer's head.
struct Journey<'a> {
    upstream: &'a Arc<Upstream>,
    arrival: &'a Arrival,
    exchange: Box<Exchange>,
}

/// The origin's answer, and what is needed to pass it on.
struct Answer {
    response: Response<Incoming>,
    lease: Lease,
    client: ClientView,
    /// The client's side, of a request to switch protocols.
    upgrade: Option<hyper::upgrade::OnUpgrade>,
    /// The request was an extended CONNECT.
    extended: bool,
}

/// How often a request was tried, and where.
#[derive(Default)]
struct Tries {
    failed: Vec<SocketAddr>,
    retries: u32,
    /// A pooled connection was dead: the others may be, too.
    fresh: bool,
}

impl Journey<'_> {
    async fn run(
        &mut self,
        mut head: request::Parts,
        body: RequestBody,
    ) -> Result<Answer, ForwardError> {
        let upstream = self.upstream;
        let config = upstream.config();
        self.exchange.admit(upstream.admit()?);
        upstream.deposit();

        let client = self.client_view(&head)?;
        let generation = upstream.target().await?;
        check_signature(&head, &client, &generation, &config.host)?;

        let extended = upgrade::translate_extended_connect(&mut head);
        // Without the client's side of it (a library caller has none) an upgrade cannot be made.
        let asked = extended || headers::upgrade(&head).is_some();
        let on_upgrade = asked.then(|| head.extensions.remove()).flatten();
        let switching = on_upgrade.is_some();
        headers::strip_request(&mut head.headers, switching);
        headers::add_forwarded(
            &mut head.headers,
            config.forwarded,
            self.arrival.peer.ip(),
            &client,
        );
        let want = want(head.version, switching, config.http.version);
        let waits = headers::expects_continue(&head.headers);

        let (response, lease, client) =
            self.try_until_answered(head, body, client, generation, want, waits).await?;
        let status = response.status();
        let unasked = status == StatusCode::SWITCHING_PROTOCOLS && on_upgrade.is_none();
        // To an extended CONNECT, any 2xx would say that the tunnel is there.
        if unasked || extended && status.is_success() {
            let (endpoint, generation) = (lease.endpoint(), lease.generation().clone());
            return Err(ForwardError::Switch { endpoint, status, generation });
        }
        Ok(Answer { response, lease, client, upgrade: on_upgrade, extended })
    }

    fn client_view(&self, head: &request::Parts) -> Result<ClientView, ForwardError> {
        let authority = match headers::authority(head)? {
            Some(authority) => authority,
            // HTTP/1.0 without Host: the address it came to.
            None => {
                self.arrival.local.to_string().parse().map_err(|_| headers::BadRequest::NoHost)?
            }
        };
        Ok(ClientView { scheme: self.arrival.scheme, authority, origin: None })
    }

    async fn try_until_answered(
        &mut self,
        mut head: request::Parts,
        mut body: RequestBody,
        mut client: ClientView,
        mut generation: Arc<Generation>,
        want: Want,
        waits: bool,
    ) -> Result<(Response<Incoming>, Lease, ClientView), ForwardError> {
        let upstream = self.upstream;
        let config = upstream.config();
        let mut tries = Tries::default();
        loop {
            let lease = upstream
                .acquire(self.arrival.worker, &generation, want, &tries.failed, tries.fresh)
                .await;
            // The true name changed meanwhile: nothing was sent to the old one, and nothing will be.
            // (An alias that a reload took away has no newer one.)
            if generation.is_retired() {
                let newer = upstream.target().await?;
                if !Arc::ptr_eq(&newer, &generation) {
                    generation = newer;
                    continue;
                }
            }
            let mut lease = match lease {
                Ok(lease) => lease,
                Err(error) => {
                    tries.failed.extend(error.endpoint());
                    let next = upstream.target().await?;
                    let elsewhere = !Arc::ptr_eq(&next, &generation)
                        || next.balancer().has_untried(Instant::now(), &tries.failed);
                    if elsewhere && self.may_reconnect(&error, &mut tries) {
                        generation = next;
                        continue;
                    }
                    upstream.refresh();
                    return Err(ForwardError::Acquire { error, generation });
                }
            };

            // Where it may turn out that the origin took nothing of it, or did and may again.
            let keep = lease.is_reused() || lease.is_http2() || self.repeats_answers(&head.method);
            let spare = keep.then(|| head.clone());
            if config.repair {
                let alias = |host: &str| {
                    host.eq_ignore_ascii_case(client.authority.as_str())
                        || upstream.hosts().iter().any(|own| own.eq_ignore_ascii_case(host))
                };
                let told = told_host(&config.host);
                let target = view(&generation, told.as_ref());
                let origin = headers::repair_request(&mut head.headers, alias, target);
                client.origin = origin.or(client.origin);
            }
            let host = host_to_send(&config.host, &client, &generation)?;
            let streams = !http_body::Body::is_end_stream(&body);
            headers::address(&mut head, generation.scheme(), &host, lease.is_http2(), streams)?;
            let handle = body.handle();
            let mut request = Request::from_parts(head, body);
            if waits && streams {
                hold_until_continue(&mut request);
            }

            let result = match config.timeouts.response {
                None => lease.send(request).await,
                Some(limit) => match timeout(limit, lease.send(request)).await {
                    Ok(result) => result,
                    Err(_) => {
                        lease.failed("no answer within `timeouts.response`");
                        let endpoint = lease.endpoint();
                        return Err(ForwardError::ResponseTimeout { endpoint, limit, generation });
                    }
                },
            };
            let mut failure = match result {
                Ok(response) if !lease.is_answer_unsolicited() => {
                    let took = lease.answered();
                    let timed_out = is_idle_timeout(response.status(), &lease, &handle);
                    if timed_out
                        && let Some(again) = spare.clone()
                        && handle.rewind()
                        && self.may_repeat("reuse", true, &mut tries)
                    {
                        tries.fresh = true;
                        (head, body) = (again, handle);
                        continue;
                    }
                    if let Some(spare) = spare
                        && self.may_repeat_status(response.status(), &spare.method, &handle)
                        && self.may_retry("status", &mut tries)
                    {
                        tries.failed.push(lease.endpoint());
                        (head, body) = (spare, handle);
                        continue;
                    }
                    handle.settle();
                    self.exchange.answered(response.status(), &lease, took);
                    return Ok((response, lease, client));
                }
                Ok(_) => None,
                Err(failure) => Some(failure),
            };
            let returned = failure.as_mut().and_then(TrySendError::take_message);
            let error = failure.map(TrySendError::into_error);
            let unsent = returned.is_some();
            let again = returned.map(|request| request.into_parts().0).or(spare);
            let endpoint = lease.endpoint();
            let reused = lease.is_reused();
            let reason =
                self.retry_reason(&lease, error.as_ref(), unsent, again.as_ref(), &handle).await;
            if let Some(error) = &error
                && !reused
                && !error.is_user()
            {
                lease.failed(&error.to_string());
                tries.failed.push(endpoint);
            }
            if let (Some(reason), Some(again)) = (reason, again)
                && handle.rewind()
                && self.may_repeat(reason, reused, &mut tries)
            {
                tries.fresh = true;
                (head, body) = (again, handle);
                continue;
            }
            return Err(match error {
                Some(error) => exchange_error(error, endpoint, generation),
                None => ForwardError::Unsolicited { endpoint, generation },
            });
        }
    }

    /// Whether and why a failed request may be sent again, whatever budget and attempts say.
    /// `error` is none where an answer came that was not for it.
    async fn retry_reason(
        &self,
        lease: &Lease,
        error: Option<&hyper::Error>,
        unsent: bool,
        again: Option<&request::Parts>,
        body: &RequestBody,
    ) -> Option<&'static str> {
        if error.is_some_and(|error| is_of_the_body(error, lease.generation())) {
            return None;
        }
        // Nothing was written, or the origin's HTTP/2 says that it took nothing.
        if unsent || error.is_some_and(was_unprocessed) {
            return Some("reuse");
        }
        let begun = error.is_some() && lease.has_begun_to_answer();
        let idempotent = again.is_some_and(|head| head.method.is_idempotent());
        if idempotent && body.is_untouched() && !begun {
            // What a pooled connection fails at is expected to be its own end (RFC 9112 §9.3.1).
            let resets = self.upstream.config().retry.on.contains(&RetryOn::Reset);
            return if lease.is_reused() { Some("reuse") } else { resets.then_some("reset") };
        }
        (!begun && lease.was_refused().await).then_some("reuse")
    }

    /// Whether it is sent again. The first time that a pooled connection turned out dead is none of
    /// the origin's failures, and free; the connection after it is a new one.
    fn may_repeat(&mut self, reason: &'static str, reused: bool, tries: &mut Tries) -> bool {
        if reason == "reuse" && reused && !tries.fresh {
            self.exchange.retried(reason);
            return true;
        }
        self.may_retry(reason, tries)
    }

    fn may_reconnect(&mut self, error: &AcquireError, tries: &mut Tries) -> bool {
        let worth = match error {
            AcquireError::Connect(error) => error.is_worth_another_endpoint(),
            AcquireError::Http { .. } => true,
            AcquireError::NoEndpoint | AcquireError::ConnectionLimit { .. } => false,
        };
        worth
            && self.upstream.config().retry.on.contains(&RetryOn::Connect)
            && self.may_retry("connect", tries)
    }

    fn may_retry(&mut self, reason: &'static str, tries: &mut Tries) -> bool {
        if tries.retries >= self.upstream.config().retry.attempts || !self.upstream.withdraw() {
            return false;
        }
        tries.retries += 1;
        self.exchange.retried(reason);
        true
    }

    /// Whether an answer, or a reset, may lead to another try: then the head is kept.
    fn repeats_answers(&self, method: &Method) -> bool {
        let retries = &self.upstream.config().retry;
        method.is_idempotent() && retries.on.iter().any(|on| *on != RetryOn::Connect)
    }

    fn may_repeat_status(&self, status: StatusCode, method: &Method, body: &RequestBody) -> bool {
        let on = RetryOn::Status(status.as_u16());
        method.is_idempotent()
            && body.is_untouched()
            && self.upstream.config().retry.on.contains(&on)
    }
}

impl Answer {
    fn into_response(
        self,
        exchange: Box<Exchange>,
        upstream: &Upstream,
        drain: &Drain,
    ) -> Response<Body> {
        let Self { mut response, lease, client, upgrade, extended } = self;
        let config = upstream.config();
        let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let keep_alive = headers::keep_alive(response.version(), response.headers());
        headers::strip_response(response.headers_mut(), switching);
        if config.repair {
            let told = told_host(&config.host);
            let target = view(lease.generation(), told.as_ref());
            headers::repair_response(response.headers_mut(), &client, target);
        }
        *response.version_mut() = Version::HTTP_11;
        if let Some(client) = upgrade
            && switching
        {
            let idle = config.timeouts.idle;
            if extended {
                upgrade::translate_switch(&mut response);
            }
            return upgrade::switch(response, client, lease, exchange, idle, drain);
        }
        let idle = config.timeouts.idle;
        response.map(|incoming| Body::streaming(incoming, lease, keep_alive, exchange, idle))
    }
}

/// The target as it knows itself: by the Host that it is sent.
fn view<'a>(generation: &'a Generation, told: Option<&'a Authority>) -> TargetView<'a> {
    let authority = told.unwrap_or(generation.authority());
    TargetView { scheme: generation.scheme(), authority }
}

fn told_host(configured: &HostHeader) -> Option<Authority> {
    match configured {
        HostHeader::Literal(host) => host.parse().ok(),
        HostHeader::Rewrite | HostHeader::Preserve => None,
    }
}

fn want(downstream: Version, switching: bool, configured: HttpVersion) -> Want {
    match configured {
        // RFC 9113 §8.6: HTTP/2 has no Upgrade.
        _ if switching => Want::Http1,
        HttpVersion::Http1 => Want::Http1,
        HttpVersion::Http2 => Want::Http2,
        HttpVersion::Auto if downstream == Version::HTTP_2 => Want::Http2Or1,
        HttpVersion::Auto => Want::Http1,
    }
}

fn host_to_send(
    configured: &HostHeader,
    client: &ClientView,
    generation: &Generation,
) -> Result<HeaderValue, ForwardError> {
    match configured {
        HostHeader::Rewrite => Ok(generation.host().clone()),
        HostHeader::Preserve => to_header(client.authority.as_str()),
        HostHeader::Literal(host) => to_header(host),
    }
}

fn to_header(host: &str) -> Result<HeaderValue, ForwardError> {
    HeaderValue::from_str(host).map_err(|_| headers::BadRequest::InvalidHost(host.into()).into())
}

fn check_signature(
    head: &request::Parts,
    client: &ClientView,
    generation: &Generation,
    configured: &HostHeader,
) -> Result<(), ForwardError> {
    if !headers::signs_host(head) {
        return Ok(());
    }
    let host = host_to_send(configured, client, generation)?;
    let signed =
        head.headers.get(HOST).map_or(client.authority.as_str().as_bytes(), |host| host.as_bytes());
    if signed == host.as_bytes() {
        return Ok(());
    }
    Err(ForwardError::SignedHost {
        signed: String::from_utf8_lossy(signed).into(),
        host: String::from_utf8_lossy(host.as_bytes()).into(),
    })
}

/// Whether a kept connection was used again just when its origin gave notice that it had waited for
/// that long enough. A 408 says that the request did not arrive whole, so that it may be sent again
/// whatever its method (RFC 9110 §15.5.9).
fn is_idle_timeout(status: StatusCode, lease: &Lease, body: &RequestBody) -> bool {
    let sent_whole = http_body::Body::is_end_stream(body);
    status == StatusCode::REQUEST_TIMEOUT && lease.is_reused() && sent_whole
}

/// The body is sent when the origin says `100 Continue`; until then nobody reads it, so that
/// the client is not told to go on either.
pub(super) fn hold_until_continue(request: &mut Request<RequestBody>) {
    request.body().hold();
    let body = request.body().handle();
    hyper::ext::on_informational(request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            body.proceed();
        }
    });
}

/// RFC 9113 §8.7: a stream refused, or beyond the last one of a GOAWAY, was not processed.
fn was_unprocessed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            let refused = h2.reason() == Some(h2::Reason::REFUSED_STREAM);
            let gone = h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR);
            return h2.is_remote() && (refused || gone);
        }
        source = cause.source();
    }
    false
}

/// Whether the request's own body broke off. hyper blames its user for that, and also for a
/// connection whose task was ended, as those to an old true name are.
fn is_of_the_body(error: &hyper::Error, generation: &Generation) -> bool {
    error.is_user() && !generation.killed().is_cancelled()
}

fn exchange_error(
    error: hyper::Error,
    endpoint: SocketAddr,
    generation: Arc<Generation>,
) -> ForwardError {
    if is_of_the_body(&error, &generation) {
        return ForwardError::ClientBody(error);
    }
    if generation.killed().is_cancelled() && (error.is_user() || error.is_canceled()) {
        return ForwardError::Moved { endpoint, generation };
    }
    let tls = generation.tls().and_then(|(tls, name)| TlsError::after_handshake(&error, name, tls));
    ForwardError::Exchange { endpoint, error, tls, generation }
}
