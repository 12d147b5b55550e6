//! Listening sockets, and which worker serves what comes in.

mod accept;
mod bind;
mod workers;

pub use bind::{BindError, Bound};
pub use workers::Workers;
