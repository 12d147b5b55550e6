//! Errors become answers: the one place that says which failure is which status.

use ::http::{
    HeaderName, HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, PROXY_AUTHENTICATE, RETRY_AFTER},
    response,
};
use bytes::Bytes;
use serde::Serialize;

use super::{Body, ForwardError, PassthroughError};
use crate::{
    connect::{ConnectError, Denied},
    error::{ProxyErrorType as Kind, Stage},
    http1::ExchangeError,
    idle::Idle,
    resolve::ResolveError,
    tls::TlsError,
    upstream::{AcquireError, NoTarget, Upstream},
};

/// An error as the client sees it: RFC 9457, with what truename knows besides.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    #[serde(serialize_with = "status_number")]
    status: StatusCode,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    true_name: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    chain: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    #[serde(serialize_with = "stage_word")]
    stage: Stage,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
    #[serde(skip)]
    error: Kind,
}

impl Problem {
    /// Classifies `error`, met while serving `upstream` (none where no alias was found).
    pub fn new(error: &ForwardError, upstream: Option<&Upstream>) -> Self {
        let (status, kind, stage) = classify(error);
        let state = upstream.map(|upstream| upstream.targets()[0].state());
        let resolution = error.generation().map(|generation| generation.resolution());
        let names = |names: &[std::sync::Arc<str>]| names.iter().map(|n| n.to_string()).collect();
        let chain: Vec<String> = match (error, &resolution, &state) {
            (ForwardError::NoTarget(NoTarget::Resolve(error)), ..) => names(error.chain()),
            (ForwardError::NoTarget(NoTarget::Refused(refusal)), ..) => names(&refusal.chain),
            (ForwardError::Passthrough(PassthroughError::Resolve(error)), ..) => {
                names(error.chain())
            }
            (_, Some(resolution), _) => names(&resolution.chain),
            (_, None, Some(state)) => {
                state.current.as_ref().map(|current| names(&current.chain)).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        let true_name = match (&resolution, &state) {
            (Some(resolution), _) => Some(resolution.true_name.to_string()),
            (None, Some(state)) => state.current.as_ref().map(|c| c.true_name.to_string()),
            _ => None,
        };
        Self {
            kind: format!("urn:truename:error:{kind}"),
            title: title(kind),
            status,
            detail: detail(error),
            alias: upstream.map(|upstream| upstream.config().name.clone()),
            true_name,
            chain,
            endpoint: error.endpoint().map(|endpoint| endpoint.to_string()),
            stage,
            fix: fix(error),
            error: kind,
        }
    }

    /// Says why a head was refused before it was a request.
    pub fn refused_head(head: RefusedHead) -> Self {
        let (status, kind, detail, fix) = head.explain();
        Self {
            kind: format!("urn:truename:error:{kind}"),
            title: title(kind),
            status,
            detail: detail.into(),
            alias: None,
            true_name: None,
            chain: Vec::new(),
            endpoint: None,
            stage: Stage::Request,
            fix: fix.map(Into::into),
            error: kind,
        }
    }

    /// The answer as bytes, with the connection's end, for where there is no HTTP server to ask.
    pub fn to_http1(&self) -> Bytes {
        let (head, body) = self.parts();
        let mut bytes = format!("HTTP/1.1 {}\r\n", head.status).into_bytes();
        for (name, value) in &head.headers {
            bytes.extend_from_slice(name.as_str().as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value.as_bytes());
            bytes.extend_from_slice(b"\r\n");
        }
        let end = format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len());
        bytes.extend_from_slice(end.as_bytes());
        bytes.extend_from_slice(&body);
        bytes.into()
    }

    /// Its name in RFC 9209.
    pub fn error(&self) -> Kind {
        self.error
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// What happened, in words.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The key or the command that mends it.
    pub fn fix(&self) -> Option<&str> {
        self.fix.as_deref()
    }

    /// How far the request came.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The answer.
    pub fn into_response(self) -> Response<Body> {
        let (head, body) = self.parts();
        Response::from_parts(head, Body::whole(body))
    }

    fn parts(&self) -> (response::Parts, Bytes) {
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        let mut response = Response::new(Bytes::from(json));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        let status =
            format!("truename; error={}; details=\"{}\"", self.error, sf_string(&self.detail));
        if let Ok(status) = HeaderValue::try_from(status) {
            headers.insert(HeaderName::from_static("proxy-status"), status);
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            let challenge = "Basic realm=\"truename\", charset=\"UTF-8\"";
            headers.insert(PROXY_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        response.into_parts()
    }
}

/// A request's head that never became a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedHead {
    /// Not HTTP, or not quite.
    Malformed,
    /// The target has a `#`.
    Fragment,
    /// `Content-Length` is no number, or several.
    Length,
    /// A `Transfer-Encoding` that nobody here can undo.
    Coding,
    /// More than `listener.max_header_size`, or too many fields.
    TooLarge,
    /// A target longer than any sane one.
    TargetTooLong,
    /// Not complete within `listener.header_timeout`.
    TooSlow,
}

impl RefusedHead {
    fn explain(self) -> (StatusCode, Kind, &'static str, Option<&'static str>) {
        match self {
            Self::Malformed => (
                StatusCode::BAD_REQUEST,
                Kind::HttpRequestError,
                "what came is not a well-formed HTTP/1 request",
                None,
            ),
            Self::Fragment => (
                StatusCode::BAD_REQUEST,
                Kind::HttpRequestError,
                "the request's target has a `#`: a fragment is for the client alone and not part of a \
                 request",
                Some(
                    "leave out what follows the `#`, or write a `#` that is part of the path as %23",
                ),
            ),
            Self::Length => (
                StatusCode::BAD_REQUEST,
                Kind::HttpRequestError,
                "the request's `Content-Length` is no number, or not the same one each time",
                Some("send the body's length once, in digits"),
            ),
            Self::Coding => (
                StatusCode::BAD_REQUEST,
                Kind::HttpRequestError,
                "the request's `Transfer-Encoding` is another than `chunked`, or in HTTP/1.0",
                Some("send the body with `Transfer-Encoding: chunked` alone, or with its length"),
            ),
            Self::TooLarge => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                Kind::HttpRequestError,
                "the request's head has more than `listener.max_header_size` bytes, or more than \
                 100 fields",
                Some("raise `listener.max_header_size`"),
            ),
            Self::TargetTooLong => (
                StatusCode::URI_TOO_LONG,
                Kind::HttpRequestError,
                "the request's target is longer than 65,534 bytes",
                None,
            ),
            Self::TooSlow => (
                StatusCode::REQUEST_TIMEOUT,
                Kind::HttpRequestError,
                "the request's head was not complete within `listener.header_timeout`",
                Some("raise `listener.header_timeout`"),
            ),
        }
    }
}

fn status_number<S: serde::Serializer>(
    status: &StatusCode,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

fn stage_word<S: serde::Serializer>(stage: &Stage, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(stage.as_str())
}

/// The inside of a structured field's string (RFC 8941 §3.3.3): printable ASCII, escaped.
fn sf_string(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' | '\\' => escaped.extend(['\\', c]),
            ' '..='~' => escaped.push(c),
            _ => escaped.push('?'),
        }
    }
    escaped
}

fn classify(error: &ForwardError) -> (StatusCode, Kind, Stage) {
    use StatusCode as S;
    match error {
        ForwardError::ClientBody(error) if is_idle(error) => {
            (S::REQUEST_TIMEOUT, Kind::HttpRequestError, Stage::Request)
        }
        ForwardError::Exchange { error, .. } if error.is_unread() => {
            (S::GATEWAY_TIMEOUT, Kind::HttpResponseTimeout, Stage::Request)
        }
        ForwardError::BadRequest(_)
        | ForwardError::ClientBody(_)
        | ForwardError::Destination(_) => (S::BAD_REQUEST, Kind::HttpRequestError, Stage::Request),
        ForwardError::Credentials { .. } => {
            (S::PROXY_AUTHENTICATION_REQUIRED, Kind::HttpRequestDenied, Stage::Request)
        }
        ForwardError::Passthrough(error) => classify_passthrough(error),
        ForwardError::Connect => (S::METHOD_NOT_ALLOWED, Kind::HttpRequestError, Stage::Request),
        ForwardError::Route(_) => (S::NOT_FOUND, Kind::DestinationNotFound, Stage::Route),
        ForwardError::SignedHost { .. } => {
            (S::BAD_GATEWAY, Kind::HttpRequestDenied, Stage::Request)
        }
        ForwardError::Limit(_) => {
            (S::SERVICE_UNAVAILABLE, Kind::ConnectionLimitReached, Stage::Request)
        }
        ForwardError::NoTarget(NoTarget::Refused(_)) => {
            (S::FORBIDDEN, Kind::HttpRequestDenied, Stage::Policy)
        }
        ForwardError::NoTarget(NoTarget::Resolve(error)) => classify_resolve(error),
        ForwardError::NoTarget(NoTarget::Unusable(error)) => classify_tls(error),
        ForwardError::NoTarget(NoTarget::Pending(_)) => {
            (S::GATEWAY_TIMEOUT, Kind::DnsTimeout, Stage::Resolve)
        }
        ForwardError::Acquire { error, .. } => classify_acquire(error),
        ForwardError::Exchange { tls: Some(error), .. } => classify_tls(error),
        ForwardError::Exchange { error, .. } if error.is_malformed() => {
            (S::BAD_GATEWAY, Kind::HttpProtocolError, Stage::Response)
        }
        ForwardError::Exchange { .. } | ForwardError::Moved { .. } => {
            (S::BAD_GATEWAY, Kind::ConnectionTerminated, Stage::Response)
        }
        ForwardError::Switch { .. } => (S::BAD_GATEWAY, Kind::HttpUpgradeFailed, Stage::Response),
        ForwardError::Unsolicited { .. } => {
            (S::BAD_GATEWAY, Kind::HttpProtocolError, Stage::Response)
        }
        ForwardError::ResponseTimeout { .. } => {
            (S::GATEWAY_TIMEOUT, Kind::HttpResponseTimeout, Stage::Response)
        }
    }
}

/// Whether the client fell silent in the midst of its body.
fn is_idle(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| cause.is::<Idle>())
}

fn classify_acquire(error: &AcquireError) -> (StatusCode, Kind, Stage) {
    use StatusCode as S;
    match error {
        AcquireError::NoEndpoint => {
            (S::SERVICE_UNAVAILABLE, Kind::DestinationUnavailable, Stage::Connect)
        }
        AcquireError::ConnectionLimit { .. } => {
            (S::SERVICE_UNAVAILABLE, Kind::ConnectionLimitReached, Stage::Connect)
        }
        AcquireError::Late { .. } => (S::GATEWAY_TIMEOUT, Kind::ConnectionTimeout, Stage::Connect),
        AcquireError::Http { .. } => (S::BAD_GATEWAY, Kind::HttpProtocolError, Stage::Connect),
        AcquireError::Connect(error) => classify_connect(error),
    }
}

fn classify_passthrough(error: &PassthroughError) -> (StatusCode, Kind, Stage) {
    use StatusCode as S;
    match error {
        PassthroughError::Refused(_) => (S::FORBIDDEN, Kind::HttpRequestDenied, Stage::Policy),
        PassthroughError::Resolve(error) => classify_resolve(error),
        PassthroughError::Connect(error) => classify_connect(error),
        PassthroughError::Exchange { error: error @ ExchangeError::RequestBody(_), .. }
            if is_idle(error) =>
        {
            (S::REQUEST_TIMEOUT, Kind::HttpRequestError, Stage::Request)
        }
        PassthroughError::Exchange { error: ExchangeError::Unread(_), .. } => {
            (S::GATEWAY_TIMEOUT, Kind::HttpResponseTimeout, Stage::Request)
        }
        PassthroughError::Exchange { error: ExchangeError::RequestBody(_), .. } => {
            (S::BAD_REQUEST, Kind::HttpRequestError, Stage::Request)
        }
        PassthroughError::Exchange { error: ExchangeError::Head(_), .. } => {
            (S::BAD_GATEWAY, Kind::HttpProtocolError, Stage::Response)
        }
        PassthroughError::Exchange { .. } => {
            (S::BAD_GATEWAY, Kind::ConnectionTerminated, Stage::Response)
        }
        PassthroughError::UnaskedSwitch(_) => {
            (S::BAD_GATEWAY, Kind::HttpUpgradeFailed, Stage::Response)
        }
    }
}

fn classify_resolve(error: &ResolveError) -> (StatusCode, Kind, Stage) {
    if error.is_timeout() {
        return (StatusCode::GATEWAY_TIMEOUT, Kind::DnsTimeout, Stage::Resolve);
    }
    (StatusCode::SERVICE_UNAVAILABLE, Kind::DnsError, Stage::Resolve)
}

fn classify_connect(error: &ConnectError) -> (StatusCode, Kind, Stage) {
    use StatusCode as S;
    match error {
        ConnectError::Denied(Denied::OwnListener(_)) => {
            (S::LOOP_DETECTED, Kind::ProxyLoopDetected, Stage::Policy)
        }
        ConnectError::Denied(Denied::Class { .. }) => {
            (S::FORBIDDEN, Kind::DestinationIpProhibited, Stage::Policy)
        }
        ConnectError::Timeout { tcp_done, .. } => {
            let stage = if *tcp_done { Stage::Tls } else { Stage::Connect };
            (S::GATEWAY_TIMEOUT, Kind::ConnectionTimeout, stage)
        }
        ConnectError::Tcp { source, .. } => match source.kind() {
            std::io::ErrorKind::ConnectionRefused => {
                (S::BAD_GATEWAY, Kind::ConnectionRefused, Stage::Connect)
            }
            std::io::ErrorKind::TimedOut => {
                (S::GATEWAY_TIMEOUT, Kind::ConnectionTimeout, Stage::Connect)
            }
            // A reset right behind the accept: whether TCP or TLS meets it is a race.
            std::io::ErrorKind::ConnectionReset => {
                (S::BAD_GATEWAY, Kind::ConnectionTerminated, Stage::Connect)
            }
            _ => (S::SERVICE_UNAVAILABLE, Kind::DestinationUnavailable, Stage::Connect),
        },
        ConnectError::Tls { source, .. } => classify_tls(source),
    }
}

fn classify_tls(error: &TlsError) -> (StatusCode, Kind, Stage) {
    let kind = match error {
        TlsError::Certificate(_) | TlsError::Name { .. } => Kind::TlsCertificateError,
        TlsError::Eof { .. } | TlsError::Io { .. } => Kind::ConnectionTerminated,
        _ => Kind::TlsProtocolError,
    };
    (StatusCode::BAD_GATEWAY, kind, Stage::Tls)
}

fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::DnsTimeout => "DNS did not answer in time",
        Kind::DnsError => "The name cannot be resolved",
        Kind::DestinationNotFound => "No alias answers to this Host",
        Kind::DestinationUnavailable => "The target cannot be reached",
        Kind::DestinationIpProhibited => "The target's address is not allowed",
        Kind::ConnectionRefused => "The target refuses connections",
        Kind::ConnectionTerminated => "The target closed the connection",
        Kind::ConnectionTimeout => "The target did not take the connection in time",
        Kind::ConnectionLimitReached => "Too many requests at once",
        Kind::TlsProtocolError => "TLS with the target failed",
        Kind::TlsCertificateError => "The target's certificate is not valid",
        Kind::HttpRequestError => "The request cannot be understood",
        Kind::HttpRequestDenied => "The request is not allowed",
        Kind::HttpResponseIncomplete => "The target's answer broke off",
        Kind::HttpResponseTimeout => "The target did not answer in time",
        Kind::HttpUpgradeFailed => "The upgrade failed",
        Kind::HttpProtocolError => "The target does not speak proper HTTP",
        Kind::ProxyLoopDetected => "The way leads back to this proxy",
        Kind::ProxyInternalError => "Internal error",
    }
}

fn detail(error: &ForwardError) -> String {
    match error {
        ForwardError::NoTarget(NoTarget::Resolve(error)) => error.what(),
        error => error.to_string(),
    }
}

/// The key or the command that mends it.
fn fix(error: &ForwardError) -> Option<String> {
    let fix = match error {
        ForwardError::Route(error) => error.fix(),
        ForwardError::SignedHost { .. } => {
            "sign the request for the true name, or set `host: preserve` for this alias".into()
        }
        ForwardError::Limit(_) => "raise `limits.requests`".into(),
        ForwardError::NoTarget(NoTarget::Resolve(error)) => error.fix(),
        ForwardError::NoTarget(NoTarget::Refused(refusal)) => refusal.fix(),
        ForwardError::NoTarget(NoTarget::Unusable(error)) => return error.hint(),
        ForwardError::NoTarget(NoTarget::Pending(_)) => {
            "check that the DNS servers of resolv.conf, or of `dns.servers`, can be reached".into()
        }
        ForwardError::Acquire { error: AcquireError::ConnectionLimit { .. }, .. } => {
            "raise `pool.max_connections`".into()
        }
        ForwardError::Acquire { error: AcquireError::Late { .. }, .. } => {
            "raise `timeouts.connect`".into()
        }
        ForwardError::Acquire { error: AcquireError::Connect(error), .. } => {
            return fix_connect(error);
        }
        ForwardError::Passthrough(PassthroughError::Connect(error)) => return fix_connect(error),
        ForwardError::Passthrough(PassthroughError::Resolve(error)) => error.fix(),
        ForwardError::Passthrough(PassthroughError::Refused(_)) => {
            "make the host an alias, or set `proxy.passthrough: allow`".into()
        }
        ForwardError::Credentials { .. } => {
            "give the client the proxy as `http://USER:PASSWORD@HOST:PORT`, with a line of the file \
             that `proxy.credentials` names"
                .into()
        }
        ForwardError::Destination(error) => return error.fix(),
        ForwardError::Exchange { tls: Some(error), .. } => return error.hint(),
        ForwardError::Exchange { error, kept: true, .. } if !error.is_malformed() => {
            "the connection had been kept from an earlier request: if the target closes those that \
             are idle, set `pool.idle_timeout` below its time for that"
                .into()
        }
        ForwardError::Moved { .. } => {
            "send the request again; `on_change` and `drain` say how long open connections have \
             after a change"
                .into()
        }
        ForwardError::ResponseTimeout { .. } => "raise `timeouts.response`".into(),
        ForwardError::ClientBody(error) if is_idle(error) => "raise `timeouts.idle`".into(),
        ForwardError::Exchange { error, .. } if error.is_unread() => "raise `timeouts.idle`".into(),
        _ => return None,
    };
    Some(fix)
}

fn fix_connect(error: &ConnectError) -> Option<String> {
    let fix = match error {
        ConnectError::Denied(Denied::OwnListener(_)) => {
            "let the Service, or `target`, lead to another address than the proxy's own".into()
        }
        ConnectError::Denied(Denied::Class { endpoint, .. }) => {
            format!("if it is meant, add {} to `policy.allow_addresses`", endpoint.ip())
        }
        ConnectError::Timeout { .. } => {
            "check that nothing between here and there drops packets (a NetworkPolicy, a \
                 firewall), or raise `timeouts.connect`"
                .into()
        }
        ConnectError::Tcp { .. } if error.is_own_lack() => {
            "this proxy's own limit is reached, not the target's: let it open more files \
             (`ulimit -Hn`), or lower `listener.max_connections`"
                .into()
        }
        ConnectError::Tcp { .. } => {
            "check that something listens there; `port` sets the target's port".into()
        }
        ConnectError::Tls { source, .. } => return source.hint(),
    };
    Some(fix)
}
