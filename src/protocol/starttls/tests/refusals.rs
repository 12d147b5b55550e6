//! What clients are sent that cannot be served.

use std::time::Duration;

use super::*;
use crate::connect::ConnectError;

/// A fault with a long text, and a fix.
fn refused(times: usize) -> Fault {
    let response = "454 TLS is not available here ".repeat(times);
    let source = StartTlsError::Refused { request: "STARTTLS", response };
    ConnectError::Opening { endpoint: ([192, 0, 2, 1], 587).into(), source: source.into() }.into()
}

fn timeout() -> Fault {
    let (endpoint, limit) = (([192, 0, 2, 1], 587).into(), Duration::from_secs(5));
    ConnectError::Timeout { endpoint, limit, tcp_done: false }.into()
}

fn text(protocol: StartTls, fault: &Fault) -> String {
    String::from_utf8(protocol.refusal(fault, b"").to_vec()).unwrap()
}

#[test]
fn an_smtp_client_gets_a_421_that_says_why_and_what_to_do() {
    let reply = text(StartTls::Smtp, &refused(1));
    let lines: Vec<_> = reply.strip_suffix("\r\n").unwrap().split("\r\n").collect();
    assert!(lines[0].starts_with("421-4.7.5 truename: "), "{reply}");
    assert!(lines[0].contains("192.0.2.1:587") && lines[0].contains("454 TLS"), "{reply}");
    assert!(lines.last().unwrap().starts_with("421 4.7.5 fix: enable STARTTLS"), "{reply}");
    assert!(text(StartTls::Smtp, &timeout()).starts_with("421-4.4.1 "));
}

#[test]
fn no_line_is_longer_than_its_protocol_allows() {
    for times in [1, 10, 30, 100] {
        let fault = refused(times);
        for line in text(StartTls::Smtp, &fault).split_inclusive("\r\n") {
            assert!(line.len() <= 512 && line.starts_with("421"), "{line}");
        }
        let pop3 = text(StartTls::Pop3, &fault);
        assert!(pop3.len() <= 512 && pop3.contains("fix: enable STARTTLS"), "{pop3}");
        let imap = text(StartTls::Imap, &fault);
        assert!(imap.len() <= 2100 && imap.contains("fix: enable STARTTLS"), "{imap}");
        for reply in [pop3, imap] {
            assert_eq!(reply.find("\r\n"), Some(reply.len() - 2));
        }
    }
}

#[test]
fn imap_and_pop3_clients_are_told_by_codes_of_their_protocols() {
    assert!(text(StartTls::Imap, &refused(1)).starts_with("* BYE [UNAVAILABLE] truename: "));
    assert!(text(StartTls::Pop3, &refused(1)).starts_with("-ERR [SYS/PERM] truename: "));
    assert!(text(StartTls::Pop3, &timeout()).starts_with("-ERR [SYS/TEMP] truename: "));
}

#[test]
fn no_text_breaks_a_line() {
    for protocol in [StartTls::Smtp, StartTls::Imap, StartTls::Pop3] {
        let source = StartTlsError::Unwilling { response: "1\r\n2\n3\0é".into() };
        let endpoint = ([192, 0, 2, 1], 25).into();
        let fault = ConnectError::Opening { endpoint, source: source.into() }.into();
        let reply = text(protocol, &fault);
        assert!(reply.contains("1??2?3??"), "{reply}");
        assert!(reply.is_ascii());
    }
}

#[test]
fn an_ldap_client_gets_a_response_to_its_request_and_a_notice() {
    let fault = refused(1);
    let notice = StartTls::Ldap.refusal(&fault, b"");
    let bind = b"\x30\x0c\x02\x01\x07\x60\x07\x02\x01\x03\x04\0\x80\0";
    for (request, response) in [
        (&bind[..], 0x61),
        // Only its beginning.
        (&bind[..7], 0x61),
        // In the form of Active Directory's clients: a search.
        (b"\x30\x84\0\0\0\x20\x02\x01\x07\x63\x84", 0x65),
        (b"\x30\x0c\x02\x01\x07\x77\x07", 0x78),
        (b"\x30\x0c\x02\x01\x07\x4a\x07", 0x6b),
    ] {
        let refusal = StartTls::Ldap.refusal(&fault, request);
        let mut rest = &refusal[..];
        let (0x30, mut message) = ber::take(&mut rest).unwrap() else { panic!() };
        assert_eq!(ber::take(&mut message), Some((0x02, &b"\x07"[..])));
        let (tag, mut result) = ber::take(&mut message).unwrap();
        assert_eq!(tag, response);
        assert_eq!(ber::take(&mut result), Some((0x0a, &[52][..])));
        assert_eq!(ber::take(&mut result), Some((0x04, &b""[..])));
        let (0x04, text) = ber::take(&mut result).unwrap() else { panic!() };
        let text = std::str::from_utf8(text).unwrap();
        assert!(text.starts_with("truename: ") && text.contains("fix: enable"), "{text}");
        assert_eq!(rest, notice);
    }
    // Unbind and abandon have no response; what is none of LDAP's messages, neither.
    for request in
        [&b"\x30\x05\x02\x01\x07\x42\0"[..], b"\x30\x06\x02\x01\x08\x50\x01\x07", b"GET /"]
    {
        assert_eq!(StartTls::Ldap.refusal(&fault, request), notice);
    }
    let notice_id = b"\x02\x01\0\x78";
    assert!(notice.windows(4).any(|window| window == notice_id));
    assert!(notice.ends_with(b"\x8a\x161.3.6.1.4.1.1466.20036"));
}

#[test]
fn the_id_of_a_response_is_that_of_its_request() {
    for (id, digits) in [
        (&b"\x02\x01\x7f"[..], &b"\x02\x01\x7f"[..]),
        (b"\x02\x02\0\x80", b"\x02\x02\0\x80"),
        (b"\x02\x04\0\0\0\x05", b"\x02\x01\x05"),
        (b"\x02\x04\x7f\xff\xff\xff", b"\x02\x04\x7f\xff\xff\xff"),
    ] {
        let request = [b"\x30\x50", id, b"\x60\x07"].concat();
        let refusal = StartTls::Ldap.refusal(&timeout(), &request);
        let mut rest = &refusal[..];
        let (_, message) = ber::take(&mut rest).unwrap();
        assert!(message.starts_with(digits), "{message:?}");
    }
}

#[test]
fn an_ldap_request_is_awaited_until_it_is_known_and_nothing_else_is() {
    let awaits = |sent: &[u8]| StartTls::Ldap.awaits_request(sent);
    let requests = [
        &b"\x30\x0c\x02\x01\x05\x60\x07\x02\x01\x03\x04\0\x80\0"[..],
        b"\x30\x05\x02\x01\x02\x42\0",
    ];
    for request in requests {
        for length in 0..request.len() {
            assert!(awaits(&request[..length]), "{length}");
        }
        assert!(!awaits(request));
    }
    let long = [b"\x30\x84\x7f\xff\xff\xff\x02\x84\0\0\0\x04\x7f\xff\xff\xff\x60", &[0; 9][..]];
    assert!(!awaits(&long.concat()), "enough is known");
    for sent in [b"GET / HTTP/1.1", &b"\x30\x80\x02\x01"[..], b"\x16", b"\x3f", b"\x30\xff"] {
        assert!(!awaits(sent), "{sent:?}");
    }
    assert!(!StartTls::Smtp.awaits_request(b""));
}
