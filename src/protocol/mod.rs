//! The protocols that an alias may speak besides HTTP, as state machines without I/O: bytes go in, and what
//! is to be done comes out.
//!
//! A protocol has two of them. Its *opening* is what is said to the target before TLS, on each connection
//! that is tried. Its [`Start`] has both sides, from the client's first byte to where the session begins.

pub mod mysql;
pub mod postgres;
#[cfg(test)]
mod run;
pub mod starttls;

use std::{net::IpAddr, time::Duration};

use bytes::{Bytes, BytesMut};

use self::starttls::{StartTls, StartTlsError};
use crate::{
    config::{self, Negotiation, Protocol, Role, TlsMode},
    fault::{Fault, Kind},
};

/// One of the two sides of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The application.
    Client,
    /// The server behind the alias.
    Target,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Target,
            Self::Target => Self::Client,
        }
    }
}

/// The start of a session.
///
/// Whoever runs it reports what happens and does what is asked for, in that order, and never reads more than
/// [`MAX_BUFFERED`] bytes that were not taken. Bytes that it leaves in a buffer are offered again after every
/// event, as long as that takes some of them.
pub trait Start {
    /// Takes note of an event, and adds what is to be done.
    ///
    /// What was added before an error is to be done as well. After an error nothing more is reported: the
    /// client gets the [`refusal`](Self::refusal), and both connections end.
    fn on(&mut self, event: Event<'_>, actions: &mut Vec<Action>) -> Result<(), Fault>;

    /// What the client is sent where the session cannot start; empty where it can be sent nothing.
    fn refusal(&self, why: &Fault) -> Bytes;

    /// Which role the target has shown, once it has.
    fn server_role(&self) -> Option<Role> {
        None
    }

    /// What the target is sent before its connection is closed without a session; empty where that is not to be
    /// announced.
    fn closing_message(&self) -> Bytes;

    /// Whether the target is due to say something, on which the [`closing_message`](Self::closing_message) depends.
    fn awaits_target(&self) -> bool {
        false
    }

    /// How long after the dial the client may take with what it has to send, where the target does not wait longer.
    fn client_limit(&self) -> Option<Duration> {
        None
    }
}

/// How many bytes of one side may wait to be taken.
pub const MAX_BUFFERED: usize = 128 * 1024;

/// What has happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A side has sent bytes. Those that are taken are removed.
    Bytes(Side, &'a mut BytesMut),
    /// The connection to the target is there; and verified, unless its TLS begins later.
    Dialled,
    /// The client's TLS handshake is done.
    Secured,
    /// The target's TLS handshake is done, and the target is verified.
    TargetSecured,
    /// A side has closed its connection. All that it sent before has been offered.
    Ended(Side),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send bytes.
    Send(Side, Bytes),
    /// Open a connection to a target of the alias.
    Dial,
    /// Open a connection to the endpoint that holds the session with this key; close the client's without a
    /// response where there is none.
    DialHolder(postgres::CancelKey),
    /// Note that the session with this key is at the target, for [`DialHolder`](Self::DialHolder), before anything
    /// else is done: the client gets it next.
    HoldKey(postgres::CancelKey),
    /// Make TLS with the client, once everything has been sent. Bytes that have come meanwhile are read as TLS:
    /// somebody may have put them in front of the client's.
    StartTls,
    /// Make TLS with the target, once everything has been sent, and verify it.
    StartTargetTls,
    /// The session has begun: bytes in the buffers belong to it.
    Established,
    /// End both connections, once everything has been sent.
    Close,
}

/// What is said to a target before TLS, on each connection that is tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// The server's greeting.
    Mysql(mysql::Opening),
    /// An SSLRequest, unless TLS is negotiated directly.
    Postgres(postgres::Opening),
    /// STARTTLS.
    StartTls(starttls::Opening),
}

/// What to do next on a connection to a target that has no TLS yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send bytes.
    Send(Bytes),
    /// Receive more.
    Receive,
    /// Make TLS. The client gets these bytes first, as if the target had sent them after that.
    StartTls(Bytes),
}

/// Why an opening does not come to TLS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpeningError {
    /// In MySQL.
    #[error(transparent)]
    Mysql(#[from] mysql::OpeningError),
    /// In PostgreSQL.
    #[error(transparent)]
    Postgres(#[from] postgres::OpeningError),
    /// Where TLS begins with STARTTLS.
    #[error(transparent)]
    StartTls(#[from] starttls::StartTlsError),
}

impl Opening {
    /// That of an alias' protocol; none where TLS begins at once, and where there is none.
    pub fn of(alias: &config::Alias) -> Option<Self> {
        let tls = alias.tls.mode != TlsMode::Plaintext;
        match alias.protocol {
            Protocol::Http | Protocol::Tcp => None,
            Protocol::Mysql => Some(Self::Mysql(mysql::Opening::new(tls))),
            _ if !tls => None,
            Protocol::Postgres => {
                Some(Self::Postgres(postgres::Opening::new(alias.postgres.negotiation)))
            }
            Protocol::Smtp | Protocol::Imap | Protocol::Pop3 | Protocol::Ldap => {
                StartTls::of(alias.protocol).map(starttls::Opening::new).map(Self::StartTls)
            }
        }
    }

    /// Says which address the connection is made from.
    pub fn made_from(&mut self, local: IpAddr) {
        match self {
            Self::Mysql(_) | Self::Postgres(_) => {}
            Self::StartTls(opening) => opening.made_from(local),
        }
    }

    /// Whether TLS begins only when the client has said more.
    pub fn defers_tls(&self) -> bool {
        matches!(self, Self::Mysql(_))
    }

    /// What to do next, given what was received and not yet taken.
    pub fn next(&mut self, received: &mut BytesMut) -> Result<Step, OpeningError> {
        match self {
            Self::Mysql(opening) => Ok(opening.next(received)?),
            Self::Postgres(opening) => Ok(opening.next(received)?),
            Self::StartTls(opening) => Ok(opening.next(received)?),
        }
    }

    /// The target has closed the connection.
    pub fn closed(&self) -> OpeningError {
        match self {
            Self::Mysql(_) => mysql::OpeningError::Closed.into(),
            Self::Postgres(_) => postgres::OpeningError::Closed.into(),
            Self::StartTls(_) => StartTlsError::Closed.into(),
        }
    }

    /// The target has not responded in time; `None` where there is nothing else to say of it.
    pub fn timed_out(&self) -> Option<OpeningError> {
        match self {
            Self::Mysql(_) | Self::Postgres(_) => None,
            Self::StartTls(_) => Some(StartTlsError::Silent.into()),
        }
    }
}

impl OpeningError {
    /// What happened.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Mysql(error) => error.kind(),
            Self::Postgres(error) => error.kind(),
            Self::StartTls(error) => error.kind(),
        }
    }

    /// What to change.
    pub fn fix(&self) -> Option<&'static str> {
        match self {
            Self::Mysql(error) => error.fix(),
            Self::Postgres(error) => Some(error.fix()),
            Self::StartTls(error) => Some(error.fix()),
        }
    }
}

/// The ALPN protocols that TLS with an alias' target offers.
pub fn offered_alpn(alias: &config::Alias) -> Vec<String> {
    match (alias.protocol, alias.postgres.negotiation) {
        (Protocol::Postgres, Negotiation::Direct) => vec![postgres::ALPN.to_owned()],
        (Protocol::Postgres, Negotiation::Request) | (Protocol::Mysql, _) => Vec::new(),
        _ => alias.tcp.alpn.clone(),
    }
}

/// The ALPN protocols that an alias' clients may ask for.
pub fn accepted_alpn(alias: &config::Alias) -> Vec<String> {
    match alias.protocol {
        Protocol::Postgres => vec![postgres::ALPN.to_owned()],
        Protocol::Mysql => Vec::new(),
        _ => alias.tcp.alpn.clone(),
    }
}
