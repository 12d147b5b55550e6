//! The start of a session: the greeting, TLS on both sides, and authentication.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};

use super::{
    ClientPackets, Greeting, RsaKey, SCRAMBLE, StartupError, capability,
    handshake_response::{self, HandshakeResponse},
    login::{Links, Login, Out, Progress},
    packet::{self, MAX_PACKET, Packet},
    response,
};
use crate::{
    fault::Fault,
    protocol::{Action, Event, Side, Start},
};

/// How long a client may take to respond to the greeting. Servers wait for 10 seconds (`connect_timeout`), count
/// that as an interrupted handshake, and block hosts that have too many of them.
const RESPONSE_LIMIT: Duration = Duration::from_secs(8);

/// What is said of a start before it begins.
#[derive(Clone, Debug)]
pub struct Settings {
    /// TLS with the client, where its connection has none yet.
    pub client_tls: ClientTls,
    /// Whether the target's connection gets TLS.
    pub target_tls: bool,
    /// The key for passwords of clients without TLS.
    pub key: Option<Arc<RsaKey>>,
}

/// TLS that a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientTls {
    /// It is not offered: the client has it already, or is not to have it.
    Off,
    /// The client has to ask for it.
    Required,
}

/// The start of a session with a server whose greeting is there, or is on its way.
#[derive(Debug)]
pub struct Startup {
    settings: Settings,
    phase: Phase,
    /// The number of what the client is sent next.
    sequence: u8,
    /// Whether the client has asked for TLS and has it.
    secured: bool,
    /// The capabilities of compression: those that the server has, and once the client has responded, that both have.
    compression: u32,
}

#[derive(Debug)]
enum Phase {
    /// The greeting is awaited.
    Greeting,
    /// The client has it, and is to respond.
    Responding { scramble: [u8; SCRAMBLE] },
    /// The client's TLS is being made.
    Handshake { scramble: [u8; SCRAMBLE] },
    /// The target's TLS is being made.
    Securing { scramble: [u8; SCRAMBLE], response: HandshakeResponse },
    /// Both take turns.
    Login(Login),
    /// Nothing more is expected.
    Over,
}

impl Startup {
    /// With a connection to a target that nothing was sent to.
    pub fn new(settings: Settings) -> Self {
        Self { settings, phase: Phase::Greeting, sequence: 0, secured: false, compression: 0 }
    }

    /// The packets of the client in the session that begins.
    pub fn client_packets(&self) -> ClientPackets {
        ClientPackets::new(self.compression != 0)
    }

    fn client_bytes(
        &mut self,
        buffer: &mut BytesMut,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        match &mut self.phase {
            Phase::Responding { scramble } => {
                let scramble = *scramble;
                let expected = self.sequence;
                if self.sequence == 1 {
                    match is_client_hello(buffer) {
                        Some(true) => return Err(StartupError::UnexpectedTls),
                        Some(false) => {}
                        None => return Ok(()),
                    }
                }
                match packet::header(buffer, MAX_PACKET).map_err(StartupError::ClientLength)? {
                    Some((sequence, _)) if sequence != expected => {
                        return Err(StartupError::ClientSequence { sequence, expected });
                    }
                    _ => {}
                }
                let packet =
                    Packet::take(buffer, MAX_PACKET).map_err(StartupError::ClientLength)?;
                let Some(packet) = packet else { return Ok(()) };
                self.sequence = self.sequence.wrapping_add(1);
                if handshake_response::is_ssl_request(packet.payload()) {
                    return self.client_asks_for_tls(scramble, actions);
                }
                self.responded(scramble, packet.into_payload(), actions)
            }
            Phase::Login(login) => {
                let mut out = Out::default();
                let result = login.client_sent(buffer, &mut out);
                send(out, actions);
                result
            }
            Phase::Greeting | Phase::Handshake { .. } | Phase::Securing { .. } | Phase::Over => {
                Ok(())
            }
        }
    }

    /// It does not wait for a response: what comes next is its ClientHello.
    fn client_asks_for_tls(
        &mut self,
        scramble: [u8; SCRAMBLE],
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        if self.settings.client_tls == ClientTls::Off || self.secured {
            return Err(StartupError::TlsNotOffered);
        }
        self.phase = Phase::Handshake { scramble };
        actions.push(Action::StartTls);
        Ok(())
    }

    /// The client has responded to the greeting.
    fn responded(
        &mut self,
        scramble: [u8; SCRAMBLE],
        payload: BytesMut,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        let response = HandshakeResponse::parse(payload)?;
        self.compression &= response.capabilities();
        if self.settings.client_tls == ClientTls::Required && !self.secured {
            return Err(StartupError::TlsRequired);
        }
        if self.settings.target_tls {
            let request = packet::write(1, &response.ssl_request()).freeze();
            actions.push(Action::Send(Side::Target, request));
            actions.push(Action::StartTargetTls);
            self.phase = Phase::Securing { scramble, response };
            Ok(())
        } else {
            self.begin(scramble, response, actions)
        }
    }

    fn begin(
        &mut self,
        scramble: [u8; SCRAMBLE],
        response: HandshakeResponse,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        let links = Links {
            client_tls: self.secured,
            target_tls: self.settings.target_tls,
            client_sequence: self.sequence,
        };
        let mut login = Login::new(scramble, links, self.settings.key.clone());
        let mut out = Out::default();
        let result = login.responded(response, &mut out);
        send(out, actions);
        self.phase = Phase::Login(login);
        result
    }

    fn target_bytes(
        &mut self,
        buffer: &mut BytesMut,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        match &mut self.phase {
            Phase::Greeting => {
                let packet =
                    Packet::take(buffer, MAX_PACKET).map_err(StartupError::ServerLength)?;
                let Some(packet) = packet else { return Ok(()) };
                let greeting = Greeting::parse(packet.into_payload());
                let greeting = greeting.map_err(|_| StartupError::ServerMalformed)?;
                let scramble = greeting.scramble();
                self.compression =
                    greeting.capabilities() & (capability::COMPRESS | capability::ZSTD);
                let offered = self.settings.client_tls == ClientTls::Required;
                let packet = packet::write(0, &greeting.offering(offered)).freeze();
                actions.push(Action::Send(Side::Client, packet));
                self.sequence = 1;
                self.phase = Phase::Responding { scramble };
                Ok(())
            }
            Phase::Login(login) => {
                let mut out = Out::default();
                let progress = login.target_sent(buffer, &mut out);
                send(out, actions);
                match progress? {
                    Progress::UnderWay => {}
                    Progress::Accepted => actions.push(Action::Established),
                    // It closes, and so does the client.
                    Progress::Refused => {}
                }
                Ok(())
            }
            // Read later, they would pass for what has come by TLS.
            Phase::Responding { .. } | Phase::Handshake { .. } | Phase::Securing { .. }
                if self.settings.target_tls && !buffer.is_empty() =>
            {
                Err(StartupError::BytesBeforeTls)
            }
            Phase::Responding { .. }
            | Phase::Handshake { .. }
            | Phase::Securing { .. }
            | Phase::Over => Ok(()),
        }
    }

    /// The target has TLS, and is who it should be.
    fn target_secured(&mut self, actions: &mut Vec<Action>) -> Result<(), StartupError> {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Securing { scramble, response } => self.begin(scramble, response, actions),
            other => {
                self.phase = other;
                Ok(())
            }
        }
    }

    fn ended(&mut self, side: Side, actions: &mut Vec<Action>) -> Result<(), StartupError> {
        match (side, &self.phase) {
            (Side::Target, Phase::Login(login)) => login.target_ended()?,
            (Side::Target, Phase::Over) => {}
            (Side::Target, _) => return Err(StartupError::Lost),
            (Side::Client, _) => {}
        }
        actions.push(Action::Close);
        Ok(())
    }
}

impl Start for Startup {
    fn on(&mut self, event: Event<'_>, actions: &mut Vec<Action>) -> Result<(), Fault> {
        match event {
            Event::Bytes(Side::Client, buffer) => self.client_bytes(buffer, actions)?,
            Event::Bytes(Side::Target, buffer) => self.target_bytes(buffer, actions)?,
            Event::Dialled => {}
            Event::Secured => {
                if let Phase::Handshake { scramble } = self.phase {
                    self.secured = true;
                    self.phase = Phase::Responding { scramble };
                }
            }
            Event::TargetSecured => self.target_secured(actions)?,
            Event::Ended(side) => self.ended(side, actions)?,
        }
        Ok(())
    }

    fn refusal(&self, why: &Fault) -> Bytes {
        let sequence = match &self.phase {
            // The client has TLS or nothing.
            Phase::Handshake { .. } => return Bytes::new(),
            Phase::Login(login) => login.client_sequence(),
            _ => self.sequence,
        };
        response::refusal(why, sequence)
    }

    fn client_limit(&self) -> Option<Duration> {
        let waits = matches!(
            self.phase,
            Phase::Greeting | Phase::Responding { .. } | Phase::Handshake { .. }
        );
        waits.then_some(RESPONSE_LIMIT)
    }

    fn awaits_target(&self) -> bool {
        match &self.phase {
            Phase::Greeting => true,
            Phase::Login(login) => login.awaits_target(),
            _ => false,
        }
    }

    fn closing_message(&self) -> Bytes {
        match &self.phase {
            Phase::Responding { .. } | Phase::Handshake { .. } => {
                let mut bytes = packet::write(1, &handshake_response::placeholder());
                // If another plugin is switched to.
                bytes.unsplit(packet::write(3, &[]));
                bytes.freeze()
            }
            Phase::Login(login) => login.closing_message().freeze(),
            Phase::Greeting | Phase::Securing { .. } | Phase::Over => Bytes::new(),
        }
    }
}

/// Whether these bytes begin a ClientHello; `None` while they may. A packet can have the length that its first bytes
/// would stand for, but then the sixth byte has a capability that every client has (`PROTOCOL_41`), and is not 1.
fn is_client_hello(bytes: &[u8]) -> Option<bool> {
    match bytes {
        [0x16, 3, _, _, _, kind, ..] => Some(*kind == 1),
        [0x16, 3, ..] | [0x16] => None,
        _ => Some(false),
    }
}

fn send(out: Out, actions: &mut Vec<Action>) {
    if !out.to_client.is_empty() {
        actions.push(Action::Send(Side::Client, out.to_client.freeze()));
    }
    actions.extend(out.to_target.into_iter().map(|bytes| Action::Send(Side::Target, bytes)));
}
