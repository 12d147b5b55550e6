//! One HTTP exchange: a request is rewritten and sent, sent again where that is safe, and its response comes back.

mod attempt;
mod body;
mod deadline;
mod exchange;
pub mod headers;
mod reply;
mod retry;
mod upgrade;
mod urls;
mod view;

pub use body::Body;
pub(super) use body::Origin;
pub use exchange::{Incoming, forward, refuse, serve};
pub use reply::{Problem, RefusedHead};
pub use upgrade::{Upgrade, UpgradeSender, is_extended_connect};
