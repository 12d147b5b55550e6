//! What happens between the two sides: a request goes out and its response comes back.

mod attempt;
mod body;
mod deadline;
pub mod destination;
mod error;
pub mod headers;
mod http;
mod passthrough;
mod record;
mod reply;
mod retry;
mod tunnel;
mod upgrade;
mod urls;

pub use body::Body;
pub use error::ForwardError;
pub use http::{Downstream, Incoming, forward, refuse, serve};
pub use passthrough::{Passthrough, PassthroughError, Tunnel};
pub use record::Record;
pub use reply::{Problem, RefusedHead};
pub use upgrade::{Upgrade, UpgradeSender, is_extended_connect};
