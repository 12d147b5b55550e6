//! Why a server gets no TLS.

use super::MAX_RECEIVED;
use crate::fault::Kind;

/// So much of what a server says is quoted.
const MAX_QUOTE: usize = 200;

/// Why TLS does not begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartTlsError {
    /// The server takes no clients now.
    #[error("the server is not ready; it sent `{response}`")]
    Unwilling {
        /// Its words, which are not to be trusted.
        response: String,
    },
    /// The server has no TLS, or not now.
    #[error("the server responded to {request} with `{response}`")]
    Refused {
        /// To what.
        request: &'static str,
        /// Its words, which are not to be trusted.
        response: String,
    },
    /// An IMAP server that has logged the client in allows no STARTTLS.
    #[error("the server greeted with PREAUTH, after which IMAP does not allow STARTTLS")]
    Preauthenticated,
    /// It is another protocol.
    #[error("the server sent `{found}`, which is not a response of its protocol")]
    Unexpected {
        /// What came.
        found: String,
    },
    /// The server sends without end.
    #[error("the server sent more than {} KiB before TLS", MAX_RECEIVED / 1024)]
    TooMuch,
    /// It sent something before it was asked.
    #[error("the server sent more than its greeting or response, without being asked")]
    OutOfTurn,
    /// It, or somebody on the way, sent more than its consent.
    #[error("bytes in plaintext followed the server's response to STARTTLS")]
    BytesBeforeTls,
    /// It closed the connection.
    #[error("the server closed the connection before TLS")]
    Closed,
    /// It said nothing, or not enough.
    #[error("the server did not respond within `timeouts.connect`")]
    Silent,
}

impl StartTlsError {
    pub(super) fn unwilling(line: &[u8]) -> Self {
        Self::Unwilling { response: quote(line) }
    }

    pub(super) fn refused(request: &'static str, line: &[u8]) -> Self {
        Self::Refused { request, response: quote(line) }
    }

    pub(super) fn unexpected(found: &[u8]) -> Self {
        Self::Unexpected { found: quote(found) }
    }

    /// What happened.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Unwilling { .. } => Kind::Unreachable,
            Self::Refused { .. } | Self::Preauthenticated | Self::BytesBeforeTls => {
                Kind::TlsProtocol
            }
            Self::Unexpected { .. } | Self::TooMuch | Self::OutOfTurn => Kind::ResponseInvalid,
            Self::Closed => Kind::ConnectionLost,
            Self::Silent => Kind::ConnectTimeout,
        }
    }

    /// What to change.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Unwilling { .. } => "see the server's log",
            Self::Refused { .. } => {
                "enable STARTTLS on the server; for a port with TLS from the first byte, set \
                 `protocol: tcp`; set `tls.mode: plaintext` only if the network between is trusted"
            }
            Self::Preauthenticated => {
                "use a port of the server where clients log in, or `protocol: tcp` with its port \
                 for TLS from the first byte, 993"
            }
            Self::Unexpected { .. } | Self::TooMuch | Self::Closed | Self::Silent => {
                "check `protocol` and `port`; for a port with TLS from the first byte (465, 993, \
                 995, 636), set `protocol: tcp`"
            }
            Self::OutOfTurn | Self::BytesBeforeTls => {
                "somebody between here and the server may be injecting bytes: do not use this path"
            }
        }
    }
}

/// What a server said, on one line of printable characters.
pub(super) fn quote(text: &[u8]) -> String {
    let shown = &text[..text.len().min(MAX_QUOTE)];
    let printable = |byte: &u8| if matches!(byte, b' '..=b'~') { char::from(*byte) } else { '?' };
    let mut quoted: String = shown.iter().map(printable).collect();
    if shown.len() < text.len() {
        quoted.push_str("...");
    }
    quoted
}
