//! The greeting, on its way to the client.

use super::*;
use crate::protocol::Step;

fn opened(bytes: &[u8]) -> Result<Step, OpeningError> {
    Opening::new(true).next(&mut BytesMut::from(bytes))
}

#[test]
fn a_greeting_is_awaited_whole_and_passes_as_it_came() {
    let greeting = greeting(CACHING, true);
    let mut opening = Opening::new(true);
    let mut received = BytesMut::new();
    for byte in &greeting[..greeting.len() - 1] {
        received.extend_from_slice(&[*byte]);
        assert_eq!(opening.next(&mut received), Ok(Step::Receive));
    }
    received.extend_from_slice(&greeting[greeting.len() - 1..]);
    let whole = Bytes::copy_from_slice(&greeting);
    assert_eq!(opening.next(&mut received), Ok(Step::StartTls(whole)));
}

#[test]
fn a_server_without_tls_is_refused_where_there_is_to_be_tls() {
    assert_eq!(opened(&greeting(NATIVE, false)), Err(OpeningError::NoTls));
    let mut received = BytesMut::from(&greeting(NATIVE, false)[..]);
    assert!(matches!(Opening::new(false).next(&mut received), Ok(Step::StartTls(_))));
}

#[test]
fn an_error_in_place_of_the_greeting_passes_as_it_is() {
    let error = b"\xff\x69\x04Host '10.1.2.3' is blocked";
    let refused = opened(&write(0, error)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the server refused the connection: Host \\'10.1.2.3\\' is blocked (1129)"
    );
}

#[test]
fn what_is_no_greeting_is_refused() {
    for (bytes, expected) in [
        (&b"HTTP/1.1 400 Bad Request\r\n"[..], "Length"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "Length"),
        (&write(0, b"\x09old"), "NotMysql"),
        (&write(0, b""), "NotMysql"),
        (&write(0, b"\x0a3.23\0\x01\0\0\0abcdefgh\0\0\0"), "TooOld"),
        (&write(1, &greeting(NATIVE, true)[4..]), "Sequence"),
        (&[0, 0, 16, 0], "Length"),
        (&[greeting(NATIVE, true), vec![0]].concat(), "BytesBeforeTls"),
    ] {
        let error = format!("{:?}", opened(bytes).unwrap_err());
        assert!(error.contains(expected), "{bytes:?}: {error}");
    }
    // Cut short: it never comes to more.
    let greeting = greeting(NATIVE, true);
    for length in 0..greeting.len() - 4 {
        let short = write(0, &greeting[4..4 + length]);
        drop(opened(&short));
    }
}

#[test]
fn the_client_is_offered_tls_only_where_it_can_have_it() {
    for (client_tls, server_offers) in
        [(ClientTls::Off, true), (ClientTls::Required, true), (ClientTls::Required, false)]
    {
        let mut run = Run::new(client_tls, server_offers);
        run.target(&greeting(CACHING, server_offers));
        let expected = greeting(CACHING, client_tls == ClientTls::Required);
        assert_eq!(run.to_client, expected, "the scramble and all else untouched");
    }
}

#[test]
fn a_scramble_is_found_wherever_it_is() {
    let payload = &greeting(NATIVE, true)[4..];
    let parsed = Greeting::parse(BytesMut::from(payload)).unwrap();
    assert_eq!(&parsed.scramble(), SCRAMBLE);
}

proptest! {
    #[test]
    fn no_bytes_make_an_opening_panic(bytes in vec(any::<u8>(), 0..200), tls: bool) {
        drop(Opening::new(tls).next(&mut BytesMut::from(&bytes[..])));
        drop(Opening::new(tls).next(&mut write(0, &bytes)));
        drop(Opening::new(tls).next(&mut write(0, &[&[10][..], &bytes].concat())));
    }
}
