//! What a client is told.

use std::{net::SocketAddr, sync::Arc};

use super::*;
use crate::fault::{Blame, Cause, Diagnosis, Kind, Stage, Taken};

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Said(String);

impl Cause for Said {
    fn fix(&self) -> Option<String> {
        Some("raise `timeouts.connect`".into())
    }

    fn chain(&self) -> Option<&[Arc<str>]> {
        None
    }
}

fn fault(kind: Kind, stage: Stage, endpoint: bool, text: &str) -> Fault {
    let endpoint = endpoint.then(|| SocketAddr::from(([192, 0, 2, 1], 5432)));
    let (blame, taken) = (Blame::Endpoint, Taken::Nothing);
    Fault::new(Diagnosis { kind, stage, blame, taken, endpoint }, Said(text.into()))
}

fn text(message: &[u8], kind: u8) -> String {
    String::from_utf8(field(&message[5..], kind).unwrap_or_default().to_vec()).unwrap()
}

#[test]
fn a_fault_becomes_an_error_with_code_reason_and_fix() {
    let fault = fault(Kind::ConnectTimeout, Stage::Connect, true, "connecting took long");
    let bytes = ErrorResponse::of(&fault).to_bytes();
    let length = u32::from_be_bytes(*bytes[1..].first_chunk().unwrap());
    assert_eq!((bytes[0], length as usize), (b'E', bytes.len() - 1));
    assert!(bytes.ends_with(b"\0\0"));
    for (kind, expected) in [
        (b'S', "FATAL"),
        (b'V', "FATAL"),
        (b'C', "08001"),
        (b'M', "truename: connecting took long"),
        (b'H', "raise `timeouts.connect`"),
    ] {
        assert_eq!(text(&bytes, kind), expected);
    }
}

#[test]
fn each_kind_of_fault_has_its_code() {
    let cases = [
        (Kind::DnsError, Stage::Resolve, "08001"),
        (Kind::DnsTimeout, Stage::Resolve, "08001"),
        (Kind::ConnectionRefused, Stage::Connect, "08001"),
        (Kind::Unreachable, Stage::Connect, "08001"),
        (Kind::TlsCertificate, Stage::Tls, "08001"),
        (Kind::TlsProtocol, Stage::Tls, "08001"),
        (Kind::ConnectionLost, Stage::Tls, "08001"),
        (Kind::ResponseInvalid, Stage::Connect, "08001"),
        (Kind::ConnectionLost, Stage::Response, "08006"),
        (Kind::AddressNotAllowed, Stage::Policy, "08004"),
        (Kind::NameNotAllowed, Stage::Policy, "08004"),
        (Kind::Loop, Stage::Policy, "08004"),
        (Kind::LimitReached, Stage::Request, "53300"),
        (Kind::RequestInvalid, Stage::Request, "08P01"),
        (Kind::RequestTimeout, Stage::Request, "08P01"),
    ];
    for (kind, stage, code) in cases {
        let response = ErrorResponse::of(&fault(kind, stage, true, "x"));
        assert_eq!(response.sql_state.as_str(), code, "{kind:?}");
    }
    let none = fault(Kind::Unreachable, Stage::Connect, false, "no endpoint");
    assert_eq!(ErrorResponse::of(&none).sql_state, SqlState::CannotConnectNow);
    assert_eq!(ErrorResponse::ending("the proxy stops").sql_state, SqlState::AdminShutdown);
}

#[test]
fn no_text_is_too_long_or_broken_for_libpq() {
    for long in ["x".repeat(50_000), "\u{1f418}".repeat(20_000), "a\0b".repeat(9_000)] {
        let bytes =
            ErrorResponse::of(&fault(Kind::DnsError, Stage::Resolve, true, &long)).to_bytes();
        assert!(bytes.len() < 30_000, "{}", bytes.len());
        assert!(text(&bytes, b'M').starts_with("truename: "));
        assert_eq!(text(&bytes, b'H'), "raise `timeouts.connect`");
    }
}
