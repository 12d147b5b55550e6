//! Why a session does not begin, whatever its protocol.

use std::time::Duration;

use crate::fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken};

/// Why a session does not begin although there is a connection to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// Client and server together took too long.
    #[error("the session did not begin within {0:?} of connecting to the target")]
    Late(Duration),
    /// The client was too slow for the server.
    #[error("the client did not respond to the server's greeting within {0:?}")]
    Silent(Duration),
    /// The alias leads elsewhere now.
    #[error("the connection to the target was closed, because the alias leads to another one now")]
    Moved,
}

impl StartError {
    fn kind(self) -> Kind {
        match self {
            Self::Late(_) => Kind::ResponseTimeout,
            Self::Silent(_) => Kind::RequestTimeout,
            Self::Moved => Kind::ConnectionLost,
        }
    }
}

impl Cause for StartError {
    fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::Late(_) => "check that neither client nor server waits for something else",
            Self::Silent(_) => "check that the client speaks the protocol of the alias",
            Self::Moved => "connect again",
        };
        Some(fix.into())
    }
}

impl From<StartError> for Fault {
    fn from(error: StartError) -> Self {
        let (stage, blame) = match error {
            StartError::Silent(_) => (Stage::Request, Blame::Client),
            StartError::Late(_) | StartError::Moved => (Stage::Response, Blame::Connection),
        };
        let diagnosis =
            Diagnosis { kind: error.kind(), stage, blame, taken: Taken::Some, endpoint: None };
        Self::new(diagnosis, error)
    }
}
