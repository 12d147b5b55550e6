//! What a client sends in response to the greeting.

use bytes::BytesMut;

use super::{
    StartupError, capability,
    packet::{take, take_text},
};

/// Capabilities, the largest packet, the character set, and the capabilities of MariaDB: the response begins with
/// them, and a request for TLS is nothing else.
const FLAGS: usize = 32;

/// The plugin of a client that names none.
const DEFAULT_PLUGIN: &[u8] = b"mysql_native_password";

/// A user of this name is refused by every server. It shows in the log who it was.
const PLACEHOLDER: &[u8] = b"truename\0";

/// The client's first packet: who it is, and the first authentication data.
#[derive(Clone, Debug)]
pub(super) struct HandshakeResponse {
    payload: BytesMut,
    /// Where the authentication data is, with its length before it.
    data_from: usize,
    data_to: usize,
    data: Vec<u8>,
    plugin: Vec<u8>,
}

/// Whether this payload is a request for TLS.
pub(super) fn is_ssl_request(payload: &[u8]) -> bool {
    payload.len() == FLAGS && capabilities(payload) & capability::SSL != 0
}

impl HandshakeResponse {
    /// Of this payload.
    pub(super) fn parse(payload: BytesMut) -> Result<Self, StartupError> {
        let capabilities = capabilities(&payload);
        if capabilities & capability::PROTOCOL_41 == 0 {
            return Err(StartupError::TooOld);
        }
        let mut rest = payload.get(FLAGS..).ok_or(StartupError::BadHandshake)?;
        // The user.
        take_text(&mut rest);
        let data_from = payload.len() - rest.len();
        let data = data(&mut rest, capabilities).ok_or(StartupError::BadHandshake)?.to_vec();
        let data_to = payload.len() - rest.len();
        if capabilities & capability::CONNECT_WITH_DB != 0 {
            take_text(&mut rest);
        }
        let plugin = match capabilities & capability::PLUGIN_AUTH {
            0 => DEFAULT_PLUGIN.to_vec(),
            _ => take_text(&mut rest).to_vec(),
        };
        Ok(Self { payload, data_from, data_to, data, plugin })
    }

    /// What the client can do.
    pub(super) fn capabilities(&self) -> u32 {
        capabilities(&self.payload)
    }

    /// The authentication plugin that the client has used.
    pub(super) fn plugin(&self) -> &[u8] {
        &self.plugin
    }

    /// The authentication data.
    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    /// The request for TLS that agrees with it: a server keeps these flags and passes over those within TLS.
    pub(super) fn ssl_request(&self) -> BytesMut {
        let mut request = BytesMut::from(&self.payload[..FLAGS]);
        offer(&mut request, true);
        request
    }

    /// The payload as it is for a server with TLS, or without.
    pub(super) fn for_server(mut self, tls: bool) -> BytesMut {
        offer(&mut self.payload, tls);
        self.payload
    }

    /// The same with other authentication data, which has a length that the client's capabilities allow for.
    pub(super) fn with_data(&self, data: &[u8]) -> Option<Self> {
        let capabilities = capabilities(&self.payload);
        let mut payload = BytesMut::from(&self.payload[..self.data_from]);
        if capabilities & capability::PLUGIN_AUTH_LENENC != 0 && data.len() > 250 {
            payload.extend_from_slice(&[0xfc]);
            payload.extend_from_slice(&u16::try_from(data.len()).ok()?.to_le_bytes());
        } else if capabilities & LENGTHS != 0 {
            payload.extend_from_slice(&[u8::try_from(data.len()).ok()?]);
        }
        payload.extend_from_slice(data);
        // Text that ends with a zero: as a password does that is not empty.
        if capabilities & LENGTHS == 0 && data.last() != Some(&0) {
            payload.extend_from_slice(&[0]);
        }
        let data_to = payload.len();
        payload.extend_from_slice(&self.payload[self.data_to..]);
        let (data, plugin) = (data.to_vec(), self.plugin.clone());
        Some(Self { payload, data_from: self.data_from, data_to, data, plugin })
    }
}

/// Capabilities by which the authentication data has a length before it.
const LENGTHS: u32 = capability::PLUGIN_AUTH_LENENC | capability::SECURE_CONNECTION;

/// The response of a user without a password: a server refuses it, and does not count that as an interrupted handshake.
pub(super) fn placeholder() -> BytesMut {
    let capabilities =
        capability::PROTOCOL_41 | capability::SECURE_CONNECTION | capability::PLUGIN_AUTH;
    let mut payload = BytesMut::zeroed(FLAGS);
    payload[..4].copy_from_slice(&capabilities.to_le_bytes());
    // The character set: utf8mb4.
    payload[8] = 45;
    payload.extend_from_slice(PLACEHOLDER);
    // No authentication data.
    payload.extend_from_slice(&[0]);
    payload.extend_from_slice(DEFAULT_PLUGIN);
    payload.extend_from_slice(&[0]);
    payload
}

/// What the client can do; nothing of a client before 4.1, whose flags have two bytes.
fn capabilities(payload: &[u8]) -> u32 {
    payload.first_chunk().map_or(0, |flags| u32::from_le_bytes(*flags))
}

fn offer(payload: &mut [u8], tls: bool) {
    let Some(flags) = payload.first_chunk_mut::<4>() else { return };
    let capabilities = u32::from_le_bytes(*flags);
    *flags = match tls {
        true => capabilities | capability::SSL,
        false => capabilities & !capability::SSL,
    }
    .to_le_bytes();
}

/// The authentication data.
fn data<'a>(rest: &mut &'a [u8], capabilities: u32) -> Option<&'a [u8]> {
    if capabilities & LENGTHS == 0 {
        return Some(take_text(rest));
    }
    let length = match *take(rest, 1)? {
        [0xfc] if capabilities & capability::PLUGIN_AUTH_LENENC != 0 => {
            usize::from(u16::from_le_bytes(take(rest, 2)?.try_into().ok()?))
        }
        // No data is as long as three or eight bytes would tell.
        [251..=255] if capabilities & capability::PLUGIN_AUTH_LENENC != 0 => return None,
        [length] => usize::from(length),
        _ => return None,
    };
    take(rest, length)
}
