//! The target's side before TLS.

use bytes::Bytes;

use super::*;
use crate::{config::Negotiation, protocol::Step};

#[test]
fn tls_begins_behind_the_servers_yes() {
    let mut opening = Opening::new(Negotiation::Request);
    let mut received = BytesMut::new();
    assert_eq!(
        opening.next(&mut received),
        Ok(Step::Send(Bytes::from_static(&[0, 0, 0, 8, 4, 210, 22, 47])))
    );
    assert_eq!(opening.next(&mut received), Ok(Step::Receive));
    received.extend_from_slice(b"S");
    assert_eq!(opening.next(&mut received), Ok(Step::StartTls(Bytes::new())));
    assert!(received.is_empty());
}

#[test]
fn direct_tls_begins_at_once() {
    let mut opening = Opening::new(Negotiation::Direct);
    assert_eq!(opening.next(&mut BytesMut::new()), Ok(Step::StartTls(Bytes::new())));
    assert_eq!(ALPN, "postgresql");
}

#[test]
fn anything_but_one_yes_fails() {
    let cases = [
        (&b"N"[..], OpeningError::NoTls),
        (b"E\0\0\0\x08fail", OpeningError::Failed),
        (b"H", OpeningError::NotPostgres { byte: b'H' }),
        (b"SS", OpeningError::BytesBeforeTls),
        (b"S\x16\x03\x03", OpeningError::BytesBeforeTls),
        (b"NS", OpeningError::NoTls),
    ];
    for (response, error) in cases {
        let mut opening = Opening::new(Negotiation::Request);
        opening.next(&mut BytesMut::new()).unwrap();
        assert_eq!(opening.next(&mut BytesMut::from(response)), Err(error));
    }
    let mut early = BytesMut::from("220 mail");
    assert_eq!(Opening::new(Negotiation::Request).next(&mut early), Err(OpeningError::SpokeFirst));
    let surplus = Opening::new(Negotiation::Direct).next(&mut early);
    assert_eq!(surplus, Err(OpeningError::BytesBeforeTls));
}
