//! Connections kept for the next request: a worker's, for one alias.
//!
//! An idle HTTP/1.1 connection is owned by the pool; taking it is owning it. An HTTP/2
//! connection is shared: the pool keeps a handle and gives out further ones. Nothing here knows
//! of balancing: the key says exactly who is meant.

mod connection;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, sleep},
};

pub use connection::{Connection, Http1, Http2, Line, SendError};

use crate::{
    config, connect::ConnectError, resolve::TrueName, telemetry::EndpointSeries, tls::Negotiated,
};

/// How often a request that waits for `pool.max_connections` looks for an idle connection that
/// could make way: an HTTP/2 one becomes idle without a word to anyone.
const MAKE_WAY_INTERVAL: Duration = Duration::from_millis(50);

/// How long a connection over `max_idle` is kept all the same. Under a heavy load many are idle for
/// a moment, and are needed in the next: closed at once, they would be a handshake each, which
/// makes the load heavier still. So what is kept is bounded by the requests of the last seconds.
const LULL: Duration = Duration::from_secs(1);

/// Everything that must be equal for a connection to serve a request. Never a hash of it: two
/// identities must not meet by accident.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Who is at the other end.
    pub endpoint: SocketAddr,
    /// The name that its certificate was verified for.
    pub true_name: TrueName,
    /// The application protocol spoken on it.
    pub protocol: Negotiated,
    /// The load of trust settings and client certificate that it was made under.
    pub trust: u64,
}

/// Counts an endpoint's connections over all workers, and bounds them.
#[derive(Debug)]
pub struct EndpointConnections {
    series: Arc<EndpointSeries>,
    /// Requests that wait for `pool.max_connections` to let one in.
    waiting: AtomicUsize,
    limit: Option<Arc<Semaphore>>,
}

impl EndpointConnections {
    /// `max_connections` 0 is no limit.
    pub fn new(series: Arc<EndpointSeries>, max_connections: usize) -> Self {
        let limit = (max_connections > 0).then(|| Arc::new(Semaphore::new(max_connections)));
        Self { series, waiting: AtomicUsize::new(0), limit }
    }

    /// What it counts.
    pub fn series(&self) -> &EndpointSeries {
        &self.series
    }
}

/// One worker's connections for one alias.
#[derive(Debug)]
pub struct Pool {
    /// Whoever asks is one of ours: the keys need no defence against collisions made on purpose.
    slots: Mutex<HashMap<PoolKey, Slot, RandomState>>,
    limits: config::Pool,
    /// This worker's share of `pool.max_idle`.
    max_idle: usize,
    returned: Notify,
    /// Of the requests that wait for a connection, those of this worker.
    waiting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Slot {
    /// A stack: the connection used last is the likeliest to be open still.
    idle: Vec<Idle>,
    shared: Vec<Http2>,
    dialling: Option<watch::Receiver<Option<Arc<ConnectError>>>>,
    /// The peer was offered HTTP/2 and chose HTTP/1.1: nobody waits for a connection to share.
    refuses_http2: bool,
}

#[derive(Debug)]
struct Idle {
    connection: Http1,
    since: Instant,
    until: Instant,
}

/// Who dials the HTTP/2 connection that several requests wait for.
#[derive(Debug)]
pub enum Flight {
    /// The caller, who drops this when done.
    Lead(Lead),
    /// Another: wait for it to end.
    Follow(watch::Receiver<Option<Arc<ConnectError>>>),
}

/// The leader's duty: telling the others, also when it is cancelled.
#[derive(Debug)]
pub struct Lead(watch::Sender<Option<Arc<ConnectError>>>);

impl Lead {
    /// Tells those who wait that the dial failed. Dropping says that they should look again.
    pub fn failed(self, error: &Arc<ConnectError>) {
        self.0.send_replace(Some(error.clone()));
    }
}

impl Pool {
    /// `workers` share `limits.max_idle` among them.
    pub fn new(limits: &config::Pool, workers: usize) -> Self {
        Self {
            slots: Mutex::default(),
            limits: limits.clone(),
            max_idle: if limits.max_idle == 0 {
                0
            } else {
                limits.max_idle.div_ceil(workers.max(1))
            },
            returned: Notify::new(),
            waiting: AtomicUsize::new(0),
        }
    }

    /// A connection that is idle, or has room for one more stream.
    pub fn take(&self, key: &PoolKey, now: Instant) -> Option<Connection> {
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(key)?;
        // The latest first: an older one may be on its way out.
        if let Some(shared) = slot
            .shared
            .iter()
            .rev()
            .filter(|shared| shared.line.expires > now)
            .find_map(Http2::share)
        {
            return Some(Connection::Http2(shared));
        }
        // One that its peer has closed meanwhile is told apart when it is used, before anything is
        // written on it.
        while let Some(idle) = slot.idle.pop() {
            if idle.until > now {
                return Some(Connection::Http1(idle.connection));
            }
        }
        None
    }

    /// Keeps a connection whose response has ended. `keep_alive` is what the origin said of how
    /// long it will keep it.
    pub fn give(&self, key: PoolKey, connection: Http1, keep_alive: Option<Duration>) {
        let now = Instant::now();
        if self.max_idle == 0 || !connection.is_free() {
            return;
        }
        // A second less than the origin's: the two clocks do not start together.
        let idle = keep_alive.map_or(self.limits.idle_timeout, |origin| {
            origin.saturating_sub(Duration::from_secs(1)).min(self.limits.idle_timeout)
        });
        let until = (now + idle).min(connection.line.expires);
        let endpoint = connection.line.endpoint.clone();
        let address = key.endpoint;
        let mut slots = self.slots.lock();
        let slot = slots.entry(key).or_default();
        if until <= now {
            return;
        }
        slot.idle.push(Idle { connection, since: now, until });
        drop(slots);
        // Only now: whoever began to wait before this has not seen the connection, and whoever
        // does after it will.
        let waiting = endpoint.waiting.load(Ordering::SeqCst);
        if waiting > self.waiting.load(Ordering::SeqCst) {
            // Closing one lets in whoever waited longest, on whichever worker.
            self.evict(address);
        } else if waiting > 0 {
            self.returned.notify_waiters();
        }
    }

    /// Keeps a handle on a new HTTP/2 connection for others to share.
    pub fn share(&self, key: PoolKey, connection: &Http2) {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key).or_default();
        slot.shared.push(connection.handle());
        slot.refuses_http2 = false;
    }

    /// Remembers that the peer behind an HTTP/2 key speaks only HTTP/1.1.
    pub fn refuses_http2(&self, key: PoolKey) {
        self.slots.lock().entry(key).or_default().refuses_http2 = true;
    }

    /// Whether the peer behind an HTTP/2 key is known to speak only HTTP/1.1.
    pub fn has_no_http2(&self, key: &PoolKey) -> bool {
        self.slots.lock().get(key).is_some_and(|slot| slot.refuses_http2)
    }

    /// Who dials for `key`, an HTTP/2 one; `None` where everyone dials for himself.
    pub fn flight(&self, key: &PoolKey) -> Option<Flight> {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key.clone()).or_default();
        if slot.refuses_http2 {
            return None;
        }
        match &slot.dialling {
            Some(flight) if flight.has_changed().is_ok() => Some(Flight::Follow(flight.clone())),
            _ => {
                let (lead, flight) = watch::channel(None);
                slot.dialling = Some(flight);
                Some(Flight::Lead(Lead(lead)))
            }
        }
    }

    /// Leave to make one more connection to an endpoint, as `pool.max_connections` has it.
    /// `make_way` is to close an idle one.
    ///
    /// `None` when a connection came back meanwhile: [`take`](Self::take) again.
    pub async fn permit(
        &self,
        endpoint: &EndpointConnections,
        make_way: impl Fn(),
    ) -> Option<Option<OwnedSemaphorePermit>> {
        let Some(limit) = &endpoint.limit else { return Some(None) };
        if let Ok(permit) = limit.clone().try_acquire_owned() {
            return Some(Some(permit));
        }
        let mut returned = pin!(self.returned.notified());
        let _waiting = (Waiting::new(&endpoint.waiting), Waiting::new(&self.waiting));
        // One and the same throughout, which keeps its place in the queue.
        let mut permit = pin!(limit.clone().acquire_owned());
        loop {
            make_way();
            tokio::select! {
                permit = &mut permit => return permit.ok().map(Some),
                () = &mut returned => return None,
                () = sleep(MAKE_WAY_INTERVAL) => {}
            }
        }
    }

    /// Closes one idle connection to `endpoint`, for a request that may make none.
    pub fn evict(&self, endpoint: SocketAddr) -> bool {
        let now = Instant::now();
        let mut slots = self.slots.lock();
        let mut of_endpoint = slots.iter_mut().filter(|(key, _)| key.endpoint == endpoint);
        let evicted = of_endpoint.find_map(|(_, slot)| {
            if let Some(idle) = slot.idle.pop() {
                return Some(Connection::Http1(idle.connection));
            }
            let idle = slot.shared.iter().position(|shared| shared.idle_for(now).is_some())?;
            Some(Connection::Http2(slot.shared.remove(idle)))
        });
        // Closing wakes other tasks: not under the lock.
        drop(slots);
        evicted.is_some()
    }

    /// Closes what is idle too long, too old, too much, of an endpoint that left, or of another
    /// identity.
    pub fn reap(&self, now: Instant, keep: impl Fn(&PoolKey) -> bool) {
        let mut closing = Vec::new();
        let mut slots = self.slots.lock();
        slots.retain(|key, slot| {
            let keep = keep(key);
            let mut kept = 0;
            for index in (0..slot.idle.len()).rev() {
                let idle = &mut slot.idle[index];
                let rests = idle.since + LULL <= now;
                let surplus = kept >= self.max_idle && rests;
                let useless = idle.until <= now || !idle.connection.is_still_free();
                if !keep || surplus || useless {
                    closing.push(Connection::Http1(slot.idle.remove(index).connection));
                } else {
                    kept += 1;
                    if rests {
                        idle.connection.rest();
                    }
                }
            }
            for index in (0..slot.shared.len()).rev() {
                let shared = &slot.shared[index];
                let idle = shared.idle_for(now).is_some_and(|idle| idle > self.limits.idle_timeout);
                if !keep || idle || shared.is_closed() || shared.line.expires <= now {
                    closing.push(Connection::Http2(slot.shared.remove(index)));
                }
            }
            let dialling =
                slot.dialling.as_ref().is_some_and(|flight| flight.has_changed().is_ok());
            let in_use = dialling || !slot.idle.is_empty() || !slot.shared.is_empty();
            keep && (in_use || slot.refuses_http2)
        });
        drop(slots);
        // Closing wakes other tasks: not under the lock.
        drop(closing);
    }

    /// Idle connections now: HTTP/1.1 ones, and HTTP/2 ones without a stream.
    pub fn idle(&self) -> usize {
        let now = Instant::now();
        let slots = self.slots.lock();
        slots
            .values()
            .map(|slot| {
                let shared = slot.shared.iter().filter(|shared| shared.idle_for(now).is_some());
                slot.idle.len() + shared.count()
            })
            .sum()
    }

    /// The endpoints that have connections here.
    pub fn endpoints(&self) -> HashSet<SocketAddr> {
        self.slots.lock().keys().map(|key| key.endpoint).collect()
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
