//! The state machines, in every fragmentation and in any order in which the two sides may be heard.

#![allow(clippy::unwrap_used)]

mod conversation;
mod login;
mod opening;
mod packets;
mod responses;

use bytes::BytesMut;
use proptest::{collection::vec, prelude::*};

use super::{response::field, *};
use crate::{
    config::{ChannelBinding, Role},
    fault::Fault,
    protocol::{Action, Event, Side, Start, run::Run},
};

/// A session without TLS to the client, to any server.
const PLAIN: Settings = Settings {
    role: Role::Any,
    channel_binding: ChannelBinding::Strip,
    client_tls: ClientTls::Off,
};

impl Run<Startup> {
    fn new(settings: Settings) -> Self {
        Self::of(Startup::new(settings, false))
    }

    /// That of a client which has sent its StartupMessage.
    fn dialled(settings: Settings) -> Self {
        let mut run = Self::new(settings);
        run.client(&startup(3, 0, &[("user", "app")]));
        assert_eq!(run.done, [Action::Dial]);
        run.event(Event::Dialled);
        run
    }

    /// Everything that somebody else could notice.
    fn outcome(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let fault = self.fault.as_ref().map(ToString::to_string);
        let server = self.start.server().cloned();
        (self.to_client.clone(), self.to_target.clone(), self.done.clone(), fault, server)
    }

    /// The SQLSTATE that the client is given for the fault.
    fn refusal(&self) -> String {
        let refusal = self.start.refusal(self.fault.as_ref().unwrap());
        String::from_utf8(field(&refusal[5..], b'C').unwrap().to_vec()).unwrap()
    }
}

/// A startup packet.
fn startup(major: u16, minor: u16, parameters: &[(&str, &str)]) -> Vec<u8> {
    let texts = parameters.iter().map(|(name, value)| format!("{name}\0{value}\0"));
    let code = [major.to_be_bytes(), minor.to_be_bytes()].concat();
    packet(&[&code[..], texts.collect::<String>().as_bytes(), b"\0"].concat())
}

/// A packet with its length.
fn packet(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32 + 4).to_be_bytes()[..], body].concat()
}

/// A message.
fn message(tag: u8, body: impl AsRef<[u8]>) -> Vec<u8> {
    message::write(tag, body.as_ref()).to_vec()
}

/// An authentication request.
fn authentication(kind: u32, body: &str) -> Vec<u8> {
    message(b'R', [&kind.to_be_bytes()[..], body.as_bytes()].concat())
}

/// What a server of version 15 says once it has let a client in.
fn welcome(in_hot_standby: &str, secret: &[u8]) -> Vec<u8> {
    [
        authentication(0, ""),
        message(b'S', format!("in_hot_standby\0{in_hot_standby}\0")),
        message(b'S', "default_transaction_read_only\0off\0"),
        message(b'S', "server_version\x0015.18\0"),
        message(b'K', [&[0, 0, 4, 1], secret].concat()),
        message(b'Z', "I"),
    ]
    .concat()
}

/// `bytes` in pieces, cut after the lengths of `cuts` in turn.
fn pieces<'a>(mut bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut cuts = cuts.iter().cycle();
    while !bytes.is_empty() {
        let length = cuts.next().copied().unwrap_or(1).clamp(1, bytes.len());
        let (piece, rest) = bytes.split_at(length);
        pieces.push(piece);
        bytes = rest;
    }
    pieces
}

/// Lengths of pieces, mostly small.
fn cuts() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![4 => 1usize..8, 1 => 8usize..200], 1..20)
}
