//! From the StartupMessage to the first ReadyForQuery: authentication, and what the server reports.

use bytes::BytesMut;

use super::{
    CancelKey, ServerParameters, SqlState, StartupError,
    message::{self, Message, take_text, take_u32},
    response::{field, with_hint},
};
use crate::config::Role;

/// As long as PostgreSQL lets a token of the client's be; libpq takes 30,000 at most from the server.
const MAX_MESSAGE: usize = 65_535;

/// A usual server sends about 20.
const MAX_MESSAGES: u32 = 1_000;

/// What may be held back until the role is known. A usual server sends 400 bytes.
const MAX_HELD: usize = 64 * 1024;

/// Kinds of authentication request.
const OK: u32 = 0;
const GSS_CONTINUE: u32 = 8;
const SASL: u32 = 10;
const SASL_FINAL: u32 = 12;

/// What the names of mechanisms with channel binding end with.
const CHANNEL_BINDING: &[u8] = b"-PLUS";

/// What is known of a session that begins.
#[derive(Debug)]
pub(super) struct Login {
    role: Role,
    /// Whether mechanisms with channel binding are taken out.
    strip: bool,
    /// Whether the client's TLS ends here.
    client_tls: bool,
    phase: Phase,
    messages: u32,
    /// Whether the server has offered channel binding.
    binds: bool,
    /// What the server said since it let the client in, where its role matters.
    held: BytesMut,
    /// The server has refused the client, and will close.
    refused: bool,
    parameters: ServerParameters,
    key: Option<CancelKey>,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The server has not said how the client is to prove who it is, or has its response.
    Waiting,
    /// The client's response is due.
    Asked,
    /// The client may respond to a token of GSSAPI, or have nothing more to say.
    MayRespond,
    /// The client is in.
    Authenticated,
    /// The session has begun.
    Ready,
}

/// What a client's message comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    /// The session is beginning.
    Stays,
    /// It has said goodbye.
    Leaves,
}

impl Login {
    pub(super) fn new(role: Role, strip: bool, client_tls: bool) -> Self {
        Self {
            role,
            strip,
            client_tls,
            phase: Phase::Waiting,
            messages: 0,
            binds: false,
            held: BytesMut::new(),
            refused: false,
            parameters: ServerParameters::default(),
            key: None,
        }
    }

    /// Takes what the server sent, up to its ReadyForQuery, and writes what is for the client. Returns whether
    /// the session has begun with that.
    pub(super) fn target_sent(
        &mut self,
        buffer: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> Result<bool, StartupError> {
        while self.phase != Phase::Ready {
            // What follows upon the client's response does not come before it.
            if self.phase == Phase::Asked && buffer.first() == Some(&b'R') {
                return Ok(false);
            }
            let message = Message::take(buffer, MAX_MESSAGE).map_err(StartupError::ServerLength)?;
            let Some(message) = message else { return Ok(false) };
            self.messages += 1;
            if self.messages > MAX_MESSAGES {
                return Err(StartupError::TooMuch { limit: "1,000 messages" });
            }
            self.message(message, to_client)?;
            if self.phase == Phase::Ready {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes the client's responses, once they are due, and leaves what comes after them to the session.
    pub(super) fn client_sent(
        &mut self,
        buffer: &mut BytesMut,
        to_target: &mut BytesMut,
    ) -> Result<Client, StartupError> {
        if !matches!(self.phase, Phase::Asked | Phase::MayRespond) || self.refused {
            return Ok(Client::Stays);
        }
        if let Some(tag) = buffer.first().copied().filter(|tag| !matches!(tag, b'p' | b'X')) {
            return match self.phase {
                Phase::MayRespond => Ok(Client::Stays),
                _ => Err(StartupError::NotAPassword { tag }),
            };
        }
        let message = Message::take(buffer, MAX_MESSAGE).map_err(StartupError::ClientLength)?;
        let Some(message) = message else { return Ok(Client::Stays) };
        self.phase = Phase::Waiting;
        let leaves = message.tag() == b'X';
        to_target.unsplit(message.into_bytes());
        Ok(if leaves { Client::Leaves } else { Client::Stays })
    }

    /// The server has closed the connection: it may, once it has said why.
    pub(super) fn target_ended(&self) -> Result<(), StartupError> {
        if self.refused { Ok(()) } else { Err(StartupError::Lost) }
    }

    /// Whether the server has let the client in.
    pub(super) fn is_authenticated(&self) -> bool {
        matches!(self.phase, Phase::Authenticated | Phase::Ready) && !self.refused
    }

    pub(super) fn parameters(&self) -> &ServerParameters {
        &self.parameters
    }

    pub(super) fn into_parameters(self) -> ServerParameters {
        self.parameters
    }

    /// The key that the server has given out, once.
    pub(super) fn take_key(&mut self) -> Option<CancelKey> {
        self.key.take()
    }

    fn message(&mut self, message: Message, out: &mut BytesMut) -> Result<(), StartupError> {
        let (tag, authenticated) = (message.tag(), self.phase == Phase::Authenticated);
        let malformed = StartupError::Malformed { tag };
        match tag {
            b'R' if !authenticated => {
                let message = self.authentication(message)?;
                self.pass(message, out)
            }
            b'E' => {
                self.refused = true;
                // No role matters to a client that is refused.
                out.unsplit(self.held.split());
                let message = match self.hint(message.body()) {
                    Some(hint) => with_hint(message.body(), hint),
                    None => message.into_bytes(),
                };
                out.unsplit(message);
                Ok(())
            }
            // NegotiateProtocolVersion and NoticeResponse.
            b'v' | b'N' => self.pass(message.into_bytes(), out),
            b'S' if authenticated => match self.parameters.report(message.body()) {
                true => self.pass(message.into_bytes(), out),
                false => Err(malformed),
            },
            b'K' if authenticated => {
                self.key = Some(CancelKey::new(message.body()).ok_or(malformed)?);
                self.pass(message.into_bytes(), out)
            }
            b'Z' if authenticated => {
                if message.body().len() != 1 {
                    return Err(malformed);
                }
                self.check_role()?;
                self.phase = Phase::Ready;
                out.unsplit(self.held.split());
                out.unsplit(message.into_bytes());
                Ok(())
            }
            tag => Err(StartupError::Unexpected { tag }),
        }
    }

    /// A message for the client, now or once the role is known.
    fn pass(&mut self, message: BytesMut, out: &mut BytesMut) -> Result<(), StartupError> {
        if self.role == Role::Any || self.phase != Phase::Authenticated || self.refused {
            out.unsplit(message);
            return Ok(());
        }
        if self.held.len() + message.len() > MAX_HELD {
            return Err(StartupError::TooMuch { limit: "64 KiB" });
        }
        self.held.unsplit(message);
        Ok(())
    }

    /// An authentication request, as it is for the client.
    fn authentication(&mut self, message: Message) -> Result<BytesMut, StartupError> {
        let malformed = StartupError::Malformed { tag: b'R' };
        let mut body = message.body();
        let kind = take_u32(&mut body).ok_or(malformed.clone())?;
        self.phase = match kind {
            OK => Phase::Authenticated,
            SASL_FINAL => Phase::Waiting,
            GSS_CONTINUE => Phase::MayRespond,
            _ => Phase::Asked,
        };
        if kind != SASL {
            return Ok(message.into_bytes());
        }
        let mut offered = Vec::new();
        loop {
            match take_text(&mut body).ok_or(malformed.clone())? {
                [] => break,
                name => offered.push(name),
            }
        }
        let binds = |name: &[u8]| name.ends_with(CHANNEL_BINDING);
        self.binds = offered.iter().any(|name| binds(name));
        if !self.strip || !self.binds {
            return Ok(message.into_bytes());
        }
        if offered.iter().all(|name| binds(name)) {
            let offered = String::from_utf8_lossy(&offered.join(&b", "[..])).into_owned();
            return Err(StartupError::OnlyChannelBinding { offered });
        }
        let mut kept = SASL.to_be_bytes().to_vec();
        for name in offered.iter().filter(|name| !binds(name)) {
            kept.extend_from_slice(name);
            kept.push(0);
        }
        kept.push(0);
        Ok(message::write(b'R', &kept))
    }

    /// What to add to the server's refusal: of a proxy between, which channel binding is about, it knows nothing.
    fn hint(&self, body: &[u8]) -> Option<&'static str> {
        let may_be_about_it = self.binds && self.phase != Phase::Authenticated;
        let invalid = field(body, b'C')? == SqlState::InvalidAuthorization.as_str().as_bytes();
        if !may_be_about_it || !invalid {
            return None;
        }
        Some(match self.client_tls {
            true => {
                "The client's TLS ends at truename, so its login cannot be bound to the server's: \
                 set channel_binding=disable in the client."
            }
            false => {
                "If the client asks for channel binding without TLS, as Npgsql does, set Channel \
                 Binding=Disable in the client, and `postgres.channel_binding: pass` for the alias."
            }
        })
    }

    fn check_role(&self) -> Result<(), StartupError> {
        match (self.role, self.parameters.role()) {
            (Role::Any, _) => Ok(()),
            (wanted, None) => Err(StartupError::UnknownRole { wanted }),
            (wanted, Some(found)) if found.serves(wanted) => Ok(()),
            (wanted, Some(found)) => Err(StartupError::WrongRole { wanted, found }),
        }
    }
}
