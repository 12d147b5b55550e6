//! Metrics, logs and the access log of a running proxy.

mod access;
mod failures;
mod families;
mod histogram;
mod log;
mod metrics;
mod process;
mod series;
mod stderr;

pub use access::{Access, ConnectionAccess};
pub use failures::{Failures, NoAliasFailure, RequestFailure};
pub use families::{Family, Lines, SERIES};
pub use log::{init as init_log, is_coloured, set_level as set_log_level};
pub use metrics::Metrics;
pub use series::{
    AliasMetrics, AliasSeries, DownstreamConnection, EndpointSeries, RequestTotals, RetryReason,
};
pub use stderr::{flush, say};
