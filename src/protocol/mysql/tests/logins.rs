//! From the client's response to the server's OK.

use super::*;

#[test]
fn the_server_gets_the_flags_then_tls_then_the_response() {
    let mut run = Run::plain().greeted();
    let sent = response(CLIENT, NATIVE, &[7; 20]);
    run.client(&write(1, &sent));
    assert_eq!(run.target_received(), [(1, flags(CLIENT | TLS))]);
    assert_eq!(run.done, [Action::StartTargetTls]);
    run.event(Event::TargetSecured);
    assert_eq!(run.target_received(), [(2, response(CLIENT | TLS, NATIVE, &[7; 20]))]);
    run.target(&write(3, OK));
    assert_eq!(run.client_received(), [(2, OK.to_vec())]);
    assert_eq!(run.done.last(), Some(&Action::Established));
}

#[test]
fn nothing_of_the_clients_goes_to_a_server_that_is_not_verified() {
    let mut run = Run::plain().greeted();
    run.client(&write(1, &response(CLIENT, NATIVE, b"a password hash here")));
    assert_eq!(run.to_target.len(), 36);
    assert_eq!(run.start.closing_message(), "");
}

#[test]
fn a_server_in_plaintext_gets_the_response_at_once() {
    let mut run = Run::new(ClientTls::Off, false).greeted();
    run.client(&write(1, &response(CLIENT, NATIVE, &[7; 20])));
    assert_eq!(run.target_received(), [(1, response(CLIENT, NATIVE, &[7; 20]))]);
    run.target(&write(2, OK));
    assert_eq!(run.client_received(), [(2, OK.to_vec())]);
}

#[test]
fn a_client_with_tls_of_its_own_has_the_servers_numbers() {
    let mut run = Run::new(ClientTls::Required, true).greeted();
    run.client(&write(1, &flags(CLIENT | TLS)));
    assert_eq!(run.done, [Action::StartTls]);
    run.event(Event::Secured);
    run.client(&write(2, &response(CLIENT | TLS, CACHING, &[7; 32])));
    run.event(Event::TargetSecured);
    let expected = [(1, flags(CLIENT | TLS)), (2, response(CLIENT | TLS, CACHING, &[7; 32]))];
    assert_eq!(run.target_received(), expected);
    run.target(&write(3, &[1, 4]));
    assert_eq!(run.client_received(), [(3, vec![1, 4])]);
    // It sends its password as it is: TLS carries it.
    run.client(&write(4, b"secret\0"));
    assert_eq!(run.target_received(), [(4, b"secret\0".to_vec())]);
    run.target(&write(5, OK));
    assert_eq!(run.client_received(), [(5, OK.to_vec())]);
}

#[test]
fn a_client_with_tls_of_its_own_and_a_server_without() {
    let mut run = Run::new(ClientTls::Required, false);
    run.target(&greeting(NATIVE, false));
    run.client(&write(1, &flags(CLIENT | TLS)));
    run.event(Event::Secured);
    run.to_client.clear();
    run.client(&write(2, &response(CLIENT | TLS, NATIVE, &[7; 20])));
    assert_eq!(run.target_received(), [(1, response(CLIENT, NATIVE, &[7; 20]))]);
    run.target(&write(2, OK));
    assert_eq!(run.client_received(), [(3, OK.to_vec())]);
}

#[test]
fn a_warm_cache_needs_no_password() {
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&[write(3, &[1, 3]), write(4, OK)].concat());
    assert_eq!(run.client_received(), [(2, vec![1, 3]), (3, OK.to_vec())]);
    assert_eq!(run.done.last(), Some(&Action::Established));
}

/// A login by which the client encrypts its password, up to its key.
fn asks_for_key(run: &mut Run<Startup>, sequence: u8, request: u8) -> Vec<u8> {
    run.client(&write(sequence, &[request]));
    let received = run.client_received();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].0, sequence + 1);
    assert_eq!(run.to_target, b"", "the server does not know the request for a key");
    received[0].1.clone()
}

#[test]
fn a_cold_cache_gets_the_password_over_tls_from_a_client_without() {
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.to_target.clear();
    run.target(&write(3, &[1, 4]));
    assert_eq!(run.client_received(), [(2, vec![1, 4])]);
    let key = asks_for_key(&mut run, 3, 2);
    run.client(&write(5, &encrypted(&key, "pässword", SCRAMBLE)));
    assert_eq!(run.target_received(), [(4, "pässword\0".as_bytes().to_vec())]);
    run.target(&write(5, OK));
    assert_eq!(run.client_received(), [(6, OK.to_vec())]);
    assert_eq!(run.done.last(), Some(&Action::Established));
}

#[test]
fn a_password_is_bound_to_the_scramble_of_the_last_switch() {
    for (plugin, request, asks) in [(CACHING, 2, &[1, 4][..]), (SHA256, 1, &[])] {
        let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
        run.target(&write(3, &switch(plugin)));
        let mut numbers = (3, 4);
        if !asks.is_empty() {
            run.client(&write(3, &[7; 32]));
            run.target(&write(5, asks));
            numbers = (5, 6);
        }
        run.to_target.clear();
        run.to_client.clear();
        let key = asks_for_key(&mut run, numbers.0, request);
        run.client(&write(numbers.0 + 2, &encrypted(&key, "secret", OTHER_SCRAMBLE)));
        assert_eq!(run.target_received(), [(numbers.1, b"secret\0".to_vec())], "{plugin}");
        run.target(&write(numbers.1 + 1, OK));
        assert_eq!(run.client_received(), [(numbers.0 + 3, OK.to_vec())]);
    }
}

#[test]
fn a_response_that_asks_for_a_key_itself_is_sent_with_the_password() {
    for password in ["secret", &"x".repeat(213)] {
        let mut run = Run::plain().greeted();
        run.client(&write(1, &response(CLIENT, SHA256, &[1])));
        run.to_target.clear();
        run.event(Event::TargetSecured);
        let received = run.client_received();
        assert_eq!(received[0].0, 2);
        run.client(&write(3, &encrypted(&received[0].1, password, SCRAMBLE)));
        let with_password = response(CLIENT | TLS, SHA256, format!("{password}\0").as_bytes());
        assert_eq!(run.target_received(), [(2, with_password)]);
        run.target(&write(3, OK));
        assert_eq!(run.client_received(), [(4, OK.to_vec())]);
    }
}

#[test]
fn a_password_that_cannot_be_decrypted_is_refused() {
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&write(3, &[1, 4]));
    run.to_client.clear();
    let key = asks_for_key_of(&mut run);
    run.to_target.clear();
    // By another scramble it ends with anything but a zero.
    run.client(&write(5, &encrypted(&key, "secret", OTHER_SCRAMBLE)));
    let (sequence, code, state, text) = run.refusal();
    assert_eq!((sequence, code, &state[..]), (6, 1045, "28000"), "{text}");
    assert_eq!(run.to_target, b"");
}

fn asks_for_key_of(run: &mut Run<Startup>) -> Vec<u8> {
    run.to_target.clear();
    asks_for_key(run, 3, 2)
}

#[test]
fn a_password_encrypted_with_the_servers_own_key_is_explained() {
    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&write(3, &[1, 4]));
    run.to_target.clear();
    run.client(&write(3, &[9; 256]));
    let (_, code, _, text) = run.refusal();
    assert_eq!(code, 1045);
    assert!(text.contains("server-public-key-path"), "{text}");
    assert_eq!(run.to_target, b"");
}

#[test]
fn without_a_key_the_client_is_told_so() {
    let settings = Settings { client_tls: ClientTls::Off, target_tls: true, key: None };
    let mut run = Run { start: Startup::new(settings), ..Run::plain() }.greeted();
    run.client(&write(1, &response(CLIENT, CACHING, &[7; 32])));
    run.event(Event::TargetSecured);
    run.target(&write(3, &[1, 4]));
    run.client(&write(3, &[2]));
    assert_eq!(run.refusal().1, 1105);
}

#[test]
fn other_plugins_pass_as_they_are() {
    for (plugin, data) in [
        ("client_ed25519", &[3; 64][..]),
        (NATIVE, &[4; 20]),
        ("mysql_clear_password", b"token\0"),
        ("mysql_clear_password", &[65; 1500]),
        (NATIVE, b""),
        // A byte that would ask for a key in another one.
        ("client_ed25519", &[2]),
    ] {
        let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
        run.to_target.clear();
        run.target(&write(3, &switch(plugin)));
        assert_eq!(run.client_received(), [(2, switch(plugin))]);
        run.client(&write(3, data));
        assert_eq!(run.target_received(), [(4, data.to_vec())], "{plugin}");
        run.target(&write(5, OK));
        assert_eq!(run.client_received(), [(4, OK.to_vec())]);
    }
}

#[test]
fn questions_and_further_factors_are_passed_on() {
    let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
    run.target(&write(3, &switch("dialog")));
    run.client(&write(3, b"one\0"));
    // Of type 2, and no further factor.
    run.target(&write(5, b"\x02Code: "));
    run.client(&write(5, b"two\0"));
    run.target(&write(7, &[&[2], b"none\0data\0"[..].as_ref()].concat()));
    run.client(&write(7, b"three\0"));
    run.target(&write(9, OK));
    assert_eq!(run.client_received().last(), Some(&(8, OK.to_vec())));
    let sequences: Vec<u8> = run.target_received().iter().map(|packet| packet.0).collect();
    assert_eq!(sequences, [2, 4, 6, 8]);

    let mut run = Run::responded(&response(CLIENT, CACHING, &[7; 32]));
    run.target(&write(3, &[1, 3]));
    run.target(&write(4, &[&[2], &switch(CACHING)[1..]].concat()));
    run.client(&write(4, &[7; 32]));
    run.target(&write(6, &[1, 4]));
    run.to_client.clear();
    run.to_target.clear();
    let key = asks_for_key(&mut run, 6, 2);
    run.client(&write(8, &encrypted(&key, "second", OTHER_SCRAMBLE)));
    assert_eq!(run.target_received(), [(7, b"second\0".to_vec())]);
}

#[test]
fn clients_before_plugins_are_taken_as_they_are() {
    let old = 1 | 1 << 9 | 1 << 15;
    let mut payload = flags(old);
    payload.extend(b"app\0\x14");
    payload.extend([7; 20]);
    let run = Run::responded(&payload);
    let mut expected = flags(old | TLS);
    expected.extend(b"app\0\x14");
    expected.extend([7; 20]);
    assert_eq!(packets(&run.to_target), [(2, expected)]);
}

#[test]
fn what_follows_the_ok_is_the_sessions() {
    let mut run = Run::responded(&response(CLIENT, NATIVE, &[7; 20]));
    // A client that does not wait for the OK.
    run.client(&write(0, b"\x03select 1"));
    run.target(&[&write(3, OK)[..], b"more"].concat());
    assert_eq!(run.done.last(), Some(&Action::Established));
    assert_eq!(run.client[..], write(0, b"\x03select 1")[..]);
    assert_eq!(run.target[..], b"more"[..]);
}

/// A login by a cold cache: who says what, in turn. What the client encrypts depends on the key.
fn cold(run: &mut Run<Startup>, mut send: impl FnMut(&mut Run<Startup>, Side, &[u8])) {
    send(run, Side::Target, &greeting(NATIVE, true));
    send(run, Side::Client, &write(1, &response(CLIENT, NATIVE, &[7; 20])));
    run.event(Event::TargetSecured);
    send(run, Side::Target, &write(3, &switch(CACHING)));
    send(run, Side::Client, &write(3, &[8; 32]));
    send(run, Side::Target, &write(5, &[1, 4]));
    send(run, Side::Client, &write(5, &[2]));
    let key = packets(&run.to_client).last().unwrap().1.clone();
    send(run, Side::Client, &write(7, &encrypted(&key, "secret", OTHER_SCRAMBLE)));
    send(run, Side::Target, &write(7, OK));
}

#[test]
fn a_login_is_the_same_wherever_it_is_split() {
    let outcome = |piece: usize| {
        let mut run = Run::plain();
        cold(&mut run, |run, side, bytes| {
            for piece in bytes.chunks(piece) {
                match side {
                    Side::Client => run.client(piece),
                    Side::Target => run.target(piece),
                }
            }
        });
        assert!(run.fault.is_none(), "{:?}", run.fault);
        assert!(run.to_target.windows(7).any(|window| window == b"secret\0"));
        (run.to_client, run.to_target, run.done)
    };
    let whole = outcome(usize::MAX);
    for piece in 1..300 {
        assert_eq!(outcome(piece), whole, "in pieces of {piece}");
    }
}

proptest! {
    #[test]
    fn no_bytes_of_either_side_make_a_login_panic(
        target in vec(any::<u8>(), 0..60),
        client in vec(any::<u8>(), 0..60),
        capabilities: u32,
        sequences: bool,
        tls: bool,
    ) {
        let mut run = Run::new(ClientTls::Off, tls).greeted();
        let mut payload = flags(capabilities | 1 << 9);
        payload.extend(&client);
        run.client(&write(1, &payload));
        run.event(Event::TargetSecured);
        for (number, piece) in target.chunks(7).enumerate() {
            let sequence = if sequences { 3 + 2 * number as u8 } else { piece[0] };
            run.target(&write(sequence, piece));
            run.client(&write(sequence.wrapping_sub(u8::from(tls)), piece));
        }
        drop(run.start.closing_message());
        if run.fault.is_some() {
            run.refusal();
        }
    }
}
