//! The first packet of a server.

use bytes::BytesMut;

use super::{
    SCRAMBLE, capability,
    packet::{take, take_text},
};

/// What a server says first: its version, its capabilities and a scramble.
#[derive(Clone, Debug)]
pub struct Greeting {
    payload: BytesMut,
    /// Where the lower half of the capabilities is.
    capabilities_at: usize,
    capabilities: u32,
    scramble: [u8; SCRAMBLE],
}

/// Why it is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GreetingError {
    /// Something else listens there.
    #[error("the server's first packet is not a MySQL greeting")]
    NotMysql,
    /// MySQL before 4.1, or a server without authentication plugins' data.
    #[error("the server speaks a protocol older than that of MySQL 4.1")]
    TooOld,
}

impl Greeting {
    /// Of this payload.
    pub(super) fn parse(payload: BytesMut) -> Result<Self, GreetingError> {
        let mut rest = payload.strip_prefix(&[10]).ok_or(GreetingError::NotMysql)?;
        take_text(&mut rest);
        let fixed = |rest: &mut &[u8], count| match take(rest, count) {
            Some(taken) => Ok(taken.to_vec()),
            None => Err(GreetingError::NotMysql),
        };
        // The number of the connection.
        fixed(&mut rest, 4)?;
        let mut scramble = fixed(&mut rest, 8)?;
        // A filler.
        fixed(&mut rest, 1)?;
        let capabilities_at = payload.len() - rest.len();
        let lower = fixed(&mut rest, 2)?;
        let mut more = || {
            // Character set and status.
            take(&mut rest, 3)?;
            let upper = take(&mut rest, 2)?;
            // The length of the scramble, and a filler.
            take(&mut rest, 11)?;
            scramble.extend_from_slice(take(&mut rest, SCRAMBLE - 8)?);
            Some(u32::from_le_bytes([lower[0], lower[1], upper[0], upper[1]]))
        };
        let capabilities = more().ok_or(GreetingError::TooOld)?;
        let needed = capability::PROTOCOL_41 | capability::SECURE_CONNECTION;
        let scramble = scramble.try_into().map_err(|_| GreetingError::TooOld)?;
        match capabilities & needed == needed {
            true => Ok(Self { payload, capabilities_at, capabilities, scramble }),
            false => Err(GreetingError::TooOld),
        }
    }

    /// Whether the server offers TLS.
    pub fn offers_tls(&self) -> bool {
        self.capabilities & capability::SSL != 0
    }

    /// What the server can do.
    pub(super) fn capabilities(&self) -> u32 {
        self.capabilities
    }

    /// What passwords are bound to.
    pub(super) fn scramble(&self) -> [u8; SCRAMBLE] {
        self.scramble
    }

    /// As it came.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The payload with TLS offered, or not offered. Nothing else changes.
    pub(super) fn offering(mut self, tls: bool) -> BytesMut {
        let [lower, upper] = (capability::SSL as u16).to_le_bytes();
        for (byte, bits) in self.payload[self.capabilities_at..].iter_mut().zip([lower, upper]) {
            if tls {
                *byte |= bits;
            } else {
                *byte &= !bits;
            }
        }
        self.payload
    }
}
