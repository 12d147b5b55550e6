//! IMAP before TLS (RFC 9051).

use bytes::{Bytes, BytesMut};

use super::{StartTlsError, lines::Lines};
use crate::protocol::Step;

/// The client's greeting. The server's may list capabilities, which count no longer: STARTTLS, LOGINDISABLED.
const GREETING: Bytes = Bytes::from_static(b"* OK IMAP4 ready\r\n");

const COMMAND: &[u8] = b"truename STARTTLS\r\n";
const TAG: &[u8] = b"truename";

/// Greeting, STARTTLS. Untagged responses may come at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Opening {
    lines: Lines,
    was_greeted: bool,
}

impl Opening {
    pub(super) fn next(&mut self, received: &mut BytesMut) -> Result<Step, StartTlsError> {
        loop {
            let Some(line) = self.lines.take(received)? else { return Ok(Step::Receive) };
            let mut words = line.splitn(3, |byte| *byte == b' ');
            let tag = words.next().unwrap_or_default();
            let word = words.next().unwrap_or_default().to_ascii_uppercase();
            match (self.was_greeted, tag, &word[..]) {
                (_, b"*", b"BYE") => return Err(StartTlsError::unwilling(&line)),
                (false, b"*", b"PREAUTH") => return Err(StartTlsError::Preauthenticated),
                (false, b"*", b"OK") => {
                    self.was_greeted = true;
                    return Ok(Step::Send(Bytes::from_static(COMMAND)));
                }
                (true, b"*", _) => {}
                (true, TAG, b"OK") => return Ok(Step::StartTls(GREETING)),
                (true, TAG, b"NO" | b"BAD") => {
                    return Err(StartTlsError::refused("STARTTLS", &line));
                }
                _ => return Err(StartTlsError::unexpected(&line)),
            }
        }
    }
}
