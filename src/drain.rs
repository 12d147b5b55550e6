//! Draining: every connection and tunnel holds a guard, and the shutdown waits for the guards.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// How long a new client has to send its first request during a drain.
const FIRST_WORD: Duration = Duration::from_millis(500);

/// How long to wait until the access log has the connections that were cut off.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// Shared by everything that must end gracefully.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    draining: CancellationToken,
    stopped: CancellationToken,
    served: TaskTracker,
}

impl Drain {
    /// The drain of a part, which may begin before the drain of the whole.
    pub fn of_part(&self) -> Self {
        let draining = self.draining.child_token();
        Self { draining, stopped: self.stopped.clone(), served: self.served.clone() }
    }

    /// Held as long as a connection or a tunnel exists.
    pub fn guard(&self) -> TaskTrackerToken {
        self.served.token()
    }

    /// Connections and tunnels alive.
    pub fn alive(&self) -> usize {
        self.served.len()
    }

    /// Begins the drain. New connections are still served, for one request each: in a pod, the application's last
    /// calls come after the signal.
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

    /// Waits until an idle connection must end, which has been ready for a request since `since`.
    #[allow(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]
    pub fn unused(&self, since: Instant) -> impl Future<Output = ()> + '_ {
        // A block and a box, because each connection reserves memory for this future.
        async move {
            self.draining.cancelled().await;
            Box::pin(sleep_until(since + FIRST_WORD)).await;
        }
    }

    /// Waits until no guard is held, or until `grace` is over. Then nothing new is served. Returns how many guards are
    /// left; their connections are cut off.
    pub async fn finish(&self, grace: Duration) -> usize {
        self.begin();
        self.served.close();
        let _ = timeout(grace, self.served.wait()).await;
        let left = self.alive();
        self.stopped.cancel();
        // They are written to the access log when the workers drop them.
        let _ = timeout(LAST_RECORDS, self.served.wait()).await;
        left
    }

    /// Cancelled when the drain is over.
    pub fn stopped(&self) -> CancellationToken {
        self.stopped.clone()
    }
}
