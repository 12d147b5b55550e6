//! What happens between the two sides: a request goes out and its answer comes back.

mod error;
mod exchange;
pub mod headers;
mod http;
mod reply;
mod tunnel;
mod upgrade;

pub use error::ForwardError;
pub use exchange::{Body, Exchange};
pub use http::{Arrival, forward, serve};
pub use reply::{Problem, RefusedHead};
