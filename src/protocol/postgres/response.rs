//! Faults as a PostgreSQL client sees them: the one place that says which failure is which SQLSTATE.

use bytes::{Bytes, BytesMut};

use super::{
    StartupError,
    message::{self, take_text},
};
use crate::fault::{Fault, Kind, Stage};

/// libpq takes no longer ErrorResponse than 30,000 bytes before it has logged in.
const MAX_TEXT: usize = 8_000;

/// An ErrorResponse of ours. It ends the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorResponse {
    /// The code.
    pub sql_state: SqlState,
    /// What happened.
    pub message: String,
    /// What else is known of it.
    pub detail: Option<String>,
    /// What to change.
    pub hint: Option<String>,
}

/// The codes that truename gives.
///
/// They decide what clients do next: libpq tries its next host after 57P03 only, and HikariCP gives a
/// connection up after any of class 08.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SqlState {
    /// The target cannot be resolved, connected to or verified.
    CannotEstablishConnection,
    /// It is not allowed to connect there.
    ConnectionRejected,
    /// The connection was lost while the session began.
    ConnectionFailure,
    /// What was sent is not the protocol.
    ProtocolViolation,
    /// It is a version of the protocol, or a part of it, that is not supported here.
    FeatureNotSupported,
    /// The client may not log in so.
    InvalidAuthorization,
    /// A limit is reached.
    TooManyConnections,
    /// The session ends because the proxy does.
    AdminShutdown,
    /// There is no endpoint that could take the session now.
    CannotConnectNow,
}

impl ErrorResponse {
    /// The error that a client gets for a fault.
    pub fn of(fault: &Fault) -> Self {
        let chain = fault.chain().filter(|chain| !chain.is_empty());
        Self {
            sql_state: sql_state(fault),
            message: format!("truename: {fault}"),
            detail: chain.map(|chain| format!("The alias leads to {}.", chain.join(" -> "))),
            hint: fault.fix(),
        }
    }

    /// The error that a client gets whose session is ended on purpose.
    pub fn ending(why: &str) -> Self {
        Self {
            sql_state: SqlState::AdminShutdown,
            message: format!("truename: terminating connection: {why}"),
            detail: None,
            hint: Some("connect again".into()),
        }
    }

    /// The message.
    pub fn to_bytes(&self) -> Bytes {
        let mut fields = BytesMut::new();
        let mut field = |kind: u8, text: &str| {
            fields.extend_from_slice(&[kind]);
            fields.extend_from_slice(shortened(text).replace('\0', " ").as_bytes());
            fields.extend_from_slice(&[0]);
        };
        field(b'S', "FATAL");
        field(b'V', "FATAL");
        field(b'C', self.sql_state.as_str());
        field(b'M', &self.message);
        if let Some(detail) = &self.detail {
            field(b'D', detail);
        }
        if let Some(hint) = &self.hint {
            field(b'H', hint);
        }
        fields.extend_from_slice(&[0]);
        message::write(b'E', &fields).freeze()
    }
}

impl SqlState {
    /// The five characters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CannotEstablishConnection => "08001",
            Self::ConnectionRejected => "08004",
            Self::ConnectionFailure => "08006",
            Self::ProtocolViolation => "08P01",
            Self::FeatureNotSupported => "0A000",
            Self::InvalidAuthorization => "28000",
            Self::TooManyConnections => "53300",
            Self::AdminShutdown => "57P01",
            Self::CannotConnectNow => "57P03",
        }
    }
}

fn sql_state(fault: &Fault) -> SqlState {
    if let Some(error) = fault.cause::<StartupError>() {
        return error.sql_state();
    }
    let connecting = matches!(fault.stage(), Stage::Connect | Stage::Tls);
    match fault.kind() {
        Kind::LimitReached => SqlState::TooManyConnections,
        Kind::AddressNotAllowed
        | Kind::NameNotAllowed
        | Kind::Loop
        | Kind::NoRoute
        | Kind::ConnectUnsupported
        | Kind::CredentialsRequired
        | Kind::SignedHost => SqlState::ConnectionRejected,
        // Not one that could not be reached, but none at all.
        Kind::Unreachable if fault.endpoint().is_none() => SqlState::CannotConnectNow,
        Kind::DnsTimeout
        | Kind::DnsError
        | Kind::ConnectionRefused
        | Kind::ConnectTimeout
        | Kind::Unreachable
        | Kind::TlsProtocol
        | Kind::TlsCertificate => SqlState::CannotEstablishConnection,
        Kind::ConnectionLost | Kind::ResponseInvalid if connecting => {
            SqlState::CannotEstablishConnection
        }
        Kind::ConnectionLost | Kind::StreamReset | Kind::ResponseTimeout => {
            SqlState::ConnectionFailure
        }
        Kind::RequestInvalid
        | Kind::RequestTimeout
        | Kind::ResponseInvalid
        | Kind::UpgradeFailed => SqlState::ProtocolViolation,
    }
}

/// At most so many bytes of a text, and no half a character.
fn shortened(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The text of a field of an ErrorResponse, whose body this is.
pub(super) fn field(mut body: &[u8], kind: u8) -> Option<&[u8]> {
    loop {
        let (first, text) = take_text(&mut body)?.split_first()?;
        if *first == kind {
            return Some(text);
        }
    }
}

/// An ErrorResponse with a hint, unless it has one.
pub(super) fn with_hint(body: &[u8], hint: &str) -> BytesMut {
    let fields = body.strip_suffix(b"\0").unwrap_or(body);
    let hint = match field(body, b'H') {
        Some(_) => String::new(),
        None => format!("H{hint}\0"),
    };
    message::write(b'E', &[fields, hint.as_bytes(), b"\0"].concat())
}
