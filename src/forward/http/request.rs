//! One request: routed, rewritten, sent, sent again where that is safe, until there is a response.

use std::sync::Arc;

use ::http::{Method, Response, StatusCode, Version, header::HOST, request, uri::Authority};
use tokio::time::Instant;

use super::{
    super::{Downstream, ForwardError, Record},
    Body, Problem,
    attempt::{Attempt, Outcome, Outgoing, Received, configured_host, host_to_send, target_view},
    headers::{self, ClientView, Repaired},
    origin::Origin,
    retry::{Next, On, Tried, next, speaks_against_target},
    upgrade::{self, Switch, Upgraded},
};
use crate::{
    body::RequestBody,
    config::{HostHeader, HttpVersion},
    fault::{Fault, Taken},
    route::Routes,
    telemetry::{AliasMetrics, Failures},
    upstream::{Alias, Generation, Lease, Want},
};

/// A request for an alias, as it came.
pub struct Incoming<'a> {
    /// Its head, which is rewritten.
    pub head: &'a mut request::Parts,
    /// Its body.
    pub body: RequestBody,
    /// Its [authority](headers::authority).
    pub authority: Option<Authority>,
    /// When it came.
    pub started: Instant,
}

/// Serves any request: with the origin's response, or with an error that explains itself.
///
/// Here and below, heads are borrowed: otherwise each of the nested futures would have room for one.
pub async fn serve(
    head: &mut request::Parts,
    body: RequestBody,
    downstream: &Downstream,
    routes: &Routes,
) -> Response<Body> {
    let started = Instant::now();
    let (authority, alias) = match route(head, downstream, routes).await {
        Ok(found) => found,
        Err(fault) => return refuse(head, &fault, downstream, started),
    };
    if let Some(connection) = &downstream.connection {
        connection.belongs_to(&alias.worker(downstream.worker).metrics);
    }
    forward(Incoming { head, body, authority, started }, &alias, downstream).await
}

/// Responds to a request that belongs to no alias and is not forwarded.
pub fn refuse(
    head: &request::Parts,
    fault: &Fault,
    downstream: &Downstream,
    started: Instant,
) -> Response<Body> {
    let problem = Problem::new(fault, None, None);
    if let Some(connection) = &downstream.connection {
        connection.belongs_to(AliasMetrics::of_no_alias());
    }
    Record::of_no_alias(head, started).failed(&problem, fault, None);
    if problem.begins(Failures::of_refused()) {
        tracing::info!(
            listener = %downstream.listener,
            stage = problem.stage().as_str(),
            error = problem.error().as_str(),
            "{}",
            problem.detail(),
        );
    }
    problem.into_response().map(Body::whole)
}

async fn route(
    head: &request::Parts,
    downstream: &Downstream,
    routes: &Routes,
) -> Result<(Option<Authority>, Arc<Alias>), Fault> {
    if head.method == Method::CONNECT && !upgrade::is_extended_connect(head) {
        return Err(ForwardError::Connect.into());
    }
    let asked = headers::authority(head)?;
    let host = asked.as_ref().map(Authority::host);
    // An HTTP/1.0 request may have no Host; then the SNI counts.
    let host = host.or(downstream.server_name.as_deref());
    let find = || routes.find(downstream.local.ip(), host);
    if let Ok(alias) = find() {
        return Ok((asked, alias));
    }
    // It may be the true name of an alias that DNS has not responded for yet.
    for alias in routes.aliases().iter().filter(|alias| alias.is_pending()) {
        let _ = alias.target().await;
    }
    let alias = find()?;
    Ok((asked, alias))
}

/// Sends a request to an alias and returns its response. Never fails: errors become responses.
pub async fn forward(
    incoming: Incoming<'_>,
    alias: &Arc<Alias>,
    downstream: &Downstream,
) -> Response<Body> {
    let mut record = Record::of_alias(alias, downstream.worker, incoming.head, incoming.started);
    record.reads(&incoming.body);
    let mut journey = Journey { alias, downstream, record, generation: None };
    match journey.run(incoming).await {
        Ok(response) => response.into_response(journey.record, alias, downstream),
        Err(fault) => {
            let generation = journey.generation.take();
            let problem = Problem::new(&fault, Some(alias), generation.as_deref());
            journey.record.failed(&problem, &fault, generation);
            journey.record.explain(&problem);
            let mut response = problem.into_response().map(Body::whole);
            response.body_mut().record(journey.record);
            response
        }
    }
}

/// A request between its routing and its response's head.
struct Journey<'a> {
    alias: &'a Arc<Alias>,
    downstream: &'a Downstream,
    record: Box<Record>,
    /// The generation under which it failed, if it got that far.
    generation: Option<Arc<Generation>>,
}

/// The origin's response, and what is needed to pass it on.
struct OriginResponse {
    response: Response<()>,
    lease: Lease,
    client: ClientView,
    /// The request was to switch protocols.
    upgrade: bool,
    /// The request was an extended CONNECT.
    extended: bool,
}

impl Journey<'_> {
    async fn run(&mut self, incoming: Incoming<'_>) -> Result<OriginResponse, Fault> {
        let Incoming { head, body, authority, started } = incoming;
        let alias = self.alias;
        let config = alias.config();
        self.record.admit(alias.admit()?);
        alias.deposit(self.downstream.worker, started);

        let client = self.client_view(authority)?;
        let generation = alias.target().await?;
        check_signature(head, &client, &generation, &config.host)?;

        let extended = upgrade::translate_extended_connect(head);
        let asked = extended || headers::upgrade(head).is_some();
        let switching = asked && self.downstream.can_switch;
        body.confine(headers::strip_request(&mut head.headers, switching));
        headers::add_forwarded(
            &mut head.headers,
            config.forwarded,
            self.downstream.client.source.ip(),
            &client,
        );
        let want = want(head.version, switching, config.http.version);
        let waits = headers::expects_continue(&head.headers);

        let mut outgoing = Outgoing { head, body, client, waits, repaired: Repaired::default() };
        let (response, lease) = self.send_with_retries(&mut outgoing, generation, want).await?;
        let client = outgoing.client;
        let status = response.status();
        let unasked = status == StatusCode::SWITCHING_PROTOCOLS && !switching;
        // To an extended CONNECT, any 2xx would mean that the tunnel is open.
        if unasked || extended && status.is_success() {
            self.generation = Some(lease.generation().clone());
            let error = ForwardError::Switch { endpoint: lease.endpoint(), status };
            return Err(error.with(Taken::Some));
        }
        Ok(OriginResponse { response, lease, client, upgrade: switching, extended })
    }

    fn client_view(&self, authority: Option<Authority>) -> Result<ClientView, Fault> {
        let authority = match authority {
            Some(authority) => authority,
            // HTTP/1.0 without Host: the address it was sent to.
            None => self
                .downstream
                .local
                .to_string()
                .parse()
                .map_err(|_| headers::BadRequest::NoHost)?,
        };
        Ok(ClientView { scheme: self.downstream.scheme, authority, origin: None })
    }

    /// Sends the request until there is a response, or a failure that is not retried.
    async fn send_with_retries(
        &mut self,
        outgoing: &mut Outgoing<'_>,
        mut generation: Arc<Generation>,
        want: Want,
    ) -> Result<(Response<()>, Lease), Fault> {
        let alias = self.alias;
        let config = alias.config();
        let mut tried = Tried::default();
        loop {
            let lease = alias
                .acquire(self.downstream.caller(), &generation, want, &tried.failed, tried.renewed)
                .await;
            // The true name has changed in the meantime: nothing was sent to the old one, and nothing will be.
            // (An alias that a reload removed has no newer one.)
            if generation.is_retired() {
                let newer = alias.target().await?;
                if !Arc::ptr_eq(&newer, &generation) {
                    generation = newer;
                    continue;
                }
            }
            let mut elsewhere = None;
            // A block, so that the future has no room for the response after it.
            let (retry, was_sent, was_lost) = {
                let outcome = match lease {
                    Ok(mut lease) => {
                        outgoing.address(alias, &generation, lease.is_http2())?;
                        tried.kept = lease.is_reused();
                        match (Attempt { lease: &mut lease, outgoing, config }).run().await {
                            Ok((response, took)) => {
                                let status = response.status();
                                Outcome::Response(status, Received { response, lease, took })
                            }
                            Err(fault) => Outcome::Lost(fault),
                        }
                    }
                    Err(fault) => {
                        tried.failed.extend(fault.endpoint());
                        if speaks_against_target(&fault) {
                            alias.failed_at(&generation, &tried.failed, &fault);
                        }
                        let behind = match tried.is_last_next(&config.retry) {
                            true => alias.behind(&generation).await,
                            false => None,
                        };
                        let target = match behind {
                            Some(target) => target,
                            None => alias.target().await?,
                        };
                        tried.elsewhere =
                            Alias::is_elsewhere(&target, &generation, &tried.failed, &fault);
                        elsewhere = Some(target);
                        Outcome::Unconnected(fault)
                    }
                };
                if let Outcome::Lost(fault) = &outcome
                    && fault.is_of_endpoint()
                {
                    tried.failed.extend(fault.endpoint());
                    if speaks_against_target(fault) {
                        alias.failed_at(&generation, &tried.failed, fault);
                    }
                }
                let retry = match next(&outcome, outgoing.asked(), &tried, &config.retry) {
                    Next::Again(retry) if retry.is_free || alias.withdraw() => retry,
                    Next::Again(_) | Next::Respond => {
                        return self.end(outcome, outgoing, generation);
                    }
                };
                tried.note(&outcome, retry);
                let was_sent = !matches!(outcome, Outcome::Unconnected(_));
                (retry, was_sent, matches!(outcome, Outcome::Lost(_)))
            };
            if was_lost && !tried.kept {
                elsewhere = Some(alias.target().await?);
            }
            self.record.retried(retry.reason);
            outgoing.start_over();
            let had_it = was_sent && (retry.on == On::AnotherEndpoint || !tried.kept);
            generation = match elsewhere {
                Some(other) if !had_it || !Arc::ptr_eq(&other, &generation) => other,
                _ if had_it => self.beyond(generation, &tried).await,
                _ => generation,
            };
        }
    }

    /// Where to retry a request that its target has received: at the next target if this is the last attempt, or if
    /// the target has no other endpoint.
    async fn beyond(&self, generation: Arc<Generation>, tried: &Tried) -> Arc<Generation> {
        let has_other = generation.balancer().has_untried(Instant::now(), &tried.failed);
        if has_other && !tried.is_last(&self.alias.config().retry) {
            return generation;
        }
        self.alias.behind(&generation).await.unwrap_or(generation)
    }

    /// The outcome of the last attempt becomes that of the request.
    fn end(
        &mut self,
        outcome: Outcome,
        outgoing: &Outgoing<'_>,
        generation: Arc<Generation>,
    ) -> Result<(Response<()>, Lease), Fault> {
        let fault = match outcome {
            Outcome::Response(status, Received { response, lease, took }) => {
                outgoing.body.settle();
                outgoing.body.set_idle(None);
                self.record.responded(status, &lease, took);
                return Ok((response, lease));
            }
            Outcome::Unconnected(fault) => {
                self.alias.refresh();
                fault
            }
            Outcome::Lost(fault) => fault,
        };
        self.generation = Some(generation);
        Err(fault)
    }
}

impl OriginResponse {
    fn into_response(
        self,
        record: Box<Record>,
        alias: &Alias,
        downstream: &Downstream,
    ) -> Response<Body> {
        let Self { mut response, mut lease, client, upgrade, extended } = self;
        let config = alias.config();
        let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let keep_alive = headers::keep_alive(response.version(), response.headers());
        let nominated = headers::strip_response(response.headers_mut(), switching);
        if config.repair {
            let configured = configured_host(&config.host);
            let target = target_view(lease.generation(), configured.as_ref());
            headers::repair_response(response.headers_mut(), &client, target);
        }
        *response.version_mut() = Version::HTTP_11;
        let idle = config.timeouts.idle;
        if upgrade && switching {
            if extended {
                upgrade::translate_switch(&mut response);
            }
            let upgraded = Box::new(Upgraded::new(lease, record, idle, downstream));
            return response.map(|()| Body::switching(Switch::Upgrade(upgraded)));
        }
        let (reusable, keep_alive) = keep_alive;
        if !reusable {
            lease.refuse_reuse();
        }
        response
            .map(|()| Body::streaming(Origin::Alias(lease, keep_alive), record, idle, nominated))
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

fn check_signature(
    head: &request::Parts,
    client: &ClientView,
    generation: &Generation,
    configured: &HostHeader,
) -> Result<(), Fault> {
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
    }
    .into())
}
