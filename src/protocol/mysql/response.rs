//! Faults as a MySQL client sees them: the one place that says which failure has which code and SQLSTATE.

use std::error::Error;

use bytes::{Bytes, BytesMut};

use super::{
    OpeningError, StartupError,
    packet::{self, ERR},
};
use crate::{
    fault::{Fault, Kind, Stage},
    protocol,
};

/// Clients take an error of 512 bytes; libmysqlclient cuts longer ones.
const MAX_TEXT: usize = 2_000;

/// An error. It ends the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrPacket {
    /// The code. None is of a client's own (2000 to 2999): clients do not take those from a server.
    pub code: u16,
    /// The five characters.
    pub sql_state: &'static str,
    /// What happened, and what to change.
    pub message: String,
}

impl ErrPacket {
    /// The error that a client gets for a fault.
    pub fn of(fault: &Fault) -> Self {
        let (code, sql_state) = code(fault);
        let chain = fault.chain().filter(|chain| !chain.is_empty());
        let chain = chain.map(|chain| format!(" (the alias leads to {})", chain.join(" -> ")));
        let fix = fault.fix().map(|fix| format!("; fix: {fix}"));
        let message =
            format!("truename: {fault}{}{}", chain.unwrap_or_default(), fix.unwrap_or_default());
        Self { code, sql_state, message }
    }

    /// The packet, with this sequence number.
    pub fn to_bytes(&self, sequence: u8) -> Bytes {
        let mut payload = BytesMut::from(&[ERR][..]);
        payload.extend_from_slice(&self.code.to_le_bytes());
        payload.extend_from_slice(b"#");
        payload.extend_from_slice(self.sql_state.as_bytes());
        payload.extend_from_slice(shortened(&self.message).as_bytes());
        packet::write(sequence, &payload).freeze()
    }

    /// The code and the text of the error in a server's payload.
    pub(super) fn text_of(payload: &[u8]) -> String {
        let Some((&[_, low, high], text)) = payload.split_first_chunk::<3>() else {
            return "without a reason".into();
        };
        let code = u16::from_le_bytes([low, high]);
        let text = match text {
            [b'#', rest @ ..] => rest.get(5..).unwrap_or_default(),
            text => text,
        };
        format!("{} ({code})", shortened(&String::from_utf8_lossy(text)).escape_debug())
    }
}

/// The packet that a client is sent for a fault. What a server says in place of its greeting passes as it is.
pub(super) fn refusal(fault: &Fault, sequence: u8) -> Bytes {
    match refused(fault) {
        Some(packet) => packet::write(sequence, packet).freeze(),
        None => ErrPacket::of(fault).to_bytes(sequence),
    }
}

/// The error in the server's place, if it is that which the fault is about.
fn refused(fault: &Fault) -> Option<&Bytes> {
    let mut cause: Option<&dyn Error> = Some(fault);
    while let Some(error) = cause {
        if let Some(protocol::OpeningError::Mysql(OpeningError::Refused { packet })) =
            error.downcast_ref()
        {
            return Some(packet);
        }
        cause = error.source();
    }
    None
}

fn code(fault: &Fault) -> (u16, &'static str) {
    if let Some(error) = fault.cause::<StartupError>() {
        return match error {
            // ER_NET_PACKETS_OUT_OF_ORDER
            StartupError::ClientSequence { .. } | StartupError::ServerSequence { .. } => {
                (1156, "08S01")
            }
            // ER_SECURE_TRANSPORT_REQUIRED
            StartupError::TlsRequired => (3159, "HY000"),
            // ER_ACCESS_DENIED_ERROR
            StartupError::Undecryptable | StartupError::OwnKey => (1045, "28000"),
            // ER_UNKNOWN_ERROR
            StartupError::NoKey => (1105, "HY000"),
            StartupError::Lost => LOST,
            StartupError::BytesBeforeTls => CANNOT_CONNECT,
            // ER_HANDSHAKE_ERROR
            _ => (1043, "08S01"),
        };
    }
    let connecting = matches!(fault.stage(), Stage::Connect | Stage::Tls);
    match fault.kind() {
        // ER_CON_COUNT_ERROR
        Kind::LimitReached => (1040, "08004"),
        // ER_HOST_NOT_PRIVILEGED
        Kind::AddressNotAllowed
        | Kind::NameNotAllowed
        | Kind::Loop
        | Kind::NoRoute
        | Kind::ConnectUnsupported
        | Kind::CredentialsRequired
        | Kind::SignedHost => (1130, "08004"),
        Kind::DnsTimeout
        | Kind::DnsError
        | Kind::ConnectionRefused
        | Kind::ConnectTimeout
        | Kind::Unreachable
        | Kind::TlsProtocol
        | Kind::TlsCertificate => CANNOT_CONNECT,
        Kind::ConnectionLost | Kind::ResponseInvalid if connecting => CANNOT_CONNECT,
        Kind::ConnectionLost | Kind::StreamReset | Kind::ResponseTimeout => LOST,
        // ER_NET_READ_INTERRUPTED
        Kind::RequestTimeout => (1159, "08S01"),
        Kind::RequestInvalid | Kind::ResponseInvalid | Kind::UpgradeFailed => (1043, "08S01"),
    }
}

/// ER_CONNECT_TO_FOREIGN_DATA_SOURCE, and the SQLSTATE of a connection that cannot be established.
const CANNOT_CONNECT: (u16, &str) = (1429, "08001");

/// ER_NET_READ_ERROR
const LOST: (u16, &str) = (1158, "08S01");

/// At most so many bytes of a text, and no half a character.
fn shortened(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
