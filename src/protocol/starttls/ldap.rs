//! LDAP before TLS (RFC 4511 §4.14), and the envelopes of its messages.

use bytes::{Bytes, BytesMut};

use super::{
    MAX_RECEIVED, StartTlsError,
    ber::{self, Header},
    error::quote,
};
use crate::protocol::Step;

pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const INTEGER: u8 = 0x02;
pub(super) const ENUMERATED: u8 = 0x0a;
pub(super) const OCTET_STRING: u8 = 0x04;
pub(super) const EXTENDED_RESPONSE: u8 = 0x78;

/// ExtendedRequest 1, with the name of StartTLS: 1.3.6.1.4.1.1466.20037.
const REQUEST: &[u8] = b"\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037";
const REQUEST_ID: u32 = 1;

/// What a server sends unasked has this.
const UNSOLICITED: u32 = 0;

const SUCCESS: u32 = 0;

/// The request, and its response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Opening {
    has_asked: bool,
}

impl Opening {
    pub(super) fn next(&mut self, received: &mut BytesMut) -> Result<Step, StartTlsError> {
        if !self.has_asked {
            if !received.is_empty() {
                return Err(StartTlsError::OutOfTurn);
            }
            self.has_asked = true;
            return Ok(Step::Send(Bytes::from_static(REQUEST)));
        }
        let unexpected = |bytes: &[u8]| StartTlsError::unexpected(bytes);
        if received.first().is_some_and(|tag| *tag != SEQUENCE) {
            return Err(unexpected(received));
        }
        let header = Header::parse(received).map_err(|_| unexpected(received))?;
        let Some(header) = header else { return Ok(Step::Receive) };
        if header.contents > MAX_RECEIVED {
            return Err(StartTlsError::TooMuch);
        }
        let length = header.length + header.contents;
        if received.len() < length {
            return Ok(Step::Receive);
        }
        let message = received.split_to(length);
        let response = Response::parse(&message).ok_or_else(|| unexpected(&message))?;
        let text = response.text();
        match (response.id, response.code) {
            (REQUEST_ID, SUCCESS) => Ok(Step::StartTls(Bytes::new())),
            (REQUEST_ID, _) => Err(StartTlsError::Refused { request: "StartTLS", response: text }),
            (UNSOLICITED, _) => Err(StartTlsError::Unwilling { response: text }),
            _ => Err(unexpected(&message)),
        }
    }
}

/// An ExtendedResponse.
struct Response<'a> {
    id: u32,
    code: u32,
    diagnostic: &'a [u8],
}

impl<'a> Response<'a> {
    fn parse(mut message: &'a [u8]) -> Option<Self> {
        let (SEQUENCE, mut message) = ber::take(&mut message)? else { return None };
        let (INTEGER, id) = ber::take(&mut message)? else { return None };
        let (EXTENDED_RESPONSE, mut response) = ber::take(&mut message)? else { return None };
        let (ENUMERATED, code) = ber::take(&mut response)? else { return None };
        let (OCTET_STRING, _matched) = ber::take(&mut response)? else { return None };
        let (OCTET_STRING, diagnostic) = ber::take(&mut response)? else { return None };
        Some(Self { id: ber::number(id)?, code: ber::number(code)?, diagnostic })
    }

    /// "protocolError (2): unsupported extended operation"
    fn text(&self) -> String {
        let name = match self.code {
            1 => "operationsError ",
            2 => "protocolError ",
            8 => "strongerAuthRequired ",
            10 => "referral ",
            51 => "busy ",
            52 => "unavailable ",
            53 => "unwillingToPerform ",
            _ => "",
        };
        let diagnostic = quote(self.diagnostic);
        let separator = if diagnostic.is_empty() { "" } else { ": " };
        format!("{name}({}){separator}{diagnostic}", self.code)
    }
}

/// So many bytes tell what a request is: the header of the message, its id, and the tag of the operation.
const LONGEST_ENVELOPE: usize = 6 + 6 + 4 + 1;

/// A client's request, as far as its envelope says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) id: u32,
    /// The tag of the response that ends it.
    pub(super) response: u8,
}

impl Request {
    /// Whether these bytes may become a request that can be responded to: they are not enough yet.
    pub(super) fn is_incomplete(bytes: &[u8]) -> bool {
        match Header::parse(bytes) {
            Ok(None) => bytes.first().is_none_or(|tag| *tag == SEQUENCE),
            Ok(Some(header)) => {
                let is_whole = bytes.len() >= header.length.saturating_add(header.contents);
                header.tag == SEQUENCE && !is_whole && bytes.len() < LONGEST_ENVELOPE
            }
            Err(_) => false,
        }
    }

    /// The request that `bytes` begin with, where it has a response. It need not be complete.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let header = Header::parse(bytes).ok()??;
        let mut contents = bytes.get(header.length..).filter(|_| header.tag == SEQUENCE)?;
        let (INTEGER, id) = ber::take(&mut contents)? else { return None };
        let response = match *contents.first()? {
            // Bind, modify, add, modify DN, compare, extended.
            request @ (0x60 | 0x66 | 0x68 | 0x6c | 0x6e | 0x77) => request + 1,
            // Search: the end of its results. Delete is no sequence.
            0x63 => 0x65,
            0x4a => 0x6b,
            _ => return None,
        };
        let id = ber::number(id).filter(|id| *id != UNSOLICITED)?;
        Some(Self { id, response })
    }
}
