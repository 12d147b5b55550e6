//! SMTP before TLS (RFC 5321, RFC 3207).

use std::net::{IpAddr, Ipv4Addr};

use bytes::{Bytes, BytesMut};

use super::{
    StartTlsError,
    lines::{Lines, put_line},
};
use crate::protocol::Step;

/// Greeting, EHLO, STARTTLS. What the server says of its extensions is forgotten: the client's EHLO, within TLS, is
/// for a server that has forgotten ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    phase: Phase,
    lines: Lines,
    greeting: BytesMut,
    local: IpAddr,
}

/// What the server is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Greeting,
    Extensions,
    Consent,
}

impl Opening {
    pub(super) fn made_from(&mut self, local: IpAddr) {
        self.local = local.to_canonical();
    }

    pub(super) fn next(&mut self, received: &mut BytesMut) -> Result<Step, StartTlsError> {
        loop {
            let Some(line) = self.lines.take(received)? else { return Ok(Step::Receive) };
            let (code, is_last) = reply(&line).ok_or_else(|| StartTlsError::unexpected(&line))?;
            match (self.phase, code) {
                (Phase::Greeting, b"220") => put_line(&line, &mut self.greeting),
                (Phase::Greeting, _) => return Err(StartTlsError::unwilling(&line)),
                (Phase::Extensions, b"250") | (Phase::Consent, b"220") => {}
                (Phase::Extensions, _) => return Err(StartTlsError::refused("EHLO", &line)),
                (Phase::Consent, _) => return Err(StartTlsError::refused("STARTTLS", &line)),
            }
            if !is_last {
                continue;
            }
            let (phase, command) = match self.phase {
                Phase::Greeting => (Phase::Extensions, hello(self.local)),
                Phase::Extensions => (Phase::Consent, Bytes::from_static(b"STARTTLS\r\n")),
                Phase::Consent => return Ok(Step::StartTls(self.greeting.split().freeze())),
            };
            if !received.is_empty() {
                return Err(StartTlsError::OutOfTurn);
            }
            self.phase = phase;
            return Ok(Step::Send(command));
        }
    }
}

impl Default for Opening {
    fn default() -> Self {
        Self {
            phase: Phase::Greeting,
            lines: Lines::default(),
            greeting: BytesMut::new(),
            local: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// The code of a line of a reply, and whether it is the last line.
fn reply(line: &[u8]) -> Option<(&[u8], bool)> {
    let (code, rest) = line.split_at_checked(3)?;
    let is_last = match rest.first() {
        None | Some(b' ') => true,
        Some(b'-') => false,
        Some(_) => return None,
    };
    code.iter().all(u8::is_ascii_digit).then_some((code, is_last))
}

/// A client without a name of its own calls itself by its address (RFC 5321 §4.1.3).
fn hello(local: IpAddr) -> Bytes {
    match local {
        IpAddr::V4(ip) => format!("EHLO [{ip}]\r\n"),
        IpAddr::V6(ip) => format!("EHLO [IPv6:{ip}]\r\n"),
    }
    .into()
}
