//! One `IP:port`, and what is known of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::time::Instant;

/// What an endpoint is good for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Takes requests.
    Active,
    /// Failed too often, or fails its health check: takes none while another can.
    Ejected,
    /// Left the target: takes no new requests, keeps those that it has.
    Retiring,
}

/// One `IP:port` of a target, shared by all workers.
pub struct Endpoint {
    address: SocketAddr,
}

impl Endpoint {
    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A request (or a tunnel) begins; it counts as in flight until the guard drops.
    pub fn begin(self: &Arc<Self>, _now: Instant) -> InFlight {
        todo!()
    }

    /// A transport failure: refused, reset, timed out, no TLS. Returns for how long the endpoint was
    /// ejected if this failure ejected it.
    #[must_use = "an ejection is worth a log line"]
    pub fn failed(&self, _now: Instant) -> Option<Duration> {
        todo!()
    }

    /// The endpoint answered: its failures are forgotten.
    pub fn succeeded(&self) {
        todo!()
    }

    /// The verdict of an active health check.
    pub fn mark_healthy(&self, _healthy: bool) {
        todo!()
    }

    /// What it is good for at `now`.
    pub fn state(&self, _now: Instant) -> State {
        todo!()
    }

    /// Requests that have begun and not ended.
    pub fn in_flight(&self) -> u32 {
        todo!()
    }

    /// The latency it is reckoned to have; `None` while it is not known.
    pub fn latency(&self, _now: Instant) -> Option<Duration> {
        todo!()
    }

    /// Transport failures since the last success.
    pub fn consecutive_failures(&self) -> u32 {
        todo!()
    }

    /// How long it stays ejected; `None` when it is not.
    pub fn ejected_for(&self, _now: Instant) -> Option<Duration> {
        todo!()
    }
}

/// A request on its way. Dropping it, whatever the reason, ends the count.
pub struct InFlight {
    endpoint: Arc<Endpoint>,
}

impl InFlight {
    /// The endpoint that serves it.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The response's head arrived: this is the latency to learn from. Only the first call counts.
    pub fn answered(&mut self, _now: Instant) {
        todo!()
    }
}
