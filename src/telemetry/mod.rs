//! What a running proxy tells: metrics, logs and the access log.

mod access;
mod log;
mod metrics;
mod process;
mod stderr;

pub use access::Access;
pub use log::{init as init_log, set_level as set_log_level};
pub use metrics::{AliasMetrics, DownstreamConnection, Metrics};
pub use stderr::{flush, say};
