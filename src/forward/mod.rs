//! What happens between the two sides: a request goes out and its answer comes back.

mod deadline;
pub mod destination;
mod error;
mod exchange;
pub mod headers;
mod http;
mod passthrough;
mod reply;
mod retry;
mod tunnel;
mod upgrade;
mod urls;

pub use error::ForwardError;
pub use exchange::{Body, Exchange};
pub use http::{Arrival, forward, refuse, serve};
pub use passthrough::{Passthrough, PassthroughError, Tunnel};
pub use reply::{Problem, RefusedHead};
pub use upgrade::{Handover, Upgrade};
