//! Draining: everything that is being served holds a guard, and the end waits for them.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// How long a new client has to send its first request during a drain: it may be on its way.
const FIRST_WORD: Duration = Duration::from_millis(500);

/// How long the records of what was cut off may take to be written.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// Shared by everything that has to end in an orderly way.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    draining: CancellationToken,
    stopped: CancellationToken,
    served: TaskTracker,
}

impl Drain {
    /// The drain of a part, which may begin before that of the whole.
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

    /// Waits until a connection has to end that has had no request since `since`, when it was ready for one.
    #[allow(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]
    pub fn unused(&self, since: Instant) -> impl Future<Output = ()> + '_ {
        // A block and a box: each connection has room for this as long as it lives.
        async move {
            self.draining.cancelled().await;
            Box::pin(sleep_until(since + FIRST_WORD)).await;
        }
    }

    /// Waits until no guard is held, or `grace` is over; then nothing new is served. Returns how many were left and
    /// are cut off.
    pub async fn finish(&self, grace: Duration) -> usize {
        self.begin();
        self.served.close();
        let _ = timeout(grace, self.served.wait()).await;
        let left = self.alive();
        self.stopped.cancel();
        // Their records are written when the workers drop them.
        let _ = timeout(LAST_RECORDS, self.served.wait()).await;
        left
    }

    /// Cancelled when it is over.
    pub fn stopped(&self) -> CancellationToken {
        self.stopped.clone()
    }
}
