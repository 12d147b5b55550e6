//! What is said to a PostgreSQL server before TLS.

use bytes::{Buf, Bytes, BytesMut};

use super::{OpeningError, Packet};
use crate::{config::Negotiation, protocol::Step};

/// The ALPN protocol of TLS that begins at once. After an SSLRequest none is offered: TLS front ends that do
/// not know it abort.
pub const ALPN: &str = "postgresql";

/// The opening: an SSLRequest and its response, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Request,
    Response,
    Done,
}

impl Opening {
    /// On a connection on which nothing has been said.
    pub fn new(negotiation: Negotiation) -> Self {
        let phase = match negotiation {
            Negotiation::Request => Phase::Request,
            Negotiation::Direct => Phase::Done,
        };
        Self { phase }
    }

    /// What to do next, given what was received and not yet taken.
    ///
    /// No byte may be behind the response: it would be read as if it had come by TLS.
    pub fn next(&mut self, received: &mut BytesMut) -> Result<Step, OpeningError> {
        match self.phase {
            Phase::Request if !received.is_empty() => Err(OpeningError::SpokeFirst),
            Phase::Request => {
                self.phase = Phase::Response;
                Ok(Step::Send(Bytes::from_static(&Packet::SSL_REQUEST)))
            }
            Phase::Response => {
                let Ok(response) = received.try_get_u8() else { return Ok(Step::Receive) };
                match response {
                    b'S' => self.phase = Phase::Done,
                    b'N' => return Err(OpeningError::NoTls),
                    b'E' => return Err(OpeningError::Failed),
                    other => return Err(OpeningError::NotPostgres { byte: other }),
                }
                self.next(received)
            }
            Phase::Done if !received.is_empty() => Err(OpeningError::BytesBeforeTls),
            Phase::Done => Ok(Step::StartTls(Bytes::new())),
        }
    }
}
