//! Chooses the endpoint for the next request.
//!
//! Pure: the clock and the random source come from the caller. Picking takes no lock.

mod choose;
mod endpoint;
mod ewma;
mod outlier;
#[cfg(test)]
mod tests;

pub use endpoint::{Endpoint, EndpointState, InFlight};

use crate::config;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// The endpoints of one target, with the balancing policy.
#[derive(Debug)]
pub struct Balancer {
    policy: config::Balance,
    /// The number of picks so far, for `round_robin`.
    turn: AtomicUsize,
    set: Arc<Set>,
}

/// The shared state of the endpoints.
#[derive(Debug)]
struct Set {
    health: config::PassiveHealth,
    members: ArcSwap<Vec<Arc<Endpoint>>>,
    /// Endpoints that were removed, for as long as something uses them. The lock also serialises changes of the
    /// membership and ejections.
    retired: Mutex<Vec<Weak<Endpoint>>>,
}

impl Balancer {
    /// An empty set: [`update`](Self::update) fills it.
    pub fn new(policy: config::Balance, health: config::PassiveHealth) -> Balancer {
        let set = Set { health, members: ArcSwap::default(), retired: Mutex::default() };
        Balancer { policy, turn: AtomicUsize::new(0), set: Arc::new(set) }
    }

    /// A balancer with the same endpoints and what is known about them, for another identity at the same addresses
    /// or for other settings. Requests in flight are not carried over.
    pub fn heir(&self, policy: config::Balance, health: config::PassiveHealth) -> Balancer {
        let heir = Balancer::new(policy, health);
        let members = self.set.members.load();
        let inherited = members.iter().map(|endpoint| Arc::new(endpoint.heir(&heir.set)));
        heir.set.members.store(Arc::new(inherited.collect()));
        heir
    }

    /// Whether it has these settings.
    pub fn has_settings(&self, policy: config::Balance, health: &config::PassiveHealth) -> bool {
        self.policy == policy && self.set.health == *health
    }

    /// Forgets TLS failures, because TLS may succeed now.
    pub fn trust_anew(&self) {
        let members = self.set.members.load();
        members.iter().for_each(|endpoint| endpoint.trust_anew());
    }

    /// Sets the addresses. An address that stays keeps its endpoint and what is known about it. The endpoint of a
    /// removed address is marked as retiring, and is not picked again.
    pub fn update(&self, addresses: &[SocketAddr], now: Instant) {
        let mut retired = self.set.retired.lock();
        let before = self.set.members.load_full();
        let seed = mean_latency(&before, now);
        let mut known: HashMap<SocketAddr, Arc<Endpoint>> = retired
            .iter()
            .filter_map(Weak::upgrade)
            .chain(before.iter().cloned())
            .map(|endpoint| (endpoint.address(), endpoint))
            .collect();

        let mut members: Vec<Arc<Endpoint>> = Vec::with_capacity(addresses.len());
        let mut staying = HashSet::with_capacity(addresses.len());
        for &address in addresses {
            if !staying.insert(address) {
                continue;
            }
            let endpoint = known
                .remove(&address)
                .unwrap_or_else(|| Arc::new(Endpoint::new(address, seed, &self.set, now)));
            endpoint.retire(false);
            members.push(endpoint);
        }
        for endpoint in known.values() {
            endpoint.retire(true);
        }
        *retired = known.values().map(Arc::downgrade).collect();
        self.set.members.store(Arc::new(members));
    }

    /// The endpoint for the next request: a usable one that is not in `tried`, or else a usable one, or else (if all
    /// are ejected) any. `None` only for an empty set.
    pub fn pick(
        &self,
        now: Instant,
        rng: &mut fastrand::Rng,
        tried: &[SocketAddr],
    ) -> Option<Arc<Endpoint>> {
        let members = self.set.members.load();
        let usable = |endpoint: &Endpoint| endpoint.is_usable(now);
        let untried = |endpoint: &Endpoint| !tried.contains(&endpoint.address());

        let turn = match self.policy {
            config::Balance::RoundRobin => self.turn.fetch_add(1, Relaxed),
            _ => 0,
        };
        let mut choose = |eligible: &dyn Fn(&Endpoint) -> bool| match self.policy {
            config::Balance::P2c => choose::p2c(&members, eligible, rng, now),
            config::Balance::RoundRobin => choose::round_robin(&members, eligible, turn),
            config::Balance::Random => choose::random(&members, eligible, rng),
            config::Balance::LeastRequest => choose::least_request(&members, eligible, rng),
        };
        choose(&|endpoint| untried(endpoint) && usable(endpoint))
            .or_else(|| choose(&usable))
            .or_else(|| choose(&untried))
            .or_else(|| choose(&|_| true))
            .cloned()
    }

    /// The endpoints that a session for a server with this role should pass over, because others are more likely to
    /// have it. If all have shown another role, only the one that did so the longest ago is left: its role is the
    /// likeliest to have changed.
    pub fn of_other_role(
        &self,
        role: config::Role,
        tried: &[SocketAddr],
        now: Instant,
    ) -> Vec<SocketAddr> {
        let primary = match role {
            config::Role::Any => return Vec::new(),
            config::Role::Primary => true,
            config::Role::Standby => false,
        };
        let members = self.set.members.load();
        let candidate = |endpoint: &&Arc<Endpoint>| {
            endpoint.is_usable(now) && !tried.contains(&endpoint.address())
        };
        // The lower, the better. There is one primary, but there may be several standbys, of which none should be
        // left out because it has not been asked yet.
        let rank = |endpoint: &Arc<Endpoint>| match endpoint.mark() {
            Some((is_primary, _)) if is_primary == primary => (0, None),
            None => (u8::from(primary), None),
            Some((_, shown)) => (2, Some(shown)),
        };
        let best = members.iter().filter(candidate).map(rank).min();
        let lesser = |endpoint: &&Arc<Endpoint>| best.is_some_and(|best| rank(endpoint) > best);
        members.iter().filter(lesser).map(|endpoint| endpoint.address()).collect()
    }

    /// Whether [`pick`](Self::pick) would now find an endpoint that is not in `tried`.
    pub fn has_untried(&self, now: Instant, tried: &[SocketAddr]) -> bool {
        let members = self.set.members.load();
        let none_usable = !members.iter().any(|endpoint| endpoint.is_usable(now));
        members.iter().any(|endpoint| {
            !tried.contains(&endpoint.address()) && (none_usable || endpoint.is_usable(now))
        })
    }

    /// Whether any endpoint works, as far as is known. If none does, it is time for a failover target. Once this is
    /// true again, the target can be tried again.
    pub fn has_healthy(&self, now: Instant) -> bool {
        self.set.members.load().iter().any(|endpoint| endpoint.is_healthy(now))
    }

    /// All endpoints of the set, and those that are retiring and still in use.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let retired = self.set.retired.lock();
        let retiring = retired.iter().filter_map(Weak::upgrade);
        let members = self.set.members.load();
        members
            .iter()
            .cloned()
            .chain(retiring.filter(|endpoint| endpoint.in_flight() > 0))
            .collect()
    }
}

/// The initial latency of a new endpoint. If it started at zero, all workers would choose it at once.
fn mean_latency(members: &[Arc<Endpoint>], now: Instant) -> Option<Duration> {
    let known: Vec<Duration> =
        members.iter().filter_map(|endpoint| endpoint.latency(now)).collect();
    let count = u32::try_from(known.len()).ok().filter(|count| *count > 0)?;
    Some(known.iter().sum::<Duration>() / count)
}
