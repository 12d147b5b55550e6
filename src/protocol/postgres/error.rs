//! What can go wrong before a session begins.

use super::{LengthError, ServerRole, SqlState};
use crate::{
    config::Role,
    fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken},
};

/// Why a server gets no TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpeningError {
    /// It has none.
    #[error("the server does not support TLS")]
    NoTls,
    /// It reported an error. What it says is not to be trusted before TLS.
    #[error("the server responded to the SSLRequest with an error")]
    Failed,
    /// It sent another byte.
    #[error(
        "the server responded to the SSLRequest with byte {byte:#04x}, which is not PostgreSQL"
    )]
    NotPostgres {
        /// Which.
        byte: u8,
    },
    /// It sent something before it was asked.
    #[error("the server sent bytes before the SSLRequest, which is not PostgreSQL")]
    SpokeFirst,
    /// It, or somebody on the way, sent more than the response.
    #[error("bytes in plaintext followed the server's response to the SSLRequest")]
    BytesBeforeTls,
    /// It closed the connection.
    #[error("the server closed the connection instead of responding to the SSLRequest")]
    Closed,
}

impl OpeningError {
    /// What happened.
    pub fn kind(self) -> Kind {
        match self {
            Self::NoTls | Self::BytesBeforeTls => Kind::TlsProtocol,
            Self::Failed | Self::NotPostgres { .. } | Self::SpokeFirst => Kind::ResponseInvalid,
            Self::Closed => Kind::ConnectionLost,
        }
    }

    /// What to change.
    pub fn fix(self) -> &'static str {
        match self {
            Self::NoTls => {
                "enable TLS on the server (`ssl = on`), or set `tls.mode: plaintext` if the \
                 network between is trusted"
            }
            Self::Failed => "see the server's log",
            Self::NotPostgres { .. } | Self::SpokeFirst | Self::Closed => {
                "check that a PostgreSQL server listens there; set `postgres.negotiation: direct` \
                 if it expects TLS from the first byte"
            }
            Self::BytesBeforeTls => {
                "somebody between here and the server may be injecting bytes: do not use this path"
            }
        }
    }
}

/// Why a session does not begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    /// The client speaks TLS without being asked to.
    #[error("the client began with TLS, and this listener does not take it")]
    UnexpectedTls,
    /// No packet has this length.
    #[error("invalid length of startup packet: {length}")]
    PacketLength {
        /// The length.
        length: u32,
    },
    /// The parameters are not names and values.
    #[error("invalid startup packet layout: expected pairs of texts and a terminator")]
    PacketLayout,
    /// It is another protocol.
    #[error("unsupported frontend protocol {major}.{minor}: truename supports 3.0 and later")]
    Version {
        /// Before the point.
        major: u32,
        /// Behind it.
        minor: u32,
    },
    /// It was asked before, or within TLS.
    #[error("received an unexpected {0}: it may come once, and not within TLS")]
    Repeated(&'static str),
    /// Somebody may have put bytes in front of the client's.
    #[error("received unencrypted data after SSL request")]
    BytesBeforeTls,
    /// The listener takes TLS only.
    #[error("this listener takes TLS only, and the client did not ask for it")]
    TlsRequired,
    /// The client sent something else while it was being authenticated.
    #[error("expected a password response, got a message of type {:?}", char::from(*.tag))]
    NotAPassword {
        /// Its type.
        tag: u8,
    },
    /// The client's message has no length.
    #[error("the client sent {0}")]
    ClientLength(LengthError),
    /// The server's message has no length.
    #[error("the server sent {0}")]
    ServerLength(LengthError),
    /// The server sent a message that has no place here.
    #[error("the server sent an unexpected message of type {:?} before it was ready", char::from(*.tag))]
    Unexpected {
        /// Its type.
        tag: u8,
    },
    /// The server's message cannot be read.
    #[error("the server sent a malformed message of type {:?}", char::from(*.tag))]
    Malformed {
        /// Its type.
        tag: u8,
    },
    /// The server sends without end.
    #[error("the server sent more than {limit} before it was ready")]
    TooMuch {
        /// How much is allowed.
        limit: &'static str,
    },
    /// The server closed the connection.
    #[error("the server closed the connection before the session had begun")]
    Lost,
    /// The server offers only what cannot cross.
    #[error(
        "the server offers only authentication with channel binding ({offered}), which no proxy \
         can pass on"
    )]
    OnlyChannelBinding {
        /// What it offers.
        offered: String,
    },
    /// The server is in hot standby, or is not.
    #[error("the server is a {}, and `postgres.role` asks for a {}", .found.word(), .wanted.word())]
    WrongRole {
        /// What the alias asks for.
        wanted: Role,
        /// What the server is.
        found: ServerRole,
    },
    /// The server does not report it.
    #[error(
        "the server does not report `in_hot_standby`, so it is not known whether it is a {}",
        .wanted.word()
    )]
    UnknownRole {
        /// What the alias asks for.
        wanted: Role,
    },
}

impl StartupError {
    /// The code that the client is given.
    pub(super) fn sql_state(&self) -> SqlState {
        match self {
            Self::Version { .. } | Self::Repeated(_) => SqlState::FeatureNotSupported,
            Self::TlsRequired | Self::OnlyChannelBinding { .. } => SqlState::InvalidAuthorization,
            Self::Lost => SqlState::ConnectionFailure,
            Self::WrongRole { .. } | Self::UnknownRole { .. } => SqlState::CannotConnectNow,
            _ => SqlState::ProtocolViolation,
        }
    }

    fn diagnosis(&self) -> Diagnosis {
        let (kind, stage, blame, taken) = match self {
            Self::UnexpectedTls
            | Self::PacketLength { .. }
            | Self::PacketLayout
            | Self::Version { .. }
            | Self::Repeated(_)
            | Self::BytesBeforeTls
            | Self::TlsRequired => {
                (Kind::RequestInvalid, Stage::Request, Blame::Client, Taken::Nothing)
            }
            Self::NotAPassword { .. } | Self::ClientLength(_) => {
                (Kind::RequestInvalid, Stage::Request, Blame::Client, Taken::Some)
            }
            Self::ServerLength(_)
            | Self::Unexpected { .. }
            | Self::Malformed { .. }
            | Self::TooMuch { .. } => {
                (Kind::ResponseInvalid, Stage::Response, Blame::Endpoint, Taken::Some)
            }
            Self::Lost => (Kind::ConnectionLost, Stage::Response, Blame::Endpoint, Taken::Some),
            Self::OnlyChannelBinding { .. } => {
                (Kind::ResponseInvalid, Stage::Response, Blame::Alias, Taken::Some)
            }
            // It is well. The role is a mark on the endpoint.
            Self::WrongRole { .. } | Self::UnknownRole { .. } => {
                (Kind::Unreachable, Stage::Response, Blame::Connection, Taken::Some)
            }
        };
        Diagnosis { kind, stage, blame, taken, endpoint: None }
    }
}

impl Cause for StartupError {
    fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::UnexpectedTls => {
                "set `sslnegotiation=postgres` or `sslmode=disable` in the client, or `tls_in: \
                 auto` for the alias"
            }
            Self::PacketLength { .. } | Self::PacketLayout => {
                "check that the client speaks PostgreSQL: this is the listener of an alias with \
                 `protocol: postgres`"
            }
            Self::TlsRequired => {
                "set `sslmode=require` in the client, or `tls_in: auto` for the alias"
            }
            Self::ServerLength(_) | Self::Unexpected { .. } | Self::Malformed { .. } => {
                "check that the target is a PostgreSQL server"
            }
            Self::Lost => "see the server's log",
            Self::OnlyChannelBinding { .. } => {
                "let the server offer SCRAM-SHA-256 as well, or another method of pg_hba.conf"
            }
            Self::WrongRole { .. } => {
                "connect again: the next session goes to another endpoint if one has that role"
            }
            Self::UnknownRole { .. } => {
                "set `postgres.role: any` for servers before PostgreSQL 14 and for poolers"
            }
            Self::Version { .. }
            | Self::Repeated(_)
            | Self::BytesBeforeTls
            | Self::NotAPassword { .. }
            | Self::ClientLength(_)
            | Self::TooMuch { .. } => return None,
        };
        Some(fix.into())
    }
}

impl From<StartupError> for Fault {
    fn from(error: StartupError) -> Self {
        Self::new(error.diagnosis(), error)
    }
}
