//! Verified TLS to the true name.
//!
//! [`ClientTls`] is built once when a configuration is loaded; [`handshake`] uses it for every
//! connection. Failures are [`TlsError`]s, whose messages say how to fix them.

mod anchor;
pub mod authority;
mod client;
mod error;
mod failure;
mod leaf;
mod lists;
mod offer;
mod pem;
mod pins;
mod roots;
pub mod server;
mod sessions;
mod shared;
pub mod source;
pub mod store;
mod system;
#[cfg(test)]
mod tests;
pub mod truststore;
mod verify;

pub use client::{ClientTls, Handshake, Negotiated, handshake, server_name};
pub use error::{TlsConfigError, TlsConfigErrors, TlsError, TlsFault};
pub use failure::{Reason, VerifyFailure};
pub use offer::{Alpn, Offer};
pub use roots::RootStores;
pub use system::files_from_env;
