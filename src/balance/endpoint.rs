//! One `IP:port`, and what is known of it.

use super::{Set, ewma::PeakEwma, outlier::Outlier};
use std::{
    net::SocketAddr,
    ptr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// What an endpoint is good for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// Takes requests.
    Active,
    /// Failed too often, or fails its health check: takes none while another can.
    Ejected,
    /// Left the target: takes no new requests, keeps those that it has.
    Retiring,
}

/// One `IP:port` of a target, shared by all workers.
#[derive(Debug)]
pub struct Endpoint {
    address: SocketAddr,
    /// Where its clock starts: the atomics hold milliseconds, not instants.
    born: Instant,
    in_flight: AtomicU32,
    retiring: AtomicBool,
    latency: PeakEwma,
    outlier: Outlier,
    /// Whether TLS was the last failure: a matter of identity and trust, which may change.
    distrusted: AtomicBool,
    /// Whether failures lead to an ejection at all.
    ejectable: bool,
    /// Whom to ask whether another endpoint could take over.
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
            ejectable: set.health.failures > 0,
            set: Arc::downgrade(set),
        }
    }

    /// The same address in another set, with what is known of it here.
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
            ejectable: set.health.failures > 0,
            set: Arc::downgrade(set),
        }
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A request (or a tunnel) begins; it counts as in flight until the guard drops.
    pub fn begin(self: &Arc<Self>, now: Instant) -> InFlight {
        self.in_flight.fetch_add(1, Relaxed);
        InFlight { endpoint: self.clone(), begun: now, responded: false }
    }

    /// A transport failure: refused, reset, timed out, no TLS. Returns for how long the endpoint was
    /// ejected if this failure ejected it.
    #[must_use = "an ejection is worth a log line"]
    pub fn failed(&self, now: Instant) -> Option<Duration> {
        self.latency.penalise(self.age(now));
        let failures = self.outlier.failed();
        let set = self.set.upgrade()?;
        if !self.ejectable || failures < set.health.failures {
            return None;
        }
        // Serialised, lest two threads eject the last two endpoints, each counting on the other.
        let _changes = set.retired.lock();
        if self.retiring.load(Relaxed) {
            return None;
        }
        let members = set.members.load();
        let another = members.iter().any(|other| !ptr::eq(&**other, self) && other.is_usable(now));
        let ejected = self.outlier.eject(self.age(now), !another, &set.health)?;
        // Its time out is the whole sentence: it returns as an unknown, not as a known bad one.
        self.latency.forget();
        Some(ejected)
    }

    /// Says whether TLS was what failed: new settings may be about just that.
    pub fn distrust(&self, distrusted: bool) {
        self.distrusted.store(distrusted, Relaxed);
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

    /// The verdict of an active health check; a good one also ends an ejection.
    pub fn mark_healthy(&self, healthy: bool) {
        self.outlier.mark_healthy(healthy);
    }

    /// What it is good for at `now`.
    pub fn state(&self, now: Instant) -> EndpointState {
        if self.retiring.load(Relaxed) {
            EndpointState::Retiring
        } else if self.is_usable(now) {
            EndpointState::Active
        } else {
            EndpointState::Ejected
        }
    }

    /// Requests that have begun and not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// The latency it is reckoned to have; `None` while it is not known.
    pub fn latency(&self, now: Instant) -> Option<Duration> {
        self.latency.load(self.age(now)).map(Duration::from_secs_f32)
    }

    /// Transport failures since the last success.
    pub fn consecutive_failures(&self) -> u32 {
        self.outlier.failures()
    }

    /// How long it stays ejected; `None` when it is not.
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

    /// The latency to compare by, in seconds; `None` where it cannot be told.
    ///
    /// While failures run and may end in an ejection, it cannot: the next request or two shall bring
    /// the verdict. Were the penalty heeded now, nobody would pick the endpoint, and it would be
    /// neither ejected nor cleared.
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

/// A request on its way. Dropping it, whatever the reason, ends the count.
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

    /// The response's head arrived: this is the latency to learn from, and is returned. Only the
    /// first call counts.
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
