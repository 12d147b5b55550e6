//! The state machines, in every fragmentation.

#![allow(clippy::unwrap_used)]

mod client_packets;
mod endings;
mod logins;
mod openings;

use std::sync::Arc;

use aws_lc_rs::rsa::{OAEP_SHA1_MGF1SHA1, OaepPublicEncryptingKey, PublicEncryptingKey};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{Bytes, BytesMut};
use proptest::{collection::vec, prelude::*};

use super::{packet::write, *};
use crate::{
    fault::Fault,
    protocol::{Action, Event, Side, Start, run::Run},
};

const SCRAMBLE: &[u8; 20] = b"abcdefghijklmnopqrst";
const OTHER_SCRAMBLE: &[u8; 20] = b"ABCDEFGHIJKLMNOPQRST";
const NATIVE: &str = "mysql_native_password";
const CACHING: &str = "caching_sha2_password";
const SHA256: &str = "sha256_password";

/// LONG_PASSWORD, CONNECT_WITH_DB, PROTOCOL_41, SECURE_CONNECTION, PLUGIN_AUTH, CONNECT_ATTRS, LENENC.
const CLIENT: u32 = 1 | 8 | 1 << 9 | 1 << 15 | 1 << 19 | 1 << 20 | 1 << 21;
const TLS: u32 = 1 << 11;
const OK: &[u8] = &[0, 0, 0, 2, 0, 0, 0];

/// The process' key: making one takes time.
fn key() -> Arc<RsaKey> {
    RsaKey::of_process().unwrap()
}

fn settings(client_tls: ClientTls, target_tls: bool) -> Settings {
    Settings { client_tls, target_tls, key: Some(key()) }
}

impl Run<Startup> {
    fn new(client_tls: ClientTls, target_tls: bool) -> Self {
        Self::of(Startup::new(settings(client_tls, target_tls)))
    }

    /// Of a client without TLS, and a server with it.
    fn plain() -> Self {
        Self::new(ClientTls::Off, true)
    }

    /// With a client that has the greeting.
    fn greeted(mut self) -> Self {
        self.target(&greeting(NATIVE, true));
        self.to_client.clear();
        self
    }

    /// With a client that has responded, and a server that has TLS and the response.
    fn responded(response: &[u8]) -> Self {
        let mut run = Self::plain().greeted();
        run.client(&write(1, response));
        assert_eq!(run.done, [Action::StartTargetTls]);
        run.to_target.clear();
        run.event(Event::TargetSecured);
        run
    }

    /// What the client has received since it was asked for last.
    fn client_received(&mut self) -> Vec<(u8, Vec<u8>)> {
        packets(&std::mem::take(&mut self.to_client))
    }

    /// What the server has received since it was asked for last.
    fn target_received(&mut self) -> Vec<(u8, Vec<u8>)> {
        packets(&std::mem::take(&mut self.to_target))
    }

    /// The packet that the client is sent for the fault: its number, its code, its SQLSTATE and its text.
    fn refusal(&self) -> (u8, u16, String, String) {
        let refusal = self.start.refusal(self.fault.as_ref().unwrap());
        let [(sequence, payload)] = &packets(&refusal)[..] else { panic!("{refusal:?}") };
        assert_eq!((payload[0], payload[3]), (0xff, b'#'));
        let text = |range: &[u8]| String::from_utf8(range.to_vec()).unwrap();
        let code = u16::from_le_bytes([payload[1], payload[2]]);
        (*sequence, code, text(&payload[4..9]), text(&payload[9..]))
    }
}

/// The packets in these bytes.
fn packets(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut packets = Vec::new();
    while let [a, b, c, sequence, rest @ ..] = bytes {
        let length = usize::from(*a) | usize::from(*b) << 8 | usize::from(*c) << 16;
        packets.push((*sequence, rest[..length].to_vec()));
        bytes = &rest[length..];
    }
    assert!(bytes.is_empty(), "half a header");
    packets
}

/// A server's greeting, as a packet.
fn greeting(plugin: &str, tls: bool) -> Vec<u8> {
    let capabilities = 0x81ff_f7ff_u32 | if tls { TLS } else { 0 };
    let [a, b, c, d] = capabilities.to_le_bytes();
    let payload = [
        b"\x0a8.4.3\0\x07\0\0\0",
        &SCRAMBLE[..8],
        &[0, a, b, 255, 2, 0, c, d, 21],
        &[0; 10],
        &SCRAMBLE[8..],
        b"\0",
        plugin.as_bytes(),
        b"\0",
    ]
    .concat();
    write(0, &payload).to_vec()
}

/// The payload of a client's response.
fn response(capabilities: u32, plugin: &str, data: &[u8]) -> Vec<u8> {
    let mut payload = flags(capabilities);
    payload.extend(b"app\0");
    payload.push(data.len() as u8);
    payload.extend(data);
    payload.extend(b"shop\0");
    payload.extend(plugin.as_bytes());
    payload.extend(b"\0\x05\x01a\x02bc");
    payload
}

/// What it begins with.
fn flags(capabilities: u32) -> Vec<u8> {
    let mut payload = capabilities.to_le_bytes().to_vec();
    payload.extend([0, 0, 0, 1, 45]);
    payload.extend([0; 19]);
    payload.extend([1, 2, 3, 4]);
    payload
}

/// A request to switch the plugin.
fn switch(plugin: &str) -> Vec<u8> {
    [&[0xfe], plugin.as_bytes(), &[0], OTHER_SCRAMBLE, &[0]].concat()
}

/// A password as a client encrypts it by a key that it was sent.
fn encrypted(key: &[u8], password: &str, scramble: &[u8]) -> Vec<u8> {
    let pem = std::str::from_utf8(key.strip_prefix(&[1]).unwrap()).unwrap();
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let der = BASE64_STANDARD.decode(body).unwrap();
    let key = OaepPublicEncryptingKey::new(PublicEncryptingKey::from_der(&der).unwrap()).unwrap();
    let masked: Vec<u8> = [password.as_bytes(), &[0]]
        .concat()
        .iter()
        .zip(scramble.iter().cycle())
        .map(|(byte, mask)| byte ^ mask)
        .collect();
    let mut room = vec![0; key.ciphertext_size()];
    key.encrypt(&OAEP_SHA1_MGF1SHA1, &masked, &mut room, None).unwrap().to_vec()
}
