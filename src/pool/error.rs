//! Why there is no connection for a request.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use super::SendError;
use crate::connect::ConnectError;

/// No connection. No byte of the request has left.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AcquireError {
    /// The true name has no endpoint.
    #[error("the true name has no addresses")]
    NoEndpoint,
    /// An endpoint could not be reached.
    #[error("{0}")]
    Connect(Arc<ConnectError>),
    /// HTTP could not be started on a fresh connection.
    #[error("starting HTTP with {endpoint}: {error}")]
    Http {
        /// With whom.
        endpoint: SocketAddr,
        /// Why.
        error: Arc<SendError>,
    },
    /// Another request was dialling, and there was no connection to share within `timeouts.connect`.
    #[error("waiting for a connection to {endpoint} took longer than {limit:?}")]
    Late {
        /// With whom.
        endpoint: SocketAddr,
        /// `timeouts.connect`.
        limit: Duration,
    },
    /// `pool.max_connections` were busy for as long as `timeouts.connect`.
    #[error("{limit} connections to {endpoint} are busy, as many as `pool.max_connections` allows")]
    ConnectionLimit {
        /// To whom.
        endpoint: SocketAddr,
        /// `pool.max_connections`.
        limit: usize,
    },
}

impl AcquireError {
    /// The endpoint in question.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        match self {
            Self::NoEndpoint => None,
            Self::Connect(error) => error.endpoint(),
            Self::Http { endpoint, .. }
            | Self::Late { endpoint, .. }
            | Self::ConnectionLimit { endpoint, .. } => Some(*endpoint),
        }
    }

    /// Whether it speaks against the endpoint: neither this process' limits nor its lack of files does.
    pub fn is_of_endpoint(&self) -> bool {
        match self {
            Self::NoEndpoint | Self::Http { .. } | Self::Late { .. } => true,
            Self::Connect(error) => !error.is_own_lack(),
            Self::ConnectionLimit { .. } => false,
        }
    }
}
