//! By when a connection must be there.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

/// The one deadline of a connection: set when it is first asked for, and shared by every step to it.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// So long from `now`: `timeouts.connect`.
    pub fn new(now: Instant, limit: Duration) -> Self {
        Self { at: now + limit, limit }
    }

    /// How long that was when it was set, for messages.
    pub fn limit(self) -> Duration {
        self.limit
    }

    /// Awaits `step`, but not past the deadline.
    pub async fn within<F: Future>(self, step: F) -> Option<F::Output> {
        timeout_at(self.at, step).await.ok()
    }
}
