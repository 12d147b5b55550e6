//! Faults as an HTTP client sees them: the only place that maps failures to statuses.

use ::http::{
    HeaderName, HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, PROXY_AUTHENTICATE, RETRY_AFTER},
    response,
};
use bytes::Bytes;
use serde::Serialize;

use crate::{
    fault::{Fault, Kind, ProxyErrorType, Stage},
    telemetry::{Failures, NoAliasFailure},
    upstream::{Alias, Generation},
};

/// The length limits of an error's details in a problem document and in a header: clients and proxies limit the size of
/// a head.
const LONGEST_DETAIL: usize = 8 * 1024;
const LONGEST_DETAIL_IN_HEADER: usize = 1024;

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
    error: ProxyErrorType,
}

impl Problem {
    /// How a fault is reported to the client of `alias` (none if no alias was found), in `generation` if the
    /// request got that far.
    pub fn new(fault: &Fault, alias: Option<&Alias>, generation: Option<&Generation>) -> Self {
        let (status, error) = view(fault.kind());
        let resolution = generation.map(Generation::resolution);
        let resolution = resolution
            .or_else(|| alias.and_then(|alias| alias.targets()[0].state().current.clone()));
        let chain = fault.chain().or(resolution.as_ref().map(|resolution| &resolution.chain[..]));
        Self {
            kind: format!("urn:truename:error:{error}"),
            title: title(error),
            status,
            detail: shortened(&fault.to_string(), LONGEST_DETAIL),
            alias: alias.map(|alias| alias.config().name.clone()),
            true_name: resolution.as_ref().map(|resolution| resolution.true_name.to_string()),
            chain: chain.unwrap_or_default().iter().map(ToString::to_string).collect(),
            endpoint: fault.endpoint().map(|endpoint| endpoint.to_string()),
            stage: fault.stage(),
            fix: fault.fix(),
            error,
        }
    }

    /// Why a head was refused before it became a request.
    pub fn refused_head(head: RefusedHead) -> Self {
        let (status, error, detail, fix) = head.explain();
        Self {
            kind: format!("urn:truename:error:{error}"),
            title: title(error),
            status,
            detail: detail.into(),
            alias: None,
            true_name: None,
            chain: Vec::new(),
            endpoint: None,
            stage: Stage::Request,
            fix: fix.map(Into::into),
            error,
        }
    }

    /// The response as bytes, followed by the connection's end.
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
    pub fn error(&self) -> ProxyErrorType {
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

    /// The setting or the command that fixes it.
    pub fn fix(&self) -> Option<&str> {
        self.fix.as_deref()
    }

    /// How far the request got.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Counts it among `failures`. Whether it is the first of its kind, so that it is to be logged in full.
    pub(in crate::forward) fn begins(&self, failures: &Failures<NoAliasFailure>) -> bool {
        let (stage, error) = (self.stage.as_str(), self.error.as_str());
        let kind = NoAliasFailure { stage, error, detail: self.detail.clone() };
        failures.begins(kind, self.detail.clone())
    }

    /// The response.
    pub fn into_response(self) -> Response<Bytes> {
        let (head, body) = self.parts();
        Response::from_parts(head, body)
    }

    fn parts(&self) -> (response::Parts, Bytes) {
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        let mut response = Response::new(Bytes::from(json));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        let details = sf_string(&shortened(&self.detail, LONGEST_DETAIL_IN_HEADER));
        let status = format!("truename; error={}; details=\"{details}\"", self.error);
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
    /// Not well-formed HTTP.
    Malformed,
    /// The target has a `#`.
    Fragment,
    /// `Content-Length` is not a number, or there are several that differ.
    Length,
    /// A `Transfer-Encoding` other than `chunked`.
    Coding,
    /// More than `listener.max_header_size`, or too many fields.
    TooLarge,
    /// A target of more than 65,534 bytes.
    TargetTooLong,
    /// Not complete within `listener.header_timeout`.
    TooSlow,
}

impl RefusedHead {
    fn explain(self) -> (StatusCode, ProxyErrorType, &'static str, Option<&'static str>) {
        match self {
            Self::Malformed => (
                StatusCode::BAD_REQUEST,
                ProxyErrorType::HttpRequestError,
                "the request is not well-formed HTTP/1",
                None,
            ),
            Self::Fragment => (
                StatusCode::BAD_REQUEST,
                ProxyErrorType::HttpRequestError,
                "the request's target has a `#`: a fragment is not part of a request",
                Some("remove the fragment, or write a `#` that is part of the path as %23"),
            ),
            Self::Length => (
                StatusCode::BAD_REQUEST,
                ProxyErrorType::HttpRequestError,
                "the request's `Content-Length` is not a number, or there are several that differ",
                Some("send the body with one `Content-Length`, in digits"),
            ),
            Self::Coding => (
                StatusCode::BAD_REQUEST,
                ProxyErrorType::HttpRequestError,
                "the request's `Transfer-Encoding` is not `chunked`, or the request is HTTP/1.0",
                Some(
                    "send the body with `Transfer-Encoding: chunked` alone, or with a `Content-Length`",
                ),
            ),
            Self::TooLarge => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                ProxyErrorType::HttpRequestError,
                "the request's head has more than `listener.max_header_size` bytes, or more than \
                 100 fields",
                Some("raise `listener.max_header_size`"),
            ),
            Self::TargetTooLong => (
                StatusCode::URI_TOO_LONG,
                ProxyErrorType::HttpRequestError,
                "the request's target is longer than 65,534 bytes",
                None,
            ),
            Self::TooSlow => (
                StatusCode::REQUEST_TIMEOUT,
                ProxyErrorType::HttpRequestError,
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

/// Without the middle of what is longer: the reason stands at the end as often as at the beginning.
fn shortened(text: &str, longest: usize) -> String {
    if text.len() <= longest {
        return text.to_owned();
    }
    let boundary = |index: usize| (0..=index).rev().find(|i| text.is_char_boundary(*i));
    let half = (longest - 3) / 2;
    let begin = boundary(half).map_or("", |end| &text[..end]);
    let end = boundary(text.len() - half).map_or("", |begin| &text[begin..]);
    format!("{begin}...{end}")
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

/// How an HTTP client sees a fault.
fn view(kind: Kind) -> (StatusCode, ProxyErrorType) {
    use ProxyErrorType as E;
    use StatusCode as S;
    match kind {
        Kind::RequestInvalid => (S::BAD_REQUEST, E::HttpRequestError),
        Kind::RequestTimeout => (S::REQUEST_TIMEOUT, E::HttpRequestError),
        Kind::ConnectUnsupported => (S::METHOD_NOT_ALLOWED, E::HttpRequestError),
        Kind::CredentialsRequired => (S::PROXY_AUTHENTICATION_REQUIRED, E::HttpRequestDenied),
        Kind::SignedHost => (S::BAD_GATEWAY, E::HttpRequestDenied),
        Kind::NoRoute => (S::NOT_FOUND, E::DestinationNotFound),
        Kind::NameNotAllowed => (S::FORBIDDEN, E::HttpRequestDenied),
        Kind::LimitReached => (S::SERVICE_UNAVAILABLE, E::ConnectionLimitReached),
        Kind::DnsTimeout => (S::GATEWAY_TIMEOUT, E::DnsTimeout),
        Kind::DnsError => (S::SERVICE_UNAVAILABLE, E::DnsError),
        Kind::AddressNotAllowed => (S::FORBIDDEN, E::DestinationIpProhibited),
        Kind::Loop => (S::LOOP_DETECTED, E::ProxyLoopDetected),
        Kind::ConnectionRefused => (S::BAD_GATEWAY, E::ConnectionRefused),
        Kind::ConnectTimeout => (S::GATEWAY_TIMEOUT, E::ConnectionTimeout),
        Kind::Unreachable => (S::SERVICE_UNAVAILABLE, E::DestinationUnavailable),
        Kind::ConnectionLost | Kind::StreamReset => (S::BAD_GATEWAY, E::ConnectionTerminated),
        Kind::TlsProtocol => (S::BAD_GATEWAY, E::TlsProtocolError),
        Kind::TlsCertificate => (S::BAD_GATEWAY, E::TlsCertificateError),
        Kind::ResponseInvalid => (S::BAD_GATEWAY, E::HttpProtocolError),
        Kind::ResponseTimeout => (S::GATEWAY_TIMEOUT, E::HttpResponseTimeout),
        Kind::UpgradeFailed => (S::BAD_GATEWAY, E::HttpUpgradeFailed),
    }
}

fn title(error: ProxyErrorType) -> &'static str {
    use ProxyErrorType as E;
    match error {
        E::DnsTimeout => "DNS did not respond in time",
        E::DnsError => "The name cannot be resolved",
        E::DestinationNotFound => "No alias answers to this Host",
        E::DestinationUnavailable => "The target cannot be reached",
        E::DestinationIpProhibited => "The target's address is not allowed",
        E::ConnectionRefused => "The target refuses connections",
        E::ConnectionTerminated => "The target closed the connection",
        E::ConnectionTimeout => "Connecting to the target timed out",
        E::ConnectionLimitReached => "Too many requests at once",
        E::TlsProtocolError => "TLS with the target failed",
        E::TlsCertificateError => "The target's certificate is not valid",
        E::HttpRequestError => "The request cannot be understood",
        E::HttpRequestDenied => "The request is not allowed",
        E::HttpResponseIncomplete => "The target's response was incomplete",
        E::HttpResponseTimeout => "The target did not respond in time",
        E::HttpUpgradeFailed => "The upgrade failed",
        E::HttpProtocolError => "The target's response is not valid HTTP",
        E::ProxyLoopDetected => "The target leads back to this proxy",
        E::ProxyInternalError => "Internal error",
    }
}
