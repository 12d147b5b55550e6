//! Faults as clients of mail and LDAP see them: the one place that says which failure is which code.

use bytes::{BufMut as _, Bytes, BytesMut};

use super::{
    ber,
    ldap::{ENUMERATED, EXTENDED_RESPONSE, INTEGER, OCTET_STRING, Request, SEQUENCE},
};
use crate::fault::{Fault, Kind};

/// The longest line of an SMTP reply (RFC 5321 §4.5.3.1.5) or a POP3 response (RFC 1939 §3), with its end.
const MAX_LINE: usize = 512;

/// So much of a text is sent to a client whose protocol has no limit of its own.
const MAX_TEXT: usize = 2000;

/// "421", which ends the connection, with a code of RFC 3463. Each line begins with both.
pub(super) fn smtp(why: &Fault) -> Bytes {
    let code = smtp_code(why.kind());
    let room = MAX_LINE - "421- \r\n".len() - code.len();
    let mut texts = wrap(&what(why, MAX_TEXT), room);
    if let Some(fix) = why.fix() {
        texts.extend(wrap(&printable(&format!("fix: {fix}")), room));
    }
    let mut reply = String::new();
    for (nth, text) in texts.iter().enumerate() {
        let separator = if nth + 1 < texts.len() { '-' } else { ' ' };
        reply.push_str(&format!("421{separator}{code} {text}\r\n"));
    }
    reply.into()
}

fn smtp_code(kind: Kind) -> &'static str {
    match kind {
        Kind::DnsTimeout | Kind::DnsError => "4.4.3",
        Kind::ConnectionRefused | Kind::ConnectTimeout | Kind::Unreachable => "4.4.1",
        Kind::ConnectionLost | Kind::StreamReset | Kind::ResponseTimeout => "4.4.2",
        Kind::Loop => "4.4.6",
        Kind::LimitReached => "4.3.2",
        Kind::TlsProtocol | Kind::TlsCertificate => "4.7.5",
        Kind::ResponseInvalid | Kind::UpgradeFailed => "4.5.0",
        Kind::AddressNotAllowed
        | Kind::NameNotAllowed
        | Kind::NoRoute
        | Kind::ConnectUnsupported
        | Kind::CredentialsRequired
        | Kind::SignedHost
        | Kind::RequestInvalid
        | Kind::RequestTimeout => "4.7.1",
    }
}

/// A BYE instead of a greeting (RFC 9051 §7.1.5), with a code of RFC 5530.
pub(super) fn imap(why: &Fault) -> Bytes {
    let code = if why.kind() == Kind::LimitReached { "LIMIT" } else { "UNAVAILABLE" };
    format!("* BYE [{code}] {}\r\n", what_and_fix(why, MAX_TEXT)).into()
}

/// An error instead of a greeting, with a code of RFC 3206.
pub(super) fn pop3(why: &Fault) -> Bytes {
    let code = if is_temporary(why.kind()) { "SYS/TEMP" } else { "SYS/PERM" };
    let room = MAX_LINE - "-ERR [] \r\n".len() - code.len();
    format!("-ERR [{code}] {}\r\n", what_and_fix(why, room)).into()
}

/// Whether it may pass without anybody's doing.
fn is_temporary(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::DnsTimeout
            | Kind::DnsError
            | Kind::ConnectionRefused
            | Kind::ConnectTimeout
            | Kind::Unreachable
            | Kind::ConnectionLost
            | Kind::ResponseTimeout
            | Kind::LimitReached
    )
}

/// A response to the client's first request, if it has sent one: programs show it, and not the Notice of
/// Disconnection that follows (RFC 4511 §4.4.1).
pub(super) fn ldap(why: &Fault, sent: &[u8]) -> Bytes {
    const BUSY: u8 = 51;
    const UNAVAILABLE: u8 = 52;
    const NOTICE_OF_DISCONNECTION: &[u8] = b"1.3.6.1.4.1.1466.20036";
    const RESPONSE_NAME: u8 = 0x8a;

    let text = what_and_fix(why, MAX_TEXT);
    let mut refusal = BytesMut::new();
    if let Some(Request { id, response }) = Request::parse(sent) {
        let code = if why.kind() == Kind::LimitReached { BUSY } else { UNAVAILABLE };
        refusal.put(ldap_message(id, response, code, &text, &[]));
    }
    let name = ber::element(RESPONSE_NAME, NOTICE_OF_DISCONNECTION);
    refusal.put(ldap_message(0, EXTENDED_RESPONSE, UNAVAILABLE, &text, &name));
    refusal.freeze()
}

/// A message with an LDAPResult, and what else is in the response.
fn ldap_message(id: u32, response: u8, code: u8, text: &str, more: &[u8]) -> BytesMut {
    let mut result = BytesMut::new();
    result.put(ber::element(ENUMERATED, &[code]));
    result.put(ber::element(OCTET_STRING, &[]));
    result.put(ber::element(OCTET_STRING, text.as_bytes()));
    result.put_slice(more);
    let mut message = BytesMut::new();
    // The shortest form, and never negative: ids are below 2^31.
    let digits = id.to_be_bytes();
    let leading = digits.windows(2).take_while(|pair| pair[0] == 0 && pair[1] < 0x80).count();
    message.put(ber::element(INTEGER, &digits[leading..]));
    message.put(ber::element(response, &result));
    ber::element(SEQUENCE, &message)
}

/// What happened and what to change, in at most so many bytes. Of the two, the former is cut.
fn what_and_fix(why: &Fault, room: usize) -> String {
    let fix = why.fix().map(|fix| printable(&format!("; fix: {fix}"))).unwrap_or_default();
    match room.checked_sub(fix.len()) {
        Some(left) => what(why, left) + &fix,
        None => what(why, room),
    }
}

/// What happened, in at most so many bytes.
fn what(why: &Fault, room: usize) -> String {
    let mut text = printable(&format!("truename: {why}"));
    if text.len() > room {
        text.truncate(room.saturating_sub("...".len()));
        text.push_str("...");
    }
    text
}

/// One line of ASCII: what these protocols can carry.
fn printable(text: &str) -> String {
    text.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).collect()
}

/// Lines of at most `width` bytes, broken between words where there are some.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = text;
    while rest.len() > width {
        let end = rest[..=width].rfind(' ').filter(|end| *end > 0);
        let (line, next) = rest.split_at(end.unwrap_or(width));
        lines.push(line.to_owned());
        rest = next.trim_start();
    }
    lines.push(rest.to_owned());
    lines
}
