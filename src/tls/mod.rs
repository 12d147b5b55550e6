//! Verified TLS to the true name.
//!
//! [`ClientTls`] is built once when a configuration is loaded; [`handshake`] uses it for every
//! connection. What can go wrong is a [`TlsError`] whose text a person can act upon.

mod client;
mod error;
mod roots;
mod verify;

pub use client::{Alpn, ClientTls, Handshake, Negotiated, handshake, server_name};
pub use error::{TlsConfigError, TlsError};
pub use roots::RootStores;
pub use verify::{Reason, VerifyFailure};
