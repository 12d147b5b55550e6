//! How a running proxy comes to its end: whoever serves something holds a guard.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// Shared by everything that has to end in order.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    draining: CancellationToken,
    stopped: CancellationToken,
    served: TaskTracker,
}

impl Drain {
    /// Held for as long as a connection or a tunnel lives.
    pub fn guard(&self) -> TaskTrackerToken {
        self.served.token()
    }

    /// Connections and tunnels alive.
    pub fn alive(&self) -> usize {
        self.served.len()
    }

    /// Asks everyone to finish what they do. New connections are still served, each for one
    /// request: in a pod, the application's last calls come after the signal.
    pub fn begin(&self) {
        self.draining.cancel();
    }

    /// Whether [`begin`](Self::begin) was called.
    pub fn has_begun(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Waits for [`begin`](Self::begin).
    pub async fn begun(&self) {
        self.draining.cancelled().await;
    }

    /// Waits until nobody holds a guard, or `grace` is over; then nothing new is served.
    /// Returns how many were left, and are cut off.
    pub async fn finish(&self, grace: Duration) -> usize {
        self.begin();
        self.served.close();
        let _ = timeout(grace, self.served.wait()).await;
        let left = self.alive();
        self.stopped.cancel();
        left
    }

    /// Cancelled when it is over.
    pub fn stopped(&self) -> CancellationToken {
        self.stopped.clone()
    }
}
