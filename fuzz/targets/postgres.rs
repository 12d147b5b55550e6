//! Both sides of the start of a PostgreSQL session and of the session itself, in one piece or in many: the
//! same is done and sent.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use truename::{
    config::{ChannelBinding, Negotiation, Role},
    protocol::{
        Action, Event, Side, Start, Step,
        postgres::{ClientTls, Opening, Settings, Startup},
    },
};

/// What somebody else could notice.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    to_client: Vec<u8>,
    to_target: Vec<u8>,
    done: Vec<Action>,
    fault: Option<String>,
    idle: Option<bool>,
}

fuzz_target!(|input: (u8, u8, &[u8], &[u8])| {
    let (fragment, choices, client, target) = input;
    let settings = Settings {
        role: [Role::Any, Role::Primary, Role::Standby][usize::from(choices & 3) % 3],
        channel_binding: [ChannelBinding::Strip, ChannelBinding::Pass]
            [usize::from(choices >> 2 & 1)],
        client_tls: [ClientTls::Off, ClientTls::Offered, ClientTls::Required]
            [usize::from(choices >> 3 & 3) % 3],
    };
    let secured = choices & 32 != 0;
    let whole = run(settings, secured, client, target, usize::MAX);
    let pieces = run(settings, secured, client, target, fragment.max(1).into());
    // Bytes behind a request for TLS are a failure if they came along with it, and TLS if they came later.
    if !whole.done.contains(&Action::StartTls) && !pieces.done.contains(&Action::StartTls) {
        assert_eq!(whole, pieces);
    }
    open(target);
});

/// A start: the client's packets, what the target says, and what else the client says; and the session, if one begins.
fn run(settings: Settings, secured: bool, client: &[u8], target: &[u8], piece: usize) -> Outcome {
    let mut start = Startup::new(settings, secured);
    let mut outcome = Outcome::default();
    let mut left = [BytesMut::new(), BytesMut::new()];
    let mut client = client;
    while !client.is_empty() && !outcome.done.iter().any(dials) {
        let (now, later) = client.split_at(piece.min(client.len()));
        left[0].extend_from_slice(now);
        settle(&mut start, &mut left, &mut outcome);
        client = later;
    }
    if !outcome.done.iter().any(dials) {
        return outcome;
    }
    // What it has sent beyond its packets comes last: else it would be a race.
    let rest = [&left[0].split()[..], client].concat();
    on(&mut start, Event::Dialled, &mut outcome);
    for (side, bytes) in [(Side::Target, target), (Side::Client, &rest)] {
        for piece in bytes.chunks(piece) {
            left[side as usize].extend_from_slice(piece);
            settle(&mut start, &mut left, &mut outcome);
        }
    }
    if outcome.done.last() == Some(&Action::Established)
        && let Some(mut session) = start.into_session()
    {
        for (side, left) in [Side::Client, Side::Target].into_iter().zip(&left) {
            let passed = left.chunks(piece).try_for_each(|piece| session.pass(side, piece));
            outcome.fault = outcome.fault.or(passed.err().map(|error| error.to_string()));
        }
        if outcome.fault.is_none() {
            outcome.idle = Some(session.is_idle());
        }
    }
    outcome
}

fn dials(action: &Action) -> bool {
    matches!(action, Action::Dial | Action::DialHolder(_))
}

/// Offers what is left, as long as some is taken.
fn settle(start: &mut Startup, left: &mut [BytesMut; 2], outcome: &mut Outcome) {
    loop {
        let before = left.iter().map(BytesMut::len).sum::<usize>();
        for side in [Side::Client, Side::Target] {
            let buffer = &mut left[side as usize];
            if !buffer.is_empty() {
                on(start, Event::Bytes(side, buffer), outcome);
            }
        }
        if left.iter().map(BytesMut::len).sum::<usize>() == before {
            return;
        }
    }
}

fn on(start: &mut Startup, event: Event<'_>, outcome: &mut Outcome) {
    if outcome.fault.is_some() {
        return;
    }
    let mut actions = Vec::new();
    let result = start.on(event, &mut actions);
    for action in actions {
        match action {
            Action::Send(Side::Client, bytes) => outcome.to_client.extend_from_slice(&bytes),
            Action::Send(Side::Target, bytes) => outcome.to_target.extend_from_slice(&bytes),
            other => outcome.done.push(other),
        }
    }
    if let Err(fault) = result {
        // libpq takes no longer one.
        assert!(start.refusal(&fault).len() < 30_000);
        outcome.fault = Some(fault.to_string());
    }
}

/// TLS begins where the server has said one `S`, and nothing else.
fn open(target: &[u8]) {
    let mut opening = Opening::new(Negotiation::Request);
    let asked = opening.next(&mut BytesMut::new());
    assert!(matches!(asked, Ok(Step::Send(_))));
    let opened = opening.next(&mut BytesMut::from(target));
    assert_eq!(opened == Ok(Step::StartTls(Bytes::new())), target == b"S");
}
