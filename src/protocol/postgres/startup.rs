//! The start of a session: what the client asks for, the dial, and the login.

use bytes::{Bytes, BytesMut};

use super::{
    Conversation, ErrorResponse, Packet, ServerParameters, ServerRole, StartupError,
    login::{Client, Login},
    message::TERMINATE,
};
use crate::{
    config::{ChannelBinding, Role},
    fault::Fault,
    protocol::{Action, Event, Side, Start},
};

/// What the configuration says of a start.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Which servers a session may go to.
    pub role: Role,
    /// Whether a client in plaintext is offered channel binding.
    pub channel_binding: ChannelBinding,
    /// TLS with the client.
    pub client_tls: ClientTls,
}

/// TLS with the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientTls {
    /// Cannot be had.
    Off,
    /// Can be had.
    Offered,
    /// Required, except for a CancelRequest, which older clients send in plaintext.
    Required,
}

/// The start of a session, or of the request to cancel another's query.
#[derive(Debug)]
pub struct Startup {
    settings: Settings,
    /// Whether the client's connection has TLS.
    secured: bool,
    asked_for_tls: bool,
    asked_for_gss: bool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The client's packets are read.
    Packets,
    /// The client's TLS is being made.
    Handshake,
    /// The target is being dialled, and gets this.
    Dialling { packet: Bytes, cancels: bool },
    /// The server has the CancelRequest, and closes once it has acted upon it.
    Cancelling,
    /// Messages pass, in both directions.
    Login(Box<Login>),
    /// Nothing more is expected.
    Over,
}

impl Startup {
    /// Of a connection that has TLS already, or has not.
    pub fn new(settings: Settings, secured: bool) -> Self {
        let phase = Phase::Packets;
        Self { settings, secured, asked_for_tls: false, asked_for_gss: false, phase }
    }

    /// What the server has reported of itself; nothing before there is one.
    pub fn server(&self) -> Option<&ServerParameters> {
        match &self.phase {
            Phase::Login(login) => Some(login.parameters()),
            _ => None,
        }
    }

    /// The session, once it has begun.
    pub fn into_session(self) -> Option<Conversation> {
        let Phase::Login(login) = self.phase else { return None };
        Some(Conversation::new(login.into_parameters()))
    }

    fn packets(
        &mut self,
        buffer: &mut BytesMut,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        while matches!(self.phase, Phase::Packets)
            && let Some(packet) = Packet::take(buffer)?
        {
            match packet {
                Packet::SslRequest => self.tls(buffer, actions)?,
                Packet::GssEncRequest => {
                    // As PostgreSQL: not within TLS either.
                    if self.secured || std::mem::replace(&mut self.asked_for_gss, true) {
                        return Err(StartupError::Repeated("GSSENCRequest"));
                    }
                    actions.push(declined());
                }
                Packet::Cancel(key) => {
                    self.phase = Phase::Dialling { packet: key.request(), cancels: true };
                    actions.push(Action::DialHolder(key));
                }
                Packet::Startup(packet) => {
                    if self.settings.client_tls == ClientTls::Required && !self.secured {
                        return Err(StartupError::TlsRequired);
                    }
                    self.phase = Phase::Dialling { packet, cancels: false };
                    actions.push(Action::Dial);
                }
            }
        }
        Ok(())
    }

    /// The client asks whether it can have TLS. It waits for the response, without which it can do nothing: so
    /// nothing is asked of the target before.
    fn tls(&mut self, rest: &BytesMut, actions: &mut Vec<Action>) -> Result<(), StartupError> {
        if self.secured || std::mem::replace(&mut self.asked_for_tls, true) {
            return Err(StartupError::Repeated("SSLRequest"));
        }
        if self.settings.client_tls == ClientTls::Off {
            actions.push(declined());
            return Ok(());
        }
        if !rest.is_empty() {
            return Err(StartupError::BytesBeforeTls);
        }
        self.phase = Phase::Handshake;
        actions.push(Action::Send(Side::Client, Bytes::from_static(b"S")));
        actions.push(Action::StartTls);
        Ok(())
    }

    fn client_bytes(
        &mut self,
        buffer: &mut BytesMut,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        match &mut self.phase {
            Phase::Packets => self.packets(buffer, actions),
            Phase::Login(login) => {
                let mut out = BytesMut::new();
                let client = login.client_sent(buffer, &mut out)?;
                if !out.is_empty() {
                    actions.push(Action::Send(Side::Target, out.freeze()));
                }
                if client == Client::Leaves {
                    self.phase = Phase::Over;
                    actions.push(Action::Close);
                }
                Ok(())
            }
            Phase::Handshake | Phase::Dialling { .. } | Phase::Cancelling | Phase::Over => Ok(()),
        }
    }

    fn target_bytes(
        &mut self,
        buffer: &mut BytesMut,
        actions: &mut Vec<Action>,
    ) -> Result<(), StartupError> {
        match &mut self.phase {
            Phase::Login(login) => {
                let mut out = BytesMut::new();
                let begun = login.target_sent(buffer, &mut out);
                if matches!(begun, Ok(true))
                    && let Some(key) = login.take_key()
                {
                    actions.push(Action::HoldKey(key));
                }
                if !out.is_empty() {
                    actions.push(Action::Send(Side::Client, out.freeze()));
                }
                if begun? {
                    actions.push(Action::Established);
                }
            }
            // No client reads what comes in response to a CancelRequest.
            Phase::Cancelling => buffer.clear(),
            Phase::Packets | Phase::Handshake | Phase::Dialling { .. } | Phase::Over => {}
        }
        Ok(())
    }

    fn dialled(&mut self, actions: &mut Vec<Action>) {
        let Phase::Dialling { packet, cancels } = &mut self.phase else { return };
        actions.push(Action::Send(Side::Target, std::mem::take(packet)));
        if *cancels {
            self.phase = Phase::Cancelling;
            return;
        }
        let Settings { role, channel_binding, .. } = self.settings;
        let strip = !self.secured && channel_binding == ChannelBinding::Strip;
        self.phase = Phase::Login(Box::new(Login::new(role, strip, self.secured)));
    }

    fn ended(&mut self, side: Side, actions: &mut Vec<Action>) -> Result<(), StartupError> {
        if let (Side::Target, Phase::Login(login)) = (side, &self.phase) {
            login.target_ended()?;
        }
        self.phase = Phase::Over;
        actions.push(Action::Close);
        Ok(())
    }
}

impl Start for Startup {
    fn on(&mut self, event: Event<'_>, actions: &mut Vec<Action>) -> Result<(), Fault> {
        match event {
            Event::Bytes(Side::Client, buffer) => self.client_bytes(buffer, actions)?,
            Event::Bytes(Side::Target, buffer) => self.target_bytes(buffer, actions)?,
            Event::Dialled => self.dialled(actions),
            Event::TargetSecured => {}
            Event::Secured => {
                self.secured = true;
                self.phase = Phase::Packets;
            }
            Event::Ended(side) => self.ended(side, actions)?,
        }
        Ok(())
    }

    fn refusal(&self, why: &Fault) -> Bytes {
        match self.phase {
            // The client has TLS or nothing, or reads nothing.
            Phase::Handshake | Phase::Cancelling | Phase::Dialling { cancels: true, .. } => {
                Bytes::new()
            }
            _ => ErrorResponse::of(why).to_bytes(),
        }
    }

    fn server_role(&self) -> Option<Role> {
        self.server()?.role().map(ServerRole::as_configured)
    }

    fn closing_message(&self) -> Bytes {
        match &self.phase {
            Phase::Login(login) if login.is_authenticated() => Bytes::from_static(&TERMINATE),
            _ => Bytes::new(),
        }
    }
}

fn declined() -> Action {
    Action::Send(Side::Client, Bytes::from_static(b"N"))
}
