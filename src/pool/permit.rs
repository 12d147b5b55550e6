//! `pool.max_connections`: who may make one more connection to an endpoint, and who waits for it.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit},
    time::sleep,
};

use crate::{limit::Limit, telemetry::EndpointSeries};

/// How often a request that waits looks for a connection that is idle and could make way, or that has
/// room for one more stream: an HTTP/2 one becomes either without a word to anyone.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Counts an endpoint's connections over all workers, and bounds them.
#[derive(Debug)]
pub struct EndpointConnections {
    series: Arc<EndpointSeries>,
    /// Requests that wait for `pool.max_connections` to let one in.
    waiting: AtomicUsize,
    limit: Limit,
}

/// Leave to make one more connection to an endpoint.
#[derive(Debug)]
pub struct Permit {
    endpoint: Arc<EndpointConnections>,
    _held: Option<OwnedSemaphorePermit>,
}

/// An open connection: counted, and holding its permit, until this is dropped.
#[derive(Debug)]
pub struct Counted(Permit);

/// What a request that needs a connection has found.
#[derive(Debug)]
pub enum Room<T> {
    /// It may make one.
    Free(Permit),
    /// One that was there has become free.
    Kept(T),
}

/// The requests of one worker that wait for a connection.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// A connection came back.
    returned: Notify,
    waiting: AtomicUsize,
}

impl EndpointConnections {
    /// `max_connections` 0 is no limit.
    pub fn new(series: Arc<EndpointSeries>, max_connections: usize) -> Self {
        Self { series, waiting: AtomicUsize::new(0), limit: Limit::new(max_connections) }
    }

    /// Sets another limit. Must run inside of a runtime.
    pub fn resize(&self, max_connections: usize) {
        self.limit.resize(max_connections);
    }

    /// What it counts.
    pub fn series(&self) -> &EndpointSeries {
        &self.series
    }
}

impl Permit {
    /// Counts the connection that was made with it.
    pub fn opened(self) -> Counted {
        self.endpoint.series.opened();
        Counted(self)
    }
}

impl Counted {
    /// The endpoint at its other end.
    pub fn endpoint(&self) -> &Arc<EndpointConnections> {
        &self.0.endpoint
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.endpoint.series.closed();
    }
}

impl Queue {
    /// Waits until one more connection to `endpoint` may be made, or until `kept` gives one that is there.
    /// `make_way` is to close an idle one.
    pub(super) async fn room<T>(
        &self,
        endpoint: &Arc<EndpointConnections>,
        kept: impl Fn() -> Option<T>,
        make_way: impl Fn(),
    ) -> Room<T> {
        let free = |held| Room::Free(Permit { endpoint: endpoint.clone(), _held: held });
        let Some(limit) = endpoint.limit.permits() else { return free(None) };
        if let Ok(permit) = limit.clone().try_acquire_owned() {
            return free(Some(permit));
        }
        let mut returned = pin!(self.returned.notified());
        let _waiting = (Waiting::new(&endpoint.waiting), Waiting::new(&self.waiting));
        // One and the same throughout, which keeps its place in the queue.
        let mut permit = pin!(limit.clone().acquire_owned());
        loop {
            make_way();
            tokio::select! {
                permit = &mut permit => return free(permit.ok()),
                () = &mut returned => returned.set(self.returned.notified()),
                () = sleep(LOOK_INTERVAL) => {}
            }
            if let Some(kept) = kept() {
                return Room::Kept(kept);
            }
            // A reload may have taken the limit away.
            if endpoint.limit.permits().is_none() {
                return free(None);
            }
        }
    }

    /// Says that a connection to `endpoint` came back. Returns whether one must be closed instead, as those
    /// who wait for it are on other workers.
    pub(super) fn returned(&self, endpoint: &EndpointConnections) -> bool {
        let waiting = endpoint.waiting.load(Ordering::SeqCst);
        if waiting > self.waiting.load(Ordering::SeqCst) {
            return true;
        }
        if waiting > 0 {
            self.returned.notify_waiters();
        }
        false
    }
}

/// Counts a waiter until it has what it waits for, or gives up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
