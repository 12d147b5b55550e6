//! One `IP:port`, and what is known about it.

use super::{Set, ewma::PeakEwma, outlier::Outlier};
use std::{
    net::SocketAddr,
    ptr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// The current state of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// It gets requests.
    Active,
    /// It failed too often, or fails its health check: it gets no requests while there is another endpoint.
    Ejected,
    /// It was removed from the target: it gets no new requests, but keeps those in flight.
    Retiring,
}

/// One `IP:port` of a target, shared by all workers.
#[derive(Debug)]
pub struct Endpoint {
    address: SocketAddr,
    /// The start of its clock: the atomics hold milliseconds since then.
    born: Instant,
    in_flight: AtomicU32,
    retiring: AtomicBool,
    latency: PeakEwma,
    outlier: Outlier,
    /// Whether the last failure was of TLS, which may succeed with another identity or other roots.
    distrusted: AtomicBool,
    /// Its role and when it showed it, or 0.
    mark: AtomicU64,
    /// Whether failures can lead to an ejection.
    ejectable: bool,
    /// The set, which knows whether another endpoint could take over.
    set: Weak<Set>,
}

impl Endpoint {
    pub(super) fn new(
        address: SocketAddr,
        latency: Option<Duration>,
        set: &Arc<Set>,
        now: Instant,
    ) -> Endpoint {
        Endpoint {
            address,
            born: now,
            in_flight: AtomicU32::new(0),
            retiring: AtomicBool::new(false),
            latency: PeakEwma::new(latency, 0),
            outlier: Outlier::new(),
            distrusted: AtomicBool::new(false),
            mark: AtomicU64::new(0),
            ejectable: set.health.failures > 0,
            set: Arc::downgrade(set),
        }
    }

    /// The same address in another set, with what is known about it.
    pub(super) fn heir(&self, set: &Arc<Set>) -> Endpoint {
        let trusted = !self.distrusted.load(Relaxed);
        Endpoint {
            address: self.address,
            born: self.born,
            in_flight: AtomicU32::new(0),
            retiring: AtomicBool::new(false),
            latency: self.latency.clone(),
            outlier: if trusted { self.outlier.clone() } else { Outlier::new() },
            distrusted: AtomicBool::new(false),
            mark: AtomicU64::new(self.mark.load(Relaxed)),
            ejectable: set.health.failures > 0,
            set: Arc::downgrade(set),
        }
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Begins a request (or a tunnel). It counts as in flight until the guard is dropped.
    pub fn begin(self: &Arc<Self>, now: Instant) -> InFlight {
        self.in_flight.fetch_add(1, Relaxed);
        InFlight { endpoint: self.clone(), begun: now, responded: false }
    }

    /// Counts a transport failure: refused, reset, timed out, no TLS. Returns for how long the endpoint is ejected, if
    /// this failure ejected it.
    #[must_use = "an ejection is worth a log line"]
    pub fn failed(&self, now: Instant) -> Option<Duration> {
        self.latency.penalise(self.age(now));
        let failures = self.outlier.failed();
        let set = self.set.upgrade()?;
        if !self.ejectable || failures < set.health.failures {
            return None;
        }
        // Serialised, so that two threads do not eject the last two endpoints, each relying on the other one.
        let _changes = set.retired.lock();
        if self.retiring.load(Relaxed) {
            return None;
        }
        let members = set.members.load();
        let another = members.iter().any(|other| !ptr::eq(&**other, self) && other.is_usable(now));
        let ejected = self.outlier.eject(self.age(now), !another, &set.health)?;
        // After the ejection, it returns as an unknown endpoint, not as a known bad one.
        self.latency.forget();
        Some(ejected)
    }

    /// Sets whether the failure was of TLS, because new settings may fix that.
    pub fn distrust(&self, distrusted: bool) {
        self.distrusted.store(distrusted, Relaxed);
    }

    /// Notes which role it has just shown: a primary, or a standby.
    pub fn mark_role(&self, primary: bool, now: Instant) {
        self.mark.store(((self.age(now) + 1) << 1) | u64::from(primary), Relaxed);
    }

    /// Whether it was a primary when it last showed its role, and when that was; `None` while it has shown none.
    pub(super) fn mark(&self) -> Option<(bool, Instant)> {
        let mark = self.mark.load(Relaxed);
        (mark > 0).then(|| (mark & 1 == 1, self.born + Duration::from_millis(mark >> 1)))
    }

    pub(super) fn trust_anew(&self) {
        if self.distrusted.swap(false, Relaxed) {
            self.outlier.succeeded();
        }
    }

    /// The endpoint responded: its failures are forgotten.
    pub fn succeeded(&self) {
        self.outlier.succeeded();
    }

    /// Sets the result of an active health check. A good one also ends an ejection.
    pub fn mark_healthy(&self, healthy: bool) {
        self.outlier.mark_healthy(healthy);
    }

    /// Its state at `now`.
    pub fn state(&self, now: Instant) -> EndpointState {
        if self.retiring.load(Relaxed) {
            EndpointState::Retiring
        } else if self.is_usable(now) {
            EndpointState::Active
        } else {
            EndpointState::Ejected
        }
    }

    /// The number of requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// The estimated latency; `None` while it is not known.
    pub fn latency(&self, now: Instant) -> Option<Duration> {
        self.latency.load(self.age(now)).map(Duration::from_secs_f32)
    }

    /// Transport failures since the last success.
    pub fn consecutive_failures(&self) -> u32 {
        self.outlier.failures()
    }

    /// How long it stays ejected; `None` if it is not ejected.
    pub fn ejected_for(&self, now: Instant) -> Option<Duration> {
        self.outlier.ejected_for(self.age(now))
    }

    pub(super) fn retire(&self, retiring: bool) {
        self.retiring.store(retiring, Relaxed);
    }

    pub(super) fn is_usable(&self, now: Instant) -> bool {
        self.outlier.is_usable(self.age(now))
    }

    pub(super) fn is_healthy(&self, now: Instant) -> bool {
        self.outlier.is_healthy(self.age(now))
    }

    /// The latency for comparisons, in seconds; `None` if it is not known.
    ///
    /// During consecutive failures that may lead to an ejection, it counts as unknown: the next requests will show
    /// whether the endpoint works. With the penalty, the endpoint would not be picked, and would be neither ejected nor
    /// cleared.
    pub(super) fn comparable_latency(&self, now: Instant) -> Option<f32> {
        if self.ejectable && self.outlier.failures() > 0 {
            return None;
        }
        self.latency.load(self.age(now))
    }

    fn age(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.born).as_millis();
        u64::try_from(age).unwrap_or(u64::MAX)
    }
}

/// A request in flight, until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    endpoint: Arc<Endpoint>,
    begun: Instant,
    responded: bool,
}

impl InFlight {
    /// The endpoint that serves it.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The response's head arrived. Measures the latency and returns it. Only the first call is counted.
    pub fn responded(&mut self, now: Instant) -> Duration {
        let latency = now.saturating_duration_since(self.begun);
        if !std::mem::replace(&mut self.responded, true) {
            self.endpoint.latency.observe(latency, self.endpoint.age(now));
        }
        latency
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Relaxed);
    }
}
