//! Authentication: from the client's response to the server's OK.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use zeroize::Zeroizing;

use super::{
    RsaKey, SCRAMBLE, StartupError,
    handshake_response::HandshakeResponse,
    packet::{self, ERR, MAX_PACKET, Packet, take_text},
};

/// A usual login has four. Several factors, and questions, take more.
const MAX_PACKETS: u32 = 100;

/// What the payloads of a server begin with, besides errors.
const OK: u8 = 0x00;
const MORE_DATA: u8 = 0x01;
const NEXT_FACTOR: u8 = 0x02;
const SWITCH: u8 = 0xfe;

/// The server lets the user in; its OK follows.
const FAST_AUTHENTICATION: &[u8] = &[MORE_DATA, 3];

const CACHING_SHA2: &[u8] = b"caching_sha2_password";
const SHA256: &[u8] = b"sha256_password";

/// The plugin that asks questions, whose packets may begin with anything.
const DIALOG: &[u8] = b"dialog";

/// Encrypted with a key of 1,024 bits, the shortest there is. No password has so many bytes.
const SHORTEST_ENCRYPTED: usize = 128;

/// What is known of a session that begins.
///
/// A client without TLS encrypts its password with RSA, and a server with TLS wants it as it is: so the client gets
/// a key of ours, and what it is asked and responds does not reach the server, nor count there.
#[derive(Debug)]
pub(super) struct Login {
    /// Whether the client has no TLS, and the server has.
    translates: bool,
    /// The key, if there is one.
    key: Option<Arc<RsaKey>>,
    /// The sequence number that is next with the client.
    client: u8,
    /// The sequence number that is next with the server.
    target: u8,
    plugin: Vec<u8>,
    scramble: [u8; SCRAMBLE],
    turn: Turn,
    packets: u32,
}

/// The two connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    /// Whether the client has TLS, and knows it.
    pub(super) client_tls: bool,
    /// Whether the target has TLS.
    pub(super) target_tls: bool,
    /// The number that is next with the client, whose response has come.
    pub(super) client_sequence: u8,
}

/// Whose turn it is.
#[derive(Debug)]
enum Turn {
    /// The server's.
    Target,
    /// The client's. A server that has something to say all the same says it with the same number.
    Client,
    /// The client's, who has to send its password, encrypted. Where it is needed in the response, the server has
    /// not had that yet.
    Encrypted { response: Option<HandshakeResponse> },
    /// Neither side's: the server has let the client in, or has not.
    Over { accepted: bool },
}

/// What is to be sent.
#[derive(Debug, Default)]
pub(super) struct Out {
    pub(super) to_client: BytesMut,
    pub(super) to_target: Vec<Bytes>,
}

/// Where the two are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// They are not done.
    UnderWay,
    /// The server has said OK.
    Accepted,
    /// The server has said why not.
    Refused,
}

impl Login {
    /// A login by this scramble.
    pub(super) fn new(scramble: [u8; SCRAMBLE], links: Links, key: Option<Arc<RsaKey>>) -> Self {
        Self {
            translates: links.target_tls && !links.client_tls,
            key,
            client: links.client_sequence,
            // After the greeting, and the request for TLS.
            target: if links.target_tls { 2 } else { 1 },
            plugin: Vec::new(),
            scramble,
            turn: Turn::Target,
            packets: 0,
        }
    }

    /// Takes the client's response.
    pub(super) fn responded(
        &mut self,
        response: HandshakeResponse,
        out: &mut Out,
    ) -> Result<(), StartupError> {
        self.plugin = response.plugin().to_vec();
        match self.translates && self.asks_for_key(response.data()) && self.plugin == SHA256 {
            true => self.give_key(Some(response), out),
            false => {
                // Without TLS this is the first that the server is sent.
                let tls = self.target == 2;
                self.pass_to_target(&response.for_server(tls), out);
                Ok(())
            }
        }
    }

    /// Takes what the client sent, if it is its turn.
    pub(super) fn client_sent(
        &mut self,
        buffer: &mut BytesMut,
        out: &mut Out,
    ) -> Result<(), StartupError> {
        if !matches!(self.turn, Turn::Client | Turn::Encrypted { .. }) {
            return Ok(());
        }
        let expected = self.client;
        match packet::header(buffer, MAX_PACKET).map_err(StartupError::ClientLength)? {
            Some((sequence, _)) if sequence != expected => {
                return Err(StartupError::ClientSequence { sequence, expected });
            }
            _ => {}
        }
        let packet = Packet::take(buffer, MAX_PACKET).map_err(StartupError::ClientLength)?;
        let Some(packet) = packet else { return Ok(()) };
        self.count()?;
        self.client = self.client.wrapping_add(1);
        let payload = packet.payload();
        if let Turn::Encrypted { response } = &self.turn {
            let response = response.clone();
            return self.encrypted(payload, response, out);
        }
        if self.translates && self.asks_for_key(payload) {
            return self.give_key(None, out);
        }
        if self.translates && self.takes_password() && is_encrypted(payload) {
            return Err(StartupError::OwnKey);
        }
        self.pass_to_target(payload, out);
        Ok(())
    }

    /// Takes what the server sent, up to its OK.
    pub(super) fn target_sent(
        &mut self,
        buffer: &mut BytesMut,
        out: &mut Out,
    ) -> Result<Progress, StartupError> {
        loop {
            match self.turn {
                Turn::Over { accepted: true } => return Ok(Progress::Accepted),
                Turn::Over { accepted: false } => return Ok(Progress::Refused),
                _ => {}
            }
            let header = packet::header(buffer, MAX_PACKET).map_err(StartupError::ServerLength)?;
            // It follows upon the client's, which is not there yet.
            if let Some((sequence, _)) = header
                && matches!(self.turn, Turn::Client | Turn::Encrypted { .. })
                && sequence == self.target.wrapping_add(1)
            {
                return Ok(Progress::UnderWay);
            }
            let packet = Packet::take(buffer, MAX_PACKET).map_err(StartupError::ServerLength)?;
            let Some(packet) = packet else { return Ok(Progress::UnderWay) };
            self.count()?;
            self.message(&packet, out)?;
        }
    }

    /// The server has closed the connection: it may, once it has said why.
    pub(super) fn target_ended(&self) -> Result<(), StartupError> {
        match self.turn {
            Turn::Over { accepted: false } => Ok(()),
            _ => Err(StartupError::Lost),
        }
    }

    /// The number of what the client is sent next.
    pub(super) fn client_sequence(&self) -> u8 {
        self.client
    }

    /// Whether it is the server's turn.
    pub(super) fn awaits_target(&self) -> bool {
        matches!(self.turn, Turn::Target)
    }

    /// What a server is sent that waits for the client: no password. It would count the client's leaving as an
    /// interrupted handshake, and block this host for too many of them.
    pub(super) fn closing_message(&self) -> BytesMut {
        match &self.turn {
            Turn::Client if self.takes_password() => packet::write(self.target, &[0]),
            Turn::Client => packet::write(self.target, &[]),
            Turn::Encrypted { response: None } => packet::write(self.target, &[0]),
            Turn::Encrypted { response: Some(response) } => {
                let Some(empty) = response.with_data(&[]) else { return BytesMut::new() };
                let mut bytes = packet::write(self.target, &empty.for_server(true));
                // If another plugin is switched to.
                bytes.unsplit(packet::write(self.target.wrapping_add(2), &[]));
                bytes
            }
            Turn::Target | Turn::Over { .. } => BytesMut::new(),
        }
    }

    fn message(&mut self, packet: &Packet, out: &mut Out) -> Result<(), StartupError> {
        let (sequence, expected) = (packet.sequence(), self.target);
        let first = *packet.payload().first().ok_or(StartupError::ServerMalformed)?;
        // A server that gives up says so whenever it likes, and some count wrongly then.
        if sequence != expected && first != ERR {
            return Err(StartupError::ServerSequence { sequence, expected });
        }
        self.target = sequence.wrapping_add(1);
        let rest = packet.payload().get(1..).unwrap_or_default();
        self.turn = match first {
            OK => Turn::Over { accepted: true },
            ERR => Turn::Over { accepted: false },
            SWITCH => {
                self.switch(rest);
                Turn::Client
            }
            NEXT_FACTOR if self.plugin != DIALOG => {
                self.switch(rest);
                Turn::Client
            }
            _ if packet.payload() == FAST_AUTHENTICATION && self.plugin == CACHING_SHA2 => {
                Turn::Target
            }
            _ => Turn::Client,
        };
        out.to_client.unsplit(packet::write(self.client, packet.payload()));
        self.client = self.client.wrapping_add(1);
        Ok(())
    }

    /// Another plugin, with its data; of one before plugins nothing is said.
    fn switch(&mut self, mut rest: &[u8]) {
        self.plugin = take_text(&mut rest).to_vec();
        if let Some(scramble) = rest.first_chunk() {
            self.scramble = *scramble;
        }
    }

    fn count(&mut self) -> Result<(), StartupError> {
        self.packets += 1;
        match self.packets > MAX_PACKETS {
            true => Err(StartupError::TooMuch { limit: MAX_PACKETS }),
            false => Ok(()),
        }
    }

    fn pass_to_target(&mut self, payload: &[u8], out: &mut Out) {
        out.to_target.push(packet::write(self.target, payload).freeze());
        self.target = self.target.wrapping_add(1);
        self.turn = Turn::Target;
    }

    /// Whether the plugin takes the password itself, over TLS.
    fn takes_password(&self) -> bool {
        self.plugin == CACHING_SHA2 || self.plugin == SHA256
    }

    fn asks_for_key(&self, payload: &[u8]) -> bool {
        match &self.plugin[..] {
            CACHING_SHA2 => payload == [2],
            SHA256 => payload == [1],
            _ => false,
        }
    }

    fn give_key(
        &mut self,
        response: Option<HandshakeResponse>,
        out: &mut Out,
    ) -> Result<(), StartupError> {
        let key = self.key.as_ref().ok_or(StartupError::NoKey)?;
        let payload = [&[MORE_DATA], key.public().as_bytes()].concat();
        out.to_client.unsplit(packet::write(self.client, &payload));
        self.client = self.client.wrapping_add(1);
        self.turn = Turn::Encrypted { response };
        Ok(())
    }

    /// The client has sent its password.
    fn encrypted(
        &mut self,
        payload: &[u8],
        response: Option<HandshakeResponse>,
        out: &mut Out,
    ) -> Result<(), StartupError> {
        let key = self.key.as_ref().ok_or(StartupError::NoKey)?;
        let password = key.decrypt(payload, &self.scramble).ok_or(StartupError::Undecryptable)?;
        let packet = match response {
            None => packet_of_secret(self.target, &password),
            Some(response) => {
                let response = response.with_data(&password).ok_or(StartupError::BadHandshake)?;
                packet_of_secret(self.target, &Zeroizing::new(response.for_server(true).to_vec()))
            }
        };
        out.to_target.push(packet);
        self.target = self.target.wrapping_add(1);
        self.turn = Turn::Target;
        Ok(())
    }
}

/// What of a client's packet cannot be a password: those end with a zero.
fn is_encrypted(payload: &[u8]) -> bool {
    payload.len() >= SHORTEST_ENCRYPTED && payload.last() != Some(&0)
}

/// A packet that is overwritten with zeros once it was sent.
fn packet_of_secret(sequence: u8, payload: &[u8]) -> Bytes {
    let mut packet = Zeroizing::new(Vec::with_capacity(payload.len() + packet::HEADER));
    packet.extend_from_slice(&packet::header_of(sequence, payload.len()));
    packet.extend_from_slice(payload);
    Bytes::from_owner(packet)
}
