//! From the StartupMessage to ReadyForQuery.

use super::*;

const SCRAM: &str = "SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0";
const BOTH: u32 = 10;

/// A login by SCRAM: who says what, in turn.
fn scram(secret: &[u8]) -> Vec<(Side, Vec<u8>)> {
    vec![
        // Servers may say first which version they speak.
        (Side::Target, message(b'v', [0, 3, 0, 0, 0, 0, 0, 0])),
        (Side::Target, authentication(BOTH, SCRAM)),
        (Side::Client, message(b'p', b"SCRAM-SHA-256\0\0\0\0\x05n,,n=")),
        (Side::Target, authentication(11, "r=a,s=b,i=4096")),
        (Side::Client, message(b'p', b"c=biws,r=a,p=c")),
        (Side::Target, [authentication(12, "v=d"), welcome("off", secret)].concat()),
    ]
}

#[test]
fn channel_binding_is_not_offered_in_plaintext() {
    let mut run = Run::dialled(PLAIN);
    run.target(&authentication(BOTH, SCRAM));
    assert_eq!(run.to_client, authentication(BOTH, "SCRAM-SHA-256\0\0"));
}

#[test]
fn channel_binding_is_offered_where_it_is_not_to_be_stripped() {
    let pass = Settings { channel_binding: ChannelBinding::Pass, ..PLAIN };
    let secured = Run { start: Startup::new(PLAIN, true), ..Run::new(PLAIN) };
    for mut run in [Run::new(pass), secured] {
        run.client(&startup(3, 0, &[("user", "app")]));
        run.event(Event::Dialled);
        run.target(&authentication(BOTH, SCRAM));
        assert_eq!(run.to_client, authentication(BOTH, SCRAM));
    }
}

#[test]
fn a_server_with_channel_binding_only_is_named_as_the_cause() {
    let mut run = Run::dialled(PLAIN);
    run.target(&authentication(BOTH, "SCRAM-SHA-256-PLUS\0\0"));
    assert!(run.to_client.is_empty());
    assert_eq!(run.refusal(), "28000");
}

#[test]
fn other_requests_pass_as_they_are() {
    for request in [
        authentication(3, ""),
        authentication(5, "salt"),
        authentication(7, ""),
        authentication(10, "SCRAM-SHA-256\0\0"),
        authentication(10, "OAUTHBEARER\0\0"),
    ] {
        let mut run = Run::dialled(PLAIN);
        run.target(&request);
        assert_eq!(run.to_client, request);
        run.client(&message(b'p', "secret\0"));
        assert!(run.to_target.ends_with(&message(b'p', "secret\0")));
        assert!(run.fault.is_none());
    }
}

#[test]
fn a_login_that_the_server_refuses_for_its_binding_gets_a_hint() {
    let error = |code: &str, more: &str| message(b'E', format!("SFATAL\0C{code}\0Mno\0{more}\0"));
    let hint = |settings, secured, messages: &[Vec<u8>]| {
        let mut run = Run { start: Startup::new(settings, secured), ..Run::new(settings) };
        run.client(&startup(3, 0, &[("user", "app")]));
        run.event(Event::Dialled);
        for message in messages {
            run.to_client.clear();
            run.target(message);
        }
        run.event(Event::Ended(Side::Target));
        assert!(run.fault.is_none());
        field(&run.to_client[5..], b'H').map(|hint| String::from_utf8(hint.to_vec()).unwrap())
    };
    let offer = authentication(BOTH, SCRAM);
    let plain = hint(PLAIN, false, &[offer.clone(), error("28000", "")]);
    assert!(plain.as_ref().unwrap().contains("Channel Binding=Disable"), "{plain:?}");
    let secured = hint(PLAIN, true, &[offer.clone(), error("28000", "")]);
    assert!(secured.as_ref().unwrap().contains("channel_binding=disable"), "{secured:?}");
    assert_eq!(hint(PLAIN, false, &[offer.clone(), error("28P01", "")]), None);
    assert_eq!(hint(PLAIN, false, &[error("28000", "")]), None);
    let own = hint(PLAIN, false, &[offer, error("28000", "Hthe server's\0")]);
    assert_eq!(own.as_deref(), Some("the server's"));
}

#[test]
fn the_session_has_what_its_server_reported() {
    for secret in [&b"abcd"[..], &[7; 32], &[8; 256]] {
        let mut run = Run::dialled(PLAIN);
        run.target(&[welcome("off", secret), message(b'A', "later")].concat());
        let key = CancelKey::new(&[&[0, 0, 4, 1], secret].concat()).unwrap();
        assert_eq!(run.done, [Action::Dial, Action::HoldKey(key), Action::Established]);
        assert_eq!(run.target, message(b'A', "later"), "that is the session's");
        assert_eq!(run.to_client, welcome("off", secret));
        let conversation = run.start.into_session().unwrap();
        let server = conversation.server();
        assert_eq!(server.role(), Some(ServerRole::Primary));
        assert_eq!(server.default_transaction_read_only(), Some(false));
        assert_eq!(server.server_version(), Some("15.18"));
        assert!(conversation.is_idle());
    }
}

#[test]
fn a_server_of_another_role_lets_nobody_in() {
    let standby = Settings { role: Role::Standby, ..PLAIN };
    let primary = Settings { role: Role::Primary, ..PLAIN };
    for (settings, reported) in [(primary, "on"), (standby, "off")] {
        let mut run = Run::dialled(settings);
        run.target(&welcome(reported, b"abcd"));
        assert!(run.to_client.is_empty(), "nothing of its welcome");
        assert_eq!(run.refusal(), "57P03");
        assert!(!run.fault.as_ref().unwrap().is_of_endpoint(), "it is well");
        assert!(run.start.server().unwrap().role().is_some(), "for whoever chooses next time");
    }
    for (settings, reported) in [(primary, "off"), (standby, "on")] {
        let mut run = Run::dialled(settings);
        run.target(&welcome(reported, b"abcd"));
        assert_eq!(run.to_client, welcome(reported, b"abcd"));
        assert_eq!(run.done.last(), Some(&Action::Established));
    }
}

#[test]
fn a_server_that_does_not_report_its_role_lets_in_only_whom_any_will_do() {
    let silent = [authentication(0, ""), message(b'Z', "I")].concat();
    let mut run = Run::dialled(Settings { role: Role::Primary, ..PLAIN });
    run.target(&silent);
    assert_eq!(run.refusal(), "57P03");
    let mut run = Run::dialled(PLAIN);
    run.target(&silent);
    assert_eq!(run.done, [Action::Dial, Action::Established], "a pooler may give no key");
}

#[test]
fn a_refusal_passes_whatever_the_role() {
    let refusal = message(b'E', "SFATAL\0C3D000\0Mno such database\0\0");
    let mut run = Run::dialled(Settings { role: Role::Primary, ..PLAIN });
    let welcome = [authentication(0, ""), message(b'S', "in_hot_standby\0on\0")].concat();
    run.target(&[&welcome[..], &refusal].concat());
    assert_eq!(run.to_client, [&welcome[..], &refusal].concat());
    run.event(Event::Ended(Side::Target));
    assert_eq!(run.done.last(), Some(&Action::Close));
    assert!(run.fault.is_none());
}

#[test]
fn a_server_that_just_leaves_is_a_failure() {
    for said in [vec![], authentication(3, ""), authentication(0, "")] {
        let mut run = Run::dialled(PLAIN);
        run.target(&said);
        run.event(Event::Ended(Side::Target));
        assert_eq!(run.refusal(), "08006");
        assert!(run.fault.unwrap().is_of_endpoint());
    }
}

#[test]
fn what_no_server_says_ends_the_start() {
    let header = |tag: u8, length: u32| [&[tag][..], &length.to_be_bytes()].concat();
    let authenticated = |message: Vec<u8>| [authentication(0, ""), message].concat();
    let cases = [
        b"HTTP/1.1 400 Bad Request\r\n".to_vec(),
        b"SSH-2.0-OpenSSH\r\n".to_vec(),
        header(b'R', 3),
        header(b'R', 0),
        header(b'R', 0x8000_0000),
        header(b'E', 1024 * 1024),
        header(b'S', 0x7fff_ffff),
        message(b'R', "abc"),
        message(b'R', [0, 0, 0, 10, b'a']),
        message(b'Z', "I"),
        message(b'K', [0; 8]),
        message(b'D', ""),
        authenticated(message(b'R', [0; 4])),
        authenticated(message(b'K', [0; 7])),
        authenticated(message(b'K', [0; 261])),
        authenticated(message(b'Z', "")),
        authenticated(message(b'S', "name")),
        message(b'N', "\0").repeat(1001),
    ];
    for bytes in cases {
        let mut run = Run::dialled(PLAIN);
        run.target(&bytes);
        assert!(run.fault.is_some(), "{bytes:?}");
        assert_eq!(run.refusal(), "08P01", "{bytes:?}");
    }
    let mut run = Run::dialled(Settings { role: Role::Primary, ..PLAIN });
    let notices = message(b'N', vec![b'x'; 1000]).repeat(70);
    run.target(&authenticated(notices));
    assert_eq!(run.refusal(), "08P01", "so much is not held back");
}

#[test]
fn no_password_leaves_before_the_server_asks() {
    let mut run = Run::new(PLAIN);
    let password = message(b'p', "secret\0");
    run.client(&[startup(3, 0, &[("user", "app")]), password.clone()].concat());
    run.event(Event::Dialled);
    assert!(!run.to_target.ends_with(&password));
    run.target(&authentication(3, ""));
    assert!(run.to_target.ends_with(&password));
}

#[test]
fn a_server_that_is_ahead_waits_for_the_clients_response() {
    let mut run = Run::dialled(PLAIN);
    run.target(&[authentication(3, ""), welcome("off", b"abcd")].concat());
    assert_eq!(run.to_client, authentication(3, ""));
    run.client(&message(b'p', "secret\0"));
    assert!(run.to_target.ends_with(&message(b'p', "secret\0")));
    assert_eq!(run.done.last(), Some(&Action::Established));
}

#[test]
fn the_last_token_of_gssapi_needs_no_response() {
    for responds in [false, true] {
        let mut run = Run::dialled(PLAIN);
        run.target(&authentication(7, ""));
        run.client(&message(b'p', "token"));
        run.target(&authentication(8, "token"));
        let sent = run.to_target.len();
        if responds {
            run.client(&message(b'p', "more"));
            assert!(run.to_target.len() > sent);
        }
        run.target(&welcome("off", b"abcd"));
        assert_eq!(run.done.last(), Some(&Action::Established), "responds: {responds}");
    }
}

#[test]
fn what_a_client_sends_early_is_left_to_the_session() {
    let mut run = Run::dialled(PLAIN);
    let query = message(b'Q', "select 1\0");
    let sent = run.to_target.len();
    run.client(&query);
    run.target(&welcome("off", b"abcd"));
    assert_eq!(run.done.last(), Some(&Action::Established));
    assert_eq!((&run.client[..], run.to_target.len()), (&query[..], sent));
}

#[test]
fn a_client_that_is_asked_for_its_password_says_that_or_goodbye() {
    let asked = || {
        let mut run = Run::dialled(PLAIN);
        run.target(&authentication(3, ""));
        run
    };
    let mut run = asked();
    run.client(&message(b'Q', "select 1\0"));
    assert_eq!(run.refusal(), "08P01");
    let mut run = asked();
    run.client(&[&b"p"[..], &65_540u32.to_be_bytes()].concat());
    assert_eq!(run.refusal(), "08P01");
    let mut run = asked();
    run.client(&message(b'X', ""));
    assert!(run.to_target.ends_with(&message(b'X', "")));
    assert_eq!(run.done.last(), Some(&Action::Close));
    let mut run = asked();
    run.event(Event::Ended(Side::Client));
    assert_eq!(run.done.last(), Some(&Action::Close));
}

/// Runs a login, each of its turns in pieces.
fn run_in_pieces(settings: Settings, turns: &[(Side, Vec<u8>)], cuts: &[usize]) -> Run<Startup> {
    let mut run = Run::dialled(settings);
    for (side, bytes) in turns {
        for piece in pieces(bytes, cuts) {
            match side {
                Side::Client => run.client(piece),
                Side::Target => run.target(piece),
            }
        }
    }
    run
}

#[test]
fn a_login_may_be_split_at_every_byte_and_cut_at_every_byte() {
    let turns = scram(b"abcd");
    let whole = run_in_pieces(PLAIN, &turns, &[usize::MAX]);
    assert_eq!(whole.done.last(), Some(&Action::Established));
    assert_eq!(run_in_pieces(PLAIN, &turns, &[1]).outcome(), whole.outcome());
    for (nth, (side, bytes)) in turns.iter().enumerate() {
        for cut in 0..bytes.len() {
            let mut turns = turns[..=nth].to_vec();
            turns[nth].1.truncate(cut);
            let mut run = run_in_pieces(PLAIN, &turns, &[usize::MAX]);
            assert!(run.fault.is_none(), "{side:?} {nth}, at {cut}");
            assert_eq!(run.done, [Action::Dial]);
            assert!(whole.to_client.starts_with(&run.to_client));
            assert!(whole.to_target.starts_with(&run.to_target));
            run.event(Event::Ended(*side));
            assert_eq!(run.fault.is_some(), *side == Side::Target);
        }
    }
}

proptest! {
    #[test]
    fn a_login_is_the_same_in_any_fragments_and_any_order(
        secret in prop_oneof![Just(4usize), Just(32), 4usize..=256],
        primary in any::<bool>(),
        cuts in cuts(),
        ahead in vec(any::<bool>(), 1..6),
    ) {
        let role = if primary { Role::Primary } else { Role::Any };
        let settings = Settings { role, ..PLAIN };
        let turns = scram(&vec![7; secret]);
        let whole = run_in_pieces(settings, &turns, &[usize::MAX]);
        prop_assert_eq!(whole.done.last(), Some(&Action::Established));
        prop_assert_eq!(run_in_pieces(settings, &turns, &cuts).outcome(), whole.outcome());
        // The client may be ahead: what it says is then left until it is asked.
        let mut turns = turns;
        for nth in 1..turns.len() {
            if turns[nth].0 == Side::Client && ahead[nth % ahead.len()] {
                turns.swap(nth - 1, nth);
            }
        }
        let run = run_in_pieces(settings, &turns, &cuts);
        prop_assert_eq!(run.outcome(), whole.outcome());
    }

    #[test]
    fn any_bytes_of_a_server_pass_or_end_the_start(
        messages in vec((any::<u8>(), vec(any::<u8>(), 0..20)), 0..10),
        damage in proptest::option::of((any::<u16>(), any::<u8>())),
        primary in any::<bool>(),
        cuts in cuts(),
    ) {
        let role = if primary { Role::Primary } else { Role::Any };
        let mut bytes = welcome("off", b"abcd");
        for (tag, body) in messages {
            bytes.extend(message(b"RSKZENv"[usize::from(tag) % 7], body));
        }
        if let Some((at, byte)) = damage {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
        }
        let turns = [(Side::Target, bytes)];
        let settings = Settings { role, ..PLAIN };
        let whole = run_in_pieces(settings, &turns, &[usize::MAX]);
        prop_assert_eq!(run_in_pieces(settings, &turns, &cuts).outcome(), whole.outcome());
    }
}
