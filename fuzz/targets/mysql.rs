//! Both sides of the start of a MySQL session, in one piece or in many: the same is done and sent.
#![no_main]

use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use truename::protocol::{
    Action, Event, Side, Start, Step,
    mysql::{ClientTls, Opening, RsaKey, Settings, Startup},
};

/// What somebody else could notice.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    to_client: Vec<u8>,
    to_target: Vec<u8>,
    done: Vec<Action>,
    fault: Option<String>,
    closing_message: Bytes,
}

fuzz_target!(|input: (u8, u8, &[u8], &[u8], &[u8])| {
    let (fragment, choices, target, client, more) = input;
    let settings = Settings {
        client_tls: [ClientTls::Off, ClientTls::Required][usize::from(choices & 1)],
        target_tls: choices & 2 != 0,
        key: key(),
    };
    let whole = run(&settings, target, client, more, usize::MAX);
    let pieces = run(&settings, target, client, more, fragment.max(1).into());
    // Bytes behind a request for TLS are a failure if they came along with it, and TLS if they came later.
    if !whole.done.contains(&Action::StartTls) && !pieces.done.contains(&Action::StartTls) {
        assert_eq!(whole, pieces);
    }
    open(target);
});

fn key() -> Option<Arc<RsaKey>> {
    static KEY: OnceLock<Arc<RsaKey>> = OnceLock::new();
    Some(KEY.get_or_init(|| Arc::new(RsaKey::generate().expect("a key"))).clone())
}

/// A start: the greeting, what the client says, and then a piece of each in turn.
fn run(settings: &Settings, target: &[u8], client: &[u8], more: &[u8], piece: usize) -> Outcome {
    let mut start = Startup::new(settings.clone());
    let mut outcome = Outcome::default();
    let mut left = [BytesMut::new(), BytesMut::new()];
    for (side, bytes) in
        [(Side::Target, target), (Side::Client, client), (Side::Target, more), (Side::Client, more)]
    {
        // Who comes first makes a difference where both speak at once: what waits of the other side comes afterwards.
        for piece in bytes.chunks(piece) {
            left[side as usize].extend_from_slice(piece);
            settle(&mut start, &mut left, &[side], &mut outcome);
        }
        settle(&mut start, &mut left, &[Side::Client, Side::Target], &mut outcome);
    }
    outcome.closing_message = start.closing_message();
    outcome
}

/// Offers what is left of these sides, as long as some is taken.
fn settle(start: &mut Startup, left: &mut [BytesMut; 2], sides: &[Side], outcome: &mut Outcome) {
    loop {
        let before = (left[0].len(), left[1].len(), outcome.done.len());
        for side in sides {
            let buffer = &mut left[*side as usize];
            if !buffer.is_empty() {
                on(start, Event::Bytes(*side, buffer), outcome);
            }
        }
        if outcome.done.len() > before.2 {
            match outcome.done.last() {
                Some(Action::StartTargetTls) => on(start, Event::TargetSecured, outcome),
                Some(Action::StartTls) => on(start, Event::Secured, outcome),
                _ => {}
            }
        }
        if (left[0].len(), left[1].len(), outcome.done.len()) == before {
            return;
        }
    }
}

fn on(start: &mut Startup, event: Event<'_>, outcome: &mut Outcome) {
    let over = matches!(outcome.done.last(), Some(Action::Established | Action::Close));
    if outcome.fault.is_some() || over {
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
        assert!(start.refusal(&fault).len() < 4_096);
        outcome.fault = Some(fault.to_string());
    }
}

/// TLS is possible where the server has sent a greeting, and nothing else.
fn open(target: &[u8]) {
    let mut received = BytesMut::from(target);
    if let Ok(Step::StartTls(greeting)) = Opening::new(true).next(&mut received) {
        assert!(received.is_empty());
        assert_eq!(greeting, target);
    }
}
