//! The facts about a failure: what happened, in which stage, what is at fault, and how much of the request the peer
//! received.
//!
//! Modules have their own typed errors and convert them to these facts. Retries, ejections of endpoints and failover
//! are pure functions of the facts. Status, `Proxy-Status`, log line and metrics label are derived from them.

use std::{error::Error, fmt, net::SocketAddr, sync::Arc};

/// A failure. Clones are cheap: all requests that waited for the same thing get one.
#[derive(Clone)]
pub struct Fault(Arc<Parts>);

struct Parts {
    diagnosis: Diagnosis,
    cause: Box<dyn Cause>,
}

/// The facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// What happened.
    pub kind: Kind,
    /// The stage in which it happened.
    pub stage: Stage,
    /// What is at fault.
    pub blame: Blame,
    /// How much of the request the peer received.
    pub taken: Taken,
    /// The endpoint in question.
    pub endpoint: Option<SocketAddr>,
}

/// An error with more details than its text.
pub trait Cause: Error + Send + Sync {
    /// The setting or the command that fixes it.
    fn fix(&self) -> Option<String> {
        None
    }

    /// The CNAME chain, if the error is about it.
    fn chain(&self) -> Option<&[Arc<str>]> {
        None
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request is not well-formed, or ends too early.
    RequestInvalid,
    /// The client took too long to send it.
    RequestTimeout,
    /// A CONNECT where there is no proxy.
    ConnectUnsupported,
    /// The forward proxy requires credentials.
    CredentialsRequired,
    /// The request is signed for another Host than the target's.
    SignedHost,
    /// No alias has this name.
    NoRoute,
    /// The name is not one that may be called.
    NameNotAllowed,
    /// A limit of the configuration is reached.
    LimitReached,
    /// DNS did not respond in time.
    DnsTimeout,
    /// DNS leads nowhere.
    DnsError,
    /// The address is not one that may be called.
    AddressNotAllowed,
    /// The address leads back to this proxy.
    Loop,
    /// Nothing listens there.
    ConnectionRefused,
    /// The connection could not be established in time.
    ConnectTimeout,
    /// The connection could not be established.
    Unreachable,
    /// The connection ended too early.
    ConnectionLost,
    /// The peer gave up this request alone: the connection serves on.
    StreamReset,
    /// The TLS handshake failed.
    TlsProtocol,
    /// The certificate could not be verified for the true name.
    TlsCertificate,
    /// The received bytes are not a valid response.
    ResponseInvalid,
    /// The target did not respond or continue in time.
    ResponseTimeout,
    /// The protocol was not switched as requested.
    UpgradeFailed,
}

/// What is at fault: the least that the next attempt should avoid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blame {
    /// The client.
    Client,
    /// The connection: another one to the same endpoint may work.
    Connection,
    /// The endpoint: another one of the same target may work.
    Endpoint,
    /// The target: another one of the same alias may work.
    Target,
    /// The alias or its configuration: no other target would work.
    Alias,
}

/// How much of the request the peer received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Provably nothing.
    Nothing,
    /// Unknown.
    Unknown,
    /// Some of it, or all.
    Some,
}

impl Fault {
    /// A fault with its cause, which has the text.
    pub fn new(diagnosis: Diagnosis, cause: impl Cause + 'static) -> Self {
        Self(Arc::new(Parts { diagnosis, cause: Box::new(cause) }))
    }

    /// What happened.
    pub fn kind(&self) -> Kind {
        self.0.diagnosis.kind
    }

    /// The stage in which it happened.
    pub fn stage(&self) -> Stage {
        self.0.diagnosis.stage
    }

    /// What is at fault.
    pub fn blame(&self) -> Blame {
        self.0.diagnosis.blame
    }

    /// How much of the request the peer received.
    pub fn taken(&self) -> Taken {
        self.0.diagnosis.taken
    }

    /// The endpoint in question.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.0.diagnosis.endpoint
    }

    /// Whether the endpoint failed, which counts towards its ejection.
    pub fn is_of_endpoint(&self) -> bool {
        self.blame() == Blame::Endpoint
    }

    /// The setting or the command that fixes it.
    pub fn fix(&self) -> Option<String> {
        self.0.cause.fix()
    }

    /// The CNAME chain, if the error is about it.
    pub fn chain(&self) -> Option<&[Arc<str>]> {
        self.0.cause.chain()
    }

    /// The cause, if it is of this type.
    pub fn cause<E: Error + 'static>(&self) -> Option<&E> {
        let cause: &(dyn Error + 'static) = &*self.0.cause;
        cause.downcast_ref()
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.diagnosis, self.0.cause)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.cause.fmt(f)
    }
}

impl Error for Fault {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.cause.source()
    }
}

/// How far a request got: the `stage` of an error response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Finding the alias for a Host.
    Route,
    /// Querying DNS.
    Resolve,
    /// Checking names and addresses against `allow` and `policy`.
    Policy,
    /// Opening the TCP connection.
    Connect,
    /// The TLS handshake and the certificate.
    Tls,
    /// Reading the request, or sending it upstream.
    Request,
    /// Waiting for the response, or reading it.
    Response,
}

impl Stage {
    /// The name used in responses and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Resolve => "resolve",
            Self::Policy => "policy",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Request => "request",
            Self::Response => "response",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The error types of the `Proxy-Status` field that truename responds with (RFC 9209 §2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "RFC 9209 §2.3 describes each under this very name")]
pub enum ProxyErrorType {
    DnsTimeout,
    DnsError,
    DestinationNotFound,
    DestinationUnavailable,
    DestinationIpProhibited,
    ConnectionRefused,
    ConnectionTerminated,
    ConnectionTimeout,
    ConnectionLimitReached,
    TlsProtocolError,
    TlsCertificateError,
    HttpRequestError,
    HttpRequestDenied,
    HttpResponseIncomplete,
    HttpResponseTimeout,
    HttpUpgradeFailed,
    HttpProtocolError,
    ProxyLoopDetected,
    ProxyInternalError,
}

impl ProxyErrorType {
    /// All types, in the order of their declaration.
    pub const ALL: [Self; 19] = [
        Self::DnsTimeout,
        Self::DnsError,
        Self::DestinationNotFound,
        Self::DestinationUnavailable,
        Self::DestinationIpProhibited,
        Self::ConnectionRefused,
        Self::ConnectionTerminated,
        Self::ConnectionTimeout,
        Self::ConnectionLimitReached,
        Self::TlsProtocolError,
        Self::TlsCertificateError,
        Self::HttpRequestError,
        Self::HttpRequestDenied,
        Self::HttpResponseIncomplete,
        Self::HttpResponseTimeout,
        Self::HttpUpgradeFailed,
        Self::HttpProtocolError,
        Self::ProxyLoopDetected,
        Self::ProxyInternalError,
    ];

    /// The token of RFC 9209, also the `error` label of `truename_upstream_errors_total`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DnsTimeout => "dns_timeout",
            Self::DnsError => "dns_error",
            Self::DestinationNotFound => "destination_not_found",
            Self::DestinationUnavailable => "destination_unavailable",
            Self::DestinationIpProhibited => "destination_ip_prohibited",
            Self::ConnectionRefused => "connection_refused",
            Self::ConnectionTerminated => "connection_terminated",
            Self::ConnectionTimeout => "connection_timeout",
            Self::ConnectionLimitReached => "connection_limit_reached",
            Self::TlsProtocolError => "tls_protocol_error",
            Self::TlsCertificateError => "tls_certificate_error",
            Self::HttpRequestError => "http_request_error",
            Self::HttpRequestDenied => "http_request_denied",
            Self::HttpResponseIncomplete => "http_response_incomplete",
            Self::HttpResponseTimeout => "http_response_timeout",
            Self::HttpUpgradeFailed => "http_upgrade_failed",
            Self::HttpProtocolError => "http_protocol_error",
            Self::ProxyLoopDetected => "proxy_loop_detected",
            Self::ProxyInternalError => "proxy_internal_error",
        }
    }
}

impl fmt::Display for ProxyErrorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
