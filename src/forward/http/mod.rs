//! One HTTP exchange: a request is rewritten and sent, sent again where that is safe, and its response comes back.

mod attempt;
mod body;
mod deadline;
mod exchange;
pub mod headers;
mod origin;
mod reply;
mod request;
mod retry;
mod upgrade;
mod urls;
mod view;

pub use body::Body;
pub use exchange::{ClientSide, Content, Done, Stopped, exchange};
pub(super) use origin::Origin;
pub use reply::{Problem, RefusedHead};
pub use request::{Incoming, forward, refuse, serve};
pub use upgrade::{Switch, is_extended_connect};
