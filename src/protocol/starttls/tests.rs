//! The openings in every fragmentation, and what clients are sent.

#![allow(clippy::unwrap_used)]

mod ldap;
mod mail;
mod refusals;

use bytes::BytesMut;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::config::Protocol;

const ALL: [StartTls; 4] = [StartTls::Smtp, StartTls::Imap, StartTls::Pop3, StartTls::Ldap];

/// What a server says when each of its turns comes, and what somebody else could notice of it.
struct Run {
    sent: Vec<Vec<u8>>,
    result: Result<Vec<u8>, StartTlsError>,
}

/// A server that waits for its turns. Each turn comes in pieces of the lengths of `cuts`; at the end it closes.
fn run(protocol: StartTls, turns: &[&[u8]], cuts: &[usize]) -> Run {
    let mut opening = Opening::new(protocol);
    opening.made_from([10, 1, 2, 3].into());
    let mut received = BytesMut::new();
    let mut sent = Vec::new();
    let mut turns = turns.iter().copied();
    // An LDAP server waits for the request.
    let mut turn = if protocol == StartTls::Ldap { &[] } else { turns.next().unwrap_or_default() };
    let mut cuts = cuts.iter().copied().cycle();
    let result = loop {
        match opening.next(&mut received) {
            Ok(Step::Send(bytes)) => {
                sent.push(bytes.to_vec());
                turn = turns.next().unwrap_or_default();
            }
            Ok(Step::Receive) if turn.is_empty() => break Err(StartTlsError::Closed),
            Ok(Step::Receive) => {
                let length = cuts.next().unwrap_or(usize::MAX).clamp(1, turn.len());
                let (now, later) = turn.split_at(length);
                received.extend_from_slice(now);
                turn = later;
            }
            Ok(Step::StartTls(greeting)) => break Ok(greeting.to_vec()),
            Err(error) => break Err(error),
        }
    };
    Run { sent, result }
}

/// The turns of a server that has TLS, what it is sent, and what its client gets.
fn good(protocol: StartTls) -> (Vec<&'static [u8]>, Vec<&'static [u8]>, &'static [u8]) {
    match protocol {
        StartTls::Smtp => (
            vec![
                b"220-mail.example.com ESMTP\r\n220 ready\r\n",
                b"250-mail.example.com greets you\r\n250-STARTTLS\r\n250 SIZE 1000\r\n",
                b"220 2.0.0 go ahead\r\n",
            ],
            vec![b"EHLO [10.1.2.3]\r\n", b"STARTTLS\r\n"],
            b"220-mail.example.com ESMTP\r\n220 ready\r\n",
        ),
        StartTls::Imap => (
            vec![
                b"* OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] ready\r\n",
                b"* CAPABILITY IMAP4rev1\r\ntruename OK begin TLS\r\n",
            ],
            vec![b"truename STARTTLS\r\n"],
            b"* OK IMAP4 ready\r\n",
        ),
        StartTls::Pop3 => (
            vec![b"+OK ready <1896.697170952@example.com>\r\n", b"+OK begin TLS\r\n"],
            vec![b"STLS\r\n"],
            b"+OK ready <1896.697170952@example.com>\r\n",
        ),
        StartTls::Ldap => (
            vec![b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\x00\x04\x00\x04\x00"],
            vec![b"\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037"],
            b"",
        ),
    }
}

#[test]
fn tls_begins_behind_the_servers_consent_in_every_fragmentation() {
    for protocol in ALL {
        let (turns, sent, greeting) = good(protocol);
        for length in 1..100 {
            let run = run(protocol, &turns, &[length]);
            assert_eq!(run.result.as_deref(), Ok(greeting), "{protocol:?}");
            assert_eq!(run.sent, sent, "{protocol:?}");
        }
    }
}

#[test]
fn a_server_that_closes_at_any_byte_gets_no_tls() {
    for protocol in ALL {
        let (turns, sent, _) = good(protocol);
        for (nth, turn) in turns.iter().enumerate() {
            for length in 0..turn.len() {
                let cut: Vec<_> = turns[..nth].iter().copied().chain([&turn[..length]]).collect();
                let run = run(protocol, &cut, &[]);
                assert_eq!(run.result, Err(StartTlsError::Closed), "{protocol:?} {nth} {length}");
                assert!(run.sent.len() <= sent.len());
            }
        }
    }
}

#[test]
fn no_byte_may_be_behind_the_consent() {
    for protocol in ALL {
        let (mut turns, ..) = good(protocol);
        for more in [&b"\x16"[..], b"\r\n", b"250 injected\r\n", b"+OK\r\n", b"* OK\r\n", b"0\0"] {
            let last = [turns.pop().unwrap(), more].concat();
            let all: Vec<_> = turns.iter().copied().chain([&last[..]]).collect();
            let run = run(protocol, &all, &[]);
            assert_eq!(run.result, Err(StartTlsError::BytesBeforeTls), "{protocol:?}");
            turns.push(good(protocol).0.pop().unwrap());
        }
    }
}

#[test]
fn what_goes_on_and_on_is_given_up() {
    let endless_lines = |line: &str| line.repeat(MAX_RECEIVED / line.len() + 1).into_bytes();
    let cases = [
        (StartTls::Smtp, vec![b'2'; MAX_RECEIVED + 1]),
        (StartTls::Smtp, endless_lines("220-and another thing\r\n")),
        (StartTls::Imap, vec![b'*'; MAX_RECEIVED + 1]),
        (StartTls::Pop3, vec![b'+'; MAX_RECEIVED + 1]),
        (StartTls::Ldap, [b"\x30\x84\x7f\xff\xff\xff", &[0; 100][..]].concat()),
    ];
    for (protocol, turn) in cases {
        for cuts in [&[][..], &[1000], &[7]] {
            let run = run(protocol, &[&turn], cuts);
            assert_eq!(run.result, Err(StartTlsError::TooMuch), "{protocol:?} {cuts:?}");
        }
    }
    let untagged = endless_lines("* OK still here\r\n");
    let run = run(StartTls::Imap, &[b"* OK\r\n", &untagged], &[9]);
    assert_eq!(run.result, Err(StartTlsError::TooMuch));
}

#[test]
fn every_protocol_but_those_of_other_kinds_has_starttls() {
    let of = |protocol| StartTls::of(protocol);
    assert_eq!(of(Protocol::Smtp), Some(StartTls::Smtp));
    assert_eq!(of(Protocol::Imap), Some(StartTls::Imap));
    assert_eq!(of(Protocol::Pop3), Some(StartTls::Pop3));
    assert_eq!(of(Protocol::Ldap), Some(StartTls::Ldap));
    assert_eq!(of(Protocol::Tcp), None);
}

fn protocols() -> impl Strategy<Value = StartTls> {
    prop::sample::select(&ALL[..])
}

proptest! {
    #[test]
    fn damaged_turns_come_to_the_same_in_one_piece_and_in_many(
        protocol in protocols(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        cuts in vec(1usize..30, 1..8),
    ) {
        let (turns, ..) = good(protocol);
        let mut turns: Vec<_> = turns.into_iter().map(<[u8]>::to_vec).collect();
        for (index, byte) in damage {
            let turn = index.index(turns.len());
            let at = index.index(turns[turn].len());
            turns[turn][at] = byte;
        }
        let turns: Vec<&[u8]> = turns.iter().map(Vec::as_slice).collect();
        let (whole, pieces) = (run(protocol, &turns, &[]), run(protocol, &turns, &[cuts[0]]));
        // Where a turn ends in the middle, the rest comes too early, or in time.
        if whole.result.is_ok() && pieces.result.is_ok() {
            prop_assert_eq!(whole.result, pieces.result);
            prop_assert_eq!(whole.sent, pieces.sent);
        }
    }

    #[test]
    fn junk_is_never_consent(
        protocol in protocols(),
        junk in vec(any::<u8>(), 0..300),
        cuts in vec(1usize..40, 1..8),
    ) {
        let run = run(protocol, &[&junk, &junk, &junk], &cuts);
        prop_assert!(run.result.is_err());
    }

    #[test]
    fn a_greeting_is_whole_lines_of_its_own_protocol(
        text in "[ -~\r\n\t\0]{0,60}",
        cuts in vec(1usize..40, 1..8),
    ) {
        for (protocol, begin) in [(StartTls::Smtp, "220"), (StartTls::Pop3, "+OK")] {
            let (mut turns, ..) = good(protocol);
            let greeting = format!("{begin} {text}\r\n");
            turns[0] = greeting.as_bytes();
            let Ok(passed) = run(protocol, &turns, &cuts).result else { continue };
            let passed = String::from_utf8(passed).unwrap();
            let body = passed.strip_suffix("\r\n").unwrap();
            for line in body.split("\r\n") {
                prop_assert!(line.starts_with(begin), "{line:?}");
                prop_assert!(!line.contains(['\r', '\n', '\0']), "{line:?}");
            }
        }
    }
}
