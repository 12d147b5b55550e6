//! Sessions that do not begin.

use super::*;
use crate::fault::{Blame, Diagnosis, Kind, Stage, Taken};

#[test]
fn what_is_no_response_is_refused_with_a_reason() {
    let with = |edit: fn(&mut Vec<u8>)| {
        let mut payload = response(CLIENT, NATIVE, &[7; 20]);
        edit(&mut payload);
        write(1, &payload).to_vec()
    };
    for (bytes, code, text) in [
        (b"GET / HTTP/1.1\r\n".to_vec(), 1043, "packet of"),
        (b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), 1043, "began with TLS"),
        (vec![255, 255, 255, 1], 1043, "packet of 16777215 bytes"),
        (write(0, &[0; 40]).to_vec(), 1156, "sequence number 0 instead of 1"),
        (write(1, b"").to_vec(), 1043, "older"),
        (write(1, &[0, 0, 0, 0, 0]).to_vec(), 1043, "older"),
        (with(|payload| payload.truncate(31)), 1043, "malformed"),
        (with(|payload| payload.truncate(40)), 1043, "malformed"),
        (with(|payload| payload[36] = 250), 1043, "malformed"),
        (with(|payload| payload[36] = 255), 1043, "malformed"),
        (write(1, &flags(CLIENT | TLS)).to_vec(), 1043, "asked for TLS"),
    ] {
        let mut run = Run::plain().greeted();
        run.client(&bytes);
        let (sequence, found, state, message) = run.refusal();
        assert_eq!((found, &state[..]), (code, "08S01"), "{message}");
        assert!((1..=2).contains(&sequence), "{sequence}");
        assert!(message.contains(text), "{message}");
        assert_eq!(run.to_target, b"");
        assert_ne!(run.start.closing_message(), "", "the server does not count it");
    }
}

#[test]
fn a_listener_that_takes_tls_only_says_so() {
    let mut run = Run::new(ClientTls::Required, true).greeted();
    run.client(&write(1, &response(CLIENT, NATIVE, &[7; 20])));
    let (sequence, code, state, text) = run.refusal();
    assert_eq!((sequence, code, &state[..]), (2, 3159, "HY000"), "{text}");
    assert_eq!(run.to_target, b"");
}

#[test]
fn bytes_behind_a_request_for_tls_are_left_to_tls() {
    let mut run = Run::new(ClientTls::Required, true).greeted();
    run.client(&[&write(1, &flags(CLIENT | TLS))[..], b"ClientHello"].concat());
    assert_eq!(run.done, [Action::StartTls]);
    assert_eq!(run.client[..], b"ClientHello"[..]);
    assert_eq!(run.to_target, b"");
}

#[test]
fn bytes_that_follow_the_greeting_never_count_as_if_they_had_come_by_tls() {
    for injected in [&write(3, OK)[..], b"\x07"] {
        let mut run = Run::plain().greeted();
        run.target(injected);
        let (sequence, code, state, text) = run.refusal();
        assert_eq!((sequence, code, &state[..]), (1, 1429, "08001"), "{text}");
        assert_eq!((&run.to_client[..], &run.to_target[..]), (&b""[..], &b""[..]));
    }
    // A server in plaintext may be early: it is read when the client has responded.
    let mut run = Run::new(ClientTls::Off, false).greeted();
    run.target(&write(2, OK));
    run.client(&write(1, &response(CLIENT, NATIVE, &[7; 20])));
    assert_eq!(run.done, [Action::Established]);
}

#[test]
fn a_response_may_have_a_length_that_looks_like_tls() {
    let mut payload = response(CLIENT, NATIVE, &[7; 20]);
    for length in [0x0316, 0x1_0316] {
        payload.resize(length, b'a');
        for cut in [1, 2, 4, 5, 6, length] {
            let mut run = Run::plain().greeted();
            let bytes = write(1, &payload);
            run.client(&bytes[..cut]);
            run.client(&bytes[cut..]);
            assert_eq!(run.done, [Action::StartTargetTls], "{length} {cut}");
        }
    }
}

#[test]
fn a_login_that_the_server_refuses_is_the_servers_word() {
    let denied = b"\xff\x15\x04#28000Access denied for user 'app'";
    // Servers that give up count as they like.
    for sequence in [3, 0, 9] {
        let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
        run.target(&write(sequence, denied));
        assert_eq!(run.client_received(), [(2, denied.to_vec())]);
        run.event(Event::Ended(Side::Target));
        assert_eq!(run.done.last(), Some(&Action::Close));
        assert!(run.fault.is_none());
    }
}

#[test]
fn a_server_that_does_not_keep_to_the_protocol_is_at_fault() {
    for (bytes, code, text) in [
        (write(4, &switch(NATIVE)).to_vec(), 1156, "sequence number 4 instead of 3"),
        (write(0, OK).to_vec(), 1156, "sequence number 0 instead of 3"),
        (write(3, b"").to_vec(), 1043, "malformed"),
        (vec![255, 255, 255, 3], 1043, "16777215 bytes"),
    ] {
        let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
        run.target(&bytes);
        let (_, found, _, message) = run.refusal();
        assert_eq!(found, code, "{message}");
        assert!(message.contains(text), "{message}");
        assert!(run.fault.unwrap().is_of_endpoint());
    }
}

#[test]
fn a_client_that_counts_wrongly_is_told() {
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&write(3, &switch(NATIVE)));
    run.client(&write(4, &[7; 20]));
    assert_eq!(run.refusal().1, 1156);
}

#[test]
fn questions_without_end_are_ended() {
    let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
    for number in 0..200_u8 {
        run.target(&write(number.wrapping_mul(2).wrapping_add(3), b"\x03?"));
        run.client(&write(number.wrapping_mul(2).wrapping_add(3), b"yes"));
    }
    assert!(run.refusal().3.contains("more than 100 packets"));
}

#[test]
fn a_server_that_leaves_before_its_ok_is_lost() {
    let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
    run.event(Event::Ended(Side::Target));
    let (sequence, code, state, _) = run.refusal();
    assert_eq!((sequence, code, &state[..]), (2, 1158, "08S01"));
}

#[test]
fn a_failure_to_connect_comes_in_place_of_the_greeting() {
    let run = Run::plain();
    for (kind, stage, code, state) in [
        (Kind::ConnectionRefused, Stage::Connect, 1429, "08001"),
        (Kind::TlsCertificate, Stage::Tls, 1429, "08001"),
        (Kind::DnsError, Stage::Resolve, 1429, "08001"),
        (Kind::AddressNotAllowed, Stage::Policy, 1130, "08004"),
        (Kind::LimitReached, Stage::Route, 1040, "08004"),
        (Kind::RequestTimeout, Stage::Request, 1159, "08S01"),
        (Kind::ConnectionLost, Stage::Response, 1158, "08S01"),
    ] {
        let (blame, taken) = (Blame::Endpoint, Taken::Nothing);
        let diagnosis = Diagnosis { kind, stage, blame, taken, endpoint: None };
        let fault = Fault::new(diagnosis, StartupErrorLike);
        let run = Run {
            fault: Some(fault),
            start: Startup::new(settings(ClientTls::Off, true)),
            ..Run::plain()
        };
        let (sequence, found, found_state, text) = run.refusal();
        assert_eq!((sequence, found, &found_state[..]), (0, code, state), "{kind:?}");
        assert_eq!(text, "truename: it failed; fix: mend it");
    }
    drop(run);
}

#[derive(Debug, thiserror::Error)]
#[error("it failed")]
struct StartupErrorLike;

impl crate::fault::Cause for StartupErrorLike {
    fn fix(&self) -> Option<String> {
        Some("mend it".into())
    }
}

#[test]
fn a_client_that_leaves_does_not_count_as_an_interrupted_handshake() {
    // Before its response: a response of nobody, and nothing of the client's.
    let mut run = Run::plain().greeted();
    run.event(Event::Ended(Side::Client));
    assert_eq!(run.done, [Action::Close]);
    let closing_message = packets(&run.start.closing_message());
    assert_eq!((closing_message[0].0, &closing_message[0].1[32..41]), (1, &b"truename\0"[..]));
    assert_eq!(closing_message[1], (3, Vec::new()));

    // When it is asked for its password: an empty one.
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&write(3, &[1, 4]));
    run.event(Event::Ended(Side::Client));
    assert_eq!(packets(&run.start.closing_message()), [(4, vec![0])]);
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&write(3, &switch(NATIVE)));
    assert_eq!(packets(&run.start.closing_message()), [(4, vec![])]);

    // When it was to encrypt its password before the server has had the response.
    let mut run = Run::plain().greeted();
    run.client(&write(1, &response(CLIENT, SHA256, &[1])));
    run.event(Event::TargetSecured);
    let closing_message = packets(&run.start.closing_message());
    assert_eq!(closing_message[0], (2, response(CLIENT | TLS, SHA256, &[])));

    // While the server is at work there is nothing to say.
    let run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
    assert_eq!(run.start.closing_message(), "");
}

#[test]
fn every_cut_ends_the_start() {
    let sent = write(1, &response(CLIENT, NATIVE, &[7; 20]));
    for length in 0..sent.len() {
        let mut run = Run::plain().greeted();
        run.client(&sent[..length]);
        run.event(Event::Ended(Side::Client));
        assert_eq!(run.done, [Action::Close]);
        assert_eq!(run.to_target, b"");
    }
    let ok = write(3, OK);
    for length in 0..ok.len() {
        let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
        run.target(&ok[..length]);
        run.event(Event::Ended(Side::Target));
        assert_eq!(run.refusal().1, 1158);
    }
}
