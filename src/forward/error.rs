//! Everything that can keep a request from its response.

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
    /// It is no single, clear request.
    #[error("{0}")]
    BadRequest(#[from] BadRequest),
    /// `CONNECT` to an alias' listener.
    #[error("CONNECT is for a forward proxy, and this listener is the alias itself")]
    Connect,
    /// The forward proxy asks for credentials.
    #[error(
        "the forward proxy is for those with credentials only, and the request has {}",
        if *.given { "none that are accepted" } else { "none" }
    )]
    Credentials {
        /// Whether there were any.
        given: bool,
    },
    /// Nobody can tell what the forward proxy is to do.
    #[error("{0}")]
    Destination(#[from] DestinationError),
    /// It is signed over the Host that would be rewritten.
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
        /// What TLS said, where that is behind it.
        tls: Option<TlsError>,
        /// Whether the connection had served before.
        kept: bool,
    },
    /// `on_change` ended the connection before the response's head had come.
    #[error(
        "the connection to {endpoint} was closed before it had answered, for the alias leads \
         elsewhere now than to `{true_name}`"
    )]
    Moved {
        /// With whom.
        endpoint: SocketAddr,
        /// Which true name that was.
        true_name: TrueName,
    },
    /// A pooled connection gave a response before the request was there.
    #[error("{endpoint} sent an answer that nobody had asked for, and so none to this request")]
    Unsolicited {
        /// Who.
        endpoint: SocketAddr,
    },
    /// `timeouts.response` ran out.
    #[error("{endpoint} has not begun to answer within {limit:?}")]
    ResponseTimeout {
        /// Who.
        endpoint: SocketAddr,
        /// `timeouts.response`.
        limit: Duration,
    },
    /// The origin switched protocols unasked, or did not where a tunnel was asked for.
    #[error("{endpoint} answered {status}, which is no answer to what the request asked for")]
    Switch {
        /// Who.
        endpoint: SocketAddr,
        /// `101`, or a success that is none.
        status: StatusCode,
    },
    /// The client's own body broke off.
    #[error("the request's body broke off{}", causes(.0))]
    ClientBody(SendError),
}

impl ForwardError {
    /// The facts, but for what the target had of the request: that is for whoever sent it to say.
    fn diagnosis(&self) -> Diagnosis {
        let (kind, stage, blame, endpoint) = match self {
            Self::BadRequest(_) | Self::Destination(_) => {
                (Kind::RequestInvalid, Stage::Request, Blame::Client, None)
            }
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
                    // The connection was ended on purpose while the body was on its way.
                    None if error.is_of_the_body() => (Kind::ConnectionLost, Stage::Response),
                    None => kind_of(error),
                };
                let own = *kept || error.is_of_the_body();
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

    /// As a fault of which the target had so much.
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
            Self::Destination(error) => return error.fix(),
            Self::Exchange { tls: Some(error), .. } => return error.hint(),
            Self::Exchange { error, kept: true, .. } if !error.is_malformed() => {
                "the connection had been kept from an earlier request: if the target closes those \
                 that are idle, set `pool.idle_timeout` below its time for that"
            }
            Self::Moved { .. } => {
                "send the request again; `on_change` and `drain` say how long open connections have \
                 after a change"
            }
            Self::ResponseTimeout { .. } => "raise `timeouts.response`",
            Self::ClientBody(error) if is_idle(error) => "raise `timeouts.idle`",
            Self::Exchange { error, .. } if error.is_unread() => "raise `timeouts.idle`",
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
    (Kind::ConnectionLost, Stage::Response)
}

/// Whether the client fell silent in the midst of its body.
fn is_idle(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| cause.is::<Idle>())
}

fn describe(endpoint: SocketAddr, error: &SendError, tls: Option<&TlsError>) -> String {
    if let Some(tls) = tls {
        return format!("{endpoint}: {tls}");
    }
    if error.is_incomplete() {
        return format!("{endpoint} closed the connection before it had answered");
    }
    if error.is_malformed() {
        return format!("{endpoint} answered something that is not HTTP: {error}");
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

/// Whether the request's own body broke off, and nothing that ended its connection on purpose did.
pub(super) fn is_of_the_body(error: &SendError, generation: &Generation) -> bool {
    error.is_of_the_body() && !generation.killed().is_cancelled()
}
