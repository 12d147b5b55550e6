//! The connections that a worker keeps for an alias' next requests.
//!
//! The pool owns idle HTTP/1.1 connections, and a request takes one over. HTTP/2 connections are shared: the
//! pool keeps a handle and hands out others. The pool knows nothing of balancing: the key names one endpoint.

mod client_id;
mod connection;
mod error;
mod flight;
mod http2;
mod info;
mod permit;

use std::{
    collections::{HashMap, HashSet},
    iter,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use tokio::time::Instant;

pub use client_id::ClientId;
pub use connection::{Connection, Http1, SendError};
pub use error::AcquireError;
pub use flight::{Flight, Follow, Lead};
pub use http2::Http2;
pub use info::ConnectionInfo;
pub use permit::{Counted, EndpointConnections, Permit, Room};

use flight::SingleFlight;

use crate::{
    config,
    connect::{AddressPolicy, Destination},
    resolve::TrueName,
    tls::Negotiated,
};

/// How long a connection beyond `max_idle` is kept anyway. Under heavy load many are idle for a moment and needed
/// in the next: closing them at once would cost a handshake each and add to the load. So the number kept is
/// bounded by the requests of the last seconds.
const LULL: Duration = Duration::from_secs(1);

/// Everything that must be equal for a connection to serve a request. Never a hash of it: identities must not
/// collide.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// The name that its certificate was verified for.
    pub true_name: TrueName,
    /// The application protocol spoken on it.
    pub protocol: Negotiated,
    /// Which load of trust settings and client certificate it was made with.
    pub trust: u64,
    /// Where it leads through a proxy, whose address `endpoint` is then.
    pub destination: Option<Arc<Destination>>,
    /// The client that its PROXY header names.
    pub client: Option<ClientId>,
}

impl PoolKey {
    /// Whether a connection may be used that goes there.
    pub fn is_allowed(&self, policy: &AddressPolicy) -> bool {
        let behind = self.destination.as_ref().and_then(|destination| destination.address());
        let mut addresses = iter::once(self.endpoint).chain(behind);
        addresses.all(|address| policy.check(address).is_ok())
    }
}

/// One worker's connections for one alias.
#[derive(Debug)]
pub struct Pool {
    /// The keys are our own, so they need no defence against deliberate collisions.
    slots: Mutex<HashMap<PoolKey, Slot, RandomState>>,
    /// This worker's share of `pool.max_idle`.
    max_idle: AtomicUsize,
    /// `pool.idle_timeout`, in milliseconds.
    idle_timeout: AtomicU64,
    worker: usize,
}

#[derive(Debug, Default)]
struct Slot {
    /// A stack: the connection used last is the most likely to be still open.
    idle: Vec<Idle>,
    shared: Vec<Http2>,
    dialling: SingleFlight,
    /// The peer was offered HTTP/2 and chose HTTP/1.1: there will be no connection to share.
    refuses_http2: bool,
}

#[derive(Debug)]
struct Idle {
    connection: Http1,
    since: Instant,
    until: Instant,
}

impl Pool {
    /// That of `worker`, one of `workers` that share `limits.max_idle` among them.
    pub fn new(limits: &config::Pool, worker: usize, workers: usize) -> Self {
        let pool = Self {
            slots: Mutex::default(),
            max_idle: AtomicUsize::new(0),
            idle_timeout: AtomicU64::new(0),
            worker,
        };
        pool.configure(limits, workers);
        pool
    }

    /// Sets other limits.
    pub fn configure(&self, limits: &config::Pool, workers: usize) {
        self.max_idle.store(limits.max_idle.div_ceil(workers.max(1)), Relaxed);
        let idle_timeout = u64::try_from(limits.idle_timeout.as_millis()).unwrap_or(u64::MAX);
        self.idle_timeout.store(idle_timeout, Relaxed);
    }

    fn max_idle(&self) -> usize {
        self.max_idle.load(Relaxed)
    }

    fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout.load(Relaxed))
    }

    /// A connection that is idle, or has room for one more stream.
    pub fn take(&self, key: &PoolKey, now: Instant) -> Option<Connection> {
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(key)?;
        // The newest first: an older one may be about to close.
        if let Some(shared) = slot
            .shared
            .iter()
            .rev()
            .filter(|shared| shared.info.expires > now)
            .find_map(Http2::share)
        {
            return Some(Connection::Http2(shared));
        }
        // One that its peer has closed in the meantime is noticed when it is used, before anything is written
        // to it.
        while let Some(idle) = slot.idle.pop() {
            if idle.until > now {
                return Some(Connection::Http1(idle.connection));
            }
        }
        None
    }

    /// Keeps a connection whose response has ended. `keep_alive`: how long the origin says that it will keep it.
    pub fn give(&self, key: PoolKey, connection: Http1, keep_alive: Option<Duration>) {
        let now = Instant::now();
        if self.max_idle() == 0 || !connection.is_free() {
            return;
        }
        // A second less than the origin's: the two clocks do not start together.
        let idle_timeout = self.idle_timeout();
        let idle = keep_alive.map_or(idle_timeout, |origin| {
            origin.saturating_sub(Duration::from_secs(1)).min(idle_timeout)
        });
        let until = (now + idle).min(connection.info.expires);
        let endpoint = connection.info.counted.endpoint().clone();
        let address = key.endpoint;
        let mut slots = self.slots.lock();
        let slot = slots.entry(key).or_default();
        if until <= now {
            return;
        }
        slot.idle.push(Idle { connection, since: now, until });
        drop(slots);
        // Only now: requests that began to wait earlier have not seen the connection, and later ones will.
        if endpoint.returned(self.worker) {
            // Closing one lets in the request that has waited longest, on any worker.
            self.evict(address);
        }
    }

    /// Keeps a handle to a new HTTP/2 connection for others to share.
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

    /// Who dials for an HTTP/2 `key`; `None` if each request dials for itself.
    pub fn flight(&self, key: &PoolKey) -> Option<Flight> {
        let mut slots = self.slots.lock();
        let slot = slots.entry(key.clone()).or_default();
        if slot.refuses_http2 {
            return None;
        }
        Some(slot.dialling.join())
    }

    /// Waits until `pool.max_connections` allows one more connection to an endpoint, or `kept` returns one that
    /// has become free. `make_way` closes an idle one.
    pub async fn room<T>(
        &self,
        endpoint: &Arc<EndpointConnections>,
        kept: impl Fn() -> Option<T>,
        make_way: impl Fn(),
    ) -> Room<T> {
        endpoint.room(self.worker, kept, make_way).await
    }

    /// Closes one idle connection to `endpoint`, for a request that is not allowed to make one.
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

    /// Closes connections that are idle too long, too old, too many, to an endpoint that was removed, of
    /// another identity, or of a client that has left.
    pub fn reap(&self, now: Instant, keep: impl Fn(&PoolKey) -> bool) {
        let mut closing = Vec::new();
        let (max_idle, idle_timeout) = (self.max_idle(), self.idle_timeout());
        let mut slots = self.slots.lock();
        slots.retain(|key, slot| {
            let has_left = key.client.as_ref().is_some_and(ClientId::has_left);
            let keep = keep(key) && !has_left;
            let mut kept = 0;
            for index in (0..slot.idle.len()).rev() {
                let idle = &mut slot.idle[index];
                let rests = idle.since + LULL <= now;
                let surplus = kept >= max_idle && rests;
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
                let idle = shared.idle_for(now).is_some_and(|idle| idle > idle_timeout);
                if !keep || idle || shared.is_closed() || shared.info.expires <= now {
                    closing.push(Connection::Http2(slot.shared.remove(index)));
                }
            }
            let in_use =
                slot.dialling.is_under_way() || !slot.idle.is_empty() || !slot.shared.is_empty();
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
