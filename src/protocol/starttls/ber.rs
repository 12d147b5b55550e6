//! As much of BER as LDAP's envelope needs (RFC 4511 §5.1): lengths are definite, in the short form or the long one.

use bytes::{BufMut as _, BytesMut};

/// The beginning of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) tag: u8,
    /// How long this is itself.
    pub(super) length: usize,
    /// How long its contents are.
    pub(super) contents: usize,
}

/// It is no BER, or none that LDAP allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotBer;

impl Header {
    /// The header that `bytes` begin with; `None` while it is incomplete.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Self>, NotBer> {
        let Some((&tag, rest)) = bytes.split_first() else { return Ok(None) };
        // LDAP has no tag of several bytes.
        if tag & 0x1f == 0x1f {
            return Err(NotBer);
        }
        let Some((&first, rest)) = rest.split_first() else { return Ok(None) };
        let more = match first {
            0..=0x7f => {
                return Ok(Some(Self { tag, length: 2, contents: first.into() }));
            }
            // Active Directory always uses four bytes.
            0x81..=0x84 => usize::from(first & 0x7f),
            _ => return Err(NotBer),
        };
        let Some(digits) = rest.get(..more) else { return Ok(None) };
        let contents = digits.iter().fold(0, |value, digit| value << 8 | usize::from(*digit));
        Ok(Some(Self { tag, length: 2 + more, contents }))
    }
}

/// Takes an element, its tag and contents, off the front of `bytes`.
pub(super) fn take<'a>(bytes: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let header = Header::parse(bytes).ok()??;
    let rest = bytes.get(header.length..)?;
    let (contents, rest) = rest.split_at_checked(header.contents)?;
    *bytes = rest;
    Some((header.tag, contents))
}

/// A whole number that is not negative.
pub(super) fn number(contents: &[u8]) -> Option<u32> {
    match contents {
        [] | [0x80..=0xff, ..] | [_, _, _, _, _, ..] => None,
        digits => Some(digits.iter().fold(0, |value, digit| value << 8 | u32::from(*digit))),
    }
}

/// An element.
pub(super) fn element(tag: u8, contents: &[u8]) -> BytesMut {
    let mut element = BytesMut::with_capacity(contents.len() + 6);
    element.put_u8(tag);
    match u8::try_from(contents.len()) {
        Ok(length @ ..=0x7f) => element.put_u8(length),
        Ok(length) => element.put_slice(&[0x81, length]),
        Err(_) => {
            element.put_u8(0x84);
            element.put_u32(contents.len() as u32);
        }
    }
    element.put_slice(contents);
    element
}
