//! Which endpoint takes the next request.
//!
//! Pure: the clock and the random source come from the caller. Picking takes no lock.

mod endpoint;

pub use endpoint::{Endpoint, InFlight, State};

use crate::config;
use std::{net::SocketAddr, sync::Arc};
use tokio::time::Instant;

/// The endpoints of one target, and the policy that chooses among them.
pub struct Balancer {}

impl Balancer {
    /// An empty set: [`update`](Self::update) fills it.
    pub fn new(_policy: config::Balance, _health: config::PassiveHealth) -> Balancer {
        todo!()
    }

    /// Makes `addresses` the set. An address that stays keeps its endpoint with all that is known of
    /// it; one that left is marked retiring and is not picked again.
    pub fn update(&self, _addresses: &[SocketAddr], _now: Instant) {
        todo!()
    }

    /// The endpoint for the next request: a usable one that was not `tried` while there is one, else
    /// a usable one, else (all are out) any. `None` only for an empty set.
    pub fn pick(
        &self,
        _now: Instant,
        _rng: &mut fastrand::Rng,
        _tried: &[SocketAddr],
    ) -> Option<Arc<Endpoint>> {
        todo!()
    }

    /// Whether any endpoint works as far as is known. When none does, a failover target is due.
    pub fn has_healthy(&self, _now: Instant) -> bool {
        todo!()
    }

    /// Every endpoint of the set, then those that retire and still carry something.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        todo!()
    }
}
