//! One request: routed, rewritten, sent, sent again where that is safe, and answered.

use std::{net::SocketAddr, sync::Arc};

use ::http::{
    HeaderValue, Method, Request, Response, StatusCode, Version, header::HOST, request,
    uri::Authority,
};
use tokio::time::Instant;

use super::{
    Body, ForwardError, Problem, Record,
    body::Origin,
    deadline,
    headers::{self, ClientView, Repaired, TargetView},
    retry::{Tries, is_idle_timeout},
    upgrade::{self, Upgrade},
};
use crate::{
    body::RequestBody,
    config::{HostHeader, HttpVersion},
    drain::Drain,
    route::Routes,
    telemetry::{AliasMetrics, DownstreamConnection},
    tls::TlsError,
    upstream::{Generation, Lease, SendError, Upstream, Want},
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
    /// The name that the application asked for by TLS' SNI, if it did.
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
    let (asked, upstream) = match route(&head, arrival, routes).await {
        Ok(found) => found,
        Err(error) => return refuse(&head, &error, arrival, started),
    };
    if let Some(connection) = &arrival.connection {
        connection.belongs_to(&upstream.worker(arrival.worker).metrics);
    }
    forward(Request::from_parts(head, body), asked, &upstream, arrival, started).await
}

/// Answers a request that is for no alias, and has not gone anywhere.
pub fn refuse(
    head: &request::Parts,
    error: &ForwardError,
    arrival: &Arrival,
    started: Instant,
) -> Response<Body> {
    let problem = Problem::new(error, None);
    if let Some(connection) = &arrival.connection {
        connection.belongs_to(AliasMetrics::of_no_alias());
    }
    Record::of_nobody(head, started).failed(&problem, error);
    tracing::info!(
        listener = %arrival.listener,
        error = problem.error().as_str(),
        "{}",
        problem.detail(),
    );
    problem.into_response()
}

async fn route(
    head: &request::Parts,
    arrival: &Arrival,
    routes: &Routes,
) -> Result<(Option<Authority>, Arc<Upstream>), ForwardError> {
    if head.method == Method::CONNECT && !upgrade::is_extended_connect(head) {
        return Err(ForwardError::Connect);
    }
    let asked = headers::authority(head)?;
    let host = asked.as_ref().map(Authority::host);
    // HTTP/1.0 need not say a Host; TLS has said it for it.
    let host = host.or(arrival.server_name.as_deref());
    let find = || routes.find(arrival.local.ip(), host);
    if let Ok(upstream) = find() {
        return Ok((asked, upstream));
    }
    // It may be the true name of an alias that DNS has yet to answer for the first time.
    for upstream in routes.upstreams() {
        let _ = upstream.target().await;
    }
    let upstream = find()?;
    Ok((asked, upstream))
}

/// Sends a request to an alias, and gives its answer. Never fails: what goes wrong is answered.
/// `asked` is the request's [authority](headers::authority), `started` when it came.
pub async fn forward(
    request: Request<RequestBody>,
    asked: Option<Authority>,
    upstream: &Arc<Upstream>,
    arrival: &Arrival,
    started: Instant,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let mut record = Record::of_alias(upstream, arrival.worker, &head, started);
    record.reads(&body);
    let mut journey = Journey { upstream, arrival, record };
    match journey.run(head, body, asked, started).await {
        Ok(answer) => answer.into_response(journey.record, upstream, arrival),
        Err(error) => {
            let problem = Problem::new(&error, Some(upstream));
            journey.record.failed(&problem, &error);
            journey.record.explain(&problem);
            let mut response = problem.into_response();
            response.body_mut().record(journey.record);
            response
        }
    }
}

/// A request between its routing and its answer's head.
pub(super) struct Journey<'a> {
    pub(super) upstream: &'a Arc<Upstream>,
    arrival: &'a Arrival,
    pub(super) record: Box<Record>,
}

/// The origin's answer, and what is needed to pass it on.
struct Answer {
    response: Response<()>,
    lease: Lease,
    client: ClientView,
    /// The client's side, of a request to switch protocols.
    upgrade: Option<Upgrade>,
    /// The request was an extended CONNECT.
    extended: bool,
}

impl Journey<'_> {
    async fn run(
        &mut self,
        mut head: request::Parts,
        body: RequestBody,
        asked: Option<Authority>,
        started: Instant,
    ) -> Result<Answer, ForwardError> {
        let upstream = self.upstream;
        let config = upstream.config();
        self.record.admit(upstream.admit()?);
        upstream.deposit(self.arrival.worker, started);

        let client = self.client_view(asked)?;
        let generation = upstream.target().await?;
        check_signature(&head, &client, &generation, &config.host)?;

        let extended = upgrade::translate_extended_connect(&mut head);
        // Without the client's side of it (a library caller has none) an upgrade cannot be made.
        let asked = extended || headers::upgrade(&head).is_some();
        let on_upgrade = asked.then(|| Upgrade::take(&mut head.extensions)).flatten();
        let switching = on_upgrade.is_some();
        body.confine(headers::strip_request(&mut head.headers, switching));
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

    fn client_view(&self, asked: Option<Authority>) -> Result<ClientView, ForwardError> {
        let authority = match asked {
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
    ) -> Result<(Response<()>, Lease, ClientView), ForwardError> {
        let upstream = self.upstream;
        let config = upstream.config();
        let mut tries = Tries::default();
        let mut repaired = Repaired::default();
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
                    if error.is_of_endpoint() {
                        upstream.failed_at(&generation, &tries.failed);
                    }
                    let next = match self.is_last_try(&tries) {
                        true => upstream.behind(&generation).await,
                        false => None,
                    };
                    let next = match next {
                        Some(next) => next,
                        None => upstream.target().await?,
                    };
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

            if config.repair {
                let alias = |host: &str| {
                    host.eq_ignore_ascii_case(client.authority.as_str())
                        || upstream.hosts().iter().any(|own| own.eq_ignore_ascii_case(host))
                };
                let told = told_host(&config.host);
                let target = view(&generation, told.as_ref());
                repaired.undo(&mut head.headers);
                repaired = headers::repair_request(&mut head.headers, alias, target);
                client.origin = repaired.origin.clone();
            }
            let host = host_to_send(&config.host, &client, &generation)?;
            let streams = !http_body::Body::is_end_stream(&body);
            headers::address(&mut head, generation.scheme(), &host, lease.is_http2(), streams)?;
            let handle = body.handle();
            if waits && streams {
                body.hold();
            }
            body.set_idle(Some(config.timeouts.idle));
            let interim = handle.interim();

            let result = match config.timeouts.response {
                None => lease.send(&head, body, interim).await,
                Some(limit) => {
                    let wire = lease.own_wire();
                    let response = lease.send(&head, body, interim);
                    match deadline::within(limit, response, &handle, wire.as_deref()).await {
                        Some(result) => result,
                        None => {
                            lease.failed("no answer within `timeouts.response`");
                            let endpoint = lease.endpoint();
                            let late =
                                ForwardError::ResponseTimeout { endpoint, limit, generation };
                            return Err(late);
                        }
                    }
                }
            };
            let error = match result {
                Ok(response) if !lease.is_answer_unsolicited() => {
                    let took = lease.answered();
                    let status = response.status();
                    if is_idle_timeout(status, &lease, &head.method, &handle)
                        && handle.rewind()
                        && self.may_repeat("reuse", true, &mut tries)
                    {
                        tries.fresh = true;
                        body = handle.next_try();
                        continue;
                    }
                    if self.may_repeat_status(status, &head.method, &handle)
                        && handle.rewind()
                        && self.may_retry("status", &mut tries)
                    {
                        tries.failed.push(lease.endpoint());
                        body = handle.next_try();
                        continue;
                    }
                    handle.settle();
                    handle.set_idle(None);
                    self.record.answered(response.status(), &lease, took);
                    return Ok((response, lease, client));
                }
                Ok(_) => None,
                Err(error) => Some(error),
            };
            let endpoint = lease.endpoint();
            let reused = lease.is_reused();
            let reason = self.retry_reason(&lease, error.as_ref(), &head, &handle).await;
            if let Some(error) = &error
                && !reused
                && !error.is_of_the_body()
            {
                lease.failed(&error.to_string());
                tries.failed.push(endpoint);
                upstream.failed_at(&generation, &tries.failed);
            }
            if let Some(reason) = reason
                && handle.rewind()
                && self.may_repeat(reason, reused, &mut tries)
            {
                if !reused {
                    generation = upstream.target().await?;
                }
                tries.fresh = true;
                body = handle.next_try();
                continue;
            }
            return Err(match error {
                Some(error) => exchange_error(error, endpoint, reused, generation),
                None => ForwardError::Unsolicited { endpoint, generation },
            });
        }
    }
}

impl Answer {
    fn into_response(
        self,
        record: Box<Record>,
        upstream: &Upstream,
        arrival: &Arrival,
    ) -> Response<Body> {
        let Self { mut response, mut lease, client, upgrade, extended } = self;
        let config = upstream.config();
        let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let keep_alive = headers::keep_alive(response.version(), response.headers());
        let nominated = headers::strip_response(response.headers_mut(), switching);
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
            return upgrade::switch(response, client, lease, record, idle, arrival);
        }
        let idle = config.timeouts.idle;
        let (reusable, keep_alive) = keep_alive;
        if !reusable {
            lease.refuse_reuse();
        }
        response
            .map(|()| Body::streaming(Origin::Alias(lease, keep_alive), record, idle, nominated))
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

/// Whether the request's own body broke off, and nothing that ended its connection on purpose did.
pub(super) fn is_of_the_body(error: &SendError, generation: &Generation) -> bool {
    error.is_of_the_body() && !generation.killed().is_cancelled()
}

fn exchange_error(
    error: SendError,
    endpoint: SocketAddr,
    kept: bool,
    generation: Arc<Generation>,
) -> ForwardError {
    if is_of_the_body(&error, &generation) {
        return ForwardError::ClientBody(error);
    }
    if generation.killed().is_cancelled() && error.is_cut_off() {
        return ForwardError::Moved { endpoint, generation };
    }
    let tls = generation.tls().and_then(|(tls, name)| TlsError::after_handshake(&error, name, tls));
    ForwardError::Exchange { endpoint, error: Box::new(error), tls, kept, generation }
}
