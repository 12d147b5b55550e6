//! One attempt at a request, on one connection.

use std::{mem, pin::pin, time::Duration};

use ::http::{HeaderValue, Method, Response, StatusCode, request, uri::Authority};

use super::{
    super::error::{ForwardError, is_of_the_body},
    deadline,
    headers::{self, BadRequest, ClientView, Repaired, TargetView},
};
use crate::{
    body::RequestBody,
    config::{self, HostHeader},
    fault::{Fault, Taken},
    tls::{Alpn, TlsError},
    upstream::{Alias, Generation, Lease, SendError},
};

/// A request that is being sent: what the client asked for, rewritten for each target.
pub(super) struct Outgoing<'a> {
    pub(super) head: &'a mut request::Parts,
    /// A handle to the body, for the next attempt.
    pub(super) body: RequestBody,
    pub(super) client: ClientView,
    /// The client waits for a `100 Continue`.
    pub(super) waits: bool,
    /// What `repair` changed for the previous target.
    pub(super) repaired: Repaired,
}

/// The parts of a request that decide whether it may be sent again.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) body: &'a RequestBody,
}

/// A request on a connection.
pub(super) struct Attempt<'a> {
    pub(super) lease: &'a mut Lease,
    pub(super) outgoing: &'a Outgoing<'a>,
    pub(super) config: &'a config::Alias,
}

/// What came of an attempt.
pub(super) enum Outcome<Response = Received> {
    /// A response with this status.
    Response(StatusCode, Response),
    /// There was no connection. Nothing was sent.
    Unconnected(Fault),
    /// The connection was lost, or what came on it is no response.
    Lost(Fault),
}

/// A response's head, and the connection that the rest arrives on.
pub(super) struct Received {
    pub(super) response: Response<()>,
    /// The connection.
    pub(super) lease: Lease,
    /// How long the head took.
    pub(super) took: Duration,
}

impl Outgoing<'_> {
    /// Addresses the request to a generation's target, in the form of its version of HTTP.
    pub(super) fn address(
        &mut self,
        alias: &Alias,
        generation: &Generation,
        http2: bool,
    ) -> Result<(), Fault> {
        let config = alias.config();
        if config.repair {
            let is_alias = |host: &str| {
                host.eq_ignore_ascii_case(self.client.authority.as_str())
                    || alias.hosts().iter().any(|own| own.eq_ignore_ascii_case(host))
            };
            let configured = configured_host(&config.host);
            let target = target_view(generation, configured.as_ref());
            mem::take(&mut self.repaired).undo(&mut self.head.headers);
            self.repaired = headers::repair_request(&mut self.head.headers, is_alias, target);
            self.client.origin = self.repaired.origin.clone();
        }
        let host: HeaderValue = host_to_send(&config.host, &self.client, generation)?;
        let streams = !http_body::Body::is_end_stream(&self.body);
        headers::address(self.head, generation.scheme(), &host, http2, streams)?;
        if self.waits && streams {
            self.body.hold();
        }
        self.body.set_idle(Some(config.timeouts.idle));
        Ok(())
    }

    /// Starts the body over, for the next attempt.
    pub(super) fn start_over(&mut self) {
        self.body.rewind();
        self.body = mem::replace(&mut self.body, RequestBody::empty()).next_try();
    }

    /// The parts that decide whether it may be sent again.
    pub(super) fn asked(&self) -> Asked<'_> {
        Asked { method: &self.head.method, body: &self.body }
    }
}

impl Asked<'_> {
    /// Whether the request may be repeated whatever became of it.
    pub(super) fn is_safe_to_repeat(&self) -> bool {
        self.method.is_idempotent() && self.body.is_untouched()
    }
}

impl Attempt<'_> {
    /// Sends the request and awaits the head of its response. Also returns how long that took.
    ///
    /// Rare branches are boxed, because each request's future has room for its largest branch.
    pub(super) async fn run(mut self) -> Result<(Response<()>, Duration), Fault> {
        let Self { lease, outgoing, config } = &mut self;
        let (body, interim) = (outgoing.body.handle(), outgoing.body.interim());
        let result = match config.timeouts.response {
            None => lease.send(outgoing.head, body, interim).await,
            Some(limit) => {
                let wire = lease.own_wire();
                let in_time = {
                    let response = pin!(lease.send(outgoing.head, body, interim));
                    deadline::within(limit, response, &outgoing.body, wire.as_deref()).await
                };
                in_time.ok_or_else(|| {
                    let endpoint = lease.endpoint();
                    lease.failed("no response within `timeouts.response`");
                    // The target had all of the request, or is reading no more of it.
                    ForwardError::ResponseTimeout { endpoint, limit }.with(Taken::Some)
                })?
            }
        };
        match result {
            Ok(response) if !lease.is_response_unsolicited() => Ok((response, lease.responded())),
            Ok(_) => {
                let error = ForwardError::Unsolicited { endpoint: lease.endpoint() };
                let taken = Box::pin(self.taken(None)).await;
                Err(error.with(taken))
            }
            Err(error) => Err(Box::pin(self.lost(error)).await),
        }
    }

    async fn lost(&self, error: SendError) -> Fault {
        let generation = self.lease.generation();
        if is_of_the_body(&error, generation) {
            return ForwardError::ClientBody(error).with(Taken::Unknown);
        }
        let taken = self.taken(Some(&error)).await;
        let text = error.to_string();
        let fault = explain(error, self.lease).with(taken);
        if fault.is_of_endpoint() {
            self.lease.failed(&text);
        }
        fault
    }

    /// How much of the request the target had. The proof may take a second, so it is sought only where
    /// something depends on it.
    async fn taken(&self, error: Option<&SendError>) -> Taken {
        if error.is_some_and(|error| error.verdict().proves_unread()) {
            return Taken::Nothing;
        }
        if error.is_some() && self.lease.has_begun_response() {
            return Taken::Some;
        }
        if self.outgoing.asked().is_safe_to_repeat() {
            return Taken::Unknown;
        }
        let verdict = self.lease.verdict(error).await;
        tracing::debug!(?verdict, endpoint = %self.lease.endpoint(), "a request was lost");
        match verdict.proves_unread() {
            true => Taken::Nothing,
            false => Taken::Unknown,
        }
    }
}

fn explain(error: SendError, lease: &Lease) -> ForwardError {
    let (endpoint, generation) = (lease.endpoint(), lease.generation());
    if generation.killed().is_cancelled() && error.is_cut_off() {
        return ForwardError::Moved { endpoint, true_name: generation.true_name().clone() };
    }
    let tls = generation
        .tls()
        .and_then(|(tls, name)| TlsError::after_handshake(&error, name, tls.offer(Alpn::None)));
    ForwardError::Exchange { endpoint, error: Box::new(error), tls, kept: lease.is_reused() }
}

/// The target under the Host that it is sent.
pub(super) fn target_view<'a>(
    generation: &'a Generation,
    configured: Option<&'a Authority>,
) -> TargetView<'a> {
    let authority = configured.unwrap_or(generation.authority());
    TargetView { scheme: generation.scheme(), authority }
}

pub(super) fn configured_host(configured: &HostHeader) -> Option<Authority> {
    match configured {
        HostHeader::Literal(host) => host.parse().ok(),
        HostHeader::Rewrite | HostHeader::Preserve => None,
    }
}

pub(super) fn host_to_send(
    configured: &HostHeader,
    client: &ClientView,
    generation: &Generation,
) -> Result<HeaderValue, Fault> {
    match configured {
        HostHeader::Rewrite => Ok(generation.host().clone()),
        HostHeader::Preserve => to_header(client.authority.as_str()),
        HostHeader::Literal(host) => to_header(host),
    }
}

fn to_header(host: &str) -> Result<HeaderValue, Fault> {
    HeaderValue::from_str(host).map_err(|_| BadRequest::InvalidHost(host.into()).into())
}
