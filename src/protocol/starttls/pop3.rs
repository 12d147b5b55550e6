//! POP3 before TLS (RFC 1939, RFC 2595).

use bytes::{Bytes, BytesMut};

use super::{
    StartTlsError,
    lines::{Lines, put_line},
};
use crate::protocol::Step;

/// Greeting, STLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Opening {
    lines: Lines,
    /// The server's, with the timestamp that a client's APOP is computed from. Empty before it has come.
    greeting: BytesMut,
}

impl Opening {
    pub(super) fn next(&mut self, received: &mut BytesMut) -> Result<Step, StartTlsError> {
        let Some(line) = self.lines.take(received)? else { return Ok(Step::Receive) };
        let greets = self.greeting.is_empty();
        match line[..].split(|byte| *byte == b' ').next() {
            Some(b"+OK") if !greets => Ok(Step::StartTls(self.greeting.split().freeze())),
            Some(b"+OK") if !received.is_empty() => Err(StartTlsError::OutOfTurn),
            Some(b"+OK") => {
                put_line(&line, &mut self.greeting);
                Ok(Step::Send(Bytes::from_static(b"STLS\r\n")))
            }
            Some(b"-ERR") if greets => Err(StartTlsError::unwilling(&line)),
            Some(b"-ERR") => Err(StartTlsError::refused("STLS", &line)),
            _ => Err(StartTlsError::unexpected(&line)),
        }
    }
}
