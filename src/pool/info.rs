//! What all requests on one connection share.

use std::sync::Arc;

use tokio::time::Instant;

use super::Counted;
use crate::connect::{Facts, Wire};

/// What all requests on one connection share; alive until its socket closes.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// The socket, for finding out what became of lost requests.
    pub wire: Arc<Wire>,
    /// How the connection was made.
    pub facts: Facts,
    /// When it has to be replaced (`pool.max_lifetime`, less some jitter).
    pub expires: Instant,
    pub(super) counted: Counted,
}
