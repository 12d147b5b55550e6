//! HTTP/1.1 on the wire (RFC 9112), for both sides: heads, bodies, and the client's half of an exchange.
//!
//! A body is read and written where it is asked for, on the connection's own task: an exchange costs
//! neither a task nor a channel. What is read here frames one message in one way, or is refused.
//!
//! * [`parse_request`], [`parse_response`]: heads, as the `http` crate has them; how names were written
//!   is kept beside ([`Spelling`])
//! * [`Decoder`], [`Encoder`]: bodies by length, in chunks, or until the end
//! * [`Inbox`], [`Outbox`]: what was read and not understood yet, what is not written yet
//! * [`ClientConnection`]: one request after the other on a connection to an origin

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
