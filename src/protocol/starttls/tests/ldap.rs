//! LDAP before TLS.

use super::*;

/// The response of Active Directory, which writes every length of an envelope in five bytes.
const ACTIVE_DIRECTORY: &[u8] =
    b"\x30\x84\0\0\0\x28\x02\x01\x01\x78\x84\0\0\0\x1f\x0a\x01\0\x04\0\x04\0\x8a\x161.3.6.1.4.1.1466.20037";

#[test]
fn lengths_may_be_long() {
    for message in [
        ACTIVE_DIRECTORY,
        b"\x30\x81\x0c\x02\x01\x01\x78\x07\x0a\x01\0\x04\0\x04\0",
        b"\x30\x82\0\x0f\x02\x82\0\x01\x01\x78\x81\x07\x0a\x01\0\x04\0\x04\0",
    ] {
        for length in 1..message.len() {
            assert_eq!(run(StartTls::Ldap, &[message], &[length]).result, Ok(Vec::new()));
        }
    }
}

#[test]
fn a_result_other_than_success_is_told() {
    let refusal = |code, text: &str| {
        let result =
            [b"\x0a\x01", &[code][..], b"\x04\0\x04", &[text.len() as u8], text.as_bytes()];
        let response = ber::element(0x78, &result.concat());
        ber::element(0x30, &[b"\x02\x01\x01", &response[..]].concat())
    };
    let cases = [
        (
            refusal(2, "unsupported extended operation"),
            "protocolError (2): unsupported extended operation",
        ),
        (refusal(52, ""), "unavailable (52)"),
        (refusal(80, "no\r\n"), "(80): no??"),
    ];
    for (message, response) in cases {
        let error = StartTlsError::Refused { request: "StartTLS", response: response.to_owned() };
        assert_eq!(run(StartTls::Ldap, &[&message], &[3]).result, Err(error));
    }
}

#[test]
fn a_notice_of_disconnection_is_told() {
    let notice =
        b"\x30\x28\x02\x01\0\x78\x23\x0a\x01\x34\x04\0\x04\x04busy\x8a\x161.3.6.1.4.1.1466.20036";
    let error = StartTlsError::Unwilling { response: "unavailable (52): busy".into() };
    assert_eq!(run(StartTls::Ldap, &[notice], &[]).result, Err(error));
}

#[test]
fn what_is_no_response_to_the_request_is_refused() {
    for message in [
        // Another tag, an indefinite length, five bytes of length.
        &b"220 mail.example.com\r\n"[..],
        b"\x16\x03\x01\0\0",
        b"\x30\x80\x02\x01\x01",
        b"\x30\x85\0\0\0\0\x0c",
        // Another id, another operation, no result, a result without its texts, junk.
        b"\x30\x0c\x02\x01\x02\x78\x07\x0a\x01\0\x04\0\x04\0",
        b"\x30\x0c\x02\x01\x01\x61\x07\x0a\x01\0\x04\0\x04\0",
        b"\x30\x05\x02\x01\x01\x78\0",
        b"\x30\x08\x02\x01\x01\x78\x03\x0a\x01\0",
        b"\x30\x0c\x02\x01\x01\x78\x08\x0a\x01\0\x04\0\x04\0",
        b"\x30\x0c\x02\x01\xff\x78\x07\x0a\x01\0\x04\0\x04\0",
        b"\x30\0",
    ] {
        let result = run(StartTls::Ldap, &[message], &[]).result;
        assert!(matches!(result, Err(StartTlsError::Unexpected { .. })), "{message:?}: {result:?}");
    }
}

#[test]
fn a_server_that_speaks_first_is_no_ldap_server() {
    let mut opening = Opening::new(StartTls::Ldap);
    assert_eq!(opening.next(&mut BytesMut::from("220 ")), Err(StartTlsError::OutOfTurn));
}
