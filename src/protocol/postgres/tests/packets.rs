//! What a client says before its session.

use super::*;

const SSL: [u8; 8] = Packet::SSL_REQUEST;
const GSS: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];

#[test]
fn tls_and_gss_are_declined_at_once_in_either_order() {
    for requests in [[SSL, GSS], [GSS, SSL]] {
        let mut run = Run::new(PLAIN);
        run.client(&requests[0]);
        assert_eq!((&run.to_client[..], &run.done[..]), (&b"N"[..], &[][..]));
        run.client(&requests[1]);
        assert_eq!(run.to_client, b"NN");
        run.client(&startup(3, 2, &[("user", "app"), ("_pq_.more", "on")]));
        assert_eq!((run.done, run.fault.is_none()), (vec![Action::Dial], true));
    }
}

#[test]
fn a_request_that_was_declined_is_not_made_again() {
    for request in [SSL, GSS] {
        let mut run = Run::new(PLAIN);
        run.client(&[request, request].concat());
        assert_eq!(run.to_client, b"N");
        assert_eq!(run.refusal(), "0A000");
    }
}

#[test]
fn tls_begins_on_request_where_the_listener_has_it() {
    for client_tls in [ClientTls::Offered, ClientTls::Required] {
        let mut run = Run::new(Settings { client_tls, ..PLAIN });
        run.client(&GSS);
        run.client(&SSL);
        assert_eq!((&run.to_client[..], &run.done[..]), (&b"NS"[..], &[Action::StartTls][..]));
        run.event(Event::Secured);
        run.client(&startup(3, 0, &[("user", "app")]));
        assert_eq!(run.done, [Action::StartTls, Action::Dial]);
    }
}

#[test]
fn nothing_may_be_behind_the_request_for_tls() {
    let mut run = Run::new(Settings { client_tls: ClientTls::Offered, ..PLAIN });
    run.client(&[&SSL[..], &startup(3, 0, &[("user", "mallory")])].concat());
    assert!(run.to_client.is_empty() && run.done.is_empty());
    assert_eq!(run.refusal(), "08P01");
}

#[test]
fn within_tls_nothing_else_is_negotiated() {
    for request in [SSL, GSS] {
        let settings = Settings { client_tls: ClientTls::Offered, ..PLAIN };
        let mut run = Run { start: Startup::new(settings, true), ..Run::new(settings) };
        run.client(&request);
        assert_eq!(run.refusal(), "0A000");
    }
}

#[test]
fn a_session_in_plaintext_is_refused_where_tls_is_required_and_a_cancel_is_not() {
    let settings = Settings { client_tls: ClientTls::Required, ..PLAIN };
    let mut run = Run::new(settings);
    run.client(&startup(3, 0, &[("user", "app")]));
    assert_eq!((run.refusal().as_str(), run.done.len()), ("28000", 0));
    let mut run = Run::new(settings);
    run.client(&cancel(b"abcd"));
    assert!(matches!(run.done[..], [Action::DialHolder(_)]));
}

#[test]
fn the_startup_packet_reaches_the_server_as_it_came() {
    let packets = [
        startup(3, 0, &[]),
        startup(3, 2, &[("user", "a"), ("database", ""), ("options", "-c x=\u{e9}")]),
        // What libpq asks for to find servers that cannot say no.
        startup(3, 9999, &[("user", "a"), ("_pq_.test_protocol_negotiation", "")]),
        startup(3, 0, &[("user", &"x".repeat(10_000 - 4 - 6 - 1))]),
    ];
    for packet in packets {
        let mut run = Run::new(PLAIN);
        run.client(&packet);
        assert!(run.to_target.is_empty());
        run.event(Event::Dialled);
        assert_eq!(run.to_target, packet);
    }
}

#[test]
fn what_no_client_of_postgresql_says_is_refused() {
    let length = |length: u32, rest: &[u8]| [&length.to_be_bytes()[..], rest].concat();
    let terminator = |body: &[u8]| packet(&[&[0, 3, 0, 0], body].concat());
    let cases = [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "08P01"),
        (b"\x16\x03\x01".to_vec(), "08P01"),
        (length(0, b""), "08P01"),
        (length(7, b""), "08P01"),
        (length(10_005, b""), "08P01"),
        (length(0x7fff_ffff, b""), "08P01"),
        (length(0xffff_ffff, b""), "08P01"),
        (terminator(b""), "08P01"),
        (terminator(b"user\0app\0"), "08P01"),
        (terminator(b"user\0app\0\0more"), "08P01"),
        (terminator(b"user\0\0"), "08P01"),
        (packet(&[&SSL[4..], b"x"].concat()), "08P01"),
        (cancel(b"abc"), "08P01"),
        (cancel(&[0; 257]), "08P01"),
        (startup(2, 0, &[]), "0A000"),
        (startup(4, 0, &[]), "0A000"),
        (startup(1234, 5682, &[]), "0A000"),
    ];
    for (bytes, sql_state) in cases {
        let mut run = Run::new(PLAIN);
        run.client(&bytes);
        assert!(run.fault.is_some(), "{bytes:?}");
        assert_eq!(run.refusal(), sql_state, "{:?}", run.fault);
        assert!(run.done.is_empty() && run.to_target.is_empty());
    }
}

#[test]
fn a_client_that_leaves_is_no_failure() {
    for said in [&b""[..], &SSL, &SSL[..3]] {
        let mut run = Run::new(PLAIN);
        run.client(said);
        run.event(Event::Ended(Side::Client));
        assert_eq!(run.done, [Action::Close]);
        assert!(run.fault.is_none());
    }
}

#[test]
fn a_cancel_goes_to_the_holder_and_waits_for_its_end() {
    for secret in [&b"abcd"[..], &[7; 32], &[9; 256]] {
        let mut run = Run::new(PLAIN);
        // libpq 17 negotiates for these as well.
        run.client(&[&SSL[..], &cancel(secret)].concat());
        let key = CancelKey::new(&[&[0, 0, 4, 1], secret].concat()).unwrap();
        assert_eq!(run.done, [Action::DialHolder(key)]);
        run.event(Event::Dialled);
        assert_eq!(run.to_target, cancel(secret));
        // The server says nothing; what somebody in its place says goes nowhere.
        run.target(b"noise");
        assert_eq!((&run.to_client[..], run.done.len()), (&b"N"[..], 1));
        run.event(Event::Ended(Side::Target));
        assert_eq!(run.done.last(), Some(&Action::Close));
        assert!(run.fault.is_none());
    }
}

#[test]
fn keys_are_found_as_long_as_their_sessions_live() {
    let key = |secret: &[u8]| CancelKey::new(&[&[0, 0, 4, 1], secret].concat()).unwrap();
    let keys = std::sync::Arc::new(CancelKeys::new(2));
    let first = keys.hold(key(b"aaaa"), "first").unwrap();
    let second = keys.hold(key(&[7; 32]), "second").unwrap();
    assert!(keys.hold(key(b"cccc"), "third").is_none(), "there is room for two");
    assert_eq!(keys.holder(&key(b"aaaa")), Some("first"));
    assert_eq!(keys.holder(&key(&[7; 32])), Some("second"));
    assert_eq!(keys.holder(&key(b"aaab")), None);
    // Another server has given out the same key.
    let again = keys.hold(key(b"aaaa"), "again").unwrap();
    drop(first);
    assert_eq!(keys.holder(&key(b"aaaa")), Some("again"));
    drop((second, again));
    assert!(keys.is_empty());
    assert_eq!(format!("{:?}", key(b"aaaa")), "CancelKey(..)");
}

proptest! {
    #[test]
    fn packets_are_the_same_in_any_fragments(
        which in vec(any::<bool>(), 0..2),
        cancels in any::<bool>(),
        cuts in cuts(),
    ) {
        let mut bytes: Vec<u8> = which.iter().flat_map(|gss| if *gss { GSS } else { SSL }).collect();
        let last = match cancels {
            true => cancel(&[1; 32]),
            false => startup(3, 2, &[("user", "app"), ("database", "db")]),
        };
        bytes.extend(last);
        let mut whole = Run::new(PLAIN);
        whole.client(&bytes);
        let mut fragments = Run::new(PLAIN);
        pieces(&bytes, &cuts).iter().for_each(|piece| fragments.client(piece));
        prop_assert_eq!(whole.outcome(), fragments.outcome());
    }

    #[test]
    fn any_bytes_are_packets_or_refused(bytes in vec(any::<u8>(), 0..300), cuts in cuts()) {
        let mut whole = Run::new(PLAIN);
        whole.client(&bytes);
        let mut fragments = Run::new(PLAIN);
        pieces(&bytes, &cuts).iter().for_each(|piece| fragments.client(piece));
        prop_assert_eq!(whole.outcome(), fragments.outcome());
    }
}

fn cancel(secret: &[u8]) -> Vec<u8> {
    packet(&[&[0x04, 0xd2, 0x16, 0x2e, 0, 0, 4, 1], secret].concat())
}
