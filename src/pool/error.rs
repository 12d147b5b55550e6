//! Why there is no connection for a request.

use std::{net::SocketAddr, time::Duration};

use super::SendError;
use crate::fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken};

/// No connection. No byte of the request has left.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// The true name has no endpoint.
    #[error("the true name has no addresses")]
    NoEndpoint,
    /// HTTP could not be started on a fresh connection.
    #[error("starting HTTP with {endpoint}: {error}")]
    Http {
        /// The endpoint.
        endpoint: SocketAddr,
        /// Why.
        error: SendError,
    },
    /// Another request was dialling, and there was no connection to share within `timeouts.connect`.
    #[error("waiting for a connection to {endpoint} took longer than {limit:?}")]
    Late {
        /// The endpoint.
        endpoint: SocketAddr,
        /// `timeouts.connect`.
        limit: Duration,
    },
    /// All `pool.max_connections` were busy for `timeouts.connect`.
    #[error("{limit} connections to {endpoint} are busy, as many as `pool.max_connections` allows")]
    ConnectionLimit {
        /// The endpoint.
        endpoint: SocketAddr,
        /// `pool.max_connections`.
        limit: usize,
    },
}

impl AcquireError {
    fn diagnosis(&self) -> Diagnosis {
        let (kind, blame, endpoint) = match self {
            Self::NoEndpoint => (Kind::Unreachable, Blame::Target, None),
            Self::Http { endpoint, .. } => {
                (Kind::ResponseInvalid, Blame::Endpoint, Some(*endpoint))
            }
            Self::Late { endpoint, .. } => (Kind::ConnectTimeout, Blame::Endpoint, Some(*endpoint)),
            Self::ConnectionLimit { endpoint, .. } => {
                (Kind::LimitReached, Blame::Alias, Some(*endpoint))
            }
        };
        Diagnosis { kind, stage: Stage::Connect, blame, taken: Taken::Nothing, endpoint }
    }
}

impl Cause for AcquireError {
    fn fix(&self) -> Option<String> {
        match self {
            Self::Late { .. } => Some("raise `timeouts.connect`".into()),
            Self::ConnectionLimit { .. } => Some("raise `pool.max_connections`".into()),
            Self::NoEndpoint | Self::Http { .. } => None,
        }
    }
}

impl From<AcquireError> for Fault {
    fn from(error: AcquireError) -> Self {
        Self::new(error.diagnosis(), error)
    }
}
