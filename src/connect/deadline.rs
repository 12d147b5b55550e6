//! The deadline of a connection.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

/// The deadline of a connection: set when it is first needed, and shared by every step.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// This long (`timeouts.connect`) from `now`.
    pub fn new(now: Instant, limit: Duration) -> Self {
        Self { at: now + limit, limit }
    }

    /// The whole time, for messages.
    pub fn limit(self) -> Duration {
        self.limit
    }

    /// Whether it has passed.
    pub fn is_over(self) -> bool {
        Instant::now() >= self.at
    }

    /// Awaits `step`, but not past the deadline.
    pub async fn within<F: Future>(self, step: F) -> Option<F::Output> {
        timeout_at(self.at, step).await.ok()
    }
}
