//! MySQL, protocol version 10, as MySQL 5.6 and later and MariaDB speak it.
//!
//! The server speaks first: a [`Greeting`] with what it can do and a scramble, to which passwords are bound. The
//! client asks for TLS, or sends its response; then both take turns until the server says OK. Every packet
//! has a sequence number, and each side of a proxy that adds or takes away packets has numbers of its own.
//! [`Startup`] is all of this up to the OK. What follows passes as it is: each command starts at 0 again.

mod client_packets;
mod error;
mod greeting;
mod handshake_response;
mod login;
mod opening;
mod packet;
mod response;
mod rsa;
mod startup;

pub use client_packets::ClientPackets;
pub use error::{OpeningError, StartupError};
pub use greeting::{Greeting, GreetingError};
pub use opening::Opening;
pub use packet::LengthError;
pub use response::ErrPacket;
pub use rsa::RsaKey;
pub use startup::{ClientTls, Settings, Startup};

/// Capabilities of a server or a client, as far as they matter here.
mod capability {
    /// A database is named in the client's response.
    pub(super) const CONNECT_WITH_DB: u32 = 1 << 3;
    /// Packets are compressed once the session has begun.
    pub(super) const COMPRESS: u32 = 1 << 5;
    /// The protocol of MySQL 4.1 and later.
    pub(super) const PROTOCOL_41: u32 = 1 << 9;
    /// TLS.
    pub(super) const SSL: u32 = 1 << 11;
    /// Authentication of MySQL 4.1 and later.
    pub(super) const SECURE_CONNECTION: u32 = 1 << 15;
    /// Authentication plugins.
    pub(super) const PLUGIN_AUTH: u32 = 1 << 19;
    /// The client's authentication data may have more than 255 bytes.
    pub(super) const PLUGIN_AUTH_LENENC: u32 = 1 << 21;
    /// The same as `COMPRESS`, with zstd.
    pub(super) const ZSTD: u32 = 1 << 26;
}

/// What a server sends for authentication has this size, without the zero behind it.
const SCRAMBLE: usize = 20;

#[cfg(test)]
mod tests;
