//! What comes before TLS in the protocols of mail and in LDAP, in one piece or in many; and what their clients are sent
//! that cannot be served.
#![no_main]

use std::net::SocketAddr;

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use truename::{
    connect::ConnectError,
    fault::Fault,
    protocol::{
        Step,
        starttls::{MAX_RECEIVED, Opening, StartTls, StartTlsError},
    },
};

fuzz_target!(|input: (u8, u8, &[u8], &[u8])| {
    let (choice, fragment, server, client) = input;
    let protocol = [StartTls::Smtp, StartTls::Imap, StartTls::Pop3, StartTls::Ldap]
        [usize::from(choice) % 4];
    let pieces = open(protocol, server, fragment.max(1).into());
    let bytes = open(protocol, server, 1);
    if let (Ok(one), Ok(other)) = (&pieces, &bytes) {
        assert_eq!(one, other);
    }
    let error = StartTlsError::Unwilling { response: String::from_utf8_lossy(server).into() };
    refuse(protocol, error, client);
    if let Err(error) = pieces {
        refuse(protocol, error, client);
    }
});

/// A server that does not wait for its turns, up to its consent. Returns the greeting.
fn open(protocol: StartTls, server: &[u8], piece: usize) -> Result<BytesMut, StartTlsError> {
    let mut opening = Opening::new(protocol);
    let mut received = BytesMut::new();
    let mut pieces = server.chunks(piece);
    let (mut sent, mut arrived) = (0, 0);
    loop {
        match opening.next(&mut received)? {
            Step::Send(bytes) => {
                sent += 1;
                assert!(!bytes.is_empty() && sent <= 2);
            }
            Step::Receive => {
                let piece = pieces.next().ok_or(StartTlsError::Closed)?;
                arrived += piece.len();
                // Never more waits than the last piece, and what was too little before.
                assert!(arrived <= MAX_RECEIVED + 256 || protocol == StartTls::Ldap);
                received.extend_from_slice(piece);
            }
            Step::StartTls(greeting) => {
                assert!(received.is_empty());
                let lines = greeting.split(|byte| *byte == b'\n');
                for line in lines.filter(|line| !line.is_empty()) {
                    let line = line.strip_suffix(b"\r").unwrap();
                    assert!(!line.contains(&b'\r') && !line.contains(&b'\0'));
                    let begins = [&b"220"[..], b"+OK", b"* OK"];
                    assert!(begins.iter().any(|begin| line.starts_with(begin)));
                }
                return Ok(BytesMut::from(&greeting[..]));
            }
        }
    }
}

/// Texts break no line, and no length is exceeded.
fn refuse(protocol: StartTls, source: StartTlsError, client: &[u8]) {
    let endpoint = SocketAddr::from(([192, 0, 2, 1], 587));
    let fault = Fault::from(ConnectError::Opening { endpoint, source: source.into() });
    let refusal = protocol.refusal(&fault, client);
    assert!(refusal.len() < 16 * 1024);
    if protocol == StartTls::Ldap {
        assert_eq!(refusal[0], 0x30);
        return;
    }
    assert!(refusal.is_ascii() && refusal.ends_with(b"\r\n"));
    let begin: &[u8] = match protocol {
        StartTls::Smtp => b"421",
        StartTls::Imap => b"* BYE ",
        StartTls::Pop3 | StartTls::Ldap => b"-ERR ",
    };
    for line in refusal.split_inclusive(|byte| *byte == b'\n') {
        assert!(line.starts_with(begin) && line.ends_with(b"\r\n"));
        assert!(protocol == StartTls::Imap || line.len() <= 512);
    }
}
