//! What a client says before its session: a length of four bytes that counts itself, and a code.

use bytes::{Bytes, BytesMut};

use super::{
    CancelKey, StartupError,
    message::{take_text, take_u32},
};

/// What PostgreSQL allows after the length.
const MAX_LENGTH: usize = 10_000;

/// The first byte of TLS, which a length of more than 360 MB would begin with.
const TLS_HANDSHAKE: u8 = 0x16;

const CANCEL_REQUEST: u32 = 80_877_102;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;

/// A packet of a client that has no session yet.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet {
    /// Whether TLS can be had.
    SslRequest,
    /// Whether encryption by GSSAPI can be had.
    GssEncRequest,
    /// A query of the session with this key is to be cancelled.
    Cancel(CancelKey),
    /// A session is to begin. The packet whole: version and parameters are for the server to judge.
    Startup(Bytes),
}

impl Packet {
    /// The SSLRequest.
    pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

    /// The first packet in `buffer`, once all of it is there. What is no packet is refused as early as that
    /// can be told.
    pub fn take(buffer: &mut BytesMut) -> Result<Option<Self>, StartupError> {
        if buffer.first() == Some(&TLS_HANDSHAKE) {
            return Err(StartupError::UnexpectedTls);
        }
        let Some(length) = buffer.first_chunk() else { return Ok(None) };
        let length = u32::from_be_bytes(*length);
        let fits = |length: &usize| (8..=4 + MAX_LENGTH).contains(length);
        let Some(whole) = usize::try_from(length).ok().filter(fits) else {
            return Err(StartupError::PacketLength { length });
        };
        if buffer.len() < whole {
            return Ok(None);
        }
        let packet = buffer.split_to(whole).freeze();
        let mut body = packet.get(4..).unwrap_or_default();
        let code = take_u32(&mut body).unwrap_or_default();
        match code {
            SSL_REQUEST | GSSENC_REQUEST if !body.is_empty() => {
                Err(StartupError::PacketLength { length })
            }
            SSL_REQUEST => Ok(Some(Self::SslRequest)),
            GSSENC_REQUEST => Ok(Some(Self::GssEncRequest)),
            CANCEL_REQUEST => match CancelKey::new(body) {
                Some(key) => Ok(Some(Self::Cancel(key))),
                None => Err(StartupError::PacketLength { length }),
            },
            _ => {
                let (major, minor) = (code >> 16, code & 0xffff);
                if major != 3 {
                    return Err(StartupError::Version { major, minor });
                }
                if !are_parameters(body) {
                    return Err(StartupError::PacketLayout);
                }
                Ok(Some(Self::Startup(packet)))
            }
        }
    }
}

/// The packet that asks for a query of the session with this key to be cancelled.
pub(super) fn cancel_request(key: &[u8]) -> Bytes {
    let length = u32::try_from(8 + key.len()).unwrap_or(u32::MAX);
    let mut packet = BytesMut::with_capacity(8 + key.len());
    packet.extend_from_slice(&length.to_be_bytes());
    packet.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
    packet.extend_from_slice(key);
    packet.freeze()
}

/// Whether these are names and values in pairs, and an empty name as the end.
fn are_parameters(mut bytes: &[u8]) -> bool {
    loop {
        match take_text(&mut bytes) {
            Some([]) => return bytes.is_empty(),
            Some(_) if take_text(&mut bytes).is_some() => {}
            _ => return false,
        }
    }
}
