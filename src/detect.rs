//! What a client speaks, from its first bytes.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

/// What an HTTP/2 client says first (RFC 9113 §3.4).
pub const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The content type of a handshake record (RFC 8446 §5.1): no HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// What the first read takes: a usual request whole.
const FIRST_READ: usize = 4096;

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS handshake record.
    Tls,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1, or something that an HTTP/1 parser will refuse.
    Http1,
}

/// Why nothing was detected.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// The client left without a word, as a port check does.
    #[error("the client closed the connection without a word")]
    Silent,
    /// The first bytes did not come by `listener.header_timeout`.
    #[error("the client said too little within `listener.header_timeout`")]
    Timeout,
    /// The connection broke.
    #[error("reading the first bytes: {0}")]
    Io(#[from] io::Error),
}

/// Reads as little as decides, and gives what was read.
pub async fn detect(
    stream: &TcpStream,
    deadline: Instant,
) -> Result<(Protocol, Bytes), DetectError> {
    let mut read = BytesMut::new();
    loop {
        let readable = timeout_at(deadline, stream.readable()).await;
        readable.map_err(|_| DetectError::Timeout)??;
        // The buffer is not allocated before there is something to put into it.
        read.reserve(FIRST_READ - read.len());
        let end = match stream.try_read_buf(&mut read) {
            Ok(0) if read.is_empty() => return Err(DetectError::Silent),
            Ok(length) => length == 0,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error.into()),
        };
        match classify(&read) {
            // An end in the middle of a preface is for the HTTP/1 parser to complain about.
            None if !end => {}
            protocol => return Ok((protocol.unwrap_or(Protocol::Http1), read.freeze())),
        }
    }
}

/// The protocol that begins with `bytes`; `None` while more bytes are needed.
pub fn classify(bytes: &[u8]) -> Option<Protocol> {
    let first = *bytes.first()?;
    if first == TLS_HANDSHAKE {
        return Some(Protocol::Tls);
    }
    let compared = bytes.len().min(HTTP2_PREFACE.len());
    if bytes[..compared] != HTTP2_PREFACE[..compared] {
        return Some(Protocol::Http1);
    }
    (compared == HTTP2_PREFACE.len()).then_some(Protocol::Http2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preface_is_known_at_its_last_byte_and_a_method_at_its_first_difference() {
        for length in 0..HTTP2_PREFACE.len() {
            assert_eq!(classify(&HTTP2_PREFACE[..length]), None, "{length}");
        }
        assert_eq!(classify(HTTP2_PREFACE), Some(Protocol::Http2));
        assert_eq!(classify(b"G"), Some(Protocol::Http1));
        assert_eq!(classify(b"PO"), Some(Protocol::Http1));
        assert_eq!(classify(b"PRI * HTTP/1"), Some(Protocol::Http1));
        assert_eq!(classify(&[0x16]), Some(Protocol::Tls));
    }
}
