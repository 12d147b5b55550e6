//! HTTP/1.1 on the wire (RFC 9112), both sides.
//!
//! Bodies are read and written on the connection's own task: an exchange needs neither a task of its own nor a
//! channel. A message whose framing is ambiguous is refused.
//!
//! * [`parse_request`], [`parse_response`]: heads, as types of the `http` crate; how names were written is kept
//!   beside them ([`Spelling`])
//! * [`Decoder`], [`Encoder`]: bodies by length, in chunks, or until the connection's end
//! * [`Inbox`], [`Outbox`]: bytes that are not parsed yet, and bytes that are not written yet
//! * [`ClientConnection`]: one request after the other on a connection to an origin
//! * [`ServerConnection`]: the state of a client's connection

mod body;
mod client;
mod head;
mod server;
mod transfer;

#[cfg(test)]
mod tests;

pub use body::{BodyError, Decoder, Encoder};
pub use client::{ClientConnection, ExchangeError};
pub use head::{
    Framing, HeadError, Reason, RequestFraming, Spelling, parse_request, parse_response,
    push_request, push_response, request_framing, response_framing,
};
pub use server::{SKIP, ServerConnection};
pub use transfer::{Inbox, Outbox};
