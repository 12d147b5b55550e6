//! What can go wrong before a session begins.

use bytes::Bytes;

use super::{ErrPacket, GreetingError, LengthError};
use crate::fault::{Blame, Cause, Diagnosis, Fault, Kind, Stage, Taken};

/// Why a connection to a server comes to nothing before TLS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpeningError {
    /// It has no TLS.
    #[error("the server does not offer TLS")]
    NoTls,
    /// It refused the connection and said why: it is full, or has blocked this host.
    #[error("the server refused the connection: {}", ErrPacket::text_of(packet))]
    Refused {
        /// The payload of its packet.
        packet: Bytes,
    },
    /// What came is no greeting.
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    /// Nor is that one.
    #[error("the server's first packet is not a MySQL greeting: it began with {0}")]
    Length(LengthError),
    /// Its numbers begin elsewhere.
    #[error("the server's greeting has sequence number {sequence} instead of 0")]
    Sequence {
        /// Where.
        sequence: u8,
    },
    /// It, or somebody on the way, sent more than the greeting.
    #[error("bytes in plaintext followed the server's greeting")]
    BytesBeforeTls,
    /// It closed the connection.
    #[error("the server closed the connection without a greeting")]
    Closed,
}

impl OpeningError {
    /// What happened.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NoTls | Self::BytesBeforeTls => Kind::TlsProtocol,
            Self::Refused { .. } => Kind::Unreachable,
            Self::Greeting(_) | Self::Length(_) | Self::Sequence { .. } => Kind::ResponseInvalid,
            Self::Closed => Kind::ConnectionLost,
        }
    }

    /// What to change.
    pub fn fix(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoTls => {
                "enable TLS on the server (`ssl_cert` and `ssl_key`), or set `tls.mode: plaintext` \
                 if the network between is trusted"
            }
            Self::Greeting(GreetingError::NotMysql)
            | Self::Length(_)
            | Self::Sequence { .. }
            | Self::Closed => "check that a MySQL or MariaDB server listens there",
            Self::Greeting(GreetingError::TooOld) => "upgrade the server",
            Self::BytesBeforeTls => {
                "somebody between here and the server may be injecting bytes: do not use this path"
            }
            Self::Refused { .. } => return None,
        })
    }
}

/// Why a session does not begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    /// The client's packet has no such length.
    #[error("the client sent {0}")]
    ClientLength(LengthError),
    /// The client counts otherwise.
    #[error("the client sent a packet with sequence number {sequence} instead of {expected}")]
    ClientSequence {
        /// The number.
        sequence: u8,
        /// The number that is due.
        expected: u8,
    },
    /// It speaks TLS without having asked for it.
    #[error("the client began with TLS, and this listener does not take it")]
    UnexpectedTls,
    /// The response cannot be read.
    #[error("the client's handshake response is malformed")]
    BadHandshake,
    /// It is of MySQL before 4.1.
    #[error("the client speaks a protocol older than that of MySQL 4.1")]
    TooOld,
    /// The client was not offered TLS.
    #[error("the client asked for TLS, and this listener does not offer it")]
    TlsNotOffered,
    /// The listener takes TLS only.
    #[error("this listener takes TLS only, and the client did not ask for it")]
    TlsRequired,
    /// The password was not encrypted with the key that the client was given.
    #[error("the client's password cannot be decrypted")]
    Undecryptable,
    /// The client used a key of its own, which is the server's.
    #[error("the client encrypted its password with a public key that it was not given here")]
    OwnKey,
    /// No key could be made.
    #[error("no RSA key could be made for the client's password")]
    NoKey,
    /// The server, or somebody on the way, sent more than the greeting.
    #[error("bytes in plaintext followed the server's greeting")]
    BytesBeforeTls,
    /// The server's packet has no such length.
    #[error("the server sent {0} before the session had begun")]
    ServerLength(LengthError),
    /// The server counts otherwise.
    #[error("the server sent a packet with sequence number {sequence} instead of {expected}")]
    ServerSequence {
        /// The number.
        sequence: u8,
        /// The number that is due.
        expected: u8,
    },
    /// It is neither OK nor ERR nor a request.
    #[error("the server sent a malformed packet before the session had begun")]
    ServerMalformed,
    /// The two go on and on.
    #[error("authentication took more than {limit} packets")]
    TooMuch {
        /// How many are allowed.
        limit: u32,
    },
    /// The server closed the connection.
    #[error("the server closed the connection before the session had begun")]
    Lost,
}

impl StartupError {
    fn diagnosis(&self) -> Diagnosis {
        let (kind, stage, blame, taken) = match self {
            Self::ClientLength(_)
            | Self::ClientSequence { .. }
            | Self::UnexpectedTls
            | Self::BadHandshake
            | Self::TooOld
            | Self::TlsNotOffered
            | Self::TlsRequired
            | Self::Undecryptable
            | Self::OwnKey => (Kind::RequestInvalid, Stage::Request, Blame::Client, Taken::Some),
            Self::BytesBeforeTls => (Kind::TlsProtocol, Stage::Tls, Blame::Endpoint, Taken::Some),
            Self::NoKey => (Kind::Unreachable, Stage::Request, Blame::Connection, Taken::Some),
            Self::ServerLength(_)
            | Self::ServerSequence { .. }
            | Self::ServerMalformed
            | Self::TooMuch { .. } => {
                (Kind::ResponseInvalid, Stage::Response, Blame::Endpoint, Taken::Some)
            }
            Self::Lost => (Kind::ConnectionLost, Stage::Response, Blame::Endpoint, Taken::Some),
        };
        Diagnosis { kind, stage, blame, taken, endpoint: None }
    }
}

impl Cause for StartupError {
    fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::ClientLength(_) | Self::ClientSequence { .. } | Self::BadHandshake => {
                "check that the client speaks MySQL: this is the listener of an alias with \
                 `protocol: mysql`"
            }
            Self::UnexpectedTls | Self::TlsNotOffered => {
                "set `ssl-mode=DISABLED` (`--skip-ssl` for MariaDB) in the client, or `tls_in: \
                 true` for the alias"
            }
            Self::TlsRequired => {
                "set `ssl-mode=REQUIRED` in the client, or `tls_in: false` for the alias"
            }
            Self::TooOld => "upgrade the client",
            Self::Undecryptable => {
                "let the client request the public key for each connection, and do not keep it"
            }
            Self::OwnKey => {
                "remove the server's public key from the client's settings \
                 (`server-public-key-path`, `serverRSAPublicKeyFile`): it gets one here"
            }
            Self::BytesBeforeTls => {
                "see the server's log for an error; if it has sent none, somebody between here and \
                 the server may be injecting bytes: do not use this path"
            }
            Self::ServerLength(_) | Self::ServerSequence { .. } | Self::ServerMalformed => {
                "check that the target is a MySQL or MariaDB server"
            }
            Self::Lost => "see the server's log",
            Self::NoKey | Self::TooMuch { .. } => return None,
        };
        Some(fix.into())
    }
}

impl From<StartupError> for Fault {
    fn from(error: StartupError) -> Self {
        Self::new(error.diagnosis(), error)
    }
}
