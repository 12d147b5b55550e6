//! Everything that can keep a request from its answer.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ::http::StatusCode;

use super::{destination::DestinationError, headers::BadRequest, passthrough::PassthroughError};
use crate::{
    route::RouteError,
    tls::TlsError,
    upstream::{AcquireError, Generation, LimitReached, NoTarget, SendError},
};

/// Why a request has no answer from its origin.
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
    /// It is for a host that is no alias, which cannot be reached.
    #[error("{0}")]
    Passthrough(#[from] PassthroughError),
    /// Nobody answers to its Host.
    #[error("{0}")]
    Route(#[from] RouteError),
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
    /// Too many are being served already.
    #[error("{0}")]
    Limit(#[from] LimitReached),
    /// The alias leads nowhere.
    #[error("{0}")]
    NoTarget(#[from] NoTarget),
    /// No connection could be had.
    #[error("{error}")]
    Acquire {
        /// Why.
        error: AcquireError,
        /// For which true name.
        generation: Arc<Generation>,
    },
    /// The connection failed while the request or its answer's head was on it.
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
        /// For which true name.
        generation: Arc<Generation>,
    },
    /// `on_change` ended the connection before the answer's head had come.
    #[error(
        "the connection to {endpoint} was closed before it had answered, for the alias leads \
         elsewhere now than to `{}`",
        generation.true_name().as_str()
    )]
    Moved {
        /// With whom.
        endpoint: SocketAddr,
        /// For which true name.
        generation: Arc<Generation>,
    },
    /// A pooled connection gave an answer before the request was there.
    #[error("{endpoint} sent an answer that nobody had asked for, and so none to this request")]
    Unsolicited {
        /// Who.
        endpoint: SocketAddr,
        /// For which true name.
        generation: Arc<Generation>,
    },
    /// `timeouts.response` ran out.
    #[error("{endpoint} has not begun to answer within {limit:?}")]
    ResponseTimeout {
        /// Who.
        endpoint: SocketAddr,
        /// `timeouts.response`.
        limit: Duration,
        /// For which true name.
        generation: Arc<Generation>,
    },
    /// The origin switched protocols unasked, or did not where a tunnel was asked for.
    #[error("{endpoint} answered {status}, which is no answer to what the request asked for")]
    Switch {
        /// Who.
        endpoint: SocketAddr,
        /// `101`, or a success that is none.
        status: StatusCode,
        /// For which true name.
        generation: Arc<Generation>,
    },
    /// The client's own body broke off.
    #[error("the request's body broke off{}", causes(.0))]
    ClientBody(SendError),
}

impl ForwardError {
    /// The generation that it happened under, where it came that far.
    pub fn generation(&self) -> Option<&Arc<Generation>> {
        match self {
            Self::Acquire { generation, .. }
            | Self::Exchange { generation, .. }
            | Self::Moved { generation, .. }
            | Self::Unsolicited { generation, .. }
            | Self::ResponseTimeout { generation, .. }
            | Self::Switch { generation, .. } => Some(generation),
            _ => None,
        }
    }

    /// The endpoint in question.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        match self {
            Self::Acquire { error, .. } => error.endpoint(),
            Self::Passthrough(error) => error.endpoint(),
            Self::Exchange { endpoint, .. }
            | Self::Moved { endpoint, .. }
            | Self::Unsolicited { endpoint, .. }
            | Self::ResponseTimeout { endpoint, .. }
            | Self::Switch { endpoint, .. } => Some(*endpoint),
            _ => None,
        }
    }
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
