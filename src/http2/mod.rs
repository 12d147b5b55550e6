//! HTTP/2 on the wire (RFC 9113), on the `h2` crate: what both sides of the proxy have in common.
//!
//! One task drives a connection and owns its `h2` end; each stream has a task of its own, or runs on the
//! task of the exchange that it belongs to. What they share:
//!
//! * [`coalesced`]: what many streams write between two polls of the connection goes out in one system
//!   call. [`Writer::poll_driven`] is how a driver polls its connection
//! * [`ReceiveWindow`]: how much the peer may send ahead of slow readers, so that an unread stream does not stall
//!   the others, and all connections together stay within [`UNREAD_STREAMS`]
//! * [`Incoming`], [`Sender`], [`Tunnel`]: the two sides of a stream, and both as a byte stream
//!
//! The server's half is in [`server`], the client's in [`handshake`] and what it returns.

mod client;
mod coalesce;
mod frames;
mod incoming;
mod keep_alive;
mod rooms;
mod sender;
pub mod server;
mod tunnel;
mod window;

pub use h2::{Reason, ext::Protocol};

pub use client::{
    ClientConnection, Connection, Exchange, ExchangeError, OriginKeepAlive, handshake,
};
pub use coalesce::{Coalesced, Writer, coalesced};
pub use frames::Flood;
pub use incoming::{Incoming, ReceiveError};
pub use sender::{Gone, Output, SEND_BUFFER, Sender};
pub use tunnel::Tunnel;
pub use window::{Credit, ReceiveWindow, Unread};

/// How much a client may send on one stream ahead of its reader.
pub const STREAM_WINDOW: u32 = 64 * 1024;

/// Streams that a peer may have open on one connection.
pub const MAX_STREAMS: u32 = 100;

/// For how many unread streams, of all connections of the process together, windows are opened beyond
/// [those that each connection has anyway](ReceiveWindow): 64 MiB.
///
/// Once that is used up, a connection's window no longer grows with its unread streams: they stall its other
/// streams until their idle timers end them.
pub const UNREAD_STREAMS: usize = 1024;

/// How much an origin may send on one stream ahead of its reader: more than a client, because it may be far away,
/// and sends more.
pub const UPSTREAM_WINDOW: u32 = 512 * 1024;

/// [`UNREAD_STREAMS`] for connections to origins: 256 MiB.
pub const UNREAD_UPSTREAM: usize = 512;
