//! Detects a client's protocol from its first bytes.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncRead,
    time::{Instant, timeout_at},
};

use crate::stream::receive;

/// What an HTTP/2 client sends first (RFC 9113 §3.4).
pub const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The content type of a handshake record (RFC 8446 §5.1): no HTTP method begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// So much of the preface is HTTP/2's alone: what goes wrong behind it is for HTTP/2 to refuse.
const HTTP2_LINE: usize = "PRI * HTTP/2.0".len();

/// The protocol of the first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS handshake record.
    Tls,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1, or something that an HTTP/1 parser will refuse.
    Http1,
}

/// Why no protocol was detected.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// The client left without sending anything, as a port check does.
    #[error("the client closed the connection without sending anything")]
    Silent,
    /// The first bytes did not arrive within `listener.header_timeout`.
    #[error("timed out detecting the protocol (`listener.header_timeout`)")]
    Timeout,
    /// The connection broke.
    #[error("reading the first bytes: {0}")]
    Io(#[from] io::Error),
}

/// Reads as much as the decision needs, and returns what was read.
pub async fn detect<S: AsyncRead + Unpin>(
    stream: &mut S,
    deadline: Instant,
) -> Result<(Protocol, Bytes), DetectError> {
    let mut read = BytesMut::new();
    loop {
        let length = timeout_at(deadline, receive(stream, &mut read)).await;
        let length = length.map_err(|_| DetectError::Timeout)??;
        if length == 0 && read.is_empty() {
            return Err(DetectError::Silent);
        }
        match classify(&read) {
            None if length > 0 => {}
            protocol => return Ok((protocol.unwrap_or_else(|| cut(&read)), read.freeze())),
        }
    }
}

/// The protocol that begins with `bytes`; `None` while more bytes are needed.
pub fn classify(bytes: &[u8]) -> Option<Protocol> {
    let first = *bytes.first()?;
    if first == TLS_HANDSHAKE {
        return Some(Protocol::Tls);
    }
    let same = bytes.iter().zip(HTTP2_PREFACE).take_while(|(one, other)| one == other).count();
    if same == HTTP2_PREFACE.len() || same >= HTTP2_LINE && same < bytes.len() {
        return Some(Protocol::Http2);
    }
    (same < bytes.len()).then_some(Protocol::Http1)
}

/// What a preface is that ends before its last byte.
fn cut(preface: &[u8]) -> Protocol {
    if preface.len() >= HTTP2_LINE { Protocol::Http2 } else { Protocol::Http1 }
}

/// Whether `bytes` begin a TLS ClientHello; `None` while more bytes are needed.
///
/// Where any protocol may be spoken, one byte proves nothing: the record's version, and the kind of its first message
/// have to fit as well (RFC 8446 §5.1, §4).
pub fn is_client_hello(bytes: &[u8]) -> Option<bool> {
    const CLIENT_HELLO: u8 = 1;
    let expected: [fn(u8) -> bool; 6] = [
        |kind| kind == TLS_HANDSHAKE,
        |major| major == 3,
        |minor| minor <= 4,
        |_| true,
        |_| true,
        |message| message == CLIENT_HELLO,
    ];
    let fits = expected.iter().zip(bytes).all(|(is_expected, byte)| is_expected(*byte));
    (!fits || bytes.len() >= expected.len()).then_some(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn a_preface_is_known_at_its_last_byte_and_a_method_at_its_first_difference() {
        for length in 0..HTTP2_PREFACE.len() {
            assert_eq!(classify(&HTTP2_PREFACE[..length]), None, "{length}");
        }
        assert_eq!(classify(HTTP2_PREFACE), Some(Protocol::Http2));
        assert_eq!(classify(b"G"), Some(Protocol::Http1));
        assert_eq!(classify(b"PO"), Some(Protocol::Http1));
        assert_eq!(classify(b"PRI * HTTP/1"), Some(Protocol::Http1));
        assert_eq!(classify(b"PRI * HTTP/2.0\r\n\r\nS?"), Some(Protocol::Http2));
        assert_eq!(classify(b"PRI * HTTP/2.0\n"), Some(Protocol::Http2));
        assert_eq!(classify(&[0x16]), Some(Protocol::Tls));
    }

    #[test]
    fn a_client_hello_is_known_at_its_sixth_byte_and_anything_else_at_its_first_difference() {
        let hello = [0x16, 3, 1, 2, 0, 1, 0];
        for length in 0..6 {
            assert_eq!(is_client_hello(&hello[..length]), None, "{length}");
        }
        assert_eq!(is_client_hello(&hello[..6]), Some(true));
        assert_eq!(is_client_hello(&hello), Some(true));
        assert_eq!(is_client_hello(b"*1\r\n"), Some(false));
        assert_eq!(is_client_hello(&[0x16, 0, 4]), Some(false));
        assert_eq!(is_client_hello(&[0x16, 3, 3, 0, 9, 2]), Some(false));
    }

    proptest! {
        #[test]
        fn what_was_decided_stays_so_whatever_follows(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            preface in 0..=HTTP2_PREFACE.len(),
        ) {
            let bytes = [&HTTP2_PREFACE[..preface], &bytes].concat();
            let whole = classify(&bytes);
            for length in 0..bytes.len() {
                let part = classify(&bytes[..length]);
                prop_assert!(part.is_none() || part == whole, "{length} of {bytes:?}");
            }
            prop_assert!(whole.is_some() || bytes.len() < HTTP2_PREFACE.len());
        }

        #[test]
        fn any_bytes_are_detected_and_given_back(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..8),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let (detected, sent) = runtime.unwrap().block_on(meet(pieces));
            match detected {
                Ok((protocol, read)) => {
                    prop_assert!(sent.starts_with(&read) && !read.is_empty());
                    prop_assert_eq!(protocol, classify(&sent).unwrap_or_else(|| cut(&sent)));
                }
                Err(error) => prop_assert!(sent.is_empty(), "{}", error),
            }
        }
    }

    /// A client sends this and closes.
    async fn meet(pieces: Vec<Vec<u8>>) -> (Result<(Protocol, Bytes), DetectError>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let deadline = Instant::now() + std::time::Duration::from_secs(20);
        let sent = pieces.concat();
        let send = async {
            for piece in pieces {
                client.write_all(&piece).await.unwrap();
                tokio::task::yield_now().await;
            }
            client.shutdown().await.unwrap();
        };
        (tokio::join!(detect(&mut server, deadline), send).0, sent)
    }
}
