//! Packets: three bytes for the length, one for the sequence number, and the payload.

use bytes::BytesMut;

/// Length and sequence number.
pub(super) const HEADER: usize = 4;

/// No packet before the session begins has more. A client may send 64 KiB of attributes.
pub(super) const MAX_PACKET: usize = 100_000;

/// What the payload of an error begins with.
pub(super) const ERR: u8 = 0xff;

/// A packet whole.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    sequence: u8,
    payload: BytesMut,
}

/// A length that no packet has at this point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a packet of {length} bytes")]
pub struct LengthError {
    /// The length.
    pub length: usize,
}

impl Packet {
    /// The first packet in `buffer`, once all of it is there. It has `max` bytes at most.
    pub(super) fn take(buffer: &mut BytesMut, max: usize) -> Result<Option<Self>, LengthError> {
        let Some((sequence, length)) = header(buffer, max)? else { return Ok(None) };
        if buffer.len() < HEADER + length {
            return Ok(None);
        }
        let mut packet = buffer.split_to(HEADER + length);
        let payload = packet.split_off(HEADER);
        Ok(Some(Self { sequence, payload }))
    }

    /// Its number in the conversation.
    pub(super) fn sequence(&self) -> u8 {
        self.sequence
    }

    /// What it holds.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// What it holds, to be changed.
    pub(super) fn into_payload(self) -> BytesMut {
        self.payload
    }
}

/// The sequence number of the first packet in `buffer`, and its length, once its header is there.
pub(super) fn header(buffer: &BytesMut, max: usize) -> Result<Option<(u8, usize)>, LengthError> {
    let Some(&[a, b, c, sequence]) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let length = usize::from(a) | usize::from(b) << 8 | usize::from(c) << 16;
    if length > max {
        return Err(LengthError { length });
    }
    Ok(Some((sequence, length)))
}

/// A packet made anew.
pub(super) fn write(sequence: u8, payload: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(&header_of(sequence, payload.len()));
    bytes.extend_from_slice(payload);
    bytes
}

/// What comes before a payload.
pub(super) fn header_of(sequence: u8, length: usize) -> [u8; HEADER] {
    let [a, b, c, ..] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    [a, b, c, sequence]
}

/// Text up to its terminating zero, which is taken with it; all of it where there is none.
pub(super) fn take_text<'a>(from: &mut &'a [u8]) -> &'a [u8] {
    let end = from.iter().position(|byte| *byte == 0).unwrap_or(from.len());
    let (text, rest) = from.split_at(end);
    *from = rest.get(1..).unwrap_or_default();
    text
}

/// So many bytes.
pub(super) fn take<'a>(from: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(count)?;
    *from = rest;
    Some(taken)
}
