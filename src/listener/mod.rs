//! Listening sockets, and the distribution of connections to workers.

mod accept;
mod bind;
mod workers;

pub use bind::{BindError, Bound};
pub use workers::Workers;
