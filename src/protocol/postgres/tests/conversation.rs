//! A session under way: when it rests, and when it waits.

use super::*;

/// What a server answers, by the kind of request. `C` stands for CommandComplete in front of it.
const READY: &str = "CZ";

fn session() -> Conversation {
    Conversation::new(ServerParameters::default())
}

/// Messages of these types pass; `Z` says that no transaction is open, `z` that one is.
fn pass(session: &mut Conversation, from: Side, types: &str) {
    for tag in types.bytes() {
        let (tag, body) = match tag {
            b'Z' => (b'Z', "I"),
            b'z' => (b'Z', "T"),
            tag => (tag, "body\0"),
        };
        session.pass(from, &message(tag, body)).unwrap();
    }
}

#[test]
fn a_session_rests_between_its_queries() {
    let mut session = session();
    assert!(session.is_idle() && !session.is_waiting());
    pass(&mut session, Side::Client, "Q");
    assert!(!session.is_idle() && session.is_waiting());
    pass(&mut session, Side::Target, "TDD");
    assert!(!session.is_idle() && session.is_between_messages());
    pass(&mut session, Side::Target, READY);
    assert!(session.is_idle() && !session.is_waiting());
    // Notifications come to a session that rests.
    pass(&mut session, Side::Target, "ANS");
    assert!(session.is_idle());
}

#[test]
fn a_session_does_not_rest_within_a_message() {
    for side in [Side::Client, Side::Target] {
        let message = message(b'A', "note");
        for cut in 1..message.len() {
            let mut session = session();
            session.pass(side, &message[..cut]).unwrap();
            assert!(!session.is_idle() && !session.is_between_messages(), "{side:?} at {cut}");
            session.pass(side, &message[cut..]).unwrap();
            assert!(session.is_between_messages());
        }
    }
}

#[test]
fn a_session_in_a_transaction_does_not_rest() {
    let mut session = session();
    pass(&mut session, Side::Client, "Q");
    pass(&mut session, Side::Target, "Cz");
    assert!(!session.is_idle() && !session.is_waiting() && session.is_between_messages());
    pass(&mut session, Side::Client, "Q");
    pass(&mut session, Side::Target, READY);
    assert!(session.is_idle());
}

#[test]
fn each_query_of_a_pipeline_is_waited_for() {
    for requests in ["QQQ", "PBESBESF", "QSQ"] {
        let mut session = session();
        pass(&mut session, Side::Client, requests);
        for _ in 0..3 - requests.matches("PBESBESF").count() {
            assert!(!session.is_idle(), "{requests}");
            pass(&mut session, Side::Target, READY);
        }
        pass(&mut session, Side::Target, if requests.len() > 3 { READY } else { "" });
        assert!(session.is_idle(), "{requests}");
    }
}

#[test]
fn messages_without_their_sync_are_waited_for() {
    let mut session = session();
    pass(&mut session, Side::Client, "PBEH");
    pass(&mut session, Side::Target, "12C");
    assert!(!session.is_idle() && session.is_waiting());
    // Those of the next request may be ahead of the last one's ReadyForQuery.
    pass(&mut session, Side::Client, "SPB");
    pass(&mut session, Side::Target, "Z");
    assert!(!session.is_idle());
    pass(&mut session, Side::Client, "ES");
    pass(&mut session, Side::Target, READY);
    assert!(session.is_idle());
}

/// As clients copy: by a Query; by Execute, as libpq does, with a Sync that the server passes over, or without
/// one; without waiting for the server's word; and where it fails at the client or at the server.
#[test]
fn a_copy_to_the_server_is_over_with_its_ready_for_query() {
    use Side::{Client, Target};
    let copies: [&[(Side, &str)]; 8] = [
        &[(Client, "Q"), (Target, "G"), (Client, "ddd"), (Client, "c"), (Target, "CZ")],
        &[(Client, "PBDES"), (Target, "12nG"), (Client, "ddd"), (Client, "cS"), (Target, "CZ")],
        &[(Client, "PBEH"), (Target, "12G"), (Client, "dd"), (Client, "cS"), (Target, "CZ")],
        &[(Client, "PBEddcS"), (Target, "12G"), (Target, "CZ")],
        &[(Client, "Qddc"), (Target, "G"), (Target, "CZ")],
        &[(Client, "PBES"), (Target, "12G"), (Client, "df"), (Client, "S"), (Target, "EZ")],
        &[
            (Client, "PBES"),
            (Target, "12G"),
            (Client, "d"),
            (Target, "E"),
            (Client, "S"),
            (Target, "Z"),
        ],
        &[
            (Client, "Q"),
            (Target, "G"),
            (Client, "d"),
            (Target, "E"),
            (Client, "dc"),
            (Target, "Z"),
        ],
    ];
    for copy in copies {
        let mut session = session();
        for (side, types) in copy {
            pass(&mut session, *side, types);
            let last = types.ends_with('Z');
            assert_eq!(session.is_idle(), last, "{copy:?} after {types}");
        }
        pass(&mut session, Client, "Q");
        assert!(!session.is_idle());
        pass(&mut session, Target, READY);
        assert!(session.is_idle(), "{copy:?}, and a query");
    }
}

#[test]
fn a_replication_never_rests() {
    let mut session = session();
    pass(&mut session, Side::Client, "Q");
    pass(&mut session, Side::Target, "Wddd");
    pass(&mut session, Side::Client, "d");
    assert!(!session.is_idle() && session.is_waiting());
}

#[test]
fn a_session_tells_what_has_become_of_its_server() {
    let mut session = session();
    session.pass(Side::Target, &message(b'S', "in_hot_standby\0on\0")).unwrap();
    assert_eq!(session.server().role(), Some(ServerRole::Standby));
    session.pass(Side::Target, &message(b'S', "in_hot_standby\0off\0")).unwrap();
    assert_eq!(session.server().role(), Some(ServerRole::Primary));
    assert!(!session.has_terminated());
    pass(&mut session, Side::Client, "X");
    assert!(session.has_terminated());
}

#[test]
fn what_is_no_message_ends_the_session() {
    for length in [0u32, 3, 0x8000_0000, 0xffff_ffff] {
        for side in [Side::Client, Side::Target] {
            let header = [&[b'd'][..], &length.to_be_bytes()].concat();
            assert!(session().pass(side, &header).is_err());
            let mut session = session();
            assert!(session.pass(side, &header[..4]).is_ok());
            assert!(session.pass(side, &header[4..]).is_err());
        }
    }
    // Bodies are not kept, so they may be as long as they like.
    let long = [&b"d"[..], &0x7fff_ffffu32.to_be_bytes(), &[0; 1000]].concat();
    assert!(session().pass(Side::Client, &long).is_ok());
}

proptest! {
    #[test]
    fn messages_are_the_same_in_any_fragments(
        messages in vec((any::<u8>(), vec(any::<u8>(), 0..150)), 0..12),
        cuts in cuts(),
    ) {
        let bytes: Vec<u8> =
            messages.iter().flat_map(|(tag, body)| message(*tag, body)).collect();
        let mut seen = Vec::new();
        let mut scanner = Scanner::default();
        for piece in pieces(&bytes, &cuts) {
            scanner.scan(piece, |tag, body| seen.push((tag, body.to_vec()))).unwrap();
        }
        prop_assert!(scanner.is_between_messages());
        let shown = messages.into_iter().map(|(tag, mut body)| {
            body.truncate(32);
            (tag, body)
        });
        prop_assert_eq!(seen, shown.collect::<Vec<_>>());
    }

    #[test]
    fn any_bytes_pass_alike_in_any_fragments(bytes in vec(any::<u8>(), 0..300), cuts in cuts()) {
        for side in [Side::Client, Side::Target] {
            let (mut whole, mut fragments) = (session(), session());
            let one = whole.pass(side, &bytes);
            let other = pieces(&bytes, &cuts).iter().try_for_each(|piece| fragments.pass(side, piece));
            prop_assert_eq!(one, other);
            if one.is_ok() {
                prop_assert_eq!(whole.is_idle(), fragments.is_idle());
            }
        }
    }
}
