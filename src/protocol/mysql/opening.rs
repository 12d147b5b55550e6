//! What a MySQL server says before anything else.

use bytes::BytesMut;

use super::{
    Greeting, OpeningError,
    packet::{self, ERR, Packet},
};
use crate::protocol::Step;

/// No greeting and no error in its place has more.
const MAX_GREETING: usize = 4096;

/// The opening: the server's greeting is awaited. TLS begins only when the client has responded to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Whether TLS follows, which the server has to offer.
    tls: bool,
}

impl Opening {
    /// On a connection on which nothing has been said.
    pub fn new(tls: bool) -> Self {
        Self { tls }
    }

    /// What to do next, given what was received and not yet taken.
    pub fn next(&mut self, received: &mut BytesMut) -> Result<Step, OpeningError> {
        let packet = Packet::take(received, MAX_GREETING).map_err(OpeningError::Length)?;
        let Some(packet) = packet else { return Ok(Step::Receive) };
        if packet.payload().first() == Some(&ERR) {
            return Err(OpeningError::Refused { packet: packet.into_payload().freeze() });
        }
        if packet.sequence() != 0 {
            return Err(OpeningError::Sequence { sequence: packet.sequence() });
        }
        let greeting = Greeting::parse(packet.into_payload())?;
        if self.tls && !greeting.offers_tls() {
            return Err(OpeningError::NoTls);
        }
        if !received.is_empty() {
            return Err(OpeningError::BytesBeforeTls);
        }
        Ok(Step::StartTls(packet::write(0, greeting.payload()).freeze()))
    }
}
