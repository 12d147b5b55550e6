//! Why a connection could not be made.

use std::{io, net::SocketAddr, time::Duration};

use nix::errno::Errno;

use super::{Denied, ViaError};
use crate::{
    fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken},
    protocol::OpeningError,
    tls::TlsError,
};

/// Why a connection could not be made. No byte of any request was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// `policy` or the loop check forbids the address.
    #[error("{0}")]
    Denied(#[from] Denied),
    /// The TCP connection failed.
    #[error("connecting to {endpoint}: {source}")]
    Tcp {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The TCP connection to the proxy of `via` failed.
    #[error("connecting to the proxy {proxy} ({endpoint}): {source}")]
    Proxy {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// The proxy, as configured.
        proxy: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The proxy of `via` opened no tunnel to the target.
    #[error("the proxy {proxy} ({endpoint}): {source}")]
    Via {
        /// Its address.
        endpoint: SocketAddr,
        /// The proxy, as configured.
        proxy: String,
        /// Why.
        source: ViaError,
    },
    /// TCP and TLS together took longer than `timeouts.connect`.
    #[error("{} with {endpoint} took longer than {limit:?}", if *tcp_done { "the TLS handshake" } else { "connecting" })]
    Timeout {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// `timeouts.connect`.
        limit: Duration,
        /// Whether TCP was up and TLS was not.
        tcp_done: bool,
    },
    /// The protocol did not come to TLS.
    #[error("asking {endpoint} for TLS: {source}")]
    Opening {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// Why.
        source: OpeningError,
    },
    /// The connection was lost while TLS was asked for.
    #[error("asking {endpoint} for TLS: {source}")]
    Negotiation {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The TLS handshake failed.
    #[error("TLS with {endpoint}: {source}")]
    Tls {
        /// Who was dialled.
        endpoint: SocketAddr,
        /// Why.
        source: TlsError,
    },
}

impl ConnectError {
    /// Whether this process or machine lacked something, which says nothing about the endpoint.
    fn is_own_lack(&self) -> bool {
        let (Self::Tcp { source, .. } | Self::Proxy { source, .. }) = self else { return false };
        let lacks = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
        source.raw_os_error().is_some_and(|error| lacks.contains(&Errno::from_raw(error)))
    }

    /// Who was dialled, or was not.
    fn endpoint(&self) -> SocketAddr {
        match self {
            Self::Denied(denied) => denied.endpoint(),
            Self::Tcp { endpoint, .. }
            | Self::Proxy { endpoint, .. }
            | Self::Via { endpoint, .. }
            | Self::Timeout { endpoint, .. }
            | Self::Opening { endpoint, .. }
            | Self::Negotiation { endpoint, .. }
            | Self::Tls { endpoint, .. } => *endpoint,
        }
    }

    /// The facts.
    pub(super) fn diagnosis(&self) -> Diagnosis {
        let (kind, stage) = self.kind();
        let (blame, endpoint) = (self.blame(), Some(self.endpoint()));
        Diagnosis { kind, stage, blame, taken: Taken::Nothing, endpoint }
    }

    /// What happened, and how far the connection got.
    fn kind(&self) -> (Kind, Stage) {
        use io::ErrorKind as E;
        match self {
            Self::Denied(Denied::OwnListener(_)) => (Kind::Loop, Stage::Policy),
            Self::Denied(Denied::Class { .. }) => (Kind::AddressNotAllowed, Stage::Policy),
            Self::Timeout { tcp_done: false, .. } => (Kind::ConnectTimeout, Stage::Connect),
            Self::Timeout { tcp_done: true, .. } => (Kind::ConnectTimeout, Stage::Tls),
            Self::Via { source, .. } => (source.facts().0, Stage::Connect),
            Self::Tcp { source, .. } | Self::Proxy { source, .. } => match source.kind() {
                E::ConnectionRefused => (Kind::ConnectionRefused, Stage::Connect),
                E::TimedOut => (Kind::ConnectTimeout, Stage::Connect),
                // A reset right after the accept: whether TCP or TLS sees it is a race.
                E::ConnectionReset => (Kind::ConnectionLost, Stage::Connect),
                _ => (Kind::Unreachable, Stage::Connect),
            },
            Self::Opening { source, .. } => (source.kind(), Stage::Tls),
            Self::Negotiation { .. } => (Kind::ConnectionLost, Stage::Tls),
            Self::Tls { source, .. } => (source.kind(), Stage::Tls),
        }
    }

    /// A wrong certificate is the endpoint's fault: only one of several addresses may be misconfigured.
    fn blame(&self) -> Blame {
        match self {
            Self::Tls { source: TlsError::Name { .. }, .. } => Blame::Target,
            Self::Via { source, .. } => source.facts().1,
            _ if self.is_own_lack() => Blame::Connection,
            _ => Blame::Endpoint,
        }
    }
}

impl Cause for ConnectError {
    fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::Denied(Denied::OwnListener(_)) => {
                "point the Service, or `target`, at an address other than the proxy's own".into()
            }
            Self::Denied(Denied::Class { endpoint, .. }) => {
                format!("if this is intended, add {} to `policy.allow_addresses`", endpoint.ip())
            }
            Self::Timeout { .. } => {
                "check that nothing between here and there drops packets (a NetworkPolicy, a \
                     firewall), or raise `timeouts.connect`"
                    .into()
            }
            Self::Tcp { .. } | Self::Proxy { .. } if self.is_own_lack() => {
                "this proxy's own limit is reached, not the target's: let it open more files \
                 (`ulimit -Hn`), or lower `listener.max_connections`"
                    .into()
            }
            Self::Tcp { .. } => {
                "check that something listens there; `port` sets the target's port".into()
            }
            Self::Proxy { .. } => "check that the proxy listens there, or correct `via`".into(),
            Self::Via { source, .. } => source.fix().into(),
            Self::Opening { source, .. } => return source.fix().map(Into::into),
            Self::Negotiation { .. } => return None,
            Self::Tls { source, .. } => return source.hint(),
        };
        Some(fix)
    }
}

impl From<ConnectError> for Fault {
    fn from(error: ConnectError) -> Self {
        Self::new(error.diagnosis(), error)
    }
}
