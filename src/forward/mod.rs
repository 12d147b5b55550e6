//! What happens between the two sides: a request goes out and its response comes back.

mod connection;
pub mod destination;
mod downstream;
mod error;
mod http;
mod passthrough;
mod record;
mod start;
mod tunnel;

pub use connection::{Begun, Connection, Ended, Unconnected, close, tell};
pub use downstream::Downstream;
pub use error::ForwardError;
pub use http::{
    Body, ClientSide, Content, Done, Incoming, Problem, RefusedHead, Stopped, Switch, exchange,
    forward, headers, is_extended_connect, refuse, serve,
};
pub use passthrough::{Passthrough, PassthroughError, Tunnel};
pub use record::Record;
pub use start::{StartError, Starting, Turn};
