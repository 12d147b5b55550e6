//! Why a request fails.

use std::{net::SocketAddr, time::Duration};

use ::http::StatusCode;

use super::{destination::DestinationError, http::headers::BadRequest};
use crate::{
    fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken},
    idle::Idle,
    resolve::TrueName,
    tls::TlsError,
    upstream::{Generation, SendError},
};

/// Why a request has no response from its origin.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// It is malformed or ambiguous.
    #[error("{0}")]
    BadRequest(#[from] BadRequest),
    /// `CONNECT` to an alias' listener.
    #[error("CONNECT is for a forward proxy, and this is the listener of an alias")]
    Connect,
    /// An HTTP request for an alias of another protocol.
    #[error("`{alias}` is an alias with `protocol: {protocol}`, which takes no HTTP requests")]
    OtherProtocol {
        /// Which.
        alias: String,
        /// Its protocol.
        protocol: &'static str,
    },
    /// The forward proxy requires credentials.
    #[error(
        "the forward proxy requires credentials, and the request has {}",
        if *.given { "none that are valid" } else { "none" }
    )]
    Credentials {
        /// Whether there were any.
        given: bool,
    },
    /// It has no clear destination for the forward proxy.
    #[error("{0}")]
    Destination(#[from] DestinationError),
    /// Its signature covers the Host that would be rewritten.
    #[error(
        "the request is signed over its Host (AWS Signature Version 4), `{signed}`, and rewriting \
         that to `{host}` would break the signature"
    )]
    SignedHost {
        /// What the client signed.
        signed: String,
        /// What would be sent.
        host: String,
    },
    /// The connection failed while the request or its response's head was on it.
    #[error("{}", describe(*.endpoint, .error, .tls.as_ref()))]
    Exchange {
        /// With whom.
        endpoint: SocketAddr,
        /// How.
        error: Box<SendError>,
        /// The TLS error that caused it, if one did.
        tls: Option<TlsError>,
        /// Whether the connection had served requests before.
        kept: bool,
    },
    /// `on_change` ended the connection before the response's head arrived.
    #[error(
        "the connection to {endpoint} was closed before the response, because the alias no longer \
         leads to `{true_name}`"
    )]
    Moved {
        /// With whom.
        endpoint: SocketAddr,
        /// The former true name.
        true_name: TrueName,
    },
    /// On a pooled connection, a response arrived before the request was sent.
    #[error("{endpoint} sent an unsolicited response, which cannot belong to this request")]
    Unsolicited {
        /// Who.
        endpoint: SocketAddr,
    },
    /// `timeouts.response` ran out.
    #[error("{endpoint} did not begin its response within {limit:?}")]
    ResponseTimeout {
        /// Who.
        endpoint: SocketAddr,
        /// `timeouts.response`.
        limit: Duration,
    },
    /// The origin switched protocols without being asked to, or sent a success that is not a switch.
    #[error("{endpoint} responded with {status}, which does not fit the request")]
    Switch {
        /// Who.
        endpoint: SocketAddr,
        /// `101`, or another success.
        status: StatusCode,
    },
    /// The client's own body broke off.
    #[error("the request's body broke off{}", causes(.0))]
    ClientBody(SendError),
}

impl ForwardError {
    /// The facts, except for how much of the request the target had: only its sender knows.
    fn diagnosis(&self) -> Diagnosis {
        let (kind, stage, blame, endpoint) = match self {
            Self::BadRequest(_) | Self::Destination(_) => {
                (Kind::RequestInvalid, Stage::Request, Blame::Client, None)
            }
            Self::OtherProtocol { .. } => (Kind::RequestInvalid, Stage::Route, Blame::Client, None),
            Self::Connect => (Kind::ConnectUnsupported, Stage::Request, Blame::Client, None),
            Self::Credentials { .. } => {
                (Kind::CredentialsRequired, Stage::Request, Blame::Client, None)
            }
            Self::SignedHost { .. } => (Kind::SignedHost, Stage::Request, Blame::Client, None),
            Self::ClientBody(error) => {
                let (kind, stage) = kind_of(error);
                (kind, stage, Blame::Client, None)
            }
            Self::Exchange { endpoint, error, tls, kept } => {
                let (kind, stage) = match tls {
                    Some(error) => (error.kind(), Stage::Tls),
                    // The connection was ended on purpose while the body was being sent.
                    None if error.is_of_the_body() => (Kind::ConnectionLost, Stage::Response),
                    None => kind_of(error),
                };
                // A connection that serves on explains nothing.
                let lost = *kept && kind != Kind::StreamReset;
                let own = lost || error.is_of_the_body();
                let blame = if own { Blame::Connection } else { Blame::Endpoint };
                (kind, stage, blame, Some(*endpoint))
            }
            Self::Moved { endpoint, .. } => {
                (Kind::ConnectionLost, Stage::Response, Blame::Connection, Some(*endpoint))
            }
            Self::Unsolicited { endpoint } => {
                (Kind::ResponseInvalid, Stage::Response, Blame::Connection, Some(*endpoint))
            }
            Self::ResponseTimeout { endpoint, .. } => {
                (Kind::ResponseTimeout, Stage::Response, Blame::Endpoint, Some(*endpoint))
            }
            Self::Switch { endpoint, .. } => {
                (Kind::UpgradeFailed, Stage::Response, Blame::Target, Some(*endpoint))
            }
        };
        Diagnosis { kind, stage, blame, taken: Taken::Nothing, endpoint }
    }

    /// The fault, with how much of the request the target had.
    pub(super) fn with(self, taken: Taken) -> Fault {
        Fault::new(Diagnosis { taken, ..self.diagnosis() }, self)
    }
}

impl Cause for ForwardError {
    fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::SignedHost { .. } => {
                "sign the request for the true name, or set `host: preserve` for this alias"
            }
            Self::Credentials { .. } => {
                "give the client the proxy as `http://USER:PASSWORD@HOST:PORT`, with a line of the \
                 file that `proxy.credentials` names"
            }
            Self::OtherProtocol { .. } => {
                "open a tunnel to it with CONNECT, or connect to its own listener"
            }
            Self::Destination(error) => return error.fix(),
            Self::Exchange { tls: Some(error), .. } => return error.hint(),
            Self::Exchange { error, .. } if error.is_unread() => "raise `timeouts.idle`",
            Self::Exchange { error, kept: true, .. }
                if error.is_cut_off() && !error.is_malformed() =>
            {
                "the connection had been kept from an earlier request: if the target closes those \
                 that are idle, set `pool.idle_timeout` below its time for that"
            }
            Self::Moved { .. } => {
                "send the request again; `on_change` and `drain` say how long open connections have \
                 after a change"
            }
            Self::ResponseTimeout { .. } => "raise `timeouts.response`",
            Self::ClientBody(error) if is_idle(error) => "raise `timeouts.idle`",
            _ => return None,
        };
        Some(fix.into())
    }
}

impl From<ForwardError> for Fault {
    fn from(error: ForwardError) -> Self {
        error.with(Taken::Nothing)
    }
}

impl From<BadRequest> for Fault {
    fn from(error: BadRequest) -> Self {
        ForwardError::from(error).into()
    }
}

/// What happened to an exchange, and how far it had come.
pub(super) fn kind_of(error: &SendError) -> (Kind, Stage) {
    if error.is_of_the_body() {
        let kind = if is_idle(error) { Kind::RequestTimeout } else { Kind::RequestInvalid };
        return (kind, Stage::Request);
    }
    if error.is_without_stream() {
        return (Kind::ConnectTimeout, Stage::Connect);
    }
    if error.is_unread() {
        return (Kind::ResponseTimeout, Stage::Request);
    }
    if error.is_malformed() {
        return (Kind::ResponseInvalid, Stage::Response);
    }
    if error.is_stream_reset() {
        return (Kind::StreamReset, Stage::Response);
    }
    (Kind::ConnectionLost, Stage::Response)
}

/// Whether the client stopped sending in the middle of its body.
fn is_idle(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| cause.is::<Idle>())
}

fn describe(endpoint: SocketAddr, error: &SendError, tls: Option<&TlsError>) -> String {
    if let Some(tls) = tls {
        return format!("{endpoint}: {tls}");
    }
    if error.is_incomplete() {
        return format!("{endpoint} closed the connection before its response");
    }
    if error.is_malformed() {
        return format!("{endpoint} sent something that is not HTTP: {error}");
    }
    format!("{endpoint}: {error}{}", causes(error))
}

/// What is behind an error: hyper's own words end at "connection error", and ours at what was being
/// done.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// Whether the client's body is what failed, and not a connection that was ended on purpose.
pub(super) fn is_of_the_body(error: &SendError, generation: &Generation) -> bool {
    error.is_of_the_body() && !generation.killed().is_cancelled()
}
