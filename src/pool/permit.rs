//! `pool.max_connections`: which requests may make one more connection to an endpoint, and which wait.

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

/// How often a request that waits looks again without having been woken: a stream that ends wakes one
/// request, and that may be one that needs a connection of HTTP/1.1.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Counts an endpoint's connections over all workers, and bounds them.
#[derive(Debug)]
pub struct EndpointConnections {
    series: Arc<EndpointSeries>,
    limit: Limit,
    /// Those who wait for `pool.max_connections` to let them in, by worker.
    waiting: Box<[Waiting]>,
}

/// The requests of one worker that wait for a connection to an endpoint.
#[derive(Debug, Default)]
struct Waiting {
    count: AtomicUsize,
    /// A connection came back, or has room for a stream.
    freed: Notify,
}

/// A permit to make one more connection to an endpoint.
#[derive(Debug)]
pub struct Permit {
    endpoint: Arc<EndpointConnections>,
    worker: usize,
    _held: Option<OwnedSemaphorePermit>,
}

/// An open connection: counted, and holding its permit, until this is dropped.
#[derive(Debug)]
pub struct Counted(Permit);

/// How a request gets a connection.
#[derive(Debug)]
pub enum Room<T> {
    /// It may make a new one.
    Free(Permit),
    /// An existing one has become free.
    Kept(T),
}

impl EndpointConnections {
    /// `max_connections` 0 is no limit.
    pub fn new(series: Arc<EndpointSeries>, max_connections: usize, workers: usize) -> Self {
        let waiting = (0..workers).map(|_| Waiting::default()).collect();
        Self { series, limit: Limit::new(max_connections), waiting }
    }

    /// A permit beyond any limit, for what concerns a connection that has its own.
    pub fn beyond_limit(self: &Arc<Self>, worker: usize) -> Permit {
        Permit { endpoint: self.clone(), worker, _held: None }
    }

    /// Sets another limit. Must run inside of a runtime.
    pub fn resize(&self, max_connections: usize) {
        self.limit.resize(max_connections);
        // There may be none any more.
        self.waiting.iter().for_each(|waiting| waiting.freed.notify_waiters());
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

    /// Says that this connection, of HTTP/2, may have room for one more stream; `is_idle`: it has none.
    pub(super) fn has_room(&self, is_idle: bool) {
        self.0.endpoint.has_room(self.0.worker, is_idle);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.endpoint.series.closed();
    }
}

impl EndpointConnections {
    /// Waits until `worker` may make one more connection, or until `kept` gives one that is there. `make_way`
    /// is to close an idle one.
    pub(super) async fn room<T>(
        self: &Arc<Self>,
        worker: usize,
        kept: impl Fn() -> Option<T>,
        make_way: impl Fn(),
    ) -> Room<T> {
        let free = |held| Room::Free(Permit { endpoint: self.clone(), worker, _held: held });
        let Some(limit) = self.limit.permits() else { return free(None) };
        if let Ok(permit) = limit.clone().try_acquire_owned() {
            return free(Some(permit));
        }
        let waiting = &self.waiting[worker];
        let _counted = CountedIn::new(&waiting.count);
        let mut freed = pin!(waiting.freed.notified());
        // The same future throughout, so that it keeps its place in the queue.
        let mut permit = pin!(limit.clone().acquire_owned());
        loop {
            make_way();
            tokio::select! {
                permit = &mut permit => return free(permit.ok()),
                () = &mut freed => freed.set(waiting.freed.notified()),
                () = sleep(LOOK_INTERVAL) => {}
            }
            if let Some(kept) = kept() {
                return Room::Kept(kept);
            }
            // A reload may have removed the limit.
            if self.limit.permits().is_none() {
                return free(None);
            }
        }
    }

    /// Says that a connection of `worker` came back. Returns whether it must be closed instead, as those who
    /// wait for it are on other workers.
    pub(super) fn returned(&self, worker: usize) -> bool {
        let elsewhere = |(other, waiting): (usize, &Waiting)| other != worker && waiting.is_any();
        let is_for_others = self.waiting.iter().enumerate().any(elsewhere);
        if !is_for_others {
            self.wake(worker);
        }
        is_for_others
    }

    /// Says that an HTTP/2 connection of `worker` may have room for one more stream; `is_idle`: it has none.
    pub(super) fn has_room(&self, worker: usize, is_idle: bool) {
        if !self.wake(worker) && is_idle {
            // A request that waits on another worker may close it and get its permit.
            let _ = (0..self.waiting.len()).any(|worker| self.wake(worker));
        }
    }

    /// Wakes one of a worker's requests that wait, if there is one.
    fn wake(&self, worker: usize) -> bool {
        let waiting = &self.waiting[worker];
        let is_any = waiting.is_any();
        if is_any {
            waiting.freed.notify_one();
        }
        is_any
    }
}

impl Waiting {
    fn is_any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }
}

/// Counts a waiter until it has what it waits for, or gives up.
struct CountedIn<'a>(&'a AtomicUsize);

impl<'a> CountedIn<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for CountedIn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicBool,
        task::{Context, Poll, Wake, Waker},
    };

    use super::*;

    /// A request that waits, and whether it was woken.
    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    impl Woken {
        fn take(&self) -> bool {
            self.0.swap(false, Ordering::SeqCst)
        }
    }

    #[tokio::test]
    async fn a_stream_that_ends_wakes_one_who_waits_on_its_worker_and_an_idle_connection_one_elsewhere()
     {
        let endpoint = Arc::new(EndpointConnections::new(Arc::default(), 1, 2));
        let streams = AtomicUsize::new(0);
        let kept = || (streams.swap(0, Ordering::SeqCst) > 0).then_some(());
        let Room::Free(permit) = endpoint.room(0, kept, || {}).await else {
            panic!("a connection")
        };
        let connection = permit.opened();
        let woken: [Arc<Woken>; 3] = Default::default();
        let [first, second, third] = woken.clone().map(Waker::from);
        let mut waiting = Box::pin(endpoint.room(0, kept, || {}));
        let mut behind = Box::pin(endpoint.room(0, kept, || {}));
        let mut elsewhere = Box::pin(endpoint.room(1, kept, || {}));
        assert!(waiting.as_mut().poll(&mut Context::from_waker(&first)).is_pending());
        assert!(behind.as_mut().poll(&mut Context::from_waker(&second)).is_pending());
        assert!(elsewhere.as_mut().poll(&mut Context::from_waker(&third)).is_pending());
        let take = || woken.clone().map(|woken| woken.take());

        connection.has_room(false);
        assert_eq!(take(), [true, false, false]);
        streams.store(1, Ordering::SeqCst);
        let room = waiting.as_mut().poll(&mut Context::from_waker(&first));
        assert!(matches!(room, Poll::Ready(Room::Kept(()))));
        drop(waiting);
        connection.has_room(true);
        assert_eq!(take(), [false, true, false]);
        drop(behind);
        connection.has_room(false);
        assert_eq!(take(), [false; 3], "it is of no use on another worker");
        connection.has_room(true);
        assert_eq!(take(), [false, false, true]);
    }
}
