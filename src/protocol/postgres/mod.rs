//! PostgreSQL, frontend/backend protocol 3.0 and later.
//!
//! A client's packets before its session ([`Packet`]) have a length and a code. Everything after them is
//! messages: a type, a length that counts itself, and a body. [`Startup`] reads both up to the server's first
//! ReadyForQuery, [`Conversation`] only the headers of what follows.

mod cancel;
mod conversation;
mod error;
mod login;
mod message;
mod opening;
mod packet;
mod parameters;
mod response;
mod startup;

pub use cancel::{CancelKey, CancelKeys, HeldKey};
pub use conversation::Conversation;
pub use error::{OpeningError, StartupError};
pub use message::{LengthError, Scanner, TERMINATE};
pub use opening::{ALPN, Opening};
pub use packet::Packet;
pub use parameters::{ServerParameters, ServerRole};
pub use response::{ErrorResponse, SqlState};
pub use startup::{ClientTls, Settings, Startup};

#[cfg(test)]
mod tests;
