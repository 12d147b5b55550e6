//! Messages: a byte for the type, a length of four bytes that counts itself, and a body.

use bytes::{Buf, BytesMut};

/// Type and length.
const HEADER: usize = 5;

/// The client ends its session.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// How much of a body a [`Scanner`] shows: enough for `in_hot_standby`, whose value may change.
const SHOWN: usize = 32;

/// A message whole.
#[derive(Debug)]
pub(super) struct Message(BytesMut);

/// A length that no message has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of type {:?} with length {length}", char::from(*.tag))]
pub struct LengthError {
    /// The message's type.
    pub tag: u8,
    /// Its length.
    pub length: i32,
}

impl Message {
    /// The first message in `buffer`, once all of it is there. Its body has `max` bytes at most.
    pub(super) fn take(buffer: &mut BytesMut, max: usize) -> Result<Option<Self>, LengthError> {
        let Some(header) = buffer.first_chunk() else { return Ok(None) };
        let (tag, body) = parse(header)?;
        if body > max {
            return Err(LengthError { tag, length: length(header) });
        }
        let whole = HEADER + body;
        Ok((buffer.len() >= whole).then(|| Self(buffer.split_to(whole))))
    }

    /// Its type.
    pub(super) fn tag(&self) -> u8 {
        self.0.first().copied().unwrap_or_default()
    }

    /// What comes after the length.
    pub(super) fn body(&self) -> &[u8] {
        self.0.get(HEADER..).unwrap_or_default()
    }

    /// As it came.
    pub(super) fn into_bytes(self) -> BytesMut {
        self.0
    }
}

/// A message made anew.
pub(super) fn write(tag: u8, body: &[u8]) -> BytesMut {
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    let mut bytes = BytesMut::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(&[tag]);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Text up to its terminating zero, which is taken with it.
pub(super) fn take_text<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = from.iter().position(|byte| *byte == 0)?;
    let (text, rest) = from.split_at_checked(end)?;
    *from = rest.get(1..)?;
    Some(text)
}

/// A number of 32 bits, which is taken.
pub(super) fn take_u32(from: &mut &[u8]) -> Option<u32> {
    from.try_get_u32().ok()
}

fn length(header: &[u8; HEADER]) -> i32 {
    let [_, length @ ..] = *header;
    i32::from_be_bytes(length)
}

/// The type of a message, and the length of its body.
fn parse(header: &[u8; HEADER]) -> Result<(u8, usize), LengthError> {
    let (tag, length) = (header[0], length(header));
    let body = length.checked_sub(4).and_then(|body| usize::try_from(body).ok());
    body.map(|body| (tag, body)).ok_or(LengthError { tag, length })
}

/// Follows messages that pass by, in any fragments, and keeps none of them.
#[derive(Debug, Default)]
pub struct Scanner {
    header: [u8; HEADER],
    /// How much of the header was seen.
    seen: usize,
    /// How much of the body was not.
    left: usize,
    /// The beginning of the body, where it came in pieces.
    shown: [u8; SHOWN],
    shown_len: usize,
}

impl Scanner {
    /// Takes note of bytes. `each` gets the type of every message that ends with them, and the beginning of
    /// its body: all of it where it is short.
    pub fn scan(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(u8, &[u8]),
    ) -> Result<(), LengthError> {
        while !bytes.is_empty() {
            if self.seen == 0
                && let Some((header, rest)) = bytes.split_first_chunk()
                && let (tag, body) = parse(header)?
                && let Some((body, rest)) = rest.split_at_checked(body)
            {
                each(tag, &body[..body.len().min(SHOWN)]);
                bytes = rest;
            } else {
                bytes = self.fragment(bytes, &mut each)?;
            }
        }
        Ok(())
    }

    /// Whether all that was seen are whole messages.
    pub fn is_between_messages(&self) -> bool {
        self.seen == 0
    }

    /// Takes some of a message that is not all there, and returns the rest.
    fn fragment<'a>(
        &mut self,
        bytes: &'a [u8],
        each: &mut impl FnMut(u8, &[u8]),
    ) -> Result<&'a [u8], LengthError> {
        let (now, rest) = if let Some(header) = self.header.get_mut(self.seen..)
            && !header.is_empty()
        {
            let (now, rest) = bytes.split_at(bytes.len().min(header.len()));
            header[..now.len()].copy_from_slice(now);
            self.seen += now.len();
            if self.seen < HEADER {
                return Ok(rest);
            }
            (self.left, self.shown_len) = (parse(&self.header)?.1, 0);
            (&[][..], rest)
        } else {
            bytes.split_at(bytes.len().min(self.left))
        };
        let room = &mut self.shown[self.shown_len..];
        let shown = now.len().min(room.len());
        room[..shown].copy_from_slice(&now[..shown]);
        self.shown_len += shown;
        self.left -= now.len();
        if self.left == 0 {
            self.seen = 0;
            each(self.header[0], &self.shown[..self.shown_len]);
        }
        Ok(rest)
    }
}
